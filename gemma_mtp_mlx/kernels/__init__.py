"""Metal kernels for verifying drafts, each beside the plain MLX operations that define it.

One operation is one stem: `<op>.metal`, the functions; `<op>.py` with `<op>` (what callers use),
`<op>_reference` (the definition, and what a CPU runs) and `<op>_metal` (the launch). README.md
lists them.
"""
