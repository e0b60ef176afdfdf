"""Put dynamic token re-weighting into the vision blocks of an open_clip model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from tir_kernels import WeightRule, reweight_tokens, token_weights

from .attention import close_attention, open_attention
from .towers import joint_space, vision_tower

PLACEMENTS = ("tokens", "attention", "both")

_INSTALLED: weakref.WeakKeyDictionary[nn.Module, Reweighting] = weakref.WeakKeyDictionary()


class Reweighting:
    """Handle of :func:`install`; as a context manager it removes itself at the end.

    Attributes:
        layers: The vision blocks that are re-weighted.
        placement: Where the weights act: "tokens", "attention" or "both".
        last_counts: Block -> (B, N) int32, how many classes selected each patch token in the last
            forward pass.
    """

    def __init__(
        self,
        tower: VisionTransformer,
        layers: tuple[int, ...],
        placement: str,
        rule: WeightRule,
        table: Tensor | None,
        backend: str,
    ) -> None:
        self.layers = layers
        self.placement = placement
        self.last_counts: dict[int, Tensor] = {}
        self._tower = tower
        self._rule = rule
        self._table = table
        self._backend = backend
        self._class_embeddings: Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        blocks = tower.transformer.resblocks
        if placement != "tokens":
            # All are opened before any is marked: a block that cannot be leaves none changed.
            opened = []
            try:
                for layer in layers:
                    opened.append(blocks[layer])
                    open_attention(blocks[layer])
            except TypeError:
                for block in opened[:-1]:
                    close_attention(block)
                raise
            for block in opened:
                block.attn.is_reweighted = True
                block.attn.backend = backend
        for layer in layers:
            self._hooks.append(blocks[layer].register_forward_pre_hook(self._before_block(layer)))
            if placement != "tokens":
                self._hooks.append(blocks[layer].register_forward_hook(_after_block))

    def set_class_embeddings(self, class_embeddings: Tensor) -> None:
        """Set the classes whose relevance decides; needed before the first forward pass.

        Args:
            class_embeddings: (C, E), or (G, C, E) for G groups of images; no gradient flows to it.

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
        self._class_embeddings = class_embeddings.detach()

    def remove(self) -> None:
        """Leave the model as it was before; harmless if done already."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if _INSTALLED.get(self._tower) is not self:
            return
        del _INSTALLED[self._tower]
        if self.placement != "tokens":
            for layer in self.layers:
                block = self._tower.transformer.resblocks[layer]
                block.attn.is_reweighted = False
                block.attn.key_weights = None
                close_attention(block)

    def __enter__(self) -> Reweighting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _before_block(self, layer: int) -> Callable[[Any, tuple], tuple]:
        def reweight(block: Any, inputs: tuple) -> tuple:
            if self._class_embeddings is None:
                raise RuntimeError(
                    "class embeddings are not set: call handle.set_class_embeddings((C, E) tensor) "
                    "before the model's first forward pass"
                )
            hidden, *others = inputs
            batch_first = self._tower.transformer.batch_first
            tokens = hidden if batch_first else hidden.transpose(0, 1)
            weights, counts = token_weights(
                tokens,
                self._class_embeddings,
                joint_space=joint_space(self._tower),
                rule=self._rule,
                table=self._table,
                backend=self._backend,
            )
            self.last_counts[layer] = counts
            if self.placement != "tokens":
                block.attn.key_weights = weights
            if self.placement != "attention":
                tokens = reweight_tokens(tokens, weights)
            return (tokens if batch_first else tokens.transpose(0, 1), *others)

        return reweight


def _after_block(block: Any, inputs: tuple, output: Tensor) -> None:
    block.attn.key_weights = None  # so that no stale weights, or their graph, outlive the pass


def install(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    placement: str = "tokens",
    rule: WeightRule | str | None = None,
    backend: str = "auto",
    *,
    table: Tensor | None = None,
) -> Reweighting:
    """Re-weight the patch tokens of some vision blocks, in training and evaluation.

    Args:
        model: An open_clip model with open_clip's own VisionTransformer, or that tower itself.
        layers: Vision blocks, counted from 0, negative ones from the end; ``None`` means depth - 4
            and depth - 2, which is 8 and 10 of 12 (arXiv 2605.25799).
        placement: "tokens" (the block receives the weighted tokens: the published method),
            "attention" (the weights act inside the block's softmax) or "both".
        rule: A ``WeightRule``, or the name of a kind with its defaults; ``None``: ``WeightRule()``.
        backend: Backend of the operators.
        table: (C + 1,) weights per count instead of the rule's; it may require gradients.

    Returns:
        A handle: ``set_class_embeddings(...)`` before the first forward pass, ``last_counts``
        after it, ``remove()`` to restore the model.

    Raises:
        TypeError, ValueError: An unsuitable model, layer, placement or rule.
        RuntimeError: The model is re-weighted already.
    """
    tower = vision_tower(model)
    if tower in _INSTALLED:
        raise RuntimeError(
            "model is re-weighted already: call remove() on the handle of the first install()"
        )
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    if rule is None or isinstance(rule, str):
        rule = WeightRule(rule or "linear")
    elif not isinstance(rule, WeightRule):
        raise TypeError(f"rule must be a WeightRule or its kind; got {type(rule).__name__}")
    layers = _resolve_layers(layers, len(tower.transformer.resblocks))
    handle = Reweighting(tower, layers, placement, rule, table, backend)
    _INSTALLED[tower] = handle
    return handle


def _resolve_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        if depth < 4:
            raise ValueError(
                f"layers must be given for a tower of {depth} blocks: the default is depth - 4 and "
                "depth - 2"
            )
        return depth - 4, depth - 2
    resolved = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must be whole numbers; got {layer!r}")
        if not -depth <= layer < depth:
            raise ValueError(f"layers must lie between 0 and {depth - 1}; got {layer}")
        resolved.append(layer % depth)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"layers must name each block once; got {tuple(layers)}")
    return tuple(resolved)
