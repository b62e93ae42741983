"""Take a model's folder apart and write it again with whatever harm is wanted."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_mtp_mlx.checkpoint import INDEX

Harm = Callable[[Path], object]
WEIGHTS = "model.safetensors"


class Tensor(NamedTuple):
    """A stored tensor."""

    dtype: str
    shape: list[int]
    content: bytes


def read_file(file: Path) -> dict[str, Tensor]:
    """Return a sound file's tensors."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return {
        name: Tensor(e["dtype"], e["shape"], content[begin:][slice(*e["data_offsets"])])
        for name, e in header.items()
    }


def write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors one behind the other."""
    header, end = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        span = [end, end + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        end += len(content)
    text = json.dumps(header).encode()
    parts = [tensor.content for tensor in tensors.values()]
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def length(value: int) -> Harm:
    """Announce a header of another length."""

    def apply(folder: Path) -> None:
        file = folder / WEIGHTS
        file.write_bytes(value.to_bytes(8, "little") + file.read_bytes()[8:])

    return apply


def header(change: Callable[[str], str]) -> Harm:
    """Change a header's text."""

    def apply(folder: Path) -> None:
        file = folder / WEIGHTS
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        text = change(content[8:begin].decode()).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[begin:])

    return apply


def entry(**changes: Any) -> Harm:
    """Change the entry of the second tensor in a header."""

    def apply(text: str) -> str:
        content = json.loads(text)
        content[sorted(content)[2]].update(changes)
        return json.dumps(content)

    return header(apply)


def offsets(change: Callable[[int, int], Any]) -> Harm:
    """Change where the second tensor of a file lies."""

    def apply(text: str) -> str:
        content = json.loads(text)
        second = content[list(content)[2]]
        second["data_offsets"] = change(*second["data_offsets"])
        return json.dumps(content)

    return header(apply)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Harm:
    """Change tensors, of a sound file as far as its format goes."""

    def apply(folder: Path) -> None:
        found = read_file(folder / WEIGHTS)
        change(found)
        write_file(folder / WEIGHTS, found)

    return apply


def spoilt(ending: str, pattern: bytes) -> Harm:
    """Write bytes at the end of the last tensor whose name ends so."""

    def apply(found: dict[str, Tensor]) -> None:
        name = [name for name in found if name.endswith(ending)][-1]
        tensor = found[name]
        found[name] = tensor._replace(content=tensor.content[: -len(pattern)] + pattern)

    return tensors(apply)


def file(name: str, content: bytes | str) -> Harm:
    """Write a file."""
    encoded = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(encoded)


def sparse(name: str, size: int) -> Harm:
    """Write a file of holes."""
    return lambda folder: os.truncate(_touched(folder / name), size)


def _touched(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def config(**changes: Any) -> Harm:
    """Change config.json."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def index(weight_map: Any) -> Harm:
    """Write an index."""
    return file(INDEX, json.dumps({"weight_map": weight_map}))


def instead(name: str, make: Callable[[Path], object]) -> Harm:
    """Put something else in a file's place."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def both(first: Harm, second: Harm) -> Harm:
    """Do one, then the other."""
    return lambda folder: (first(folder), second(folder))


def packed(folder: Path) -> None:
    """Make a compressed-tensors folder of a plain one, its first up_proj packed with 4 bits."""
    found = read_file(folder / WEIGHTS)
    path = next(name for name in found if name.endswith("up_proj.weight")).removesuffix(".weight")
    rows, width = found.pop(f"{path}.weight").shape
    codes, scale = bytes(rows * width // 2), b"\x80\x3f" * (rows * width // 32)
    found[f"{path}.weight_packed"] = Tensor("I32", [rows, width // 8], codes)
    found[f"{path}.weight_scale"] = Tensor("BF16", [rows, width // 32], scale)
    sides = rows.to_bytes(8, "little") + width.to_bytes(8, "little")
    found[f"{path}.weight_shape"] = Tensor("I64", [2], sides)
    write_file(folder / WEIGHTS, found)
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config(quantization_config=block)(folder)


def part(what: str, **changes: Any) -> Harm:
    """Change, or with no changes remove, one of the tensors of a packed weight."""

    def apply(found: dict[str, Tensor]) -> None:
        name = next(name for name in found if name.endswith(f".weight_{what}"))
        if changes:
            found[name] = found[name]._replace(**changes)
        else:
            del found[name]

    return tensors(apply)


def peak_bytes() -> int:
    """Return the largest resident size that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage counts what the parent had as well
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
