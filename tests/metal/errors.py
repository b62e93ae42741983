"""What goes wrong in a kernel."""

# In the order of ErrorKind in runtime/launch.h.
KINDS = (
    "no error",
    "out-of-bounds read",
    "out-of-bounds write",
    "uninitialised read",
    "write to input",
    "race",
    "SIMD divergence",
    "barrier divergence",
    "threadgroup memory",
    "misaligned access",
    "index out of bounds",
    "bad lane",
    "division by zero",
    "bad address",
    "timeout",
)


class MetalError(Exception):
    """A kernel does what Metal does not allow, or leaves undefined."""

    def __init__(self, kernel: str, kind: str, message: str, places: list[str]) -> None:
        """kind: of KINDS, or "compile", "address space", "not Metal", "unwritten output",
        "threads"; places: lines of the text, the offending one first."""
        self.kernel, self.kind, self.places = kernel, kind, places
        super().__init__("\n".join([f"kernel {kernel}: {kind}: {message}", *places]))
