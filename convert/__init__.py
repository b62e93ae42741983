"""Write a published Gemma 4 checkpoint and its drafter as one folder that MLX runs.

sources.py     folders, compressed-tensors (compressed.py) and GGUF files (gguf*.py) as checkpoints
config.py      the published config layout, from any layout
recipe.py      which modules are packed, and how
plan.py        what becomes of each parameter, from headers alone
packing.py     rows of weights as they are written, and how far they are from the source's
stream.py      strips of rows through every core, into files (shard.py)
journal.py     what is finished, for when a conversion is ended
record.py      conversion.json; card.py: the model card
conversion.py  a source in, a finished folder out, or nothing at all
"""

from gemma_mtp_mlx.convert.conversion import Report, convert
from gemma_mtp_mlx.convert.recipe import Quantization, Rule, read_rules

__all__ = ["Quantization", "Report", "Rule", "convert", "read_rules"]
