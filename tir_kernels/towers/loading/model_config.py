"""Configurations of models that a folder brings along, checked before anything is built of them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import MIB, read_text
from tir_kernels.text import setting
from tir_kernels.towers.loading.timm_names import parameters_of_timm, problem_of_timm
from tir_kernels.towers.loading.weights import StateDict

_MODEL = setting("model")
_PRETRAINED = setting("pretrained")

CONFIG_NAME = "open_clip_config.json"

_MAX_CONFIG_BYTES = MIB
# Attention takes memory by the square of these: 2**16 patches are 4096 x 4096 pixels by 16 x 16.
MAX_PATCHES = 2**16
MAX_CONTEXT_LENGTH = 2**13
# The largest of open_clip's models has 56 layers, and every layer takes time to build.
MAX_LAYERS = 2**10
_MAX_SIDE = 2**16  # pixels
# A model of other sizes than its weights is built to say where it differs, unless it is too large.
SMALL_MODEL = 10**8  # parameters
_SMALL_SIZE = 2**16

_DECODER = "multimodal_cfg"  # of CoCa alone
_SECTIONS: dict[str, Any] = {
    "vision_cfg": CLIPVisionCfg,
    "text_cfg": CLIPTextCfg,
    _DECODER: MultimodalCfg,
}
_SIZES = {
    "vision_cfg": ("layers", "width", "head_width", "patch_size", "image_size"),
    "text_cfg": ("layers", "width", "heads", "context_length", "vocab_size"),
    _DECODER: ("layers", "width", "heads", "context_length", "vocab_size"),
}
_BOUNDS = {
    "layers": MAX_LAYERS,
    "context_length": MAX_CONTEXT_LENGTH,
    "image_size": _MAX_SIDE,
}
_PAIRS = ("image_size", "patch_size")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a folder: "model_cfg", and "preprocess_cfg" where it has one.

    Raises:
        FewShotError: There is none, or it is not one of open_clip's.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(read_text(path, at_most=_MAX_CONFIG_BYTES))
        if not isinstance(config["model_cfg"], dict):
            raise TypeError("'model_cfg' is no object")
    except FileNotFoundError as error:
        raise FewShotError(
            f"{_MODEL}: {folder} has no {CONFIG_NAME}; pass a folder that has it beside the "
            f"weights, or an architecture name with {_PRETRAINED}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FewShotError(
            f"{_MODEL}: {path} is not a model configuration with 'model_cfg' ({first_line(error)})"
        ) from error
    _check_preprocessing(config.get("preprocess_cfg"), path)
    return config


def check_config(config: dict[str, Any], found: list[StateDict], source: str) -> None:
    """Refuse a configuration that can't be of the weights before it is built.

    A model is as large as its weights, so its sizes are compared with theirs: one of ten million
    layers would be refused anyway, but only after filling the memory.

    Args:
        config: open_clip's "model_cfg".
        found: The state dicts of the weights file.
        source: Where the configuration is from, for errors.

    Raises:
        FewShotError: A value is of a wrong type or out of bounds, or a tower can't be used.
    """
    refuse_other_towers(config, source)
    _check_flags(config, ("quick_gelu", "custom_text", "nonscalar_logit_scale"), source)
    tensors = [tensor for state in found for tensor in state.tensors.values()]
    largest = max(_SMALL_SIZE, *(max(tensor.shape, default=1) for tensor in tensors))
    check_size(config.get("embed_dim"), "embed_dim", largest, source)
    for name, kind in _sections_in(config).items():
        section = config.get(name)
        if not isinstance(section, dict):
            raise FewShotError(f"{_MODEL}: {source} has no {name}; pass one of open_clip's")
        fields = dataclasses.fields(kind)
        _check_flags(
            section, [field.name for field in fields if isinstance(field.default, bool)], source
        )
        _check_numbers(section, name, largest, source)
        for key in _SIZES[name]:
            if key in section:
                bound = _BOUNDS.get(key, largest)
                check_size(section[key], f"{name}.{key}", bound, source, pair=key in _PAIRS)
    _check_patches(config["vision_cfg"], source)
    held, wanted = num_bytes(tensors), _num_parameters(config)
    if wanted > max(held, SMALL_MODEL):  # no weights take less than a byte for a parameter
        raise FewShotError(
            f"{_MODEL}: {source} describes a model of {wanted:.2g} parameters, but the weights are "
            f"{held:.2g} bytes; pass the configuration that belongs to them"
        )


def _sections_in(config: dict[str, Any]) -> dict[str, Any]:
    """The sections that a configuration must have, and the decoder if it has one."""
    return {name: kind for name, kind in _SECTIONS.items() if name != _DECODER or name in config}


def refuse_other_towers(config: dict[str, Any], source: str) -> None:
    """Name towers that can't be used, whose building may need the network, before it is tried."""
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    other = ""
    if isinstance(text, dict) and text.get("hf_model_name"):
        other = f"text tower is {text['hf_model_name']!r} of the transformers library"
    elif isinstance(vision, dict) and vision.get("timm_model_name"):
        other = problem_of_timm(vision["timm_model_name"])
    elif isinstance(vision, dict) and isinstance(vision.get("layers"), (list, tuple)):
        other = "image tower is a ResNet"
    if other:
        raise FewShotError(
            f"{_MODEL}: {source} can't be used: its {other}, and only open_clip's own "
            "transformers and timm's can be re-weighted; choose an architecture such as ViT-B-16"
        )


def _check_flags(section: dict[str, Any], names: Iterable[str], source: str) -> None:
    for name in names:
        if not isinstance(section.get(name, False), bool):
            raise FewShotError(
                f"{_MODEL}: {source}: {name} must be true or false; it is {section[name]!r}"
            )


def _check_numbers(section: dict[str, Any], name: str, largest: int, source: str) -> None:
    """Bound what is not among the known sizes too, such as the queries of a pooling."""
    for key, value in section.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or key in _SIZES[name]:
            continue
        if not abs(value) <= largest:
            raise FewShotError(
                f"{_MODEL}: {source}: {name}.{key} is {_short(value)}, but for these weights "
                f"{largest:,} is the most; pass the configuration that belongs to them"
            )


def check_size(value: Any, name: str, bound: int, source: str, *, pair: bool = False) -> None:
    values = value if pair and isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    for size in values:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise FewShotError(
                f"{_MODEL}: {source}: {name} must be a whole number of at least 1; "
                f"it is {_short(size)}"
            )
        if size > bound:
            raise FewShotError(
                f"{_MODEL}: {source}: {name} is {_short(size)}, but {bound:,} is the most that "
                "is built; pass the configuration that belongs to the weights"
            )


def _check_patches(vision: dict[str, Any], source: str) -> None:
    image, patch = (
        _pair(vision.get(key, getattr(CLIPVisionCfg, key))) for key in ("image_size", "patch_size")
    )
    if (image[0] // patch[0]) * (image[1] // patch[1]) > MAX_PATCHES:
        raise FewShotError(
            f"{_MODEL}: {source}: images of {_short(image[0])} x {_short(image[1])} pixels have "
            f"more than {MAX_PATCHES:,} patches, the most that attention can take; choose a "
            "smaller vision_cfg.image_size"
        )


def num_bytes(tensors: list[Tensor]) -> int:
    """How much is stored, however often and in however large a shape it is seen."""
    storages = [
        tensor.untyped_storage()
        for tensor in tensors
        if tensor.layout == torch.strided and not tensor.is_meta
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _num_parameters(config: dict[str, Any]) -> float:
    """About how many parameters the blocks and the token embedding have."""
    count = 0.0
    for name, kind in _sections_in(config).items():
        settings: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(kind)}
        settings |= config[name]
        if settings.get("timm_model_name"):
            count += parameters_of_timm(settings["timm_model_name"])
            continue
        ratio = settings["mlp_ratio"] if isinstance(settings["mlp_ratio"], (int, float)) else 4
        count += settings["layers"] * (4 + 2 * ratio) * settings["width"] ** 2
        count += settings.get("vocab_size", 0) * settings["width"]
    return count


def _check_preprocessing(preprocess: Any, path: Path) -> None:
    if preprocess is None:
        return
    if not isinstance(preprocess, dict):
        raise FewShotError(f"{_MODEL}: {path}: preprocess_cfg must be an object of settings")
    for name in ("mean", "std"):
        values = preprocess.get(name, [1, 1, 1])
        is_right = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
        if not is_right or (name == "std" and min(values) <= 0):
            least = " above 0" if name == "std" else ""
            raise FewShotError(
                f"{_MODEL}: {path}: preprocess_cfg.{name} must be three numbers{least}; "
                f"it is {_short(values)}"
            )


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < sys.float_info.max


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (list, tuple)) else (value, value)


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and abs(value) < 10**18 else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
