"""Small models of timm and of open_clip with towers of timm's, by the names of their families."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import timm
import torch
from open_clip.model import CustomTextCLIP
from timm.layers.attention import Attention
from timm.models.eva import Eva
from torch import Tensor, nn

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 3}
SIGLIP_TEXT = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}


def make_alone(name: str, **options: Any) -> nn.Module:
    """A transformer of timm's list, of 4 blocks of width 32 for 16 patches, without classifier."""
    return _shaken(lambda: timm.create_model(name, **{**SIZES, "num_classes": 0, **options}))


def make_in_clip(
    name: str,
    pool: str,
    proj: str | None = None,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> CustomTextCLIP:
    """An open_clip model of joint width 32 with such a transformer as image tower."""
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 32}
    smaller = partial(timm.create_model, **{**SIZES, **options})

    def make() -> nn.Module:
        with mock.patch("timm.create_model", smaller):
            return CustomTextCLIP(32, vision, text or TEXT, init_logit_bias=-10)

    return _shaken(make)


def _shaken(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # gains, offsets and queries of pools at rest too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_eva(**options: Any) -> Eva:
    return _shaken(lambda: Eva(**{**SIZES, "num_classes": 0, **options}))


def make_gated() -> nn.Module:
    def make() -> nn.Module:
        model = timm.create_model("vit_small_patch16_224", **SIZES, num_classes=0)
        for block in model.blocks:
            block.attn = Attention(32, 2, qkv_bias=True, gated=True)
        return model

    return _shaken(make)


_CONV = {"patch_size": 1, "embed_dim": 384, "depth": 4, "num_heads": 6, "img_size": 64}
MODELS: dict[str, Callable[[], Any]] = {
    "PE-Core": partial(make_in_clip, "vit_pe_core_tiny_patch16_384", "map", attn_pool_num_heads=4),
    "SigLIP": partial(
        make_in_clip, "vit_base_patch16_siglip_224", "map", proj="none", text=SIGLIP_TEXT
    ),
    "EVA": partial(make_in_clip, "eva_giant_patch14_224", "token"),
    "EVA-02": partial(make_in_clip, "eva02_base_patch16_clip_224", "token"),
    "EVA-02 E": partial(make_in_clip, "eva02_enormous_patch14_clip_224", "token"),
    "ViTamin": partial(make_in_clip, "vitamin_small_224", "", proj="linear", **_CONV),
    "pre-norm ViT": partial(make_in_clip, "vit_large_patch14_clip_224", "token"),
    "MLP head": partial(make_in_clip, "vit_small_patch16_224", "avg", proj="mlp"),
    "DINOv2 with registers": partial(make_alone, "vit_small_patch14_reg4_dinov2"),
    "DINOv3": partial(make_alone, "vit_small_patch16_dinov3"),
    "mixed rotary": partial(make_alone, "vit_small_patch16_rope_mixed_224"),
    "register alone": partial(make_alone, "vit_medium_patch16_rope_reg1_gap_256"),
    "distilled": partial(make_alone, "deit_small_distilled_patch16_224"),
    "gate": make_gated,
    "root mean square norm": partial(
        make_alone, "vit_small_patch16_224", norm_layer=timm.layers.RmsNorm
    ),
    "shared keys": partial(
        make_eva,
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
        use_rot_pos_emb=True,
        init_values=0.5,
        attn_only_layer_scale=True,
    ),
    "two norms": partial(make_eva, use_fc_norm=True, use_post_transformer_norm=True),
}
PREFIX = {
    "SigLIP": 0,
    "ViTamin": 0,
    "DINOv2 with registers": 5,
    "DINOv3": 5,
    "distilled": 2,
}
READS = {
    **dict.fromkeys(("EVA", "EVA-02", "EVA-02 E", "pre-norm ViT", "gate"), 1),
    **dict.fromkeys(("DINOv2 with registers", "mixed rotary", "root mean square norm"), 1),
    "distilled": 2,
}


def trunk_of(model: nn.Module) -> Any:
    return model.visual.trunk if isinstance(model, CustomTextCLIP) else model


def encode(model: nn.Module, images: Tensor) -> Tensor:
    """The image features by the library's own forward pass."""
    if isinstance(model, CustomTextCLIP):
        return model.encode_image(images)
    return model(images)


def images_for(model: nn.Module, count: int = 3) -> Tensor:
    height, width = trunk_of(model).patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def make_classes(model: nn.Module) -> Tensor:
    width = 32 if isinstance(model, CustomTextCLIP) else model.embed_dim
    return torch.randn(5, width, generator=torch.Generator().manual_seed(2))
