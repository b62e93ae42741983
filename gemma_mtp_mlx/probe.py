"""Whether a GPU does what exact mode stands on: the same bits however many positions are computed.

Our kernels sum in one order for one position and for several, if the matrix unit adds as a chain of
fused multiply-adds does, which is documented nowhere. So a block is verified at once and in parts;
where that differs, a format's plain path is given up. On the way every kernel is launched once,
with as many threads as the device lets it have.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.cache import MAX_BLOCK, Cache, Seat, seat_size
from gemma_mtp_mlx.kernels.kernel import Refused
from gemma_mtp_mlx.kernels.verify_matmul import project_metal
from gemma_mtp_mlx.kernels.weights import Packing, packing, use_matrix_unit
from gemma_mtp_mlx.readers import SharedKV, VerifyReader
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.sampling import SamplingParams, batch_sampling
from gemma_mtp_mlx.target import Target

PARTS = range(1, 9)  # positions at a time: each way a kernel has of taking them, but the whole
COPIES = 3  # rows of a batch, for more positions than a tile has


def probe(models: Models) -> list[str]:
    """Try the models' kernels on this GPU. Returns what its user has to know, a line each.

    Raises: RuntimeError naming a kernel that the device refuses.
    """
    while True:
        try:
            return _probe(models)
        except Refused:  # the kernel has fewer threads now
            continue


def _probe(models: Models) -> list[str]:
    target = models.target
    tokens = [i * 7919 % target.config.vocab_size for i in range(1, MAX_BLOCK + 1)]
    _draft_once(models, tokens)
    if _is_invariant(target, tokens):
        return []
    notes = []
    for found, module in _formats(target).items():
        if not _sums_alike(module, target.dtype):
            use_matrix_unit(found)
            notes.append(
                f"{found.mode} weights of {found.bits} bits: this GPU's matrix unit does not add "
                "as fused multiply-adds do; it is used for single positions too, which is slower"
            )
    if not _is_invariant(target, tokens):
        notes.append(
            "this GPU gives other bits for one position than for several: texts are the same with "
            "and without a drafter up to numerical ties only; please report it, and your chip"
        )
    return notes


def check_formats(model: nn.Module) -> None:
    """Raise ValueError naming the first layer whose weights have no kernel of our own."""
    for path, module in _weighted(model):
        try:
            packing(module)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every layer that is a matrix, with its path."""
    for path, module in model.named_modules():
        if "weight" in module and module.weight.ndim > 1:
            yield path, module


def _formats(model: nn.Module) -> dict[Packing, nn.Module]:
    """Return a layer of every format."""
    return {packing(module): module for _, module in _weighted(model) if module.weight.ndim == 2}


def _is_invariant(target: Target, tokens: Sequence[int]) -> bool:
    """Whether a block has the same bits in parts, and in company."""
    whole = _verify(target, tokens, len(tokens), COPIES)
    apart = [_verify(target, tokens, part, 1) for part in PARTS]
    return all(mx.array_equal(whole[:1], other).item() for other in apart) and all(
        mx.array_equal(whole[:1], row[None]).item() for row in whole
    )


def _verify(target: Target, tokens: Sequence[int], part: int, copies: int) -> mx.array:
    """Hidden states and logits, [copies, L, E + V] float32, verified so many tokens at a time."""
    size = seat_size(len(tokens))
    cache = Cache(target.config, copies, copies * size, target.dtype)
    seats = [Seat(row * size, size, row) for row in range(copies)]
    results = []
    for start in range(0, len(tokens), part):
        block = mx.array([tokens[start : start + part]] * copies)
        rows = cache.rows(seats, mx.full((copies,), start, mx.int32), [start] * copies)
        reader = VerifyReader(cache, rows, block.shape[1])
        hidden = target.verify(block, reader)
        results.append(mx.concatenate([hidden.astype(mx.float32), target.logits(hidden)], axis=-1))
        mx.eval(results[-1], reader.blocks)
        cache.commit(reader.blocks, rows)
    return mx.concatenate(results, axis=1)


def _sums_alike(module: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether a layer's results for a few positions are those among many."""
    width = module.weight.shape[-1]
    if "scales" in module:
        width = width * 32 // module.bits
    x = mx.random.normal((MAX_BLOCK, width), key=mx.random.key(0)).astype(dtype)
    (many,) = project_metal(x, module)
    few = mx.concatenate([project_metal(x[i : i + 1], module)[0] for i in range(MAX_BLOCK)])
    return bool(mx.array_equal(many, few).item())


def _draft_once(models: Models, tokens: Sequence[int]) -> None:
    """Launch what drafting and choosing tokens launch, greedy and with noise."""
    target, drafter, _ = models
    size = seat_size(len(tokens))
    cache = Cache(target.config, 1, size, target.dtype)
    rows = cache.rows([Seat(0, size, 0)], mx.array([0]), [0])
    reader = VerifyReader(cache, rows, len(tokens))
    hidden = target.verify(mx.array([list(tokens)]), reader)
    mx.eval(hidden, reader.blocks)
    cache.commit(reader.blocks, rows)
    positions = mx.arange(len(tokens))[None]
    for temperature in (0.0, 1.0):
        sampling = batch_sampling([SamplingParams(temperature=temperature)], [0])
        mx.eval(target.choose(hidden, sampling, positions))
        if drafter is not None:
            done = cache.rows([Seat(0, size, 0)], mx.array([len(tokens)]), [len(tokens)])
            fed = target.embed(mx.array([[tokens[0]]]), hidden[:, -1:])
            h, back = drafter.step(fed, SharedKV(cache, done))
            mx.eval(drafter.choose(h, sampling, positions[:, -1:]), back)
