"""The shape of the package: imports point down, files stay small, the hot path never waits."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "gemma_mtp_mlx"
MOST_LINES = 400

# From the top. A module imports from levels below its own, never from beside it. A new module is
# entered here, so where it belongs is a decision.
LEVELS = [
    {"__main__"},
    {"cli"},
    {"cli_convert", "cli_inspect", "cli_models", "cli_serve"},
    {"options", "inspect_report", "progress"},
    {"inspection", "verification"},
    {"report"},
    {"batch"},
    {"lines", "convert", "serve"},
    {"__init__"},
    {"api", "async_session"},
    {"session", "hub_cache"},
    {"engine", "prompts", "hub", "remote"},
    {"seating", "host", "probe", "download", "pairing", "upload", "footprint"},
    {"round", "prefix", "memory", "prompt_cache", "hub_errors"},
    {"target", "drafter"},
    {"depth"},
    {"layers", "acceptance", "weights", "costs", "grid"},
    {"readers"},
    {"cache", "kernels"},
    {"attention", "request", "tensor_names"},
    {"sections"},
    {"constraint", "penalties", "outcome"},
    {"config", "sampling", "tokens", "checkpoint", "device", "segments", "catalogue"},
    {"fields"},
]
# Where the names that the package itself offers are defined.
HOMES = {"SamplingParams": "sampling", "Stats": "request", "__version__": None}

HOT_PATH = [
    "attention",
    "cache",
    "readers",
    "layers",
    "target",
    "drafter",
    "acceptance",
    "penalties",
    "outcome",
    "round",
    "prefix",
    "seating",
    "engine",
]
WAITS = {"item", "tolist", "eval", "synchronize", "asarray", "save", "savez"}
CONVERSIONS = {"bool", "int", "float", "memoryview"}
# The one wait of a round, one per prompt chunk, the reservation of the cache and copies of prompts.
# What is read, and digested, is on the host.
ALLOWED = {
    ("engine", "Engine._read", "array"),
    ("engine", "Engine._prefill_chunk", "eval"),
    ("cache", "Cache.__init__", "eval"),
    ("cache", "Cache._copy", "eval"),
    ("outcome", "unpack", "tolist"),
    ("prefix", "digests", "array"),
}


def _sources() -> dict[str, Path]:
    """Return every module's file, by its name in the package: cli, kernels.route, ..."""
    own = {path.stem: path for path in (ROOT / PACKAGE).glob("*.py")}
    convert = {f"convert.{path.stem}": path for path in (ROOT / "convert").glob("*.py")}
    kernels = {f"kernels.{path.stem}": path for path in (ROOT / PACKAGE / "kernels").glob("*.py")}
    serve = {f"serve.{path.stem}": path for path in (ROOT / PACKAGE / "serve").glob("*.py")}
    return own | convert | kernels | serve


def _level(module: str) -> int:
    name = module.partition(".")[0]
    found = [number for number, level in enumerate(LEVELS) if name in level]
    assert found, f"{module} is not in LEVELS: decide where it belongs"
    return found[0]


def _imports(source: str) -> Iterator[str]:
    """Yield the modules of the package that a source imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            first = rest.partition(".")[0]
            module = HOMES.get(first, first if first.islower() else "api")
            if package == PACKAGE and module is not None:
                yield "api" if module == "load" else module


def _wrong_imports(sources: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module, source in sources.items()
        for imported in _imports(source)
        if imported != module.partition(".")[0] and _level(imported) <= _level(module)
    ]


def test_imports_point_down() -> None:
    assert _wrong_imports({name: path.read_text() for name, path in _sources().items()}) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("target", "from gemma_mtp_mlx.drafter import Drafter"),
        ("cache", "from gemma_mtp_mlx.layers import KV"),
        ("engine", "def f():\n    from gemma_mtp_mlx.api import Pair"),
        ("sampling", "import gemma_mtp_mlx.engine"),
        ("hub", "from gemma_mtp_mlx import load"),
        ("round", "from gemma_mtp_mlx import engine"),
        ("weights", "from gemma_mtp_mlx.convert import Quantization"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, source: str) -> None:
    assert _wrong_imports({module: source})


def test_every_level_is_in_use() -> None:
    modules = {name.partition(".")[0] for name in _sources()}
    assert set().union(*LEVELS) == modules


@pytest.mark.parametrize("module", sorted(_sources()))
def test_files_are_small(module: str) -> None:
    assert len(_sources()[module].read_text().splitlines()) <= MOST_LINES


def _called(node: ast.Call) -> str:
    """Return what a call calls if it may wait for the device, else nothing."""
    if isinstance(node.func, ast.Name) and node.func.id in CONVERSIONS:
        return node.func.id
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        of_numpy = isinstance(owner, ast.Name) and owner.id in ("np", "numpy")
        if node.func.attr in WAITS or (of_numpy and node.func.attr == "array"):
            return node.func.attr
    return ""


def _waits(node: ast.AST, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield (function, call) for every call by which the host may wait for the device."""
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner = f"{where}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call) and _called(child):
            yield where, _called(child)
        yield from _waits(child, inner)


def test_the_hot_path_waits_where_it_may() -> None:
    found = {
        (module, *wait)
        for module in HOT_PATH
        for wait in _waits(ast.parse(_sources()[module].read_text()))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "expression",
    [
        "x.item()",
        "x.tolist()",
        "mx.eval(x)",
        "mx.synchronize()",
        "np.array(x)",
        "np.asarray(x)",
        "bool(x)",
        "float(x.sum())",
        "[int(i) for i in x]",
        "f(g(x.max().item()))",
    ],
)
def test_a_wait_is_found(expression: str) -> None:
    source = f"class C:\n    def f(self, x):\n        return {expression}"
    assert [where for where, _ in _waits(ast.parse(source))] == ["C.f"]
