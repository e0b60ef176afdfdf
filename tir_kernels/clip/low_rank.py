"""Low-rank adaptation of a packed query, key and value projection (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The low-rank change of the query, key and value projections of one attention module.

    ``delta = (dropout(x) A^T) B^T * alpha / sqrt(rank)`` for each of the three, each with dropout
    of its own. Only products with the (rank, width) factors are formed, never B A. With groups,
    the batch falls into that many equal parts, each with factors of its own.

    Args:
        width: Width D of the tokens.
        rank, alpha, dropout: As in the formula.
        passes_input_gradient: Whether the branch passes a gradient on to the tokens. Without it,
            only the factors learn from the branch.
        device: Of the factors.
        num_groups: G; ``None``: one set of factors, without the leading dimension.

    Attributes:
        a: (3, rank, width) or (G, 3, rank, width), drawn as ``nn.Linear`` draws its weights.
        b: (3, width, rank) or (G, 3, width, rank), zero at first: the model starts unchanged.
        generators: One a group, which drop for it whatever the other groups do; ``None``: PyTorch's
            own.
        lengths: Where the sequences of a group are padded: how long they truly are. The padding
            takes no random numbers.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        alpha: float,
        dropout: float,
        passes_input_gradient: bool,
        device: torch.device | None,
        num_groups: int | None = None,
    ) -> None:
        super().__init__()
        groups = () if num_groups is None else (num_groups,)
        self.a = nn.Parameter(torch.empty(*groups, 3, rank, width, device=device))
        self.b = nn.Parameter(torch.zeros(*groups, 3, width, rank, device=device))
        self.scaling = alpha / math.sqrt(rank)
        self.dropout = dropout
        self.passes_input_gradient = passes_input_gradient
        self.generators: Sequence[torch.Generator] | None = None
        self.lengths: Sequence[int] | None = None
        self.draw()

    def draw(self) -> None:
        """Draw A anew, with the generators where there are some."""
        groups = self.a.detach().unflatten(0, (-1, 3)) if self.a.dim() == 3 else self.a.detach()
        for index, group in enumerate(groups):
            generator = None if self.generators is None else self.generators[index]
            for factor in group:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, 3 D)."""
        num_groups = 1 if self.a.dim() == 3 else len(self.a)
        rows = tokens.reshape(num_groups, -1, tokens.shape[-1])
        if not self.passes_input_gradient:
            rows = rows.detach()
        # A model may be of low precision throughout; the factors stay in float32.
        a, b = self.a.to(rows.dtype), (self.b * self.scaling).to(rows.dtype)
        a, b = (factor.view(num_groups, *factor.shape[-3:]) for factor in (a, b))
        if self.training and self.dropout > 0:
            compressed = torch.matmul(self._drop(rows, tokens.shape[1]), a.mT)
        else:  # one product serves all three
            compressed = torch.matmul(rows, a.flatten(1, 2).mT)
            compressed = compressed.unflatten(2, (3, -1)).transpose(1, 2)
        delta = torch.matmul(compressed, b.mT)  # (G, 3, rows, D)
        return delta.transpose(1, 2).reshape(*tokens.shape[:-1], -1)

    def _drop(self, rows: Tensor, length: int) -> Tensor:
        """(G, rows, D) -> (G, 3, rows, D), dropped for each projection by itself.

        Each group takes as many random numbers as it would alone.
        """
        num_groups, num_rows, width = rows.shape
        keep = rows.new_zeros(num_groups, 3, num_rows // length, length, width)
        for group, each in enumerate(keep):
            generator = None if self.generators is None else self.generators[group]
            own = each if self.lengths is None else each[:, :, : self.lengths[group]]
            own.copy_(_draw_kept(own.shape, self.dropout, rows.device, generator))
        keep.mul_(1 / (1 - _drawn_probability(self.dropout, rows.device)))
        return rows[:, None] * keep.flatten(2, 3)


def _drawn_probability(probability: float, device: torch.device) -> float:
    """What is drawn in place of a probability: on a CPU a multiple of 2^-16."""
    if device.type != "cpu":
        return probability
    return min(round(probability * 2**16), 2**16 - 1) / 2**16


def _draw_kept(
    shape: Sequence[int],
    probability: float,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """False with the given probability.

    On a CPU PyTorch draws a double per element, which takes longer than the products it serves:
    here four elements share a draw of 64 bits.
    """
    probability = _drawn_probability(probability, device)
    if device.type != "cpu":
        kept = torch.empty(shape, dtype=torch.bool, device=device)
        return kept.bernoulli_(1 - probability, generator=generator)
    count = math.prod(shape)
    draws = torch.empty((count + 3) // 4, dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:count].view(shape) >= int(probability * 2**16) - 2**15
