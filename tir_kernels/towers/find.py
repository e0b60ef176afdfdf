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
    "timm": "tir_kernels.towers.timm:Timm",
    "transformers": "tir_kernels.towers.transformers:Transformers",
}


def vision_tower(model: Any) -> VisionTower:
    """The image tower of a model, opened.

    Args:
        model: A model with an image tower, that tower itself, or an opened one, which is returned.

    Raises:
        TypeError: No family knows the tower.
        ValueError: It is of a known family, but of a kind that can't be opened.
    """
    return _opened(
        model,
        "num_prefix_tokens",
        ("vision_tower", "images"),
        f"; its tower is {_kind(model, 'visual', model)}. Choose an architecture such as ViT-B-16",
    )


def text_tower(model: Any) -> EncodesText:
    """The text tower of a model, opened.

    Args:
        model: A model with a text tower, or an opened one, which is returned.

    Raises:
        TypeError: No family knows the tower, or the model has none.
        ValueError: It is of a known family, but of a kind that can't be opened.
    """
    return _opened(
        model,
        "is_causal",
        ("text_tower", "texts"),
        f", since this needs texts; got {type(model).__name__} "
        + (f"with text tower {_kind(model, 'text')}" if hasattr(model, "text") else "without any"),
    )


def _opened(model: Any, mark: str, names: tuple[str, str], complaint: str) -> Any:
    """The tower that the first family to know the model gives.

    Args:
        model: The model, or an opened tower.
        mark: An attribute that opened towers have.
        names: The function of a family that opens the tower, and its words for what it takes.
        complaint: What is said, after what the families take, where none knows the model.
    """
    if not isinstance(model, nn.Module) and hasattr(model, mark):
        return model
    function, words = names
    taken = []
    for place in FAMILIES.values():
        family = load(place)
        tower = getattr(family, function)(model)
        if tower is not None:
            return tower
        taken.append(getattr(family, words))
    raise TypeError(f"model must be {', or '.join(filter(None, taken))}{complaint}")


def _kind(model: Any, name: str, default: Any = None) -> str:
    return type(getattr(model, name, default)).__name__


def open_tower(model: Any, kind: str) -> VisionTower | EncodesText:
    """The tower "visual" or "text" of a model, opened; raises as the two functions above."""
    return vision_tower(model) if kind == "visual" else text_tower(model)
