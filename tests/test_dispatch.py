"""What MLX's kernels read, worked by hand from its rules. No kernel is run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemma_mtp_mlx.chips import find
from gemma_mtp_mlx.dispatch import (
    Gpu,
    Heads,
    Weights,
    attention,
    distinct_experts,
    gather_qmm,
    is_fast,
    is_fused,
    is_two_pass,
    plain_matmul,
    quantized_matmul,
    row_limit,
    split_k,
)

M1, M3, M5 = find("M1 Max").gpu, find("M3 Max").gpu, find("M5 Max").gpu
ULTRA = find("M3 Ultra").gpu
# 31B's up projection, 26B-A4B's query projection of a sliding layer, E2B's per-layer gate.
LARGE, MIDDLE, SMALL = Weights(21_504, 5376), Weights(4096, 2816), Weights(256, 1536)


def test_chips_are_told_apart_by_their_architecture() -> None:
    assert Gpu.parse("applegpu_g16s") == find("M4 Pro").gpu == find("M4 Max").gpu
    assert Gpu.parse("applegpu_g13g") == find("M1").gpu
    assert Gpu.parse("applegpu_g15d") == find("M3 Ultra").gpu
    assert [find(name).gpu.tensor_units for name in ("M4 Max", "M5")] == [False, True]
    with pytest.raises(ValueError, match="x86_64"):
        Gpu.parse("x86_64")


def test_bytes_of_weights() -> None:
    # Four bits, and a 16-bit scale and bias for 64: half a byte and a sixteenth.
    assert LARGE.nbytes == LARGE.out_width * LARGE.in_width * 0.5625
    assert Weights(128, 64, bits=8, group=32).nbytes == 128 * 64 * 1.125


@pytest.mark.parametrize(
    "chip, limits",
    [(M1, (14, 10, 6)), (M3, (13, 15, 13)), (M5, (33, 25, 13)), (ULTRA, (32, 18, 12))],
)
def test_rows_from_which_on_tiles_are_used(chip: Gpu, limits: tuple[int, int, int]) -> None:
    assert tuple(row_limit(chip, w) for w in (SMALL, MIDDLE, LARGE)) == limits


def test_widths_the_fast_kernel_takes() -> None:
    # Of 4 bits: multiples of 512. E2B, E4B and all inner widths, but no other hidden size.
    widths = {1536: True, 2560: True, 10_240: True, 21_504: True, 4096: True}
    widths |= {2816: False, 3840: False, 5376: False, 2112: False, 704: False}
    assert {width: is_fast(Weights(512, width)) for width in widths} == widths
    assert is_fast(Weights(512, 2816, bits=8)) and not is_fast(Weights(514, 2560))


@pytest.mark.parametrize(
    "chip, rows, kernel, passes",
    [
        (M1, 1, "qmv", 1),
        (M1, 5, "qmv", 5),
        (M1, 6, "qmm", 1),
        (M1, 32, "qmm", 1),
        (M1, 33, "qmm", 2),
        (M3, 1, "qmv", 1),
        (M3, 2, "qmv_wide", 1),
        (M3, 5, "qmv_wide", 1),
        (M3, 6, "qmv_wide", 2),
        (M3, 11, "qmv_wide", 3),
        (M3, 12, "qmv_wide", 3),
        (M3, 13, "qmm", 1),
        (M5, 12, "qmv_wide", 3),
        (M5, 16, "qmm_nax", 1),
        (M5, 64, "qmm_nax", 1),
        (M5, 65, "qmm_nax", 2),
    ],
)
def test_passes_over_a_large_matrix(chip: Gpu, rows: int, kernel: str, passes: int) -> None:
    call = quantized_matmul(chip, LARGE, rows)
    assert (call.kernel, call.passes, call.launches) == (kernel, passes, 1)
    assert call.bytes == passes * LARGE.nbytes and not call.extra_bytes


def test_small_heads_take_the_quad_kernel() -> None:
    assert quantized_matmul(M3, Weights(256, 128), 4)[:3] == ("qmv_quad", 1, 4)


def test_sums_of_a_few_tiles_are_split() -> None:
    # 5376 rows are 168 tiles: 3 of 512 fit, and 21,504 = 3 * 112 * 64 divides.
    down = Weights(5376, 21_504)
    assert split_k(down, 16) == 3
    call = quantized_matmul(M3, down, 16)
    assert call[:3] == ("qmm_splitk", 2, 1)
    assert call.extra_bytes == 2 * 3 * 16 * 5376 * 4  # written and read back in float32
    # 21,504 rows are 672 tiles already. 2112 are 66: 7, but 44 groups of 64 divide by 4 at most.
    assert split_k(LARGE, 16) == 1
    assert split_k(Weights(2112, 2816), 16) == 4
    assert quantized_matmul(M5, down, 16).kernel == "qmm_splitk"  # without tensor units


def test_experts_are_read_once_per_pair() -> None:
    up = Weights(704, 2816)
    for tokens in (1, 2, 8, 32, 63):
        call = gather_qmm(M3, up, 128, tokens, 8)
        assert call[:3] == ("gather_qmv", 1, 8 * tokens)
        assert call.bytes == 8 * tokens * 704 * 2816 * 0.5625
    call = gather_qmm(M3, up, 128, 64, 8)  # four pairs per expert
    assert call.kernel == "gather_qmm_rhs" and 128 <= call.passes < 512
    assert gather_qmm(M3, Weights(2816, 704), 128, 4, 8).kernel == "gather_qmv"
    assert gather_qmm(M3, Weights(704, 2560), 128, 4, 8).kernel == "gather_qmv_fast"


def test_distinct_experts() -> None:
    counts = {1: 8.0, 2: 15.5, 4: 29.1, 8: 51.6, 16: 82.4, 32: 111.8, 64: 125.9}
    found = {tokens: round(distinct_experts(128, tokens, 8), 1) for tokens in counts}
    assert found == counts


# Query and key/value heads of sliding (256) and full (512) layers.
SLIDING = {
    "E2B": Heads(8, 1, 256),
    "E4B": Heads(8, 2, 256),
    "12B": Heads(16, 8, 256),
    "26B-A4B": Heads(16, 8, 256),
    "31B": Heads(32, 16, 256),
}
FULL = {
    "E2B": Heads(8, 1, 512),
    "E4B": Heads(8, 2, 512),
    "12B": Heads(16, 1, 512),
    "26B-A4B": Heads(16, 2, 512),
    "31B": Heads(32, 4, 512),
}


def most_fused(heads: Heads, keys: int) -> int:
    return max((n for n in range(1, 17) if is_fused(heads, n, keys)), default=0)


def test_positions_that_sliding_layers_fuse() -> None:
    found = {model: most_fused(heads, 512) for model, heads in SLIDING.items()}
    assert found == {"E2B": 4, "E4B": 8, "12B": 8, "26B-A4B": 8, "31B": 8}
    assert not is_fused(SLIDING["31B"], 4, 3)  # more positions than keys


def test_full_layers_fuse_one_position_of_eight_heads() -> None:
    found = {model: most_fused(heads, 1024) for model, heads in FULL.items()}
    assert found == {"E2B": 1, "E4B": 0, "12B": 0, "26B-A4B": 1, "31B": 1}
    assert not is_fused(FULL["31B"], 1, 1023)
    assert not is_fused(FULL["31B"], 1, 4096, mask=True)


def test_every_query_head_reads_keys_again() -> None:
    # 26B-A4B, sliding: two query heads share a key head; four positions read it eight times.
    call = attention(M3, SLIDING["26B-A4B"], 1, 4, 1023, mask="causal")
    assert call[:3] == ("sdpa_vector", 1, 8)
    assert call.bytes == 8 * (8 * 1023 * 256 * 2 * 2) and not call.extra_bytes


def test_keys_of_large_chips_are_split_earlier() -> None:
    heads = SLIDING["26B-A4B"]
    assert is_two_pass(M3, heads, 1024) and not is_two_pass(M3, heads, 1023)
    assert is_two_pass(find("M3").gpu, heads, 4096) and not is_two_pass(find("M3").gpu, heads, 4095)
    assert attention(M3, heads, 1, 4, 1024)[:2] == ("sdpa_vector_2pass", 2)
    # 16 heads, 4 positions, 64 parts (1024 keys) of 256 16-bit sums, a peak and a total.
    assert attention(M3, heads, 1, 4, 1024).extra_bytes == 2 * 16 * 4 * 64 * (512 + 8)


def test_masks_of_ragged_batches_are_written_out() -> None:
    # Eight rows, 32 heads, eight positions, 8192 keys: 16.8 MB of booleans, written and read.
    heads = Heads(32, 8, 128)
    call = attention(M3, heads, 8, 8, 8192, mask="array")
    without = attention(M3, heads, 8, 8, 8192)
    assert call.extra_bytes - without.extra_bytes == 2 * 8 * 32 * 8 * 8192
    assert call.launches == without.launches + 1
    assert attention(M3, heads, 1, 8, 8192, mask="array").launches == without.launches


def test_unfused_attention_writes_its_scores() -> None:
    # 31B, full, K = 3 over 8192 keys: four reads of K and V per query group of eight, not fused.
    call = attention(M3, FULL["31B"], 1, 4, 8192, mask="causal")
    assert call.kernel == "unfused" and call.passes == 8
    assert call.extra_bytes == 6 * 2 * (32 * 4 * 8192)
    assert attention(M3, FULL["E4B"], 1, 1, 8192)[:2] == ("unfused", 4)


def test_what_older_versions_lack() -> None:
    old = [quantized_matmul(M3, LARGE, rows, wide=False).kernel for rows in (1, 5, 13)]
    assert old == ["qmv", "qmv", "qmm"]
    assert quantized_matmul(M1, replace(LARGE, mode="mxfp4", group=32), 4).kernel == "qmv_wide"
    assert quantized_matmul(M1, LARGE, 4).kernel == "qmv"


def test_bytes_of_floating_point_and_plain_weights() -> None:
    assert Weights(64, 128, 8, 32, "mxfp8").nbytes == 64 * 128 + 64 * 4
    assert Weights(64, 128, 4, 16, "nvfp4").nbytes == 64 * 64 + 64 * 8
    assert Weights(64, 128, 16, 1, "plain").nbytes == 2 * 64 * 128


@pytest.mark.parametrize(
    "chip, rows, wide, kernel, passes",
    [
        (M3, 1, True, "gemv", 1),
        (M3, 15, True, "gemv_wide", 1),
        (M3, 15, False, "gemm", 1),
        (M3, 65, True, "gemm", 2),
        (M1, 4, True, "gemm", 1),
        (M5, 16, True, "gemm_nax", 1),
    ],
)
def test_plain_weights_are_multiplied_in_tiles_of_64(
    chip: Gpu, rows: int, wide: bool, kernel: str, passes: int
) -> None:
    plain = Weights(LARGE.out_width, LARGE.in_width, 16, 1, "plain")
    call = plain_matmul(chip, plain, rows, wide=wide)
    assert (call.kernel, call.passes, call.bytes) == (kernel, passes, plain.nbytes)


def test_sums_of_plain_weights_are_split_for_want_of_tiles() -> None:
    narrow = Weights(2048, 8192, 16, 1, "plain")
    assert [plain_matmul(M1, narrow, rows).kernel for rows in (16, 512)] == ["gemm_splitk", "gemm"]


def test_heads_that_share_one_row_s_keys_are_one_gemm() -> None:
    one, two = Heads(8, 1, 512), Heads(8, 2, 512)
    assert attention(M3, one, 1, 4, 4096, mask="causal").passes == 1
    assert attention(M3, one, 4, 4, 4096, mask="array").passes == 8
    assert attention(M3, two, 1, 4, 4096, mask="causal").passes == 4
