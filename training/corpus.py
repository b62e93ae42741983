"""The training corpus: the Python standard library, split by file, and chat samples made from
it.

Three pools of token ids are sampled during training: `code` (modules), `tests` (their tests, at
lower weight) and `chat` (functions asked for by name and docstring). Files held out are chosen
by a hash of their path, so the split is the same on every machine with the same Python version.
"""

import ast
import hashlib
import json
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.tokenizer import BOS, chat_text, train_tokenizer

NUM_HELD_OUT = 24
HELD_OUT_BYTES = (6_000, 60_000)
# Site packages are not the standard library; the others are generated tables or prose.
SKIPPED_DIRS = {"site-packages", "encodings", "pydoc_data", "idlelib", "__pycache__"}
TEST_DIRS = {"test", "tests"}
REQUESTS = (
    "Write the function `{name}`: {doc}",
    "Write a Python function `{name}`. {doc}",
    "Please implement `{name}` in Python: {doc}",
    "{doc} Call the function `{name}`.",
    "Write a function. {doc}",
)
SYSTEM_TEXT = "You write Python code."
MAX_FUNCTION_BYTES = 1_600


@dataclass(frozen=True, slots=True)
class Split:
    """Source texts by path relative to the standard library."""

    code: dict[str, str]
    tests: dict[str, str]
    held_out: dict[str, str]


def path_hash(path: str) -> str:
    """Return the hash that orders paths for the split and for choosing phrasings."""
    return hashlib.sha256(path.encode()).hexdigest()


def read_split() -> Split:
    """Read every usable file of the running Python's standard library and split it."""
    root = Path(sysconfig.get_path("stdlib"))
    code: dict[str, str] = {}
    tests: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_DIRS & set(parts):
            continue
        text = decode_source(path.read_bytes())
        if text is not None:
            pool = tests if TEST_DIRS & set(parts) else code
            pool["/".join(parts)] = text
    low, high = HELD_OUT_BYTES
    candidates = [p for p, text in code.items() if low <= len(text.encode()) <= high]
    names = sorted(candidates, key=path_hash)[:NUM_HELD_OUT]
    held_out = {p: code.pop(p) for p in names}
    return Split(code, tests, held_out)


def decode_source(data: bytes) -> str | None:
    """Return the text of a file that is UTF-8, parses and is not nearly empty, else None."""
    try:
        text = data.decode("utf-8")
        ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None
    return text if len(text) > 100 else None


def chat_samples(files: dict[str, str]) -> list[str]:
    """Return one conversation per documented function: its docstring asks, its source answers."""
    samples = []
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = (ast.get_docstring(node) or "").strip().split("\n")[0]
                source = function_source(text, node)
                if len(doc) > 10 and len(source) <= MAX_FUNCTION_BYTES:
                    samples.append(one_sample(path, node.name, doc, source))
    return samples


def function_source(text: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the function's own lines, dedented."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = text.split("\n")[first - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines)).strip("\n")


def one_sample(path: str, name: str, doc: str, source: str) -> str:
    """Phrase one request; the phrasing follows from a hash, a quarter get a system turn."""
    choice = int(path_hash(f"{path}:{name}")[:8], 16)
    request = REQUESTS[choice % len(REQUESTS)].format(name=name, doc=doc)
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": source}]
    if choice % 4 == 0:
        messages.insert(0, {"role": "system", "content": SYSTEM_TEXT})
    return chat_text(messages)


def encode_pool(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Return the documents' token ids in a hash order, each behind one BOS."""
    documents = sorted(documents, key=lambda text: path_hash(text[:2_000]))
    ids = [
        np.array([BOS, *encoding.ids], dtype=np.uint16)
        for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)
    ]
    return np.concatenate(ids)


def prepare(out: Path) -> None:
    """Write tokenizer.json, split.json and the token pools under `out`, unless they are there."""
    if (out / "pools.npz").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    split = read_split()
    tokenizer = train_tokenizer(list(split.code.values()))
    tokenizer.save(str(out / "tokenizer.json"))
    chats = chat_samples(split.code)
    pools = {
        "code": encode_pool(tokenizer, list(split.code.values())),
        "tests": encode_pool(tokenizer, list(split.tests.values())),
        "chat": encode_pool(tokenizer, [text.removeprefix("<bos>") for text in chats]),
        "held_out": encode_pool(tokenizer, list(split.held_out.values())),
    }
    record = {
        "python": sysconfig.get_python_version(),
        "held_out": sorted(split.held_out),
        "files": {"code": len(split.code), "tests": len(split.tests), "chat": len(chats)},
        "tokens": {name: len(ids) for name, ids in pools.items()},
        "bytes_code": sum(len(text.encode()) for text in split.code.values()),
    }
    (out / "split.json").write_text(json.dumps(record, indent=1) + "\n")
    np.savez(out / "pools.npz", **pools)


class Sampler:
    """Draw [B, T+1] windows from the pools by weight; every window starts with BOS."""

    def __init__(self, out: Path, weights: dict[str, float], seed: int) -> None:
        pools = np.load(out / "pools.npz")
        self.pools = [pools[name] for name in weights]
        total = sum(weights.values())
        self.shares = [weight / total for weight in weights.values()]
        self.random = np.random.default_rng(seed)

    def batch(self, rows: int, length: int) -> np.ndarray:
        """Return int64 [rows, length + 1]: BOS, then a window of one pool."""
        windows = np.full((rows, length + 1), BOS, dtype=np.int64)
        for row in windows:
            pool = self.pools[self.random.choice(len(self.pools), p=self.shares)]
            start = self.random.integers(len(pool) - length)
            row[1:] = pool[start : start + length]
        return windows


def held_out_windows(out: Path, rows: int, length: int) -> np.ndarray:
    """Return int64 [rows, length + 1], BOS first, evenly spaced over the held-out files."""
    pool = np.load(out / "pools.npz")["held_out"]
    starts = np.linspace(0, len(pool) - length - 1, rows).astype(int)
    windows = [np.concatenate([[BOS], pool[s : s + length]]) for s in starts]
    return np.stack(windows).astype(np.int64)
