"""What `verify` checks: that files are what was written or published, and that logits agree.

A conversion lists the SHA-256 of its files in conversion.json. In the hub's cache a file is a link
to one that is named after its content: the SHA-256 of a large file, the hash that git gives a small
one. Source: huggingface_hub, "Understand caching"; git-hash-object.
"""

import gc
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from gemma_mtp_mlx import api, hub
from gemma_mtp_mlx.cache import MAX_BLOCK, Cache, Seat, seat_size
from gemma_mtp_mlx.checkpoint import Folder, read_config, read_json
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.convert.record import RECORD
from gemma_mtp_mlx.footprint import kv_dtype
from gemma_mtp_mlx.readers import VerifyReader
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import target_names
from gemma_mtp_mlx.weights import plan_weights

POSITIONS = 32
MOST_RELATIVE = 1e-2  # of logits, where the weights should be the same
LEAST_AGREEMENT = 0.5  # of best tokens; a trained model that was quantised well is far above it
_BLOCK = 1 << 22
_SEED = 0
_TEXT = """\
Write a short Python function that returns the prime numbers below n, then explain in two sentences
how it works and how long it takes for large n."""
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
OnBytes = Callable[[int, int], None]
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Expected:
    """A file and what its content should hash to. by: who says so."""

    file: Path
    shown: str
    digest: str
    by: str

    def problem(self, on_block: Callable[[int], None]) -> str | None:
        """Return what is wrong with the file, None if nothing is."""
        git = _GIT.fullmatch(self.digest)
        digest = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
        if git:
            digest.update(b"blob %d\0" % self.file.stat().st_size)
        with self.file.open("rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                on_block(len(block))
        if digest.hexdigest() == self.digest:
            return None
        return (
            f"{self.shown} is not what it should be: its hash is {digest.hexdigest()[:12]}..., "
            f"{self.by} says {self.digest[:12]}...; download or copy it again"
        )


@dataclass(frozen=True, slots=True)
class Checked:
    """What checking files found. files: that were compared, of nbytes; problems: a line each."""

    files: int
    nbytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's logits are from its source's.

    relative: the largest difference over the source's largest logit; divergence: KL, source to
    model, in nats, mean over positions; agreement: share of positions with the same best token.
    exact: whether the weights should be the same.
    """

    positions: int
    relative: float
    divergence: float
    agreement: float
    exact: bool

    @property
    def problem(self) -> str | None:
        """Return what is wrong, None if nothing is."""
        if self.exact and not self.relative < MOST_RELATIVE:
            return (
                f"the logits are not the source's: they differ by {self.relative:.2%} of the "
                f"largest, and weights of the same format should differ by < {MOST_RELATIVE:.0%}"
            )
        return None

    @property
    def warning(self) -> str | None:
        """Return what is odd about a model that is not exactly its source, None if nothing is."""
        if self.exact or self.agreement >= LEAST_AGREEMENT:
            return None
        return (
            f"warning: the best token differs in {1 - self.agreement:.0%} of positions; of a "
            "trained model that is too much: use more bits, or check that it is the source"
        )


def locate(name: str) -> Path:
    """Return the folder of a model that is here. Raises: ValueError for a repository that is not.

    Nothing is downloaded, which would mend, or add, what is to be checked.
    """
    if Path(name).expanduser().exists():
        return hub.resolve(name)
    folder = hub.cached(name)
    if folder is None:
        raise ValueError(f"{name} is not in the hub's cache, or not all of it; download it first")
    return folder


def check_files(folder: Path, on_bytes: OnBytes) -> Checked | None:
    """Compare every file of a model and its drafter with what is known of it.

    on_bytes: called with the bytes that are compared and those there are. Returns: None if nothing
    is known: there is no conversion.json, and it is not in the hub's cache.
    """
    expected: list[Expected] = []
    problems: list[str] = []
    for part in (folder, folder / "drafter"):
        if part.is_dir():
            published = list(_published(part, folder))
            missing = _recorded(part, folder, expected, problems, cached=bool(published))
            # A large file's digest is known from both: it is compared once.
            known = {(each.file, each.digest) for each in expected}
            expected += [each for each in published if (each.file, each.digest) not in known]
            if missing and not published:
                if part == folder:
                    return None
                problems.append(f"drafter/{RECORD} is missing: its files cannot be checked")
    total, done = sum(each.file.stat().st_size for each in expected), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    wrong: dict[Path, str] = {}
    for each in expected:
        problem = each.problem(advance)
        if problem is not None:
            wrong.setdefault(each.file, problem)
    problems += wrong.values()
    if not problems:
        problems += _structure(folder)
    return Checked(len({each.file for each in expected}), total, tuple(problems))


def _recorded(
    part: Path, folder: Path, expected: list[Expected], problems: list[str], *, cached: bool
) -> bool:
    """Add what a part's conversion.json says. Returns whether there is none.

    cached: whether it is the hub's cache, into which texts about a model are not downloaded.
    """
    if not (part / RECORD).is_file():
        return True
    prefix = "" if part == folder else f"{part.name}/"
    try:
        files = _listed(part / RECORD)
    except ValueError as error:
        problems.append(str(error))
        return False
    for name, digest in files.items():
        if (part / name).is_file():
            expected.append(Expected(part / name, f"{prefix}{name}", digest, f"{prefix}{RECORD}"))
        elif not (cached and name.endswith(".md")):
            problems.append(f"{prefix}{name} is missing, but {prefix}{RECORD} lists it")
    for path in sorted(part.iterdir()):
        own = path.name in (*files, RECORD) or path == folder / "drafter"
        if not own and not path.name.startswith("."):
            problems.append(f"{prefix}{path.name} is there, but {prefix}{RECORD} does not list it")
    return False


def _listed(record: Path) -> dict[str, str]:
    """Return the digests that a conversion.json lists, by the files' names."""
    files = read_json(record).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(digest, str) and _SHA256.fullmatch(digest) and name == Path(name).name
        for name, digest in files.items()
    ):
        raise ValueError(f"{record} is damaged: it does not list files and their SHA-256")
    return files


def _published(part: Path, folder: Path) -> Iterator[Expected]:
    """Yield the files that the hub's cache names after their content."""
    for file in sorted(part.iterdir()):
        target = file.resolve()
        named = _SHA256.fullmatch(target.name) or _GIT.fullmatch(target.name)
        if file.is_symlink() and target.parent.name == "blobs" and named and target.is_file():
            yield Expected(file, str(file.relative_to(folder)), target.name, "the hub")


def _structure(folder: Path) -> Iterator[str]:
    """Yield what keeps the files from being read as a model."""
    for part in (folder, folder / "drafter"):
        if (part / "config.json").is_file():
            try:
                Folder(part)
            except ValueError as error:
                yield str(error)


def compare(model: Path, source: Path) -> Comparison:
    """Compare the logits of two targets on the same tokens, one in memory at a time.

    Raises: ValueError if one cannot be loaded, or their vocabularies differ.
    """
    ours, theirs = (_read_facts(folder) for folder in (model, source))
    if ours[0] != theirs[0]:
        raise ValueError(f"{model} has {ours[0]} tokens and {source} {theirs[0]}: another model")
    pair = api.load(model, None)
    ids = _token_ids(pair)
    got = target_logits(pair.target, ids)
    del pair
    gc.collect()
    mx.clear_cache()
    want = target_logits(api.load(source, None).target, ids)
    return difference(got, want, exact=ours == theirs)


def _read_facts(folder: Path) -> tuple[int, mx.Dtype, dict[str, dict[str, Any]]]:
    """Return a target's vocabulary, its type and how its modules are packed."""
    config = ModelConfig.from_dict(read_config(folder))
    plan = plan_weights(Target(config), Folder(folder), target_names(config))
    return config.vocab_size, kv_dtype(plan), plan.quantization


def _token_ids(pair: api.Pair) -> list[int]:
    """Return the beginning of a chat, if there is a tokenizer, and tokens drawn by a seed."""
    ids = [] if pair.tokenizer is None else pair.encode(_TEXT)
    size = pair.target.config.vocab_size
    drawn = np.random.default_rng(_SEED).integers(size, size=POSITIONS).tolist()
    return [*ids, *drawn][:POSITIONS]


def target_logits(target: Target, ids: list[int]) -> Logits:
    """Return the float32 logits [L, V] that a target gives tokens, in blocks as in a round."""
    cache = Cache(target.config, 1, seat_size(len(ids)), target.dtype)
    found = []
    for start in range(0, len(ids), MAX_BLOCK):
        block = ids[start : start + MAX_BLOCK]
        rows = cache.rows([Seat(0, seat_size(len(ids)), 0)], mx.array([start]), [start])
        reader = VerifyReader(cache, rows, len(block))
        logits = target.logits(target.verify(mx.array([block]), reader)[0])
        mx.eval(logits, list(reader.blocks.values()))
        cache.commit(reader.blocks, rows)
        found.append(np.array(logits))
    return np.concatenate(found)


def difference(got: Logits, want: Logits, *, exact: bool) -> Comparison:
    """Compare logits [L, V]."""
    ours, theirs = _log_softmax(got), _log_softmax(want)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return Comparison(
        positions=len(got),
        relative=float(np.abs(got - want).max() / np.abs(want).max()),
        divergence=float(divergence.mean()),
        agreement=float((got.argmax(axis=-1) == want.argmax(axis=-1)).mean()),
        exact=exact,
    )


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
