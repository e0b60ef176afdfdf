"""Every architecture of open_clip in small, and what of it can be opened.

``python python_tests/towers/architectures.py`` prints the tables of docs/towers.md, and with
``--names`` a row for each tower of each name.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from tiny_clip import varied
from torch import nn
from transformers import RobertaConfig

from tir_kernels.towers import text_tower, vision_tower

_SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "head_width": 16,
    "layers": 2,
    "attn_pooler_heads": 2,
    "attn_pooler_queries": 3,
}
_SMALL_TEXT = {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2}
_SIZES = {*_SMALL, *_SMALL_TEXT, "mlp_ratio", "embed_dim", "hf_tokenizer_name", "tokenizer_kwargs"}


class Architecture:
    """One of open_clip's architectures: what it is made of, and a small model of its kind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._config = open_clip.get_model_config(name)

    @property
    def image_kind(self) -> str:
        """Its image tower in words; those alike open alike."""
        vision = self._config["vision_cfg"]
        if "timm_model_name" in vision:
            return f"timm {type(_timm_tower(*_timm_options(vision)).trunk).__name__}"
        if isinstance(vision["layers"], list):
            return "ResNet"
        return ", ".join(["ViT", *_settings(vision)])

    @property
    def text_kind(self) -> str:
        """Its text tower in words."""
        text = self._config["text_cfg"]
        if "hf_model_name" in text:
            return f"transformers {text['hf_model_name'].split('/')[-1].split('-')[0]}"
        return ", ".join(["transformer", *_settings(text)])

    @property
    def has_vit(self) -> bool:
        """Whether its image tower is a transformer of open_clip's own."""
        vision = self._config["vision_cfg"]
        return "timm_model_name" not in vision and not isinstance(vision["layers"], list)

    @property
    def has_transformer(self) -> bool:
        """Whether its text tower is one of open_clip's own."""
        return "hf_model_name" not in self._config["text_cfg"]

    def small(self, native: bool = False) -> nn.Module:
        """A model of its kind; image towers of timm are on the meta device, at full size.

        Args:
            native: Put small towers of open_clip's own in the place of other libraries'.
        """
        config = {**self._config, "embed_dim": 16}
        vision, text = config["vision_cfg"], config["text_cfg"]
        is_custom = config.pop("custom_text", False) or "hf_model_name" in text
        if isinstance(vision.get("layers"), list):
            sizes = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}
            config["vision_cfg"] = sizes
        elif "timm_model_name" in vision:
            config["vision_cfg"] = _SMALL
        else:
            config["vision_cfg"] = {**vision, **_SMALL}
        config["text_cfg"] = _SMALL_TEXT if "hf_model_name" in text else {**text, **_SMALL_TEXT}
        kind = CLIP if not is_custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
        if kind is CoCa:
            config["multimodal_cfg"] = _SMALL_TEXT
        torch.manual_seed(0)
        model = varied(kind(**config))
        if "timm_model_name" in vision and not native:
            model.visual = _timm_tower(*_timm_options(vision))
        if "hf_model_name" in text and not native:
            sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            model.text = HFTextEncoder("", 16, RobertaConfig(**sizes), "mean_pooler", "mlp")
        return model.eval()

    def outcome(self, which: str) -> str:
        """Of its tower "visual" or "text": "opened", or why not."""
        kind = self.image_kind if which == "visual" else self.text_kind
        if kind.startswith("timm "):  # whose settings the kind doesn't tell
            kind = self.name
        return _outcome(which, kind, self.small)


def _settings(section: dict[str, Any]) -> list[str]:
    """What sets a tower apart from CLIP's, in the words of the configuration."""
    return [
        key if value is True else f"{key} {json.dumps(value)}"
        for key, value in sorted(section.items())
        if key not in _SIZES and key != "eos_id" and value is not False
    ]


def _timm_options(vision: dict[str, Any]) -> tuple[str, str, str]:
    """Name, pool and projection of a tower of timm."""
    pool, proj = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    return vision["timm_model_name"], pool, proj


@functools.cache
def _timm_tower(name: str, pool: str, proj: str) -> nn.Module:
    with torch.device("meta"):
        return TimmModel(name, 16, pool=pool, proj=proj)


_outcomes: dict[tuple[str, str], str] = {}


def _outcome(which: str, kind: str, make: Callable[[], nn.Module]) -> str:
    if (which, kind) not in _outcomes:
        try:
            (vision_tower if which == "visual" else text_tower)(make())
            _outcomes[which, kind] = "opened"
        except (TypeError, ValueError) as error:
            _outcomes[which, kind] = str(error)
    return _outcomes[which, kind]


def every() -> list[Architecture]:
    return [Architecture(name) for name in open_clip.list_models()]


def table(which: str) -> list[str]:
    """Markdown rows: a kind of tower, how many names have it, the shortest, what becomes of it."""
    kinds: dict[str, list[Architecture]] = {}
    for each in every():
        kinds.setdefault(each.image_kind if which == "visual" else each.text_kind, []).append(each)
    rows = ["| tower | architectures | such as | |", "|---|---|---|---|"]
    for kind, members in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        shortest = min((each.name for each in members), key=lambda name: (len(name), name))
        outcome = "opened" if members[0].outcome(which) == "opened" else "refused"
        rows.append(f"| {kind} | {len(members)} | {shortest} | {outcome} |")
    return rows


if __name__ == "__main__":
    if "--names" in sys.argv:
        for each in every():
            print(each.name, each.image_kind, each.outcome("visual"), sep=" | ")
            print(each.name, each.text_kind, each.outcome("text"), sep=" | ")
    else:
        print("\n".join([*table("visual"), "", *table("text")]))
