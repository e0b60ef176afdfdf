"""What follows the blocks of timm's transformers, for one token alone: norms, pool and head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers.opening import plain_type


class AfterBlocks:
    """The maps that a token goes through after the blocks, if it is the only one that is pooled.

    An average or maximum of one token is that token. An attention pool has a softmax over one key,
    which is 1. Dropout is left out.

    Args:
        trunk: timm's VisionTransformer or Eva.
        head: The modules behind ``trunk``, one of which may be its classifier.
    """

    def __init__(self, trunk: Any, head: list[nn.Module]) -> None:
        pool = trunk.attn_pool
        modules = [*_flat(trunk.norm), pool, *_flat(trunk.fc_norm)]
        for module in head:
            modules.extend(_flat(module))
        self._modules: list[Any] = [module for module in modules if module is not None]
        norm, projection = None, None
        if self._modules and _is_projection(self._modules[-1]):
            projection = self._modules.pop()
        if self._modules and isinstance(self._modules[-1], nn.LayerNorm):
            norm = self._modules.pop()
        self.joint_space = JointSpace(
            getattr(norm, "weight", None),
            getattr(norm, "bias", None),
            getattr(norm, "eps", None),
            None if projection is None else projection.weight.T,
        )

    def compared_tokens(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, K), up to what is a :class:`JointSpace`."""
        if not self._modules:
            return hidden
        own = (parameter for module in self._modules for parameter in module.parameters())
        home = next(own, hidden).device  # not the tokens' in a replica of nn.DataParallel
        tokens = hidden.to(home)
        for module in self._modules:
            is_pool = isinstance(module, AttentionPoolLatent)
            tokens = _pool_each(module, tokens) if is_pool else module(tokens)
        return tokens.to(hidden.device)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a sequence, without those that change nothing outside of training."""
    if isinstance(module, nn.Sequential):
        for each in module:
            yield from _flat(each)
    elif not isinstance(module, (nn.Identity, nn.Dropout)):
        yield module


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is None


def _pool_each(pool: Any, tokens: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, E): the pool of each token alone, alike for all of its queries."""
    width = pool.kv.out_features // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[width:]
    pooled = pool.proj(F.linear(tokens, pool.kv.weight[width:], bias))
    return pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))


def refuse_pool(trunk: Any) -> None:
    """Refuse a transformer of timm's that pools in a way without features of single tokens.

    Raises:
        ValueError: It does.
    """
    pool = trunk.attn_pool
    if pool is None:
        if not trunk.global_pool:
            raise ValueError(
                "model keeps all its tokens (global_pool=''), so it has no features of an image; "
                "make it with global_pool='token' or 'avg'"
            )
        return
    if plain_type(pool) is not AttentionPoolLatent or pool.pos_embed is not None or not pool.pool:
        kind = type(pool).__name__
        of_positions = " with positions" if getattr(pool, "pos_embed", None) is not None else ""
        raise ValueError(
            f"model pools its image tokens by its {kind}{of_positions}; what that makes of a "
            "single token is known of timm's AttentionPoolLatent alone, without positions and with "
            "one output"
        )
