"""A small model of each family of towers that the package opens, in memory and as a folder.

Depths and widths are reduced, weights are random; names, settings and tokenizers are those of the
family's published models.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import small_transformers
import timm
import timm_models
import torch
import transformers
from safetensors.torch import save_file
from tiny_clip import ATTENTION_POOL, varied
from torch import Tensor, nn

from tir_kernels.towers.loading import model_config, timm_names

SIDE = 32  # of an image, in pixels; 16 patches
_DEPTH = 5
_VISION = {"image_size": SIDE, "patch_size": 8, "width": 32, "head_width": 16, "layers": _DEPTH}
_TEXT = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
_TIMM = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": _DEPTH, "num_heads": 2}
_CONFIGS: dict[str, dict[str, Any]] = {
    "open_clip ViT": {
        "embed_dim": 16,
        "vision_cfg": _VISION,
        "text_cfg": {**_TEXT, "context_length": 77},
    },
    "open_clip CoCa": {
        "embed_dim": 16,
        "vision_cfg": {**_VISION, **ATTENTION_POOL, "output_tokens": True},
        "text_cfg": {**_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**_TEXT, "context_length": 76, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "open_clip PE-Core": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": SIDE,
            "timm_model_name": "vit_pe_core_base_patch16_224",
            "timm_pool": "map",
            "timm_proj": None,
        },
        "text_cfg": {**_TEXT, "context_length": 32, "layers": 24},
        "custom_text": True,
    },
    "open_clip registers": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": SIDE,
            "timm_model_name": "vit_small_patch14_reg4_dinov2",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        "text_cfg": {**_TEXT, "context_length": 77},
        "custom_text": True,
    },
    "open_clip SigLIP 2": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": SIDE,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **_TEXT,
            "context_length": 64,
            "vocab_size": 256,
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
        "custom_text": True,
    },
}


@dataclass(frozen=True)
class Family:
    """One column of the table in docs/towers.md.

    Args:
        name: What the column is called.
        prefix: Tokens in front of the patches.
        make: A model and its tokenizer; an image tower alone has none.
        write: Writes that model into a folder.
        is_refused: Whether such a folder is none for the command line.
    """

    name: str
    prefix: int
    make: Callable[[], tuple[nn.Module, Any]]
    write: Callable[[Path], None]
    is_refused: bool = False


@contextmanager
def small_timm() -> Iterator[None]:
    """timm's names stand for models of 5 blocks of width 32 inside of the context.

    An open_clip configuration names a model of timm's, and has no word for its sizes.
    """
    smaller = partial(timm.create_model, **_TIMM)
    parameters = functools.cache(timm_names.parameters_of_timm.__wrapped__)
    with (
        mock.patch("timm.create_model", smaller),
        mock.patch.object(model_config, "parameters_of_timm", parameters),
    ):
        yield


def _open_clip_model(name: str) -> nn.Module:
    config = {key: value for key, value in _CONFIGS[name].items() if key != "custom_text"}
    kinds = open_clip.model
    kind = kinds.CustomTextCLIP if "custom_text" in _CONFIGS[name] else kinds.CLIP
    if "multimodal_cfg" in config:
        kind = open_clip.coca_model.CoCa
    torch.manual_seed(0)
    with small_timm():
        model = varied(kind(**config))
        with torch.no_grad():
            for parameter in model.visual.parameters():  # else pools hardly see their images
                parameter.add_(0.1 * torch.randn_like(parameter))
        # Weights that float16 can hold, as folders keep them.
        return model.half().float().requires_grad_(False)


def _open_clip(name: str) -> tuple[nn.Module, Any]:
    return _open_clip_model(name), _tokenizer(name)


def _tokenizer(name: str) -> Any:
    text = _CONFIGS[name]["text_cfg"]
    length = text["context_length"]
    if "hf_tokenizer_name" not in text:
        return open_clip.SimpleTokenizer(context_length=length)
    return _filling(small_transformers.siglip_tokenizer(), length)


def _filling(tokenizer: Any, length: int) -> Callable[..., Tensor]:
    def tokens(texts: list[str], context_length: int | None = None) -> Tensor:
        return tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=context_length or length,
        )["input_ids"]  # fmt: skip

    return tokens


def _write_open_clip(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    means = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    content = {"model_cfg": _CONFIGS[name], "preprocess_cfg": means}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = _open_clip_model(name).state_dict()
    save_file(
        {key: value.half().contiguous() for key, value in state.items()},
        folder / "open_clip_model.safetensors",
    )
    if "hf_tokenizer_name" in _CONFIGS[name]["text_cfg"]:
        small_transformers.siglip_tokenizer().save_pretrained(folder)


def _transformers_parts(kind: str) -> tuple[Any, Any]:
    """A model and its tokenizer, as transformers has them."""
    own = small_transformers.TOKENIZERS[kind]()
    image = {"num_hidden_layers": _DEPTH}
    text = {
        "vocab_size": len(own),
        "num_hidden_layers": 3,
        "max_position_embeddings": own.model_max_length,
        "bos_token_id": own.bos_token_id or 0,
        "eos_token_id": own.eos_token_id,
    }
    makers = {
        "clip": partial(small_transformers.make_clip, image=image, **text),
        "siglip": partial(small_transformers.make_siglip, text=text, **image),
        "siglip2": partial(small_transformers.make_siglip2, text=text, image=image),
    }
    return makers[kind]().requires_grad_(False), own


def _transformers(kind: str) -> tuple[nn.Module, Any]:
    model, own = _transformers_parts(kind)
    return model, _filling(own, own.model_max_length)


def _write_transformers(kind: str, folder: Path) -> None:
    processor: Any
    if kind == "clip":
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    elif kind == "siglip":
        processor = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    else:
        processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    for part in (*_transformers_parts(kind), processor):
        part.save_pretrained(folder)


_REGISTERS = "vit_small_patch14_reg4_dinov2"


def _registers() -> tuple[nn.Module, Any]:
    """Image only, with a class token and four registers, as DINOv2's."""
    return timm_models.make_alone(_REGISTERS, depth=_DEPTH).requires_grad_(False), None


def _write_registers(folder: Path) -> None:
    """As timm writes a model for the hub."""
    model, _ = _registers()
    timm.models.save_for_hf(model, folder, model_config={"num_classes": 0}, safe_serialization=True)


FAMILIES = [
    *(
        Family(name, prefix, partial(_open_clip, name), partial(_write_open_clip, name))
        for name, prefix in zip(_CONFIGS, (1, 1, 1, 5, 0), strict=True)
    ),
    *(
        Family(
            f"transformers {name}", prefix, partial(_transformers, kind),
            partial(_write_transformers, kind),
        )
        for name, kind, prefix in (
            ("CLIP", "clip", 1), ("SigLIP", "siglip", 0), ("Siglip2", "siglip2", 0)
        )
    ),
    Family("timm with registers", 5, _registers, _write_registers, is_refused=True),
]  # fmt: skip
