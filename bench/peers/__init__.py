"""The contenders of `bench.compare`, one process each, and what is made of their runs.

contenders.py   how a contender is named, the record of a run, the same clock for all
ours.py, lm.py, vlm.py, hf.py   one adapter each: this project, mlx_lm, mlx_vlm, transformers
layout.py       the same weights in the only layout that mlx_vlm drafts with
worker.py       the process: loads once, then answers one turn at a time
turns.py        the other end of it: starts workers, takes turns
prompts.py      prompts by category, as token ids
figures.py      medians, spreads, ratios, tables
plots.py        the same as PNG
"""
