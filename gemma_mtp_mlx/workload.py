"""What a pass asks of a GPU, counted: bytes, multiplications, launches. No time is in here.

Two sides: MLX's own kernels, by its dispatch rules (dispatch.py), and ours, which load a weight
once for up to 16 positions and attend from all of them at once (kernels/README.md). A step is one
kernel or several alike that wait for memory or compute, whichever takes longer; steps run one after
the other, and so do the launches between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from gemma_mtp_mlx import dispatch, footprint
from gemma_mtp_mlx.chips import Chip
from gemma_mtp_mlx.config import LayerConfig, ModelConfig
from gemma_mtp_mlx.dispatch import Heads, Weights
from gemma_mtp_mlx.outline import Outline, Part

MLX, OURS = "mlx", "ours"
FEW = 4  # positions that our kernels take one by one; more are tiles of TILE. kernels/weights.py
TILE = 8
OWN_TILES = 16  # positions that our kernels load weights for once
# Rows of a tile of MLX's GEMMs, all of which are computed. dispatch.py has the sources.
_TILES = {"qmm": 32, "qmm_splitk": 32, "qmm_nax": 32}
_TILES |= {"gemm": 64, "gemm_nax": 64, "gemm_splitk": 16}
SCORES_TILE = 64  # of those that attend
PER_KEY = 13  # a lane's multiplications beside those with entries: sum over 32 lanes, softmax


class Step(NamedTuple):
    """nbytes: from memory. The rest are operations, two a multiplication.

    vector: on vector units; decode, decode_fp: there, if decoding an affine or a floating-point
    weight cost as much as multiplying by it; matrix: on matrix units by large GEMMs; own: there by
    kernels for few positions, ours.
    """

    nbytes: float
    vector: float = 0.0
    decode: float = 0.0
    decode_fp: float = 0.0
    matrix: float = 0.0
    own: float = 0.0


class Work(NamedTuple):
    """What is done: steps, launches, waits of the host for the device."""

    steps: tuple[Step, ...]
    launches: float
    syncs: float = 0.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """Whose kernels run, and what is documented of the loop around them.

    kernels: MLX or OURS. wide: whether MLX has qmv_wide (0.32 and later). syncs: waits for the
    device per drafting round of one row. heads_apart: with one row, the head takes one position at
    a time and stops at the first mismatch. window_copies: with more than one row, a pass of several
    positions writes every sliding window anew.
    """

    kernels: str = OURS
    wide: bool = True
    syncs: float = 1.0
    heads_apart: bool = False
    window_copies: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """`length` new positions of each of `rows` rows that stand at `context`."""

    rows: int
    length: int
    context: int

    @property
    def tokens(self) -> int:
        """Positions in all."""
        return self.rows * self.length


# Launches of a layer by what the model has: of one row and one position, one row and several,
# several rows and one position each, several and several; then of a draft step. The means of
# `python -m bench.launches` over the published models; tests/test_launches.py compares.
_LAUNCHES = {
    (MLX, "dense"): (25.0, 31.8, 30.0, 40.7),
    (MLX, "per-layer inputs"): (27.9, 32.3, 31.0, 40.9),
    (MLX, "experts"): (48.8, 55.8, 54.0, 72.8),
    (OURS, "dense"): (10.0, 11.0, 10.0, 12.0),
    (OURS, "per-layer inputs"): (12.5, 13.5, 12.5, 14.0),
    (OURS, "experts"): (13.0, 14.0, 13.0, 15.0),
}
_AROUND = {MLX: 16.0, OURS: 22.0}  # of a pass, outside layers
# mlx-vlm's by hand: four layers of a dense model less what makes keys and values, and the head.
_DRAFT_STEP = {MLX: 90.0, OURS: 45.0}


def verify(outline: Outline, chip: Chip, runtime: Runtime, step: Pass) -> Work:
    """Return a target's pass, plain decoding (length 1) included. Its waits are the round's."""
    steps = [*_part(outline.target, chip, runtime, step)]
    steps += _attention(outline.config, chip, runtime, step, outline.dtype.size)
    if runtime.window_copies and step.rows > 1 and step.length > 1:
        steps.append(Step(2.0 * step.rows * _window_bytes(outline)))
    kind = "experts" if outline.config.num_experts else "dense"
    if outline.config.hidden_size_per_layer_input:
        kind = "per-layer inputs"
    each = _LAUNCHES[runtime.kernels, kind][2 * (step.rows > 1) + (step.length > 1)]
    layers = len(outline.config.layers)
    return Work(tuple(steps), layers * each + _AROUND[runtime.kernels])


def draft(outline: Outline, chip: Chip, runtime: Runtime, rows: int, context: int) -> Work:
    """Return one draft step of every row."""
    assert outline.drafter is not None and outline.drafter_config is not None
    step = Pass(rows, 1, context)
    target, text = outline.config, outline.drafter_config.text
    layers = tuple(
        replace(target.last_owner(sliding=layer.sliding), kv_source=0) for layer in text.layers
    )
    reader = replace(text, layers=layers, sliding_window=target.sliding_window + 1)
    steps = [*_part(outline.drafter, chip, runtime, step)]
    steps += _attention(reader, chip, runtime, step, outline.dtype.size)
    steps.append(Step(rows * outline.embedding_row_bytes))
    return Work(tuple(steps), _DRAFT_STEP[runtime.kernels])


def drafting_round(
    outline: Outline, chip: Chip, runtime: Runtime, rows: int, k: int, context: int, kept: float
) -> Work:
    """Return a whole round. kept: tokens a row keeps of it, for a head that stops after so many."""
    work = verify(outline, chip, runtime, Pass(rows, k + 1, context))
    if k == 0:
        return work
    steps = list(work.steps)
    if runtime.heads_apart and rows == 1 and outline.target.head is not None:
        steps.remove(matmul(outline.target.head, 1, k + 1, chip, runtime))
        one = matmul(outline.target.head, 1, 1, chip, runtime)
        steps.append(Step(*(kept * number for number in one)))
    each = draft(outline, chip, runtime, rows, context)
    steps += [Step(*(k * number for number in one)) for one in each.steps]
    return Work(tuple(steps), work.launches + k * each.launches, runtime.syncs)


def _part(part: Part, chip: Chip, runtime: Runtime, step: Pass) -> Iterator[Step]:
    """Yield the matrices of a target or drafter, its experts, and the rest of what it reads."""
    tokens = step.tokens
    for weights, number in part.matrices:
        yield matmul(weights, number, tokens, chip, runtime)
    if part.head is not None:
        yield matmul(part.head, 1, tokens, chip, runtime)
    reads = part.reads
    rest = part.other_bytes + tokens * reads.token_bytes
    if not part.experts:
        distinct = footprint.distinct(reads.parts, reads.parts_per_token, tokens)
        yield Step(rest + distinct * reads.part_bytes)
        return
    yield Step(rest)
    for weights, number in part.experts:
        yield _experts(weights, number, reads, tokens, runtime)


def matmul(weights: Weights, number: int, rows: int, chip: Chip, runtime: Runtime) -> Step:
    """Return so many alike, each times `rows` rows."""
    once, size = number * weights.nbytes, 2.0 * number * weights.count
    if runtime.kernels == OURS:
        loads = ceil(rows / OWN_TILES)
        if rows <= FEW:
            return _step(weights, once, size, vector=rows, decodes=1)
        padded = TILE * ceil(rows / TILE)
        return _step(weights, once * loads, size, own=padded, decodes=loads)
    rule = dispatch.plain_matmul if weights.plain else dispatch.quantized_matmul
    call = rule(chip.gpu, weights, rows, wide=runtime.wide)
    tile = _TILES.get(call.kernel)
    if tile is None:
        # Threadgroups that share weights run together: memory is read once, a pass decodes again.
        return _step(weights, once, size, vector=rows, decodes=call.passes)
    share = chip.tflops / chip.matrix_tflops if call.kernel.endswith("_nax") else 1.0
    nbytes = once * ceil(rows / tile) + number * call.extra_bytes
    return _step(weights, nbytes, size, matrix=share * tile * ceil(rows / tile))


def _step(
    weights: Weights,
    nbytes: float,
    size: float,
    *,
    vector: float = 0.0,
    matrix: float = 0.0,
    own: float = 0.0,
    decodes: float = 0.0,
) -> Step:
    """Return a step that multiplies and decodes each weight so often. size: operations of once."""
    affine = 0.0 if weights.plain or weights.mode != "affine" else size * decodes
    floating = 0.0 if weights.plain or weights.mode == "affine" else size * decodes
    return Step(nbytes, size * vector, affine, floating, size * matrix, size * own)


def _experts(
    weights: Weights, number: int, reads: footprint.Reads, tokens: int, runtime: Runtime
) -> Step:
    """Return one of an expert's matrices in all layers, for what so many tokens choose."""
    distinct = footprint.distinct(reads.parts, reads.parts_per_token, tokens)
    pairs = tokens * reads.parts_per_token
    once, size = number * weights.nbytes * distinct, 2.0 * number * weights.count
    if runtime.kernels == MLX:
        # Decoded for every token that chose it, one after the other: memory is read once.
        return _step(weights, once, size, vector=pairs, decodes=pairs)
    each = pairs / distinct
    if each <= FEW:
        return _step(weights, once, size, vector=pairs, decodes=distinct)
    return _step(weights, once, size, own=distinct * TILE * ceil(each / TILE), decodes=distinct)


def _attention(
    config: ModelConfig, chip: Chip, runtime: Runtime, step: Pass, entry: int
) -> Iterator[Step]:
    """Yield the layers' attention. entry: bytes of a key's or value's entry."""
    alike: dict[tuple[bool, int, int], list[LayerConfig]] = {}
    for layer in config.layers:
        alike.setdefault((layer.sliding, layer.num_key_value_heads, layer.head_dim), []).append(
            layer
        )
    for (sliding, kv, dim), layers in alike.items():
        number = len(layers)
        seen = min(step.context, config.sliding_window) if sliding else step.context
        heads = Heads(config.num_attention_heads, kv, dim)
        stored = 2.0 * entry * step.rows * kv * seen * dim
        each = 4.0 * step.rows * seen * dim  # operations of one query head at one position
        if runtime.kernels == OURS:
            packed = TILE * ceil(heads.sharing * step.length / TILE)
            yield Step(number * stored, own=number * each * kv * packed)
            continue
        mask = None if step.tokens == 1 else ("causal" if step.rows == 1 else "array")
        call = dispatch.attention(
            chip.gpu, heads, step.rows, step.length, max(1, seen) + step.length, mask=mask
        )
        if call.kernel == "unfused" and step.length > 1:  # each query head's GEMMs, in whole tiles
            together = heads.queries if dispatch.is_merged(heads, step.rows) else 1
            padded = SCORES_TILE * ceil(together * step.length / SCORES_TILE) / together
            nbytes = call.passes * stored + call.extra_bytes
            yield Step(number * nbytes, matrix=number * each * heads.queries * padded)
        else:
            work = number * each * heads.queries * step.length * (1.5 + PER_KEY * 32 / (2 * dim))
            yield Step(number * (stored + call.extra_bytes), work)


def _window_bytes(outline: Outline) -> float:
    """Bytes of a row's keys and values in all windows of layers that own them."""
    return sum(
        2.0 * layer.num_key_value_heads * layer.head_dim * outline.dtype.size
        for layer in outline.config.layers
        if layer.sliding and layer.owns_kv
    ) * float(outline.config.sliding_window)
