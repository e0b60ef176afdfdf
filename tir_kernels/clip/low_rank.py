"""Low-rank adaptation of a packed query, key and value projection (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """The low-rank change of the query, key and value projections of one attention module.

    ``delta = (dropout(x) A^T) B^T * alpha / sqrt(rank)`` for each of the three, each with dropout
    of its own. Only products with the (rank, width) factors are formed, never B A.

    Args:
        width: Width D of the tokens.
        rank, alpha, dropout: As in the formula.
        passes_input_gradient: Whether the branch passes a gradient on to the tokens. Without it,
            only the factors learn from the branch.
        device: Of the factors.

    Attributes:
        a: (3, rank, width), drawn as ``nn.Linear`` draws its weights by default.
        b: (3, width, rank), zero at first, so that the model starts unchanged.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        alpha: float,
        dropout: float,
        passes_input_gradient: bool,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3, rank, width, device=device))
        self.b = nn.Parameter(torch.zeros(3, width, rank, device=device))
        self.scaling = alpha / math.sqrt(rank)
        self.dropout = dropout
        self.passes_input_gradient = passes_input_gradient
        for factor in self.a.unbind():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, 3 D)."""
        rows = tokens.flatten(0, -2)
        if not self.passes_input_gradient:
            rows = rows.detach()
        # A model may be of low precision throughout; the factors stay in float32.
        a, b = self.a.to(rows.dtype), (self.b * self.scaling).to(rows.dtype)
        if self.training and self.dropout > 0:
            compressed = torch.bmm(_drop(rows.expand(3, *rows.shape), self.dropout), a.mT)
        else:  # one product serves all three
            compressed = F.linear(rows, a.flatten(0, 1)).view(len(rows), 3, -1).transpose(0, 1)
        delta = torch.bmm(compressed, b.mT)
        return delta.transpose(0, 1).reshape(*tokens.shape[:-1], -1)


def _drop(rows: Tensor, probability: float) -> Tensor:
    """Dropout; on a CPU with the probability rounded to a multiple of 2^-16.

    There F.dropout draws a double per element, which takes longer than the products it serves: here
    four elements share a draw of 64 bits.
    """
    if rows.device.type != "cpu":
        return F.dropout(rows, probability)
    threshold = min(round(probability * 2**16), 2**16 - 1)
    draws = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: rows.numel()].view(rows.shape)
    keep = (bits >= threshold - 2**15).to(rows.dtype)
    return rows * keep.mul_(1 / (1 - threshold / 2**16))
