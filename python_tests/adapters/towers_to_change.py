"""Small models of each family, with one way to encode images, for changes of the forward pass."""

from collections.abc import Callable
from typing import Any

import small_transformers
import timm_models
from tiny_clip import ATTENTION_POOL, OWN_BLOCKS, make_clip, swap_token_order
from torch import Tensor, nn

MODELS: dict[str, Callable[[], Any]] = {
    "open_clip": make_clip,
    "length first": lambda: swap_token_order(make_clip()),
    "own blocks": lambda: make_clip(OWN_BLOCKS),
    "average": lambda: make_clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "attention pool": lambda: make_clip(ATTENTION_POOL),
    "timm": timm_models.MODELS["pre-norm ViT"],
    "timm registers": timm_models.MODELS["DINOv2 with registers"],
    "timm SigLIP": timm_models.MODELS["SigLIP"],
    "rotary": timm_models.MODELS["EVA-02"],
    "transformers CLIP": small_transformers.make_clip,
    "transformers SigLIP": small_transformers.make_siglip,
}


def encode(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, E), by the model's own function."""
    if hasattr(model, "get_image_features"):
        return small_transformers.image_features(model, images)
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)
