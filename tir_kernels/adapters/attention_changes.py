"""Changes of attention that need no text: its temperature, and what its sinks receive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tir_kernels import weighted_attention
from tir_kernels.adapters.block_change import BlockChange, default_layers, resolved_layers
from tir_kernels.adapters.placing import placed
from tir_kernels.adapters.sinks import Sinks
from tir_kernels.rules import PLACEMENTS, ratio
from tir_kernels.scalars import finite_number
from tir_kernels.towers import vision_tower
from tir_kernels.towers.attention import AttentionRule, attention_matrix
from tir_kernels.towers.protocol import AttentionCall, Block, Modifier, VisionTower


class AttentionTemperature(BlockChange):
    """Handle of :func:`add_attention_temperature`."""

    def __init__(
        self, tower: VisionTower, layers: Sequence[int], temperature: float, backend: str
    ) -> None:
        self.temperature = temperature
        super().__init__(tower, layers, backend)

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        return hidden, self._scale

    def _scale(self, call: AttentionCall, hidden: Tensor) -> AttentionCall:
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        return call._replace(scale=self.temperature * scale, backend=self.backend)


def add_attention_temperature(
    model: nn.Module | VisionTower,
    temperature: float,
    layers: Sequence[int] | None = None,
    backend: str = "auto",
) -> AttentionTemperature:
    """Multiply the scores of some vision blocks' attention: ``A = softmax(T scale q . k)``.

    At 0 every token attends to all alike.

    Args:
        model: A model whose image tower can be opened, or that tower.
        temperature: T, a finite number.
        layers: Vision blocks, counted from 0, negative ones from the end; ``None``: all.
        backend: Backend of the attention.

    Raises:
        TypeError, ValueError: An unsuitable model, temperature or layer.
    """
    tower = vision_tower(model)
    depth = len(tower.blocks)
    chosen = range(depth) if layers is None else resolved_layers(layers, depth)
    return AttentionTemperature(tower, chosen, finite_number("temperature", temperature), backend)


class SinkSuppression(BlockChange):
    """Handle of :func:`add_sink_suppression`."""

    def __init__(
        self,
        tower: VisionTower,
        layers: Sequence[int],
        sinks: Sinks,
        weight: float,
        placement: str,
        backend: str,
    ) -> None:
        self.sinks = sinks
        self.weight = weight
        self.placement = placement
        super().__init__(tower, layers, backend)

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        prefix = self._num_prefix_tokens
        with torch.no_grad():
            is_sink = self.sinks(block, layer, hidden, prefix)
            weights = torch.ones(hidden.shape[:2], device=hidden.device)
            weights[:, prefix:].masked_fill_(is_sink, self.weight)
        return placed(hidden, weights, self.placement, self.backend)


def add_sink_suppression(
    model: nn.Module | VisionTower,
    sinks: Sinks,
    weight: float = 0.0,
    layers: Sequence[int] | None = None,
    placement: str = "attention",
    backend: str = "auto",
) -> SinkSuppression:
    """Give sinks among the patches of some vision blocks one weight; all other tokens keep 1.

    Args:
        model: A model whose image tower can be opened, or that tower.
        sinks: Which patches are sinks.
        weight: Their weight.
        layers: Vision blocks; ``None``: those of :func:`add_reweighting`.
        placement: Where the weight acts, as in :func:`add_reweighting`.
        backend: Backend of the operators.

    Raises:
        TypeError, ValueError: An unsuitable model, weight, layer or placement.
    """
    tower = vision_tower(model)
    depth = len(tower.blocks)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    chosen = default_layers(depth) if layers is None else resolved_layers(layers, depth)
    weight = finite_number("weight", weight)
    return SinkSuppression(tower, chosen, sinks, weight, placement, backend)


class Redistributed(AttentionRule):
    """Attention that gives a part of what its sinks receive to the other keys.

    With O the attention as it is and R that without the sinks, it is ``p O + (1 - p) R``: R's rows
    are O's other entries, scaled to a sum of 1, so the freed mass goes to them in proportion.

    Args:
        is_sink: (B, L) bool.
        keep: p, the share of its attention that a sink keeps.
        most: Heads and queries that give the sinks more than this stay as they are.
        before: The call without the rule.
    """

    def __init__(self, is_sink: Tensor, keep: float, most: float, before: AttentionCall) -> None:
        self.is_sink = is_sink
        self.keep = keep
        self.most = most
        self.before = before

    def attend(self, call: AttentionCall) -> Tensor:
        weights = self.before.key_weights
        if weights is not None and not isinstance(weights, Tensor):
            weights = weights.form()
        others = (~self.is_sink).float()
        if weights is not None:
            others = others * weights
        attend = partial(
            weighted_attention,
            *(call.query, call.key, call.value),
            is_causal=call.is_causal,
            scale=call.scale,
            backend=self.before.backend,
            return_lse=True,
        )
        plain, lse = attend(weights)
        without, lse_without = attend(others)
        mass = 1 - (lse_without - lse).exp()
        mixed = self.keep * plain + (1 - self.keep) * without
        return torch.where(self._gives(mass)[..., None], mixed, plain)

    def matrix(self, call: AttentionCall) -> Tensor:
        """The attention, (B, H, L, L) float32."""
        plain = attention_matrix(call._replace(key_weights=self.before.key_weights))
        without = plain.masked_fill(self.is_sink[:, None, None], 0)
        left = without.sum(-1, keepdim=True)
        mixed = self.keep * plain + (1 - self.keep) * without / left
        return torch.where(self._gives(1 - left), mixed, plain)

    def _gives(self, mass: Tensor) -> Tensor:
        # Where sinks receive all there is, or nothing, there is nobody to give it to, or nothing.
        return (mass > 0) & (mass < 1) & (mass <= self.most)


class SinkRedistribution(BlockChange):
    """Handle of :func:`add_sink_redistribution`."""

    def __init__(
        self,
        tower: VisionTower,
        layers: Sequence[int],
        sinks: Sinks,
        shares: tuple[float, float],
        backend: str,
    ) -> None:
        self.sinks = sinks
        self.keep, self.most = shares
        super().__init__(tower, layers, backend)

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        prefix = self._num_prefix_tokens
        with torch.no_grad():
            is_sink = self.sinks(block, layer, hidden, prefix)
        is_sink = torch.nn.functional.pad(is_sink, (prefix, 0))

        def redistribute(call: AttentionCall, hidden: Tensor) -> AttentionCall:
            before = call._replace(backend=self.backend)
            rule = Redistributed(is_sink, self.keep, self.most, before)
            return before._replace(key_weights=rule)

        return hidden, redistribute


def add_sink_redistribution(
    model: nn.Module | VisionTower,
    sinks: Sinks,
    keep: float = 0.6,
    most: float = 0.5,
    layers: Sequence[int] | None = None,
    backend: str = "auto",
) -> SinkRedistribution:
    """Let sinks keep a part of the attention they receive; the rest goes to the other keys.

    As in arXiv 2503.03321, where all keys are an image's: the freed attention goes to every key
    that is no sink, class token included, in proportion to what it receives.

    Args:
        model: A model whose image tower can be opened, or that tower.
        sinks: Which patches are sinks.
        keep: The part that sinks keep, in [0, 1]; at 1 nothing changes.
        most: Queries of a head that give sinks more than this share of their attention stay as
            they are, in [0, 1].
        layers: Vision blocks; ``None``: all from block 2 on but the last.
        backend: Backend of the attention.

    Raises:
        TypeError, ValueError: An unsuitable model, share or layer.
    """
    tower = vision_tower(model)
    depth = len(tower.blocks)
    if layers is None and depth < 4:
        raise ValueError(
            f"layers must be given for a tower of {depth} blocks: the default is all from block 2 "
            "on but the last"
        )
    chosen = range(2, depth - 1) if layers is None else resolved_layers(layers, depth)
    shares = ratio("keep", keep), ratio("most", most)
    return SinkRedistribution(tower, chosen, sinks, shares, backend)
