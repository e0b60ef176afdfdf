"""The Muon optimizer in float32: momentum whose matrices are made orthogonal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors and singular values of 0.7 to 1.2."""
    a, b, c = _QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.mT if is_tall else matrix
    result = result / result.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = result @ result.mT
        result = a * result + (b * gram + c * gram @ gram) @ result
    return result.mT if is_tall else result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal steps, for the matrices inside a transformer's blocks.

    torch.optim.Muon computes in bfloat16, which takes a CPU without such instructions as long as
    the rest of the training step. Here the projections of queries, keys and values, which lie in
    one matrix, are also made orthogonal each for itself.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float = 3e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step along the gradients."""
        for group in self.param_groups:
            keep = group["momentum"]
            for matrix in group["params"]:
                state = self.state[matrix]
                mean = state.setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - keep)
                ahead = matrix.grad.lerp(mean, keep)
                rows, columns = matrix.shape
                parts = ahead.chunk(3) if rows == 3 * columns else (ahead,)
                # Entries as large as AdamW's are, so that both take much the same rates.
                size = 0.2 * max(parts[0].shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(
                    torch.cat([orthogonal(part) for part in parts]), alpha=group["lr"] * size
                )
