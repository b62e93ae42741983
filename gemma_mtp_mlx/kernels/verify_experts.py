"""The experts that were chosen over the few positions of a pass, weighted and summed: two launches.

Each launch reads the weights of an expert that is in use once for up to 16 tokens that share it. A
token's result has the same bits whatever other tokens are computed with it.
"""

import mlx.core as mx
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from gemma_mtp_mlx.device import on_gpu
from gemma_mtp_mlx.kernels.geglu import geglu
from gemma_mtp_mlx.kernels.kernel import SIMDGROUP, Kernel, Output
from gemma_mtp_mlx.kernels.weights import Packing, few, packing, weight_arrays

Switch = SwitchLinear | QuantizedSwitchLinear

TOKENS = 64  # of a threadgroup, as in verify_experts.metal; more are further threadgroups
MOST = 8  # experts of a token: the sums of TOKENS tokens' take 16 KB of threadgroup memory
TILE = 8  # weight rows

GATE_UP = Kernel(
    "experts_gate_up",
    ["x", "chosen", *(f"{part}{i}" for i in range(2) for part in ("codes", "scales", "biases"))],
    ["h"],
    """
    threadgroup atomic_uint users[2 * EXPERTS];
    threadgroup ushort pairs[THREADS / 32 * TOKENS];
    threadgroup float chains[CHAINS * 4 * 64];
    gate_up<THREADS / 32, TOP, ROWS, FEW>(
        x,
        chosen,
        x_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes0, scales0, biases0, codes0_shape[1], x_shape[1]),
        weights<FORMAT, BITS, GROUP, RUN>(codes1, scales1, biases1, codes0_shape[1], x_shape[1]),
        EXPERTS,
        h,
        users,
        pairs,
        chains,
        threadgroup_position_in_grid,
        simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
    ["verify_experts"],
    threads=128,
)

DOWN = Kernel(
    "experts_down",
    ["h", "chosen", "factors", "codes", "scales", "biases"],
    ["y"],
    """
    threadgroup atomic_uint users[2 * EXPERTS];
    threadgroup ushort pairs[THREADS / 32 * TOKENS];
    threadgroup float sums[TOKENS * TOP * 8];
    down<THREADS / 32, TOP, ROWS, FEW>(
        h,
        chosen,
        factors,
        chosen_shape[0],
        weights<FORMAT, BITS, GROUP, RUN>(codes, scales, biases, codes_shape[1], h_shape[1]),
        EXPERTS,
        y,
        users,
        pairs,
        sums,
        threadgroup_position_in_grid,
        simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """,
    ["verify_experts"],
)


def experts(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    gate: Switch,
    up: Switch,
    down: Switch,
) -> mx.array:
    """Return the sum of each token's experts' outputs, weighted.

    x: [..., K] in the model's dtype; chosen: [..., k] int32, a token's experts, no two alike;
    weights: [..., k] float32; gate and up [experts, F, K], down [experts, K, F] without a
    bias, gate and up alike in shape and format.
    Returns: [..., K] in x.dtype; sums in float32, in the order of `chosen`.
    Raises: ValueError for weights that have no kernel.
    """
    if on_gpu():
        return experts_metal(x, chosen, weights, gate, up, down)
    return experts_reference(x, chosen, weights, gate, up, down)


def experts_reference(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    gate: Switch,
    up: Switch,
    down: Switch,
) -> mx.array:
    """The definition, in MLX's own operations."""
    rows = x[..., None, None, :]
    h = geglu(_chosen_matmul(gate, rows, chosen), _chosen_matmul(up, rows, chosen))
    outputs = _chosen_matmul(down, h, chosen).squeeze(-2)
    return (outputs * weights[..., None].astype(x.dtype)).sum(axis=-2)


def _chosen_matmul(proj: Switch, x: mx.array, chosen: mx.array) -> mx.array:
    if isinstance(proj, SwitchLinear) and mx.default_device().type == mx.cpu:
        # MLX's CPU backend has gather_mm in float32 only.
        weight = proj.weight.swapaxes(-1, -2).astype(mx.float32)
        out = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=chosen)
        return out.astype(x.dtype)
    return proj(x, chosen).astype(x.dtype)


def experts_metal(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    gate: Switch,
    up: Switch,
    down: Switch,
) -> mx.array:
    """The same in two launches; only the inner activations and the result are rounded."""
    top_k = chosen.shape[-1]
    assert chosen.shape == weights.shape == (*x.shape[:-1], top_k) and x.size
    assert (chosen.dtype, weights.dtype) == (mx.int32, mx.float32)
    stored = packing(gate)
    if packing(up) != stored or top_k > MOST:
        raise ValueError(
            f"experts whose gate is {stored} and whose up is {packing(up)}, {top_k} for a token, "
            f"have no kernel: it takes gate and up in one format and at most {MOST} for a token. "
            "Run with --fast, which uses MLX's kernels."
        )
    flat, pairs = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, top_k)
    count, width, _ = gate.weight.shape
    assert up.weight.shape == gate.weight.shape and down.weight.shape[:2] == (count, x.shape[-1])
    tiles, sizes = -(-len(flat) // TOKENS), {"EXPERTS": count, "TOP": top_k}
    rows = TILE * GATE_UP.threads // SIMDGROUP
    (h,) = GATE_UP.launch(
        [flat, pairs, *weight_arrays(gate), *weight_arrays(up)],
        # No more experts are in use than there are, or than pairs.
        (-(-width // rows), min(count, min(len(flat), TOKENS) * top_k), tiles),
        [Output((pairs.size, width), x.dtype)],
        {**_constants(stored, x.shape[-1]), **sizes},
    )
    (y,) = DOWN.launch(
        [h, pairs, weights.reshape(-1, top_k), *weight_arrays(down)],
        (x.shape[-1] // TILE, 1, tiles),
        [Output(flat.shape, x.dtype)],
        # Weight rows are short here: small units leave fewer chains without one.
        {**_constants(packing(down), width), **sizes, "RUN": 8},
    )
    return y.reshape(x.shape)


def _constants(stored: Packing, width: int) -> dict[str, int]:
    """A lane takes two weight rows of a matrix if that leaves it registers."""
    rows = 2 if stored.bits <= 4 else 1
    return {**stored.template(width), "ROWS": rows, "FEW": few(stored)}
