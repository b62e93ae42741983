"""What is converted: a folder of safetensors, compressed-tensors among them, or a GGUF file."""

from pathlib import Path

from gemma_mtp_mlx.checkpoint import Checkpoint, Folder, read_json
from gemma_mtp_mlx.convert.compressed import CompressedFolder, is_compressed
from gemma_mtp_mlx.convert.gguf import GgufFile

_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def open_source(path: Path) -> Checkpoint:
    """Return a checkpoint, no weights read. path: as `hub.resolve_source` returns it.

    Raises: ValueError naming the file and the remedy for what cannot be read.
    """
    if path.suffix == ".gguf":
        return GgufFile(path)
    if is_compressed(read_json(path / "config.json")):
        return CompressedFolder(path)
    return Folder(path)


def companions(path: Path) -> dict[str, bytes]:
    """Return the files that a model is used with, by their names: tokenizer, chat template, ..."""
    if path.suffix == ".gguf":
        return GgufFile(path).companion_files()
    return {name: (path / name).read_bytes() for name in _COPIED if (path / name).is_file()}
