"""Image towers of timm by their names, checked before anything is built of them."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch

# The files of timm in which the towers are that can be opened.
_FILES = ("eva", "vision_transformer", "vision_transformer_hybrid", "vitamin", "deit")


def problem_of_timm(name: Any) -> str:
    """Why an image tower of timm can't be used, behind "its "; "" if it may be."""
    if not isinstance(name, str) or not timm.is_model(name):
        return (
            f"image tower is {name!r} of the timm library, whose version {timm.__version__} has "
            "no model of that name"
        )
    if not timm.models.is_model_in_modules(name, _FILES):
        return f"image tower is {name!r} of the timm library, which is no plain vision transformer"
    return ""


def refusal_of_timm(name: str) -> str:
    """What to do with a model of timm, which has no text tower, behind its name."""
    return (
        f"{name} is an image tower of the timm library alone, and classes are named by texts: pass "
        "an open_clip model that has such an image tower, or from Python give the tower to "
        "tir_kernels.fewshot.finetune_episode with a method that reads no texts, such as "
        "linear-probe"
    )


@functools.cache
def parameters_of_timm(name: str) -> int:
    """How many parameters an image tower has; nothing is kept of it."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters())
