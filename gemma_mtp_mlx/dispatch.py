"""Which Metal kernels MLX 0.32.4 calls for small passes, and how often these read their operands.

A rule each from MLX's source, as data: what a Mac would run cannot be asked on a machine without
one. `passes` is how often a kernel loads (and, if quantised, decodes) every weight, key or value it
needs; the caches serve part of the repeats, the loads and the decoding are paid for by each.
`bytes` are those loads; `extra_bytes` is what a call writes and reads back on the way to its
result (scores, partial sums, copies of masks). Activations are not counted.

Lines are those of ml-explore/mlx at 846d176, between 0.32.2 and 0.32.3; what 0.32.4 does otherwise
is said where it matters. In mlx/backend/metal: `quantized` is quantized.cpp, `attention`
scaled_dot_product_attention.cpp, `device` device.cpp; matmul.cpp is there too.
"""

import re
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

BASE, MAX, ULTRA = "g", "s", "d"  # what an architecture's name ends in: base; Pro and Max; Ultra


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as MLX tells them apart: generation 13 is M1, 17 is M5. Source: device 587-600."""

    generation: int
    size: str

    @classmethod
    def parse(cls, architecture: str) -> "Gpu":
        """Read what `mx.device_info()` calls the architecture, as in applegpu_g16s."""
        found = re.fullmatch(r"applegpu_g(\d\d)([gsdpc])", architecture)
        if found is None:
            raise ValueError(f"{architecture!r} is not an Apple GPU's architecture")
        return cls(int(found[1]), found[2])

    @property
    def tensor_units(self) -> bool:
        """Whether matmuls run on them, from macOS 26.2 on. Source: device 947-966."""
        return self.generation >= 17


@dataclass(frozen=True, slots=True)
class Weights:
    """A [out_width, in_width] matrix, quantised as mx.quantize does it; 16 bits and more are plain.

    Affine has a 16-bit scale and bias per group, the floating-point modes a scale of one byte.
    """

    out_width: int
    in_width: int
    bits: int = 4
    group: int = 64
    mode: str = "affine"

    @property
    def count(self) -> int:
        """How many weights."""
        return self.out_width * self.in_width

    @property
    def plain(self) -> bool:
        """Whether they are not quantised."""
        return self.bits >= 16

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        scales = 0 if self.plain else (4 if self.mode == "affine" else 1)
        return self.count * self.bits // 8 + scales * (self.count // self.group)


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of an attention: query heads, key/value heads, head dim; 16-bit entries."""

    queries: int
    kv: int
    dim: int

    @property
    def sharing(self) -> int:
        """Query heads per key/value head."""
        return self.queries // self.kv


class Call(NamedTuple):
    """What one MLX operation becomes: its main kernel, launches, and what is read (see above)."""

    kernel: str
    launches: int
    passes: int
    bytes: int
    extra_bytes: int = 0


# get_qmv_batch_limit, quantized 85-139. Rows from which on a matmul takes GEMM tiles, by the larger
# of both widths: up to 2048, up to 4096, beyond.
_LIMITS = {
    "M5": (33, 25, 13),
    "M3, M4": (13, 15, 13),
    "M1, M2": (14, 10, 6),
    "Ultra": (32, 18, 12),
}


def row_limit(chip: Gpu, weights: Weights) -> int:
    """Rows from which on MLX multiplies by quantised weights with GEMM tiles."""
    if chip.size == ULTRA:
        kind = "Ultra"
    elif chip.generation >= 17:
        kind = "M5"
    else:
        kind = "M3, M4" if chip.generation >= 15 else "M1, M2"
    width = max(weights.in_width, weights.out_width)
    return _LIMITS[kind][0 if width <= 2048 else 1 if width <= 4096 else 2]


def is_fast(weights: Weights) -> bool:
    """Whether the quick matrix-vector kernel takes these shapes.

    Hidden sizes that are no multiple of 512 (2816, 3840, 5376) are left to a slower one, which sums
    in another order, at one row already. Source: quantized 145-149, 484, 1337.
    """
    packed = {2: 16, 3: 8, 4: 8, 5: 8, 6: 4, 8: 4}[weights.bits] * 32
    packed *= 1 if weights.bits == 2 else 2
    return weights.out_width % 8 == 0 and weights.in_width % packed == 0


def quantized_matmul(chip: Gpu, weights: Weights, rows: int, *, wide: bool = True) -> Call:
    """[rows, in_width] times transposed 2-D weights. Source: quantized 1739-1835.

    wide: whether MLX has qmv_wide, which came with 0.32.0 (ml-explore/mlx 3764).
    """
    if rows >= row_limit(chip, weights):
        return _gemm(chip, weights, rows)
    if weights.in_width in (64, 128) and weights.bits in (2, 4, 8):
        kernel, passes = "qmv_quad", rows
    elif wide and rows >= 2 and (chip.generation >= 15 or weights.mode != "affine"):
        # use_qmv_wide, quantized 538
        kernel, passes = "qmv_wide", ceil(rows / 5)  # at most five rows a threadgroup, 559-564
    else:
        kernel, passes = "qmv_fast" if is_fast(weights) else "qmv", rows
    return Call(kernel, 1, passes, passes * weights.nbytes)


def split_k(weights: Weights, rows: int) -> int:
    """Parts that a GEMM's sums are split into, to have about 512 threadgroups.

    Source: quantized 1135-1153.
    """
    tiles = ceil(weights.out_width / 32) * ceil(rows / 32)
    align = max(32, weights.group)
    parts = min(max(1, 512 // tiles), weights.in_width // align)
    while parts > 1 and weights.in_width % (parts * align):
        parts -= 1
    return parts


def _gemm(chip: Gpu, weights: Weights, rows: int) -> Call:
    """qmm_splitk, quantized 1120-1234, and qmm, 1024-1115; tensor units only without a split."""
    parts = split_k(weights, rows)
    if parts > 1:
        passes = ceil(rows / 32)
        partial_bytes = 2 * 4 * parts * rows * weights.out_width  # float32 since 0.32.4
        return Call("qmm_splitk", 2, passes, passes * weights.nbytes, partial_bytes)
    if chip.tensor_units and weights.in_width % 64 == 0:
        passes = ceil(rows / (32 if rows <= 32 else 64))  # qmm_nax, 834
        return Call("qmm_nax", 1, passes, passes * weights.nbytes)
    passes = ceil(rows / 32)
    return Call("qmm", 1, passes, passes * weights.nbytes)


def plain_matmul(chip: Gpu, weights: Weights, rows: int, *, wide: bool = True) -> Call:
    """[rows, in_width] times transposed 16-bit 2-D weights; passes as in quantized_matmul.

    wide: whether MLX reads weights once for up to 15 rows, as 0.32 does. Source: matmul.cpp 86-160
    (tiles of 64 rows), 620-640 (16, if sums are split), 895-975.
    """
    if rows == 1:
        return Call("gemv", 1, 1, weights.nbytes)
    if wide and chip.generation >= 15 and rows <= 15:
        return Call("gemv_wide", 1, 1, weights.nbytes)
    if splits_sums(chip, rows, weights.out_width, weights.in_width):
        partial_bytes = 2 * 4 * 16 * rows * weights.out_width
        return Call("gemm_splitk", 2, ceil(rows / 16), weights.nbytes, partial_bytes)
    name = "gemm_nax" if chip.tensor_units else "gemm"
    return Call(name, 1, ceil(rows / 64), weights.nbytes)


def splits_sums(chip: Gpu, rows: int, out_width: int, in_width: int) -> bool:
    """Whether a plain GEMM splits its sums, for want of tiles. Source: matmul.cpp 1451-1590."""
    widest = max(rows, out_width)
    if chip.tensor_units:
        return in_width >= 3 * widest or (widest <= 1024 and in_width > 2 * widest)
    most = 1024 if chip.size == BASE else 2048
    tiles = ceil(rows / 16) * ceil(out_width / 16)
    return tiles <= most and in_width >= 128 and in_width >= widest


def gather_qmm(chip: Gpu, weights: Weights, experts: int, tokens: int, chosen: int) -> Call:
    """`chosen` experts for each token, as mlx_lm calls it: sorted by expert from 64 pairs on.

    weights: one expert's. passes counts experts read, one per pair of token and expert as long as
    there are less than four pairs per expert (64 tokens of eight out of 128): there is no kernel
    that reads an expert once for several tokens. Source: quantized 1877-1960.
    """
    pairs = tokens * chosen
    if pairs >= 64 and pairs // experts >= 4:
        tile = 16
        if chip.tensor_units:
            tile = 32 if pairs / experts < 64 else 64  # gather_qmm_rhs_nax, 1495
        streams = min(pairs, ceil(pairs / tile) + experts - 1)  # at most: a tile ends in an expert
        return Call("gather_qmm_rhs", 1, streams, streams * weights.nbytes)
    kernel = "gather_qmv_fast" if is_fast(weights) else "gather_qmv"
    return Call(kernel, 1, pairs, pairs * weights.nbytes)


def distinct_experts(experts: int, tokens: int, chosen: int) -> float:
    """Experts that so many tokens choose between them, routed uniformly and independently."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


def is_fused(heads: Heads, length: int, keys: int, *, mask: bool = False) -> bool:
    """Whether one kernel attends from `length` positions per row. mask: an array, not "causal".

    Source: attention 633-712 and 715-768; head dim 512 as 0.32.4 does it, from one position of
    exactly eight heads per key/value head over 1024 keys or more (MLX_SDPA_D512_MIN_KL).
    """
    if length > 8 or length > keys or length * heads.sharing > 32:
        return False
    if heads.dim == 512:
        return length == 1 and heads.sharing == 8 and not mask and keys >= 1024
    return heads.dim in (64, 96, 128, 256)


def attention(
    chip: Gpu, heads: Heads, rows: int, length: int, keys: int, *, mask: str | None = None
) -> Call:
    """`length` positions per row over `keys` keys; mask: None, "causal" or "array" (booleans).

    Fused, every query head at every position reads its keys and values itself; with more than one
    row an array is first copied for every head (attention 859-867). Unfused, every query head
    multiplies by itself, but if all share the keys of one row: then they are rows of one GEMM.
    Scores are written, masked, normalised and read back one by one.
    Source: attention 454-620, 868-881; mlx/fast.cpp 718-790; matmul.cpp, Matmul::eval_gpu.
    """
    stored = rows * heads.kv * keys * heads.dim * 2 * 2
    scores = rows * heads.queries * length * keys
    if is_fused(heads, length, keys, mask=mask == "array"):
        passes = heads.sharing * length
        copies = mask == "array" and rows > 1 and heads.queries > 1
        extra = 2 * scores if copies else 0
        name, launches = "sdpa_vector", 1 + copies
        if is_two_pass(chip, heads, keys):
            name, launches = "sdpa_vector_2pass", launches + 1
            partials = rows * heads.queries * length * _blocks(chip, heads, length, keys)
            extra += 2 * partials * (2 * heads.dim + 8)
        return Call(name, launches, passes, passes * stored, extra)
    trips = 4 if mask is None else 6  # 16-bit scores: matmul, mask, softmax, matmul
    launches = {None: 4, "array": 5, "causal": 8}[mask]  # q * scale first; causal makes its mask
    passes = 1 if is_merged(heads, rows) else heads.sharing
    return Call("unfused", launches, passes, passes * stored, 2 * trips * scores)


def is_merged(heads: Heads, rows: int) -> bool:
    """Whether unfused attention of all query heads is one GEMM."""
    return heads.kv == 1 and rows == 1


def is_two_pass(chip: Gpu, heads: Heads, keys: int) -> bool:
    """Whether fused attention splits the keys over threadgroups. Source: attention 873-877."""
    large = chip.size in (MAX, ULTRA)
    return (large and keys >= 1024) or (heads.sharing > 1 and keys >= 4096)


def _blocks(chip: Gpu, heads: Heads, length: int, keys: int) -> int:
    """Parts that the keys are split into. Source: attention 485-518."""
    together = heads.sharing * length
    if chip.size == MAX:
        if keys <= 1024 or together <= 4:
            return 64
        bounds = {8192: 128, 32768: 256, 65536: 512}
        return next((blocks for bound, blocks in bounds.items() if keys <= bound), 1024)
    if chip.size == ULTRA:
        if together >= 6 and keys >= 16384:
            return 512 if keys < 65536 else 1024
        return 256 if together <= 2 and keys > 8192 else 128
    return 64 if together >= 4 else 32
