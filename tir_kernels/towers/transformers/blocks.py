"""Encoder layers of transformers, whose attention goes through the library's own registry.

No forward of an attention is replaced. While an adapter is on it, its configuration names the
function that is registered here, which gets the modifiers of the pass under way in the place of the
mask: every attention of the library hands that on as it is, and threads don't meet in an argument.
A pass without modifiers goes to the function that the user has chosen for the model; of PyTorch's
own, to this package's where that is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

from tir_kernels.towers.attention import (
    OpenedAttention,
    OpenedLinear,
    attend,
    attention_matrix,
    is_faster_than_pytorch,
    join_heads,
    split_heads,
)
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.mlp import OpenedMlp
from tir_kernels.towers.opening import Changes, Opened, put_on, require_own_forward, take_off
from tir_kernels.towers.products import through
from tir_kernels.towers.protocol import AttentionCall, Linear
from tir_kernels.towers.transformers.pools import OpenedSiglip2Head, OpenedSiglipHead

REGISTERED_NAME = "tir_kernels"


class _Pass(NamedTuple):
    """What one pass gives to a block's attention instead of its mask."""

    mask: Tensor | None
    changes: Changes


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: (B, H, L, d) each -> (B, L, H, d), and its matrix."""
    call = AttentionCall(query, key, value, scaling, backend=module.named_backend)
    if not isinstance(attention_mask, _Pass):
        if attention_mask is None and _is_plain(module, query, options):
            call = call._replace(is_causal=_is_causal(module, options))
            return attend(call).transpose(1, 2).contiguous(), None
        chosen = module.chosen_attention
        return chosen(module, query, key, value, attention_mask, scaling=scaling, **options)
    mask = attention_mask.mask
    # A mask of the library's hides later tokens itself.
    is_causal = mask is None and _is_causal(module, options)
    call = call._replace(mask=None if mask is None else _added(mask), is_causal=is_causal)
    call = attention_mask.changes.of(call)
    attended = attend(call).transpose(1, 2).contiguous()
    if module.chosen_name != "eager":
        return attended, None
    return attended, attention_matrix(call).to(attended.dtype)


def _is_plain(module: Any, query: Tensor, options: dict[str, Any]) -> bool:
    """Whether PyTorch's own attention was chosen where this package's is faster."""
    is_pytorchs = module.chosen_attention is sdpa_attention_forward
    return is_pytorchs and not options.get("dropout") and is_faster_than_pytorch(query)


def _added(mask: Tensor) -> Tensor:
    """A mask as it is added to the scores, also where it says what is kept."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _is_causal(module: Any, options: dict[str, Any]) -> bool:
    is_causal = options.get("is_causal")
    return bool(module.is_causal if is_causal is None else is_causal)


AttentionInterface.register(REGISTERED_NAME, _attention)


class _Configuration:
    """A module's configuration, but for the attention function that it names."""

    _attn_implementation = REGISTERED_NAME

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _Attention(OpenedAttention):
    """The library's attention, with room for modifiers; its forward stays the library's."""

    eager: ClassVar[Callable[..., Any]]
    num_heads: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    @property
    def config(self) -> Any:
        return _Configuration(self.__dict__["config"])

    @property
    def chosen_name(self) -> str:
        """The attention function of the model's own configuration."""
        return self.__dict__["config"]._attn_implementation or "eager"

    @property
    def chosen_attention(self) -> Callable[..., Any]:
        name = self.chosen_name
        return type(self).eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]

    @property
    def named_backend(self) -> str:
        return self._backend

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        owners = [self.q_proj, self.k_proj, self.v_proj][parts]
        return tuple(
            split_heads(through(each, tokens), self.num_heads, slice(0, 1))[0] for each in owners
        )

    def output(self, attended: Tensor) -> Tensor:
        return through(self.out_proj, join_heads(attended))


class _OpenedClipAttention(_Attention, modeling_clip.CLIPAttention):
    plain = modeling_clip.CLIPAttention
    eager = staticmethod(modeling_clip.eager_attention_forward)


class _OpenedSiglipAttention(_Attention, modeling_siglip.SiglipAttention):
    plain = modeling_siglip.SiglipAttention
    eager = staticmethod(modeling_siglip.eager_attention_forward)


class _OpenedSiglip2Attention(_Attention, modeling_siglip2.Siglip2Attention):
    plain = modeling_siglip2.Siglip2Attention
    eager = staticmethod(modeling_siglip2.eager_attention_forward)


class _Layer(Opened):
    """The library's encoder layer, with adapters on it."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Tensor:
        hidden, changes = self.enter(hidden_states)
        if changes.modifiers:
            attention_mask = _Pass(attention_mask, changes)
        return self.plain_forward(hidden, attention_mask, **options)


class _OpenedClipLayer(_Layer, modeling_clip.CLIPEncoderLayer):
    plain = modeling_clip.CLIPEncoderLayer


class _OpenedSiglipLayer(_Layer, modeling_siglip.SiglipEncoderLayer):
    plain = modeling_siglip.SiglipEncoderLayer


class _OpenedSiglip2Layer(_Layer, modeling_siglip2.Siglip2EncoderLayer):
    plain = modeling_siglip2.Siglip2EncoderLayer

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Tensor:
        if attention_mask is not None and _hides(attention_mask):
            raise ValueError(
                "pixel_attention_mask hides padded patches, which adapters on the image's blocks "
                "would take for patches of the image; pass images whose grids have all patches, "
                "without padding"
            )
        return super().forward(hidden_states, None, **options)


class _Mlp(OpenedMlp):
    """The library's MLP, alike in all of these models."""

    kinds: ClassVar[Mapping[type, str]] = {
        nn.GELU: "gelu",
        GELUActivation: "gelu",
        QuickGELUActivation: "quick_gelu",
        GELUTanh: "gelu_tanh",
    }
    fc1: nn.Module
    activation_fn: nn.Module
    fc2: nn.Module

    def in_turn(self) -> list[nn.Module]:
        return [self.fc1, self.activation_fn, self.fc2]


class _OpenedClipMlp(_Mlp, modeling_clip.CLIPMLP):
    plain = modeling_clip.CLIPMLP


class _OpenedSiglipMlp(_Mlp, modeling_siglip.SiglipMLP):
    plain = modeling_siglip.SiglipMLP


class _OpenedSiglip2Mlp(_Mlp, modeling_siglip2.Siglip2MLP):
    plain = modeling_siglip2.Siglip2MLP


def _hides(mask: Tensor) -> bool:
    """Whether a mask, of booleans, of 0 and 1 or added to the scores, hides any token."""
    hidden = mask < 0 if mask.is_floating_point() else mask == 0
    return bool(hidden.any())


class TransformersBlock(BlockBase):
    """An encoder layer of CLIP, SigLIP or SigLIP 2."""

    attention_name = "self_attn"
    opened: ClassVar[Mapping[type, type[Opened]]] = {
        **{each.plain: each for each in (_OpenedClipLayer, _OpenedSiglipLayer)},
        _OpenedSiglip2Layer.plain: _OpenedSiglip2Layer,
        **{each.plain: each for each in (_OpenedClipAttention, _OpenedSiglipAttention)},
        _OpenedSiglip2Attention.plain: _OpenedSiglip2Attention,
        nn.Linear: OpenedLinear,
        **{each.plain: each for each in (_OpenedClipMlp, _OpenedSiglipMlp, _OpenedSiglip2Mlp)},
        **{each.plain: each for each in (OpenedSiglipHead, OpenedSiglip2Head)},
    }

    @property
    def _projections(self) -> dict[str, Any]:
        return {name: getattr(self.attention, f"{name}_proj") for name in ("q", "k", "v")}

    @property
    def linears(self) -> dict[str, Linear]:
        self.check_attention()
        for name, owner in self._projections.items():
            if type(owner) not in (nn.Linear, OpenedLinear):
                raise TypeError(
                    f"LoRA needs plain nn.Linear projections, but model's {name}_proj is a "
                    f"{type(owner).__name__}; load the model unquantised, without other adapters"
                )
            require_own_forward(owner)
        return {
            name: Linear(owner, (1, owner.out_features, owner.in_features))
            for name, owner in self._projections.items()
        }

    def norm_first(self, hidden: Tensor) -> Tensor:
        return self.module.layer_norm1(hidden)

    def check_attention(self) -> None:
        attention = self.attention
        if isinstance(attention, _Attention):
            return
        if type(attention) not in self.opened or attention.dropout > 0:
            raise TypeError(
                "model's blocks must use the attention of transformers' CLIP or SigLIP without "
                f"dropout to take LoRA or placement 'attention'; got {type(attention).__name__}. "
                "Set attention_dropout to 0 in its configurations, or choose placement 'tokens' "
                "without LoRA"
            )
        require_own_forward(attention)

    def put_low_rank(self, owner: Any, low_rank: nn.Module, handle: Any) -> None:
        super().put_low_rank(owner, low_rank, handle)
        if not any(each is handle for each in getattr(self.attention, "tir_adapters", ())):
            put_on(self.attention, handle, self.opened)  # for first_tokens

    def take_low_rank(self, owner: Any, handle: Any) -> None:
        super().take_low_rank(owner, handle)
        take_off(self.attention, handle)

    def __call__(self, hidden: Tensor, mask: Any = None) -> Tensor:
        options: dict[str, Any] = {"attention_mask": None}
        if isinstance(mask, KnownMask):
            if self._knows_causality:
                options["is_causal"] = mask.is_causal
                mask = None
            else:
                mask = mask.tensor()
        if mask is not None:
            options["attention_mask"] = mask.to(hidden.dtype)[None, None]
        return self.module(hidden, **options)

    @property
    def _knows_causality(self) -> bool:
        """Whether the chosen attention is causal by an option, without a mask."""
        name = self.attention.__dict__["config"]._attn_implementation or "eager"
        if "flash" in name:  # which takes no mask
            return True
        return name != "eager" and ALL_ATTENTION_FUNCTIONS[name] is sdpa_attention_forward

    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None:
        block = self.module
        # An adapter on the block needs all its tokens.
        if isinstance(block, Opened) or not isinstance(block.self_attn, _Attention):
            return None
        if "forward" in vars(block):
            return None
        attended = block.self_attn.first_tokens(block.layer_norm1(hidden), count)
        first = hidden[:, :count] + attended
        return first + block.mlp(block.layer_norm2(first))


def blocks_of(encoder: Any, path: str) -> list[TransformersBlock]:
    return [
        TransformersBlock(layer, f"{path}encoder.layers.{index}")
        for index, layer in enumerate(encoder.layers)
    ]


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length) float32, added to the scores: each token sees itself and those before."""
    hidden = torch.full((length, length), float("-inf"), dtype=torch.float32, device=device)
    return hidden.triu_(1)
