"""More attention of the class token to chosen patches, by a change of its scores (PAINT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tir_kernels.adapters.block_change import BlockChange, resolved_layers
from tir_kernels.adapters.sinks import above_quartiles
from tir_kernels.rules import ratio
from tir_kernels.scalars import finite_number
from tir_kernels.towers import vision_tower
from tir_kernels.towers.attention import AttentionRule, attend, attention_matrix, hide_later
from tir_kernels.towers.protocol import AttentionCall, Block, Modifier, VisionTower


class InformedTokens(NamedTuple):
    """Patches (B, N), bool each, that the class token attends to more; none is in both."""

    local: Tensor
    summary: Tensor


@torch.no_grad()
def informed_tokens(
    model: nn.Module | VisionTower, images: Tensor, local_share: float = 0.25
) -> InformedTokens:
    """The patches that PAINT turns up, from the class token's attention in two blocks.

    Summary tokens are those above Q3 + 1.5 (Q3 - Q1) in the last block but one; local tokens are
    the share that is most attended in the first block, without the summary tokens. Attention is the
    sum over heads.

    Args:
        model: A model whose image tower can be opened, or that tower, without changes on it.
        images: (B, 3, H, W), or the tokens (B, L, D) that enter the first block.
        local_share: Share of the patches, in [0, 1].

    Raises:
        TypeError, ValueError: A tower without a class token, or a share outside [0, 1].
    """
    tower = _with_class_token(model)
    hidden = tower.embed(images) if images.dim() == 4 else images
    prefix, blocks = tower.num_prefix_tokens, tower.blocks
    rows: dict[int, Tensor] = {}
    last = max(len(blocks) - 2, 0)
    for layer, block in enumerate(blocks[: last + 1]):
        if layer in (0, last):
            rows[layer] = _class_token_row(block, hidden)[..., prefix:].sum(1)
        if layer < last:
            hidden = block(hidden)
    summary = above_quartiles(rows[last])
    first = rows[0].argsort(dim=1, descending=True, stable=True)
    count = int(ratio("local_share", local_share) * first.shape[1])
    local = torch.zeros_like(summary).scatter_(1, first[:, :count], True)
    return InformedTokens(local & ~summary, summary)


def _class_token_row(block: Block, hidden: Tensor) -> Tensor:
    """(B, H, L), what the class token gives to each key."""
    twin, reader = block.twin(), _Reader()
    twin.put(reader, changes_attention=True)
    call = twin.attention_of(hidden)
    return attention_matrix(call._replace(query=call.query[:, :, :1]))[:, :, 0]


class _Reader:
    """An adapter that changes nothing: it opens a block's attention, so that it can be read."""

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        return hidden, None


class Informed(AttentionRule):
    """Attention whose class token has scores ``a + gain |a|`` for some keys.

    Args:
        gains: (B, L), 0 for keys that stay as they are.
        before: The call without the rule.
    """

    def __init__(self, gains: Tensor, before: AttentionCall) -> None:
        self.gains = gains
        self.before = before

    def _row(self, call: AttentionCall) -> Tensor:
        """(B, H, 1, L) attention of the class token."""
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        scores = scale * call.query[:, :, :1].float() @ call.key.float().mT
        scores = scores + self.gains[:, None, None] * scores.abs()
        return (hide_later(scores) if call.is_causal else scores).softmax(-1)

    def attend(self, call: AttentionCall) -> Tensor:
        plain = attend(call._replace(key_weights=None, backend=self.before.backend))
        first = (self._row(call) @ call.value.float()).to(plain.dtype)
        return torch.cat([first, plain[:, :, 1:]], 2)

    def matrix(self, call: AttentionCall) -> Tensor:
        plain = attention_matrix(call._replace(key_weights=None))
        return torch.cat([self._row(call), plain[:, :, 1:]], 2)


class PayingAttention(BlockChange):
    """Handle of :func:`add_paying_attention`."""

    def __init__(
        self,
        tower: VisionTower,
        layers: Sequence[int],
        gains: tuple[float, float],
        backend: str,
    ) -> None:
        self.local_gain, self.summary_gain = gains
        self._tokens: InformedTokens | None = None
        super().__init__(tower, layers, backend)

    def set_tokens(self, tokens: InformedTokens | None) -> None:
        """Set the patches of the images that come next; ``None``: the model is as it was."""
        self._tokens = tokens

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        if self._tokens is None:
            return hidden, None
        local, summary = self._tokens
        if len(local) != len(hidden):
            raise ValueError(
                f"tokens were set for {len(local)} images, but {len(hidden)} came: call "
                "set_tokens(informed_tokens(model, images)) for these"
            )
        gains = self.local_gain * local.float() + self.summary_gain * summary.float()
        gains = torch.nn.functional.pad(gains, (hidden.shape[1] - gains.shape[1], 0))

        def pay(call: AttentionCall, hidden: Tensor) -> AttentionCall:
            if call.key_weights is not None:
                raise ValueError(
                    "scores of the class token cannot be changed beside weights of its keys; "
                    "remove() one of the two"
                )
            before = call._replace(backend=self.backend)
            return before._replace(key_weights=Informed(gains, before))

        return hidden, pay


def add_paying_attention(
    model: nn.Module | VisionTower,
    local_gain: float = 0.7,
    summary_gain: float = 0.3,
    layers: Sequence[int] | None = None,
    backend: str = "auto",
) -> PayingAttention:
    """Let the class token attend more to chosen patches: their scores a become ``a + gain |a|``.

    Patches are set for each batch of images: ``handle.set_tokens(informed_tokens(model, images))``
    in front of ``model.encode_image(images)``.

    Args:
        model: A model whose image tower can be opened, or that tower.
        local_gain, summary_gain: Of the two kinds of patches; at 0 their scores stay as they are.
        layers: Vision blocks, counted from 0, negative ones from the end; ``None``: from 2 on.
        backend: Backend of the other tokens' attention.

    Raises:
        TypeError, ValueError: A tower without a class token, an unsuitable gain or layer.
    """
    tower = _with_class_token(model)
    depth = len(tower.blocks)
    chosen = range(2, depth) if layers is None else resolved_layers(layers, depth)
    gains = finite_number("local_gain", local_gain), finite_number("summary_gain", summary_gain)
    return PayingAttention(tower, chosen, gains, backend)


def _with_class_token(model: nn.Module | VisionTower) -> VisionTower:
    tower = vision_tower(model)
    if tower.num_prefix_tokens < 1 or not getattr(tower, "has_class_token", True):
        kind = type(getattr(tower, "module", tower)).__name__
        raise TypeError(
            f"model's image tower, a {kind}, has no class token, whose attention this changes; "
            "choose an architecture that has one, such as ViT-B-16"
        )
    return tower
