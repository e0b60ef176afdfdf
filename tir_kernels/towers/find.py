"""The family that a model's towers are of, found from the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tir_kernels.registry import load
from tir_kernels.towers.protocol import VisionTower

if TYPE_CHECKING:
    from tir_kernels.towers.run import EncodesText

# Family -> class with what it takes in words, ``images`` and ``texts``, and the functions
# ``vision_tower`` and ``text_tower``, which give None for models of other families.
FAMILIES = {
    "open_clip": "tir_kernels.towers.open_clip:OpenClip",
    "timm": "tir_kernels.towers.timm_vit:TimmVit",
}


def _ask(model: Any, function: str, words: str) -> tuple[Any, str]:
    """The tower that the first family to know the model gives; else ``None`` and what all take."""
    taken = []
    for place in FAMILIES.values():
        family = load(place)
        tower = getattr(family, function)(model)
        if tower is not None:
            return tower, ""
        taken.append(getattr(family, words))
    return None, ", or ".join(filter(None, taken))


def vision_tower(model: Any) -> VisionTower:
    """The image tower of a model, opened.

    Args:
        model: A model with an image tower, that tower itself, or an opened one, which is returned.

    Raises:
        TypeError: No family knows the tower.
        ValueError: It is of a known family, but of a kind that can't be opened.
    """
    if not isinstance(model, nn.Module) and hasattr(model, "num_prefix_tokens"):
        return model
    tower, taken = _ask(model, "vision_tower", "images")
    if tower is not None:
        return tower
    raise TypeError(
        f"model must be {taken}; its tower is "
        f"{type(getattr(model, 'visual', model)).__name__}. Choose an architecture such as ViT-B-16"
    )


def text_tower(model: Any) -> EncodesText:
    """The text tower of a model, opened.

    Args:
        model: A model with a text tower, or an opened one, which is returned.

    Raises:
        TypeError: No family knows the tower, or the model has none.
        ValueError: It is of a known family, but of a kind that can't be opened.
    """
    if not isinstance(model, nn.Module) and hasattr(model, "is_causal"):
        return model
    tower, taken = _ask(model, "text_tower", "texts")
    if tower is not None:
        return tower
    raise TypeError(
        f"model must be {taken}, since this needs texts; got {type(model).__name__} "
        f"with text tower {type(getattr(model, 'text', None)).__name__}"
    )


def open_tower(model: Any, kind: str) -> VisionTower | EncodesText:
    """The tower "visual" or "text" of a model, opened; raises as the two functions above."""
    return vision_tower(model) if kind == "visual" else text_tower(model)
