"""Put dynamic token re-weighting into the vision blocks of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from tir_kernels import WeightRule, reweight_tokens, token_weights
from tir_kernels.rules import PLACEMENTS
from tir_kernels.scalars import whole_number
from tir_kernels.towers.attention import close_attention, open_attention
from tir_kernels.towers.open_clip import joint_space, vision_tower


class Reweighting:
    """Handle of :func:`add_reweighting`; as a context manager it removes itself at the end.

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
        self._forwards: list[_ReweightedForward] = []
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
            self._forwards.append(_ReweightedForward(self, blocks[layer], layer))

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
        for forward in self._forwards:
            forward.remove()
        if self._forwards and self.placement != "tokens":
            for layer in self.layers:
                block = self._tower.transformer.resblocks[layer]
                block.attn.is_reweighted = False
                close_attention(block)
        self._forwards.clear()

    def __enter__(self) -> Reweighting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _weights_of(self, layer: int, tokens: Tensor) -> Tensor:
        """(B, L) weights of the tokens (B, L, D) that enter a block; the counts are kept."""
        if self._class_embeddings is None:
            raise RuntimeError(
                "class embeddings are not set: call handle.set_class_embeddings((C, E) tensor) "
                "before the model's first forward pass"
            )
        weights, counts = token_weights(
            tokens,
            self._class_embeddings,
            joint_space=joint_space(self._tower),
            rule=self._rule,
            table=self._table,
            backend=self._backend,
        )
        self.last_counts[layer] = counts
        return weights


class _ReweightedForward:
    """Stands in for the ``forward`` of one block.

    No hook, for ``torch.compile`` takes no notice of a hook registered after compiling. And a
    method of an object that holds the block, for then a deep copy of the model re-weights itself.
    """

    def __init__(self, handle: Reweighting, block: Any, layer: int) -> None:
        self._handle = handle
        self._block = block
        self._layer = layer
        self._plain_forward = block.forward
        self._hidden_attribute = vars(block).get("forward")  # other tools' stand-in, if any
        block.forward = self.forward

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        handle, block = self._handle, self._block
        batch_first = handle._tower.transformer.batch_first
        tokens = hidden if batch_first else hidden.transpose(0, 1)
        weights = handle._weights_of(self._layer, tokens)
        if handle.placement != "attention":
            tokens = reweight_tokens(tokens, weights)
            hidden = tokens if batch_first else tokens.transpose(0, 1)
        if handle.placement == "tokens":
            return self._plain_forward(hidden, *arguments, **options)
        block.attn.key_weights = weights
        try:
            return self._plain_forward(hidden, *arguments, **options)
        finally:  # so that no stale weights, or their graph, outlive the pass
            block.attn.key_weights = None

    def remove(self) -> None:
        if self._hidden_attribute is None:
            del self._block.forward
        else:
            self._block.forward = self._hidden_attribute


def _is_reweighted(block: nn.Module) -> bool:
    forward = vars(block).get("forward")
    return isinstance(getattr(forward, "__self__", None), _ReweightedForward)


def add_reweighting(
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
    if any(_is_reweighted(block) for block in tower.transformer.resblocks):
        raise RuntimeError(
            "model is re-weighted already: call remove() on the handle of its add_reweighting()"
        )
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    if rule is None or isinstance(rule, str):
        rule = WeightRule(rule or "linear")
    elif not isinstance(rule, WeightRule):
        raise TypeError(f"rule must be a WeightRule or its kind; got {type(rule).__name__}")
    layers = _resolve_layers(layers, len(tower.transformer.resblocks))
    return Reweighting(tower, layers, placement, rule, table, backend)


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
        layer = whole_number("layers", layer, "whole numbers")
        if not -depth <= layer < depth:
            raise ValueError(f"layers must lie between 0 and {depth - 1}; got {layer}")
        resolved.append(layer % depth)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"layers must name each block once; got {tuple(layers)}")
    return tuple(resolved)
