"""Compiling for this machine: the compiler, its flags, and what it has compiled already."""

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.metal.swizzles import swizzles_header

HERE = Path(__file__).parent
NO_COMPILER = "NO KERNEL IS TESTED: install clang 17 or later, or `pip install ziglang`"
NOT_LINUX = "NO KERNEL IS TESTED: their execution on a CPU is for Linux"

_COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fno-sanitize=all",  # zig adds some
    "-fno-exceptions",
    "-fno-rtti",
    "-nostdinc++",
    "-fdeclspec",
    "-fno-strict-aliasing",
    "-fno-delete-null-pointer-checks",
    "-fno-finite-loops",
    "-ferror-limit=10",
    "-fstack-clash-protection",  # a frame larger than the page behind a stack touches that page
]
# One rounding for each operation, as the kernel's text has it.
_ARITHMETIC = [
    "-ffp-contract=off",
    "-fno-math-errno",
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
]
_CHECKED = [
    "-w",
    "-O1",
    "-DCHECKED",
    "-gdwarf-4",
    "-gline-tables-only",
    "-fno-builtin-memcpy",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-ftrivial-auto-var-init=pattern",  # a thread's own variables start as NaN
    # Not the driver's options: zig's turns off some of these where there are others.
    *("-Xclang", "-fsanitize=thread,array-bounds,alignment,integer-divide-by-zero"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
]
_FAST = ["-w", "-O2"]
_SPACES = [
    "-DSPACES",
    "-S",
    "-emit-llvm",
    "-O0",
    "-gline-tables-only",
    "-fno-caret-diagnostics",
    "-Wimplicit-float-conversion",
]


class CompileError(Exception):
    """The compiler refuses a text."""


def missing() -> str | None:
    """Return why no kernel can be executed here, if so."""
    if sys.platform != "linux":
        return NOT_LINUX
    return None if find_compiler() else NO_COMPILER


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """Return the command of a clang that has bfloat arithmetic, if there is one."""
    for name in ("clang++", *(f"clang++-{version}" for version in range(25, 16, -1))):
        if shutil.which(name) and _clang_version((name,)) >= 17:
            return (name,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def _clang_version(command: tuple[str, ...]) -> int:
    found = subprocess.run([*command, "-dumpversion"], capture_output=True, text=True)
    return int(found.stdout.split(".")[0] or 0)


@functools.cache
def _compiler() -> tuple[str, ...]:
    command = find_compiler()
    if command is None:
        raise RuntimeError(NO_COMPILER)
    return command


@functools.cache
def _identity() -> str:
    """The compiler and its version."""
    command = [*_compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _machine() -> list[str]:
    if platform.machine() != "x86_64":
        return []
    # For the instructions fma and f16c; zig spells it its own way.
    return ["-mcpu=x86_64_v3"] if "ziglang" in _compiler() else ["-march=x86-64-v3"]


def cache_folder() -> Path:
    """Return the folder of what has been compiled, of all versions."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(user) / "mlx-gemma-mtp" / "metal"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(parts: Iterable[str]) -> str:
    """Return a name for what the parts determine."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() + b"\0")
    return whole.hexdigest()[:32]


@functools.cache
def shim() -> tuple[Path, str]:
    """Return the folder of the complete shim, and its digest."""
    texts = {path.name: path.read_text() for path in sorted((HERE / "shim").iterdir())}
    texts["swizzles.h"] = swizzles_header()
    name = digest([*texts, *texts.values()])
    folder = cache_folder() / f"shim-{name}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as parent:
            new = Path(parent) / "shim"
            new.mkdir()
            for file, text in texts.items():
                (new / file).write_text(text)
            try:
                new.rename(folder)
            except OSError:  # another process was first
                assert folder.exists()
    return folder, name


def compile_kernel(source: str, *, checked: bool) -> Path:
    """Return a library of a translation unit."""
    folder, version = shim()
    flags = [*_COMMON, *_ARITHMETIC, *_machine(), *(_CHECKED if checked else _FAST)]
    library = cache_folder() / (digest([source, *flags, _identity(), version]) + ".so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as parent:
            text, unit, new = (Path(parent) / f"kernel.{end}" for end in ("cpp", "o", "so"))
            text.write_text(source)
            flags += ["-fvisibility=hidden", "-I", str(folder)]
            _run([*_compiler(), *flags, "-c", str(text), "-o", str(unit)])
            # Apart from compiling: with -fsanitize a compiler would link its own runtime.
            _run([*_compiler(), "-shared", "-nostdlib", "-o", str(new), str(unit)])
            new.rename(library)
    return library


def compile_runtime() -> Path:
    """Return the library of runtime/."""
    files = sorted((HERE / "runtime").iterdir())
    texts = [path.read_text() for path in (*files, HERE / "shim" / "abi.h")]
    flags = [*_COMMON, *_machine(), "-O2"]
    library = cache_folder() / f"runtime-{digest([*texts, *flags, _identity()])}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as parent:
            new = Path(parent) / "runtime.so"
            sources = [str(path) for path in files if path.suffix == ".cpp"]
            _run([*_compiler(), *flags, "-shared", "-nostdlib", "-o", str(new), *sources])
            new.rename(library)
    return library


def compile_spaces(source: str) -> tuple[str, str]:
    """Return what the compiler says of a translation unit with address spaces, and the
    intermediate code that it makes of it, if it does."""
    folder, _ = shim()
    with tempfile.TemporaryDirectory(dir=cache_folder()) as parent:
        text, code = Path(parent) / "kernel.cpp", Path(parent) / "kernel.ll"
        text.write_text(source)
        flags = [*_COMMON, *_ARITHMETIC, *_machine(), *_SPACES, "-I", str(folder)]
        command = [*_compiler(), *flags, str(text), "-o", str(code)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr, code.read_text() if code.exists() else ""


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
