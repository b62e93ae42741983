"""Feed damaged headers, configurations and indexes to what reads them.

    python -m tests.fuzz_readers --inputs 100000 --seed 0

Each input is a sound tiny file with one to four mutations, of its bytes or of the values in it.
Whatever comes, a reader returns or raises ValueError in one line, soon, in bounded memory, and
opens nothing outside of the scratch folder. Mutations are a plain seeded random choice: shrinking,
which hypothesis is for, is worth little where an input is a sound file and four changes, and it
costs more per input than the readers do. An input is found again by its seed and number.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from gemma_mtp_mlx.checkpoint import INDEX, Stored, check_safetensors, read_json, stored_tensors
from gemma_mtp_mlx.config import DrafterConfig, ModelConfig
from gemma_mtp_mlx.target import Target
from gemma_mtp_mlx.tensor_names import target_names
from gemma_mtp_mlx.weights import plan_weights
from tests.checkpoints import write_checkpoint
from tests.families import FAMILIES, assistant_config, target_config
from tests.hostile_folders import peak_bytes

MOST_S = 2.0
MOST_GROWTH = 256 << 20  # bytes; a header of 8 MB is far less as Python objects
LONGEST_MESSAGE = 2000
PLANNED = 20  # one of so many inputs that are accepted is used to build and plan a model
_SMALL = 16  # bytes of a tensor
DEEP, TWICE = "@deep", "@twice:"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1),
    *(10**400, -(10**400), 0.5, -0.0, 64.0, 1e308, -1e308, float("nan"), float("inf")),
    *("", "4", "abc", "two\nlines", "\x00", "\ud800", "../../etc/passwd", "/etc/passwd", "F32"),
    *([], {}, [1], [[1]], {"a": 1}, [0, 0], [2**61] * 64, "x" * 5000, [0] * 500, DEEP),
)


class Refused(NamedTuple):
    """What a reader said of an input."""

    message: str


@dataclass
class Figures:
    """What came of all inputs. kinds: refused and accepted, by kind."""

    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest_s: float = 0.0
    growth: int = 0

    def count(self, outcome: str) -> int:
        """Inputs that ended so."""
        return sum(number for (_, what), number in self.kinds.items() if what == outcome)


@dataclass
class Bare:
    """A checkpoint of headers only; see `checkpoint.Checkpoint`."""

    config: dict[str, Any]
    tensors: dict[str, Stored]
    files: tuple[Path, ...] = ()
    dtype: str | None = None

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Planning reads no weights."""
        raise AssertionError(f"rows {start} to {stop} of {name} were read")


class Fuzzer:
    """Makes inputs in a folder of its own and hands them to the readers."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch = scratch
        self._seed = seed
        self._random = random.Random(seed)
        write_checkpoint(scratch, "31b", dtype="bfloat16")
        self._file = scratch / "model.safetensors"
        content = self._file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        # Bytes of weights cost time and decide nothing: a small file stands for the large one.
        self._few = _laid_out(list(header)[1:6])
        self._config = read_json(scratch / "config.json")
        self._configs = [
            make(family, layout, "float32")
            for family in FAMILIES
            for layout in ("published", "per_layer")
            for make in (_text_target, assistant_config)
        ]
        self._stored = check_safetensors(self._file)
        self._model = ModelConfig.from_dict(self._config)
        (scratch / "config.json").unlink()
        (scratch / "generation_config.json").unlink()

    def kinds(self) -> dict[Callable[[], object], int]:
        """Return what makes and reads an input, and how often in turn; some take longer."""
        return {
            self.header_bytes: 6,
            self.header_values: 8,
            self.config_bytes: 4,
            self.config_values: 12,
            self.index_values: 4,
            self.quantization_values: 1,
        }

    def one(self, number: int) -> tuple[str, Refused | None]:
        """Make and read an input. Returns its kind, and what was said if it was refused."""
        self._random.seed(f"{self._seed} {number}")
        kinds = self.kinds()
        (kind,) = self._random.choices(list(kinds), list(kinds.values()))
        try:
            kind()
        except ValueError as error:
            return kind.__name__, Refused(str(error))
        return kind.__name__, None

    def header_bytes(self) -> None:
        """Flip, cut, repeat or overwrite bytes of a file."""
        self._file.write_bytes(self._damaged_bytes(self._small_file(self._few)))
        self._read_header()

    def header_values(self) -> None:
        """Change values of a header, or swap two tensors' places."""
        header = self._mutated(self._few)
        entries = [v for v in header.values() if isinstance(v, dict) and "data_offsets" in v]
        if len(entries) > 1 and self._random.random() < 0.3:
            a, b = self._random.sample(entries, 2)
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        self._file.write_bytes(self._small_file(header))
        self._read_header()

    def config_bytes(self) -> None:
        """Damage the text of a config.json."""
        text = json.dumps(self._random.choice(self._configs)).encode()
        self._read_config(self._damaged_bytes(text))

    def config_values(self) -> None:
        """Change values of a config.json."""
        self._read_config(self._text(self._mutated(self._random.choice(self._configs))))

    def index_values(self) -> None:
        """Change an index."""
        self._file.write_bytes(self._small_file(self._few))
        weight_map = dict.fromkeys(self._few, "model.safetensors")
        index = self._mutated({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (self.scratch / INDEX).write_bytes(self._text(index))
        try:
            stored_tensors(self.scratch)
        finally:
            (self.scratch / INDEX).unlink()

    def quantization_values(self) -> None:
        """Plan a load with other shapes, types and names, and a changed quantisation block."""
        stored = dict(self._stored)
        path = self._random.choice(["model.layers.0.mlp.up_proj", "model.embed_tokens"])
        rows = stored[f"{path}.weight"].shape[0]
        words, groups = 16, 2
        if self._random.random() < 0.6:
            words, groups = self._random.choices([0, 1, 2, 4, 16, 128, 2**30], k=2)
        stored[f"{path}.weight"] = Stored(self._file, "U32", (rows, words))
        for what in ("scales", "biases"):
            shape = (rows, groups) if self._random.random() < 0.9 else ()
            stored[f"{path}.{what}"] = Stored(self._file, "BF16", shape)
        if self._random.random() < 0.3:
            del stored[self._random.choice(list(stored))]
        usual = {"group_size": 64, "bits": 4, "mode": "affine"}
        block = {**usual, path: dict(usual)}
        if self._random.random() < 0.7:
            block = self._mutated(block)
        config = self._read_text(self._text({**self._config, "quantization": block}))
        self._plan(self._model, Bare(config, stored))

    def _read_header(self) -> None:
        size = self._file.stat().st_size
        stored = check_safetensors(self._file)
        assert all(s.offset + s.nbytes <= size for s in stored.values())
        if self._random.random() < 1 / PLANNED:
            self._plan(self._model, Bare(self._config, stored))

    def _read_text(self, text: bytes) -> dict[str, Any]:
        file = self.scratch / "config.json"
        file.write_bytes(text)
        try:
            return read_json(file)
        finally:
            file.unlink()

    def _read_config(self, text: bytes) -> None:
        config = self._read_text(text)
        kind = str(config.get("model_type"))
        if "assistant" in kind:
            DrafterConfig.from_dict(config)
            return
        model = ModelConfig.from_dict(config)
        if len(model.layers) <= 12 and self._random.random() < 1 / PLANNED:
            self._plan(model, Bare(config, self._stored))

    def _plan(self, model: ModelConfig, checkpoint: Bare) -> None:
        mx.random.seed(0)  # each module adds to what the state was made from, and keeps it
        plan_weights(Target(model), checkpoint, target_names(model))

    def _small_file(self, header: dict[str, Any]) -> bytes:
        """Return a file with that header, and as many bytes behind it as the sound one has."""
        text = self._text(header)
        return len(text).to_bytes(8, "little") + text + bytes(_SMALL * (len(self._few) - 1))

    def _mutated(self, content: dict[str, Any]) -> dict[str, Any]:
        content = copy.deepcopy(content)
        for _ in range(self._random.choice([1, 1, 2, 4])):
            places = list(_places(content))
            if not places:
                break
            holder, key = self._random.choice(places)
            action = self._random.random()
            if action < 0.7 or isinstance(holder, list):
                holder[key] = copy.deepcopy(self._random.choice(ODD))
            elif action < 0.8:
                del holder[key]
            elif action < 0.9:
                holder[TWICE + key] = holder[key]
            else:
                holder[self._random.choice(["", "x\ny", "0", "999999", "weight"])] = holder[key]
        return content

    def _text(self, content: Any) -> bytes:
        depth = self._random.choice([10, 70, 900, 3000])
        nested = "[" * depth + "]" * depth
        text = json.dumps(content).replace(TWICE, "").replace(f'"{DEEP}"', nested)
        return text.encode()

    def _damaged_bytes(self, content: bytes) -> bytes:
        damaged = bytearray(content)
        for _ in range(self._random.randint(1, 4)):
            place = self._random.randrange(len(damaged) + 1)
            action = self._random.randrange(5)
            if action == 0 and place < len(damaged):
                damaged[place] ^= 1 << self._random.randrange(8)
            elif action == 1:
                del damaged[place : place + self._random.choice([1, 8, 64])]
            elif action == 2:
                damaged[place:place] = damaged[place : place + self._random.choice([1, 8, 64])]
            elif action == 3:
                damaged[place : place + 1] = self._random.choice([b"9" * 400, b"-", b'"', b"[{"])
            else:
                length = self._random.choice([0, 1, 2**31, 2**63, 2**64 - 1])
                damaged[:8] = length.to_bytes(8, "little")
        return bytes(damaged)


def _text_target(family: str, config_layout: str, dtype: str) -> dict[str, Any]:
    return target_config(family, "text", config_layout, dtype)


def _laid_out(names: list[str]) -> dict[str, Any]:
    """Return a header of small tensors of the same names, one behind the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        entries[name] = {"dtype": "BF16", "shape": [2, 4], "data_offsets": [end, end + _SMALL]}
        end += _SMALL
    return entries


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value's holder and key or index."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


class Watch:
    """What the process opens, changes and removes outside of a folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or not event.startswith(("open", "os.", "shutil.")):
            return
        path = str(arguments[0]) if arguments else ""
        code = path.endswith((".py", ".pyc", ".so")) or "__pycache__" in path
        if event in ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir") and not code:
            inside = Path(path).is_relative_to(self.folder) and ".." not in Path(path).parts
            if not inside:
                self.outside.append(f"{event} {path}")

    @contextmanager
    def around(self, folder: Path) -> Iterator[None]:
        """Watch for a while."""
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None


def run(inputs: int, seed: int) -> Figures:
    """Read so many inputs. Raises: AssertionError with the number of one that went wrong."""
    figures, watch = Figures(), Watch()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        fuzzer = Fuzzer(scratch, seed)
        for number in range(min(inputs, 200)):  # what is imported and cached on first use
            _judge(fuzzer, -1 - number, Figures())
        before, there = peak_bytes(), sorted(scratch.iterdir())
        with watch.around(scratch):
            for number in range(inputs):
                _judge(fuzzer, number, figures)
        assert not watch.outside, watch.outside[:3]
        assert sorted(scratch.iterdir()) == there
    figures.growth = peak_bytes() - before
    assert figures.growth <= MOST_GROWTH, f"memory grew by {figures.growth} bytes"
    return figures


def _judge(fuzzer: Fuzzer, number: int, figures: Figures) -> None:
    began = time.perf_counter()
    try:
        kind, refused = fuzzer.one(number)
    except Exception as error:
        raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
    took = time.perf_counter() - began
    if refused is not None:
        message = refused.message
        one_line = message.isprintable() and 0 < len(message) <= LONGEST_MESSAGE
        assert one_line, f"input {number}: not one line: {message[:300]!r}"
    assert took <= MOST_S, f"input {number}: {took:.1f} s"
    figures.kinds[kind, "accepted" if refused is None else "refused"] += 1
    figures.slowest_s = max(figures.slowest_s, took)


def main() -> None:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    figures = run(options.inputs, options.seed)
    for (kind, outcome), number in sorted(figures.kinds.items()):
        print(f"{kind} {outcome}: {number}")
    print(
        f"{options.inputs} inputs in {time.perf_counter() - began:.0f} s: "
        f"{figures.count('refused')} refused, {figures.count('accepted')} accepted, slowest "
        f"{figures.slowest_s * 1e3:.0f} ms, memory grew by {figures.growth / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
