"""Write tensors as safetensors shards of bounded size, holding one shard in memory at a time."""

import json
from pathlib import Path

import mlx.core as mx

from gemma_mtp_mlx.checkpoint import INDEX, check_safetensors

SHARD_BYTES = 5 << 30


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would not fit."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.nbytes = 0
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._held: dict[str, mx.array] = {}
        self._shards: list[list[str]] = []

    def add(self, name: str, value: mx.array) -> None:
        """Take a tensor; it is evaluated, so that only its own bytes are held."""
        mx.eval(value)
        held = sum(array.nbytes for array in self._held.values())
        if self._held and held + value.nbytes > self._shard_bytes:
            self._write()
        self._held[name] = value
        self.nbytes += value.nbytes

    def finish(self) -> None:
        """Write what is held, give the shards their final names and write the index."""
        self._write()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            final = final if count > 1 else "model.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            metadata = {"total_size": self.nbytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def _write(self) -> None:
        file = self._part(len(self._shards))
        mx.save_safetensors(str(file), self._held, metadata={"format": "mlx"})
        check_safetensors(file)  # a full disk goes unnoticed otherwise
        self._shards.append(list(self._held))
        self._held = {}
