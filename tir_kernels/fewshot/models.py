"""Models by architecture name or from a local folder, always with weights, always in float32."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from tir_kernels.fewshot.errors import FewShotError, first_line
from tir_kernels.fewshot.preprocess import Preprocess

CONFIG_NAME = "open_clip_config.json"
SAFETENSORS = (".safetensors",)
PICKLES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that goes with it.

    Args:
        model: An open_clip model in evaluation mode, float32, frozen.
        preprocess: Makes the model's (3, H, W) float32 input from an RGB image.
        tokenizer: The model's tokenizer.
        description: The model in words.
        fingerprint: Digest of its configuration, preprocessing and weights.
    """

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Callable[..., Tensor]
    description: str
    fingerprint: str


def load_model(
    name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a model for fine-tuning.

    Args:
        name: A folder with ``open_clip_config.json`` and weights, or an open_clip architecture.
        pretrained: Of an architecture: a tag, whose weights are downloaded unless they are in the
            cache, or a checkpoint file. Of a folder: which of its weights files to take, needed
            only if there are several. Pickled checkpoints are read as tensors only.
        device: Where the model is put.

    Raises:
        FewShotError: The model, its weights or the device can't be had.
    """
    target = _usable_device(device)
    folder = Path(name).expanduser()
    if folder.is_dir():
        source = _from_folder(folder, pretrained)
    elif name in open_clip.list_models():
        source = _from_architecture(name, pretrained)
    else:
        raise FewShotError(_unknown_model(name))
    model = source.model
    _load_weights(model, source.weights, source.description)
    model = model.float().eval().requires_grad_(False).to(target)
    preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
    try:
        preprocess = Preprocess(PreprocessCfg(**preprocess_cfg))
        tokenizer = open_clip.get_tokenizer(source.open_clip_name)
    except Exception as error:
        raise FewShotError(
            f"--model: {source.description} has no usable preprocessing or tokenizer: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return LoadedModel(
        model,
        preprocess,
        tokenizer,
        source.description,
        _fingerprint(source.config, preprocess_cfg, source.weights),
    )


@dataclass(frozen=True)
class _Source:
    """A model that is built but has no weights yet."""

    model: nn.Module
    config: dict[str, Any]
    weights: Path
    open_clip_name: str
    description: str


def _from_folder(folder: Path, pretrained: str | None) -> _Source:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    except FileNotFoundError as error:
        raise FewShotError(
            f"--model: {folder} has no {CONFIG_NAME}; pass a folder that has it beside the "
            "weights, or an architecture name with --pretrained"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FewShotError(
            f"--model: {path} is not a model configuration with 'model_cfg' ({first_line(error)})"
        ) from error
    weights = _weights_in(folder, pretrained)
    name = f"local-dir:{folder}"
    return _Source(_build(name), config, weights, name, str(folder))


def _weights_in(folder: Path, pretrained: str | None) -> Path:
    if pretrained is not None:
        for path in (Path(pretrained), folder / pretrained):
            if path.is_file():
                return path
        raise FewShotError(f"--pretrained: no file {pretrained} here or in {folder}")
    for endings in (SAFETENSORS, PICKLES):
        found = sorted(path for path in folder.iterdir() if path.suffix in endings)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise FewShotError(
                f"--model: {folder} has several weights files ({names}); "
                "say which with --pretrained FILE"
            )
    raise FewShotError(
        f"--model: {folder} has no weights; put a {' or '.join(SAFETENSORS + PICKLES)} file in it"
    )


def _from_architecture(name: str, pretrained: str | None) -> _Source:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = f"a tag ({', '.join(tags)}) or " if tags else ""
        raise FewShotError(
            f"--model {name} needs weights: pass {known}a checkpoint file with --pretrained"
        )
    description = f"{name} with {pretrained}"
    config = open_clip.get_model_config(name)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        if Path(pretrained).is_file():
            return _Source(_build(name), config, Path(pretrained), name, description)
        known = f"a tag of {name} ({', '.join(tags)})" if tags else f"a tag ({name} has none)"
        raise FewShotError(f"--pretrained: {pretrained} is neither a file nor {known}")
    # The tag knows what its weights were trained with, down to the activation function.
    preprocess = {key: value for key, value in tag.items() if key in ("mean", "std")}
    for key in ("interpolation", "resize_mode"):
        if tag.get(key):
            preprocess[key] = tag[key]
    quick_gelu = bool(tag.get("quick_gelu"))
    model = _build(name, force_quick_gelu=quick_gelu, force_preprocess_cfg=preprocess)
    try:
        with _quiet():
            weights = Path(open_clip.download_pretrained(tag))
    except Exception as error:
        raise FewShotError(
            f"--pretrained: can't download the weights of {name} {pretrained}: "
            f"{first_line(error)}; check the network, or pass a checkpoint file instead"
        ) from error
    config = {**config, "quick_gelu": quick_gelu or config.get("quick_gelu", False)}
    return _Source(model, config, weights, name, description)


def _build(name: str, **options: Any) -> nn.Module:
    try:
        with _quiet():
            return open_clip.create_model(
                name, load_weights=False, pretrained_text=False, device="cpu", **options
            )
    except Exception as error:
        raise FewShotError(
            f"--model: open_clip can't build {name.removeprefix('local-dir:')}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _load_weights(model: nn.Module, weights: Path, description: str) -> None:
    try:
        with _quiet():
            open_clip.load_checkpoint(model, str(weights), strict=True, weights_only=True)
    except Exception as error:
        # open_clip's reasons run over hundreds of lines, so the two usual ones get their own words.
        try:
            state = load_state_dict(str(weights), weights_only=True)
            found = {key: tuple(value.shape) for key, value in state.items()}
        except Exception as read_error:
            raise FewShotError(
                f"can't read the weights {weights}: {first_line(read_error)}; the file is damaged, "
                "or holds more than tensors: pass a safetensors file or a plain state dict"
            ) from error
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        raise FewShotError(
            f"the weights {weights} are not of {description.split(' with ')[0]}: "
            f"{_differences(expected, found) or first_line(error)}; "
            "pass the architecture they were made for"
        ) from error


def _differences(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], limit: int = 3
) -> str:
    words = [
        f"{key} is {found[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    words += [f"{key} is missing" for key in expected if key not in found]
    words += [f"{key} is not part of it" for key in found if key not in expected]
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more


def _unknown_model(name: str) -> str:
    if name.startswith("hf-hub:"):
        return f"--model: download {name.removeprefix('hf-hub:')} and pass its folder"
    path = Path(name)
    if path.is_file():
        return f"--model: {name} is a file; pass its architecture and --pretrained {name}"
    if len(path.parts) > 1:
        return f"--model: there is no folder {name}"
    # Case is the usual slip, and it would spoil the likeness.
    names = {known.lower(): known for known in open_clip.list_models()}
    close = [names[key] for key in get_close_matches(name.lower(), names, n=3, cutoff=0.5)]
    hint = f"; the nearest are {', '.join(close)}" if close else ""
    return f"--model: {name} is neither a folder nor an open_clip architecture{hint}"


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FewShotError(
            f"--device {device} can't be used here: {first_line(error)}; --device cpu always works"
        ) from error
    return target


def _fingerprint(config: dict[str, Any], preprocess: dict[str, Any], weights: Path) -> str:
    digest = hashlib.sha256(json.dumps([config, preprocess], sort_keys=True).encode())
    with open(weights, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # open_clip logs a warning about missing weights before they are loaded, and each failure twice.
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
