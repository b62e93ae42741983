"""Muon: momentum whose update is replaced by the nearest semi-orthogonal matrix.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon): Nesterov momentum, five quintic Newton-Schulz steps with
the published coefficients, and the sqrt(max(1, rows / columns)) step scale. Weight decay is
decoupled.
"""

from collections import defaultdict

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return a stack [N, R, C] with all singular values moved to about one."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights; equal shapes are orthogonalised as one stack."""

    def __init__(
        self, weights: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(weights, settings)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonalise(torch.stack([self.nesterov(w, group) for w in weights]))
                lr = group["lr"]
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - lr * group["weight_decay"])
                    weight.add_(update, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)

    def nesterov(self, weight: Tensor, group: dict) -> Tensor:
        """Update the weight's momentum and return the look-ahead gradient."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
        return torch.lerp(weight.grad, state["momentum"], group["momentum"])
