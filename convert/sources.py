"""What is converted: a folder of safetensors, compressed-tensors among them, or a GGUF file."""

from pathlib import Path

from gemma_mtp_mlx.checkpoint import Checkpoint, Folder, check_companion, read_config
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
    for file in _companions(path):
        check_companion(file)
    if is_compressed(read_config(path)):
        return CompressedFolder(path)
    return Folder(path)


def companions(path: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files that a model is used with, by their names: tokenizer, chat template, ..."""
    if isinstance(checkpoint, GgufFile):
        return checkpoint.companion_files()
    return {file.name: file.read_bytes() for file in _companions(path)}


def _companions(path: Path) -> list[Path]:
    return [path / name for name in _COPIED if (path / name).is_file()]
