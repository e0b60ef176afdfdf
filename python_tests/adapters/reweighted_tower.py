"""The re-weighted image tower in plain PyTorch, and models to compare it with."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from oracle import pick_counts, plain_relevance
from tiny_clip import (
    ATTENTION_POOL,
    OWN_BLOCKS,
    each_alone,
    make_class_embeddings,
    make_clip,
    swap_token_order,
)
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers import vision_tower

PLACEMENTS = ("tokens", "attention", "both", "values")


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "clip": make_clip,
    "custom text": lambda: make_clip(custom_text=True),
    "length first": lambda: swap_token_order(make_clip()),
    "quick gelu": lambda: make_clip(quick_gelu=True),
    "no first norm, layer scale": lambda: make_clip({"no_ln_pre": True, "ls_init_value": 0.3}),
    "average pooling": lambda: make_clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "no projection": lambda: without_projection(make_clip()),
    "own blocks": lambda: make_clip(OWN_BLOCKS),
    "attention pool": lambda: make_clip(ATTENTION_POOL),
}


def without_projection(model: nn.Module) -> nn.Module:
    model.visual.proj = None
    return model


def classes_for(model: nn.Module, *groups: int) -> Tensor:
    width = 32 if model.visual.proj is None else 16
    return make_class_embeddings(*groups, 5, width)


def linear_table(strength: float = 0.5) -> Tensor:
    return torch.tensor([1.0, *(1 - strength * (count - 3) for count in range(1, 6))])


def plain_attention(
    attention: nn.Module, tokens: Tensor, weights: Tensor, of_values: Tensor
) -> Tensor:
    projected = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in projected.chunk(3, -1))
    is_own = isinstance(attention, Attention)
    if is_own:
        q, k = attention.ln_q(q), attention.ln_k(k)
    v = of_values[..., None, None] * v
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    terms = weights.clamp(min=0)[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    sums = terms.sum(-1, keepdim=True)
    attended = torch.einsum("bhij,bjhd->bihd", terms / sums.where(sums > 0, 1.0), v)
    if is_own:
        attended = attended * attention.head_scale.squeeze(2)
        return attention.out_proj(attention.ln_inner(attended.flatten(2)))
    return attention.out_proj(attended.flatten(2))


def plain_block(block: nn.Module, tokens: Tensor, weights: Tensor, placement: str) -> Tensor:
    ones = torch.ones_like(weights)
    if placement in ("tokens", "both"):
        tokens = weights[..., None] * tokens
    inside = weights if placement in ("attention", "both") else ones
    of_values = weights if placement == "values" else ones
    attended = plain_attention(block.attn, block.ln_1(tokens), inside, of_values)
    tokens = tokens + block.ls_1(getattr(block, "ln_attn", nn.Identity())(attended))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def plain_encode_image(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    layers: tuple[int, ...],
    placement: str,
    table: Tensor | None = None,
    top_ratio: float = 0.3,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The re-weighted tower, block by block, and the counts of the re-weighted blocks."""
    tower = model.visual
    table = linear_table() if table is None else table
    tokens = tower._embeds(images)
    all_counts = {}
    for layer, block in enumerate(tower.transformer.resblocks):
        weights = torch.ones(tokens.shape[:2])
        if layer in layers:
            if tower.attn_pool is None:
                entered, space = tokens.detach(), vision_tower(tower).joint_space
            else:
                entered, space = each_alone(tower, tokens).detach(), JointSpace(norm_eps=None)
            relevance = plain_relevance(entered, classes, space, 1)
            counts = pick_counts(relevance, int(16 * top_ratio))
            weights = torch.cat([weights[:, :1], table[counts.long()]], dim=1)
            all_counts[layer] = counts
        tokens = plain_block(block, tokens, weights, placement)
    pooled, _ = tower._pool(tokens)
    return pooled if tower.proj is None else pooled @ tower.proj, all_counts
