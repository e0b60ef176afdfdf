"""CLIP models of any size with random weights; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME
from torch import Tensor, nn

from tir_kernels.towers.loading.new_models import new_model

from .counting import Transformer

_DEFAULT_MODEL = "ViT-B-16"


@dataclass(frozen=True)
class ClipSizes:
    """The ``model_cfg`` of an open_clip model, and the sizes in it that are measured."""

    model_cfg: dict[str, Any]

    @property
    def vision(self) -> dict[str, Any]:
        return self.model_cfg["vision_cfg"]

    @property
    def text(self) -> dict[str, Any]:
        return self.model_cfg["text_cfg"]

    def image_tower(self, images: int) -> Transformer:
        """Images that pass through their tower, the class token included."""
        length = (self.vision["image_size"] // self.vision["patch_size"]) ** 2 + 1
        return Transformer(images, length, self.vision["width"], self.vision["layers"])

    def text_tower(self, prompts: int, length: int) -> Transformer:
        """Prompts of a length that pass through their tower."""
        return Transformer(prompts, length, self.text["width"], self.text["layers"])

    def shape(self) -> dict[str, int]:
        """The length and the width of the image tower, as in the records."""
        tower = self.image_tower(1)
        return {"L": tower.length, "D": tower.width}

    def shrunk(self) -> ClipSizes:
        """The same kind of model with next to nothing in it."""
        side, width = 2 * self.vision["patch_size"], self.vision.get("head_width", 64)
        return ClipSizes(
            self.model_cfg
            | {"vision_cfg": self.vision | {"image_size": side, "layers": 4, "width": width}}
            | {"text_cfg": self.text | {"width": 16, "heads": 1, "layers": 2}}
        )


def load_sizes(model: str | None) -> ClipSizes:
    """Sizes of an open_clip architecture, or of a JSON file or folder with a ``model_cfg``.

    Raises:
        click.ClickException: There is no such architecture, file or folder.
    """
    name = model or _DEFAULT_MODEL
    path = Path(name)
    if path.is_dir():
        path /= HF_CONFIG_NAME
    if path.suffix == ".json":
        try:
            return ClipSizes(json.loads(path.read_text())["model_cfg"])
        except (OSError, ValueError, KeyError) as error:
            raise click.ClickException(f"--model: {path} has no model_cfg: {error}") from error
    config = open_clip.get_model_config(name)
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise click.ClickException(f"--model: open_clip has no architecture {name!r}{hint}")
    return ClipSizes(config)


def make_model(sizes: ClipSizes, device: str) -> nn.Module:
    """A model with random weights, frozen and in evaluation mode."""
    with torch.device(device):
        model, _ = new_model(sizes.model_cfg)
    return model.to(device).eval().requires_grad_(False)


def make_tokenizer(sizes: ClipSizes) -> Callable[[list[str]], Tensor]:
    return open_clip.SimpleTokenizer(context_length=sizes.text["context_length"])
