"""Who computes what mixes a token's channels, and so decides whether its bits depend on company.

OWN: the kernels of this folder, whose results for a position have the same bits whatever else is
computed with it. STOCK: MLX's own, which sum in another order for one position than for several.
On a CPU both are the same operations, which do not depend on company there.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gemma_mtp_mlx.kernels.verify_experts import experts, experts_reference
from gemma_mtp_mlx.kernels.verify_matmul import (
    gated,
    gated_by,
    gated_by_reference,
    gated_reference,
    project,
    project_reference,
)


class Arithmetic(NamedTuple):
    """The operations of a pass, as `verify_matmul` and `verify_experts` define them."""

    project: Callable[..., list[mx.array]]
    gated: Callable[[mx.array, nn.Module, nn.Module], mx.array]
    gated_by: Callable[[mx.array, nn.Module, mx.array], mx.array]
    experts: Callable[..., mx.array]


OWN = Arithmetic(project, gated, gated_by, experts)
STOCK = Arithmetic(project_reference, gated_reference, gated_by_reference, experts_reference)
