"""timm's vision transformers, alone or as the image towers of open_clip models."""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tir_kernels.towers.timm.after_blocks import refuse_pool
from tir_kernels.towers.timm.vision import EvaVision, TimmVision


class Timm:
    """The family of timm's vision transformers."""

    images = "a timm VisionTransformer or Eva, alone or as image tower of an open_clip model"
    texts = ""

    @staticmethod
    def text_tower(model: nn.Module) -> None:
        """Nothing: these towers know images alone."""

    @staticmethod
    def vision_tower(model: Any) -> TimmVision | None:
        """The opened tower, if the model is one or has one.

        Raises:
            ValueError: It is no such transformer, or pools in a way that has no features of single
                tokens.
        """
        tower = getattr(model, "visual", model)
        if isinstance(tower, TimmModel):
            _refuse_trunk(tower.trunk)
            path = "trunk." if tower is model else "visual.trunk."
            return _opened(tower.trunk, path, tower.head)
        return _opened(model) if isinstance(model, (VisionTransformer, Eva)) else None


def _opened(trunk: Any, path: str = "", head: nn.Module | None = None) -> TimmVision:
    refuse_pool(trunk)
    kind = EvaVision if isinstance(trunk, Eva) else TimmVision
    return kind(trunk, path, head)


def _refuse_trunk(trunk: Any) -> None:
    if type(trunk) in (VisionTransformer, Eva):
        return
    name = getattr(trunk, "default_cfg", {}).get("architecture")
    named = f"timm's {type(trunk).__name__}" + (f" ({name})" if name else "")
    raise ValueError(
        f"model's image tower is {named}, which is not one of timm's VisionTransformer and Eva: "
        "token re-weighting and LoRA need blocks in which all patch tokens attend to one another. "
        "Choose an architecture such as ViT-B-16, PE-Core-B-16 or ViT-B-16-SigLIP2"
    )
