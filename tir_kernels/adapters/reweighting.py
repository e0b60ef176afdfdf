"""Dynamic token re-weighting in the blocks of an image tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels import (
    JointSpace,
    TokenWeights,
    WeightRule,
    reweighted_attention,
    token_weights,
    weighted_attention,
)
from tir_kernels.adapters.block_change import default_layers, resolved_layers
from tir_kernels.adapters.handle import Handle, handles_on
from tir_kernels.adapters.placing import placed
from tir_kernels.adapters.selection import PatchOrder, hand_out
from tir_kernels.rules import PLACEMENTS
from tir_kernels.towers import vision_tower
from tir_kernels.towers.protocol import AttentionCall, Modifier, VisionTower


class Reweighting(Handle):
    """Handle of :func:`add_reweighting`; as a context manager it removes itself at the end.

    It is a setting of the model: threads that use the model at once share its class embeddings, and
    each entry of ``last_counts`` is that of whichever thread was last. Threads with classes of
    their own take copies of the model; :func:`reweighting_of` gives a copy's handle.

    Attributes:
        layers: The vision blocks that are re-weighted.
        placement: Where the weights act: "tokens", "attention", "both" or "values".
        table: (C + 1,) weights per count instead of the rule's, or ``None``.
        last_counts: Block -> (B, N) int32, how many classes selected each patch token in the last
            forward pass. A pass that is only traced for export leaves none.
    """

    def __init__(
        self,
        tower: VisionTower,
        layers: tuple[int, ...],
        placement: str,
        rule: WeightRule,
        table: Tensor | None,
        backend: str,
        order: PatchOrder | None,
    ) -> None:
        self.layers = layers
        self.placement = placement
        self.table = table
        self.last_counts: dict[int, Tensor] = {}
        self._tower = tower
        self._rule = rule
        self._backend = backend
        self._order = order
        self._class_embeddings: Tensor | None = None
        self._ready: Callable[[], None] | None = None
        blocks = tower.blocks
        self._places = [(blocks[layer], _ReweightedBlock(self, layer)) for layer in layers]
        try:
            self._put()
        except TypeError:  # and a block that cannot be opened leaves none changed
            self.remove()
            raise

    def _put(self) -> None:
        # An order of the patches may look at the attention.
        changes_attention = self.placement != "tokens" or self._order is not None
        for block, adapter in self._places:
            block.put(adapter, changes_attention)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Have the model without the re-weighting inside of the context."""
        for block, adapter in self._places:
            block.take(adapter)
        try:
            yield
        finally:
            self._put()

    @property
    def class_embeddings(self) -> Tensor:
        """The classes that were set."""
        if self._class_embeddings is None:
            raise RuntimeError(
                "class embeddings are not set: call handle.set_class_embeddings((C, E) tensor) "
                "before the model's first forward pass; reweighting_of(model) gives the handle"
            )
        ready, self._ready = self._ready, None
        if ready is not None:
            ready()
        return self._class_embeddings

    def weights(self, tokens: Tensor, layer: int) -> TokenWeights:
        """The weights (B, L) and counts (B, N) of tokens (B, L, D) that enter block ``layer``.

        With an order of the patches, both are handed out in it.
        """
        weights, counts = token_weights(**self._inputs(tokens))
        if self._order is None:
            return TokenWeights(weights, counts)
        block = next(block for block, adapter in self._places if adapter.layer == layer)
        prefix = self._tower.num_prefix_tokens
        with torch.no_grad():
            order = self._order(block, layer, tokens, prefix)
        parts = [weights[:, :prefix], hand_out(weights[:, prefix:], counts, order)]
        return TokenWeights(torch.cat(parts, 1), hand_out(counts, counts, order))

    def set_class_embeddings(
        self, class_embeddings: Tensor, ready: Callable[[], None] | None = None
    ) -> None:
        """Set the classes whose relevance decides; needed before the first forward pass.

        Args:
            class_embeddings: (C, E), or (G, C, E) for G groups of images; no gradient flows to it.
            ready: Called once before they are first read, for what another stream of a GPU makes.

        Raises:
            TypeError, ValueError: No tensor of such a shape.
        """
        if not isinstance(class_embeddings, Tensor):
            raise TypeError(
                f"class_embeddings must be a tensor; got {type(class_embeddings).__name__}"
            )
        if class_embeddings.dim() not in (2, 3):
            raise ValueError(
                "class_embeddings must have shape (C, E) or (G, C, E); "
                f"got {tuple(class_embeddings.shape)}"
            )
        self._class_embeddings, self._ready = class_embeddings.detach(), ready

    def remove(self) -> None:
        for block, adapter in self._places:
            block.take(adapter)
        self._places = []

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        """The operators' arguments for tokens (B, L, D) that enter a block."""
        class_embeddings = self.class_embeddings
        space, table = self._tower.joint_space, self.table
        with torch.no_grad():  # none flows through counts
            compared = self._tower.compared_tokens(tokens)
        parts = [part for part in (space.norm_weight, space.proj) if part is not None]
        if parts and parts[0].device != tokens.device:  # in a replica of nn.DataParallel
            class_embeddings = class_embeddings.to(tokens.device)
            table = None if table is None else table.to(tokens.device)
            space = _moved(space, tokens.device)
        return {
            "tokens": compared,
            "class_embeddings": class_embeddings,
            "joint_space": space,
            "rule": self._rule,
            "table": table,
            "num_prefix_tokens": self._tower.num_prefix_tokens,
            "backend": self._backend,
        }

    def _keep(self, layer: int, counts: Tensor) -> None:
        # Not what a tracer has in place of tensors, which would outlive it.
        if type(counts) is Tensor and not torch.compiler.is_exporting():
            self.last_counts[layer] = counts


def _moved(space: JointSpace, device: torch.device) -> JointSpace:
    def on_device(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device)

    parts = (space.norm_weight, space.norm_bias, space.proj)
    weight, bias, proj = (on_device(part) for part in parts)
    return JointSpace(weight, bias, space.norm_eps, proj)


@dataclass(frozen=True)
class _DerivedKeyWeights:
    """Key weights that the attention's own operator derives from the tokens."""

    handle: Reweighting
    layer: int
    tokens: Tensor

    def attend(self, call: AttentionCall) -> Tensor:
        rows, inputs = (call.query, call.key, call.value), self.handle._inputs(self.tokens)
        if call.is_causal:  # which the operator in one piece is not
            weights, counts = token_weights(**inputs)
            attended = weighted_attention(
                *rows, weights, is_causal=True, scale=call.scale, backend=inputs["backend"]
            )
        else:
            results: Any = reweighted_attention(
                *rows, **inputs, scale=call.scale, return_counts=True
            )
            attended, counts = results
        self.handle._keep(self.layer, counts)
        return attended

    def form(self) -> Tensor:
        return token_weights(**self.handle._inputs(self.tokens)).weights


class _ReweightedBlock:
    """The part of a re-weighting that is on one block."""

    def __init__(self, handle: Reweighting, layer: int) -> None:
        self.handle = handle
        self.layer = layer
        self.backend = handle._backend

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        handle = self.handle
        if handle.placement == "attention" and handle._order is None:
            return hidden, self._derive
        weights, counts = handle.weights(hidden, self.layer)
        handle._keep(self.layer, counts)
        return placed(hidden, weights, handle.placement, self.backend)

    def _derive(self, call: AttentionCall, hidden: Tensor) -> AttentionCall:
        weights = _DerivedKeyWeights(self.handle, self.layer, hidden)
        return call._replace(key_weights=weights, backend=self.backend)


def reweighting_of(model: nn.Module) -> Reweighting:
    """The handle of the re-weighting that is on a model: of a copy, the copy's own.

    A deep copy, a copy with averaged weights or a model that was saved and loaded is re-weighted as
    its original was, by a handle of its own. Replicas of ``nn.DataParallel`` share the original's.

    Args:
        model: A model, or its image tower, that is re-weighted.

    Raises:
        ValueError: It is not.
    """
    handles = handles_on(model, Reweighting)
    if not handles:
        raise ValueError("model is not re-weighted: call add_reweighting(model) first")
    return handles[0]


def add_reweighting(
    model: nn.Module | VisionTower,
    layers: Sequence[int] | None = None,
    placement: str = "tokens",
    rule: WeightRule | str | None = None,
    backend: str = "auto",
    *,
    table: Tensor | None = None,
    order: PatchOrder | None = None,
) -> Reweighting:
    """Re-weight the patch tokens of some vision blocks, in training and evaluation.

    Args:
        model: A model whose image tower can be opened, or that tower.
        layers: Vision blocks, counted from 0, negative ones from the end; ``None`` means depth - 4
            and depth - 2, which is 8 and 10 of 12 (arXiv 2605.25799).
        placement: "tokens" (the block receives the weighted tokens: the published method),
            "attention" (the weights act inside the block's softmax), "both", or "values" (the
            block's attention stays as it is, and the values are weighted: ``v <- w v``).
        rule: A ``WeightRule``, or the name of a kind with its defaults; ``None``: ``WeightRule()``.
        backend: Backend of the operators.
        table: (C + 1,) weights per count instead of the rule's; it may require gradients.
        order: Order of the patches in which each image's counts, and their weights, are handed out,
            the highest first: a control such as ``MostAttended``. ``None``: patches keep their own.

    Returns:
        A handle: ``set_class_embeddings(...)`` before the first forward pass, ``last_counts``
        after it, ``remove()`` to restore the model.

    Raises:
        TypeError, ValueError: An unsuitable model, layer, placement or rule.
        RuntimeError: The model is re-weighted already.
    """
    tower = vision_tower(model)
    adapters = [adapter for block in tower.blocks for adapter in block.adapters]
    if any(isinstance(adapter, _ReweightedBlock) for adapter in adapters):
        raise RuntimeError(
            "model is re-weighted already: call remove() on the handle of its add_reweighting(), "
            "which reweighting_of(model) finds"
        )
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    if rule is None or isinstance(rule, str):
        rule = WeightRule(rule or "linear")
    elif not isinstance(rule, WeightRule):
        raise TypeError(f"rule must be a WeightRule or its kind; got {type(rule).__name__}")
    depth = len(tower.blocks)
    layers = default_layers(depth) if layers is None else resolved_layers(layers, depth)
    return Reweighting(tower, layers, placement, rule, table, backend, order)
