"""Write a published Gemma 4 checkpoint and its drafter as one folder that MLX runs.

config.py      the published config layout, from any layout
packing.py     which modules are quantised, and how
writer.py      shards of bounded size
conversion.py  source folders in, finished folder out, or nothing at all

gguf.py            a GGUF file as a checkpoint: names, config, rows of tensors
gguf_config.py     its metadata as config.json
gguf_header.py     its header, strictly
gguf_tokenizer.py  its vocabulary as a folder's tokenizer files
"""

from gemma_mtp_mlx.convert.conversion import Report, convert
from gemma_mtp_mlx.convert.packing import Quantization

__all__ = ["Quantization", "Report", "convert"]
