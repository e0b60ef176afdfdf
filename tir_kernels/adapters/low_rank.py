"""Low-rank adaptation of packed linear maps (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.adapters.frozen_projection import Dropping, FrozenProjection
from tir_kernels.adapters.one_pass import shared_parts
from tir_kernels.operators.choose import backend_with
from tir_kernels.precision import autocast_dtype


@dataclass(frozen=True)
class PhiloxRandomness:
    """The source of a layer's dropout when it must not depend on what else is trained.

    Args:
        seeds: (G,) int64, one an episode.
        step: (1,) int64, changed in place from step to step.
        stream: The layer's own.
    """

    seeds: Tensor
    step: Tensor
    stream: int


@dataclass(frozen=True)
class LowRankSettings:
    """The settings of a low-rank change.

    Args:
        rank, alpha, dropout: As in the formula of :class:`LowRank`.
        passes_input_gradient: Whether the branch passes a gradient on to the tokens. Without it,
            only the factors learn from the branch.
        num_episodes: G; ``None``: one set of factors, without the leading dimension.
        backend: Backend of dropout, and of unweighted attention behind the change.
    """

    rank: int
    alpha: float
    dropout: float
    passes_input_gradient: bool = True
    num_episodes: int | None = None
    backend: str = "auto"


class LowRank(nn.Module):
    """The low-rank change of K linear maps of the same tokens that are packed into one matrix.

    ``delta = (dropout(x) A^T) B^T * alpha / sqrt(rank)`` for each of the K, each with dropout of
    its own. With episodes, the batch falls into that many equal parts, each with factors of its
    own.

    Args:
        shape: Number of maps K, their output width O and the width D of the tokens.
        settings: Rank, alpha and the like.
        device: Of the factors; ``None``: the CPU.

    Attributes:
        a: (K, rank, D) or (G, K, rank, D), drawn as ``nn.Linear`` draws its weights.
        b: (K, O, rank) or (G, K, O, rank), zero at first: the model starts unchanged.
        randomness: What drops; ``None``: PyTorch's own generator.
        forms_product: Multiply with B A, (O, D), instead of with its factors in turn.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        settings: LowRankSettings,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        count, output, width = shape
        rank = settings.rank
        episodes = () if settings.num_episodes is None else (settings.num_episodes,)
        place: dict[str, Any] = {"dtype": torch.float32, "device": device or "cpu"}
        with torch.inference_mode(False):  # where it is on, nothing could learn
            self.a = nn.Parameter(torch.empty(*episodes, count, rank, width, **place))
            self.b = nn.Parameter(torch.zeros(*episodes, count, output, rank, **place))
        self.scaling = settings.alpha / math.sqrt(rank)
        self.dropout = settings.dropout
        self.backend = backend_with(settings.backend, "philox_dropout")
        self.passes_input_gradient = settings.passes_input_gradient
        self.randomness: PhiloxRandomness | None = None
        self.forms_product = False
        self.draw()

    @torch.no_grad()
    def draw(self, generators: Sequence[torch.Generator] | None = None) -> None:
        """Draw A anew, with one generator of the CPU an episode where they are given."""
        a = self.a if self.a.dim() == 4 else self.a[None]
        for index, own in enumerate(a):
            for factor in own:
                if generators is None:
                    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
                else:  # the same numbers on every device
                    drawn = torch.empty(factor.shape, dtype=torch.float32, device="cpu")
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generators[index])
                    factor.copy_(drawn)

    def product(self) -> Tensor:
        """The change of the weight, (K O, D) float32, or (G, K O, D) of several episodes."""
        return torch.matmul(self.b * self.scaling, self.a).flatten(-3, -2)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, K O)."""
        num_episodes = 1 if self.a.dim() == 3 else len(self.a)
        rows = tokens.reshape(num_episodes, -1, *tokens.shape[-2:])
        if not self.passes_input_gradient:
            rows = rows.detach()
        # A model may be of low precision throughout; the factors stay in float32.
        a, b = self.a.to(rows.dtype), (self.b * self.scaling).to(rows.dtype)
        a, b = (factor.view(num_episodes, *factor.shape[-3:]) for factor in (a, b))
        inputs = self._drop(rows).flatten(2, 3) if self._drops else rows.flatten(1, 2)[:, None]
        if self.forms_product:
            delta = torch.matmul(inputs, torch.matmul(b, a).mT)  # (G, K, rows, O)
        elif self._drops:
            delta = torch.matmul(torch.matmul(inputs, a.mT), b.mT)
        else:  # one product serves them all
            compressed = torch.matmul(inputs[:, 0], a.flatten(1, 2).mT)
            delta = torch.matmul(compressed.unflatten(2, (a.shape[1], -1)).transpose(1, 2), b.mT)
        return delta.transpose(1, 2).reshape(*tokens.shape[:-1], -1)

    def _drop(self, rows: Tensor) -> Tensor:
        """(G, S, L, D) -> (G, K, S, L, D), dropped for each map by itself."""
        count = self.a.shape[-3]
        if self.randomness is None:
            return F.dropout(rows[:, None].expand(-1, count, -1, -1, -1), self.dropout)
        seeds, step, stream = self.randomness.seeds, self.randomness.step, self.randomness.stream
        dropping = Dropping(seeds, step, stream, 0, self.dropout, self.backend)
        return rows[:, None] * dropping.of(torch.ones_like(rows), count)

    def project(
        self,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: int = 0,
        count: int | None = None,
    ) -> Tensor:
        """The adapted projection: ``tokens weight^T + bias`` and the change, as one.

        Args:
            tokens: (B, L, D).
            weight, bias: (K O, D) and (K O,) of all maps.
            first, count: Which of the maps are wanted; ``None``: all from the first on.

        Returns:
            (B, L, count O).
        """
        count = self.a.shape[-3] - first if count is None else count
        width = self.b.shape[-2]
        chosen = slice(first * width, (first + count) * width)
        weight, bias = weight[chosen], None if bias is None else bias[chosen]
        is_frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        is_repeatable = not self._drops or self.randomness is not None
        is_fusible = is_frozen and is_repeatable and not self.passes_input_gradient
        if is_fusible and not self.forms_product:
            a, b, dropping = self._parts(tokens, first, count)
            return FrozenProjection.apply(tokens, weight, bias, a, b, dropping)
        projected = F.linear(tokens, weight, bias)
        return projected + self(tokens)[..., chosen].to(projected.dtype)

    def _parts(self, tokens: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Any]:
        """A (G, K, rank, D), scaled B (G, K, O, rank) and the dropout of some of the maps."""
        dtype = autocast_dtype(tokens.device.type) or tokens.dtype
        shared = shared_parts(self, dtype)
        if shared is None:
            a, b = self.a.to(dtype), (self.b * self.scaling).to(dtype)
        else:
            a, b = shared.a, shared.b
        a, b = (factor if factor.dim() == 4 else factor[None] for factor in (a, b))
        if count < a.shape[1]:
            a, b = (factor[:, first : first + count] for factor in (a, b))
        if not self._drops or self.randomness is None:
            return a, b, None
        seeds, step, stream = self.randomness.seeds, self.randomness.step, self.randomness.stream
        step = step.clone() if shared is None else shared.step
        return a, b, Dropping(seeds, step, stream, first, self.dropout, self.backend)
