"""Embeddings of tokens, in every format a table may have."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_mtp_mlx.kernels.embed_tokens import (
    EMBED,
    embed_tokens,
    embed_tokens_metal,
    embed_tokens_reference,
)
from tests.kernels.exact import DTYPES, check_errors, draw, exact
from tests.kernels.linear import ROUNDING

BF16 = mx.bfloat16
VOCAB = 264
TOKENS = mx.array([[0, 263, 5], [5, 131, 262]])
FORMATS = [
    ("affine", 64, 4, mx.bfloat16),
    ("affine", 32, 8, mx.float16),
    ("affine", 64, 3, mx.bfloat16),
    ("affine", 128, 6, mx.float32),
    ("mxfp4", 32, 4, mx.bfloat16),
    ("mxfp8", 32, 8, mx.bfloat16),
    ("nvfp4", 16, 4, mx.bfloat16),
]


def _plain(width: int, dtype: mx.Dtype) -> nn.Embedding:
    embedding = nn.Embedding(VOCAB, width)
    embedding.weight = draw(0, VOCAB, width, dtype=dtype, scale=0.05)
    return embedding


def _quantised(width: int, mode: str, group: int, bits: int, dtype: mx.Dtype) -> nn.Module:
    return _plain(width, dtype).to_quantized(group, bits, mode)


def _exact(embedding: nn.Module, tokens: mx.array) -> np.ndarray:
    """Decoded in float32; the module is not as it was afterwards."""
    if "scales" not in embedding or embedding.mode == "affine":
        embedding.set_dtype(mx.float32)
    return exact(embedding(tokens))


def _beside(width: int, dtype: mx.Dtype) -> mx.array:
    return draw(1, *TOKENS.shape, width, dtype=dtype)


def _check(embedding: nn.Module, scale: float, dtype: mx.Dtype = BF16) -> None:
    reference = embed_tokens_reference(embedding, TOKENS, scale, None, dtype)
    found = embed_tokens_metal(embedding, TOKENS, scale, None, dtype)
    assert found.dtype == dtype
    rounded = exact(mx.array(scale, reference.dtype))
    check_errors([found], [reference], [_exact(embedding, TOKENS) * rounded])


@pytest.mark.parametrize(
    "width, dtype", list(zip([1536, 192, 160, 128], [*DTYPES, mx.bfloat16], strict=True))
)
def test_a_plain_table(metal: object, width: int, dtype: mx.Dtype) -> None:
    _check(_plain(width, dtype), width**0.5, dtype)


@pytest.mark.parametrize("width", [2560, 3840, 2816, 5376, 192, 160])
def test_four_bits(metal: object, width: int) -> None:
    _check(_quantised(width, "affine", 32 if width % 64 else 64, 4, mx.bfloat16), width**0.5)


@pytest.mark.parametrize("mode, group, bits, dtype", FORMATS)
def test_formats(metal: object, mode: str, group: int, bits: int, dtype: mx.Dtype) -> None:
    _check(_quantised(256, mode, group, bits, dtype), 16.0, dtype)


@pytest.mark.parametrize("path", [embed_tokens_metal, embed_tokens_reference])
@pytest.mark.parametrize(
    "stored, dtype",
    [
        (mx.float16, BF16),
        (mx.float32, BF16),
        (BF16, mx.float16),
        (mx.float16, mx.float32),
    ],
)
def test_scales_of_another_dtype_lose_nothing(
    metal: object, path: Callable[..., mx.array], stored: mx.Dtype, dtype: mx.Dtype
) -> None:
    """Two roundings to the model's dtype, of the weight and of its product; plain tables too."""
    table = _quantised(256, "affine", 32, 4, mx.float32)
    for embedding in (table, _plain(256, stored)):
        if "scales" in embedding:
            embedding.scales, embedding.biases = (
                part.astype(stored) for part in (embedding.scales, embedding.biases)
            )
        found = path(embedding, TOKENS, 16.0, _beside(256, dtype), dtype)
        assert found.dtype == dtype and mx.array_equal(found[..., 256:], _beside(256, dtype))
        right = 16 * _exact(embedding, TOKENS)
        decoding = 2**-22 * np.abs(right).max()  # in float32, which `right` is too
        allowed = (2 * ROUNDING[dtype] + ROUNDING[dtype] ** 2) * np.abs(right) + decoding
        assert (np.abs(exact(found[..., :256]) - right) <= allowed).all()


@pytest.mark.parametrize("width", [2560, 160])
def test_something_beside(metal: object, width: int) -> None:
    embedding, beside = _plain(width, mx.bfloat16), _beside(width, mx.bfloat16)
    found = embed_tokens_metal(embedding, TOKENS, 3.1, beside, BF16)
    assert mx.array_equal(found, embed_tokens_reference(embedding, TOKENS, 3.1, beside, BF16))


@pytest.mark.parametrize("threads", [64, 128])
def test_other_threadgroups(metal: object, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    embedding = _quantised(2560, "affine", 64, 4, mx.bfloat16)
    beside = _beside(2560, mx.bfloat16)
    expected = embed_tokens_metal(embedding, TOKENS, 2.0, beside, BF16)
    monkeypatch.setattr(EMBED, "threads", threads)
    assert mx.array_equal(embed_tokens_metal(embedding, TOKENS, 2.0, beside, BF16), expected)


def test_tokens_do_not_see_each_other(metal: object) -> None:
    embedding = _quantised(192, "affine", 64, 4, mx.bfloat16)
    tokens = mx.arange(0, VOCAB, 3).reshape(8, 11)
    together = embed_tokens_metal(embedding, tokens, None, None, BF16)
    for row, place in [(0, 0), (3, 7), (7, 10)]:
        token = tokens[row : row + 1, place : place + 1]
        assert mx.array_equal(
            embed_tokens_metal(embedding, token, None, None, BF16)[0, 0], together[row, place]
        )
    check_errors([together], [embedding(tokens)], [_exact(embedding, tokens)])


def test_views(metal: object) -> None:
    """Hidden states of a verify pass's accepted positions, tokens of one step of many."""
    embedding = _plain(128, mx.bfloat16)
    tokens = mx.stack([TOKENS, TOKENS + 1], axis=-1)[..., 0]
    beside = mx.stack([_beside(128, mx.bfloat16)] * 2, axis=2)[:, :, 1]
    found = embed_tokens_metal(embedding, tokens, 1.5, beside, BF16)
    assert mx.array_equal(found, embed_tokens_reference(embedding, tokens, 1.5, beside, BF16))


def test_the_path_follows_the_device(metal: object) -> None:
    """On a GPU, the kernel: it rounds a decoded weight once, MLX the product and the sum."""
    embedding = _quantised(2560, "affine", 64, 4, mx.bfloat16)
    found = embed_tokens(embedding, TOKENS, 2.0, None, BF16)
    assert mx.array_equal(found, embed_tokens_metal(embedding, TOKENS, 2.0, None, BF16))
    assert not mx.array_equal(found, embed_tokens_reference(embedding, TOKENS, 2.0, None, BF16))


def test_a_table_without_a_kernel(metal: object) -> None:
    with pytest.raises(ValueError, match="264 x 40 plain"):
        embed_tokens_metal(_plain(40, mx.bfloat16), TOKENS, 2.0, None, BF16)
