"""Models by architecture name or from a local folder, always with weights, always in float32."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import expand_user, open_regular
from tir_kernels.text import Notice, setting
from tir_kernels.towers import text_tower, vision_tower
from tir_kernels.towers.loading.checkpoints import INDEX_ENDING, checkpoint_files, read_checkpoint
from tir_kernels.towers.loading.hub import (
    cached_folder,
    download_weights,
    load_tokenizer,
    offline,
    tokenizer_files,
)
from tir_kernels.towers.loading.model_config import check_config, read_config, refuse_other_towers
from tir_kernels.towers.loading.placement import moved, usable_device
from tir_kernels.towers.loading.preprocess import Preprocess
from tir_kernels.towers.loading.weights import StateDict, load_weights, state_dicts

_MODEL = setting("model")
_PRETRAINED = setting("pretrained")

SAFETENSORS = (".safetensors",)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_HUB = "hf-hub:"
_REPOSITORY = re.compile(rf"({_HUB})?[\w.-]+/[\w.-]+")
# Whose published CLIP weights need QuickGELU, by what files and folders of them are called.
_QUICK_GELU_MAKERS = re.compile(r"openai|dfn|metaclip(?!-?_?2)", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that goes with it.

    Args:
        model: An open_clip model in evaluation mode, float32, frozen.
        preprocess: Makes the model's (3, H, W) float32 input from an RGB image.
        tokenizer: The model's tokenizer.
        description: The model in words.
        fingerprint: Digest of its configuration, preprocessing, weights and tokenizer.
        notes: What of the weights was chosen, changed, left out or can't be known.
        config: open_clip's "model_cfg".
    """

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Callable[..., Tensor]
    description: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def load_model(
    name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a model for fine-tuning.

    Args:
        name: A folder with ``open_clip_config.json`` and weights, an open_clip architecture, or a
            repository of such a folder in Hugging Face's cache (``hf-hub:timm/NAME``).
        pretrained: Of an architecture: a tag, whose weights are downloaded unless they are in the
            cache, or a checkpoint file. Of a folder: which of its weights files to take, needed
            only if there are several. A checkpoint is read as tensors only; it may wrap them in
            containers and prefixes, and be a TorchScript archive.
        device: Where the model is put.

    Raises:
        FewShotError: The model, its weights or the device can't be had.
    """
    target = usable_device(device)
    # Whatever the caller's default device and modes are: the model is to be trained on.
    with torch.device("cpu"), torch.inference_mode(False):
        return _load(_find(name, pretrained), target)


def _load(source: _Source, target: torch.device) -> LoadedModel:
    found = state_dicts(read_checkpoint(source.weights), source.weights)
    if source.folder is not None:
        check_config(source.config, found, source.description)
    notes = _notes_on_activation(source, found)
    model = _build(source)
    notes += load_weights(model, found, source.weights, source.architecture)
    del found  # as large as the model
    model = moved(model.eval().requires_grad_(False), target)
    preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
    try:
        preprocess = Preprocess(PreprocessCfg(**preprocess_cfg))
        with _quiet():
            tokenizer = load_tokenizer(
                source.open_clip_name, source.config["text_cfg"], source.folder
            )
    except FewShotError:
        raise
    except Exception as error:
        raise FewShotError(
            f"{_MODEL}: {source.description} has no usable preprocessing or tokenizer: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return LoadedModel(
        model,
        preprocess,
        tokenizer,
        source.description,
        _fingerprint(source, preprocess_cfg),
        tuple(map(Notice, notes)),
        source.config,
    )


def problem_of(name: str, pretrained: str | None = None) -> str:
    """Why a model can't be loaded without a network; "" if it can, but for its weights' content."""
    try:
        with offline():
            source = _find(name, pretrained)
    except FewShotError as error:
        return str(error)
    tokenizer = source.config["text_cfg"].get("hf_tokenizer_name")
    if not tokenizer:
        return ""
    if source.folder is None:
        is_there = cached_folder(tokenizer) is not None
    else:
        is_there = bool(tokenizer_files(source.folder))
    return "" if is_there else f"its tokenizer, {tokenizer}, is not there"


@dataclass(frozen=True)
class _Source:
    """The parts that a model is made of, before it is built.

    Args:
        config: open_clip's "model_cfg".
        weights: The weights file, or the index of several.
        open_clip_name: Name by which open_clip knows the model.
        description: The model in words.
        folder: Folder of a local model.
        options: Further arguments for open_clip's ``create_model``.
    """

    config: dict[str, Any]
    weights: Path
    open_clip_name: str
    description: str
    folder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The model in words, without its weights."""
        return self.open_clip_name if self.folder is None else str(self.folder)


def _find(name: str, pretrained: str | None) -> _Source:
    if not name.strip() or (pretrained is not None and not pretrained.strip()):
        argument = _MODEL if not name.strip() else _PRETRAINED
        raise FewShotError(f"{argument} is empty; pass a name or a path")
    try:
        folder = expand_user(name)
        if os.path.isdir(folder):
            return _from_folder(folder, pretrained)
        # As open_clip does for the names that OpenAI gave its models, such as ViT-B/32.
        architecture = name.strip().replace("/", "-")
        if architecture in open_clip.list_models():
            return _from_architecture(architecture, pretrained)
    except OSError as error:
        raise FewShotError(
            f"{_MODEL}: can't read {error.filename or name}: "
            f"{error.strerror or first_line(error)}; "
            "pass a path that can be read"
        ) from error
    if _REPOSITORY.fullmatch(name):
        cached = cached_folder(name.removeprefix(_HUB))
        if cached is not None:
            return _from_folder(cached, pretrained, name)
    raise FewShotError(_unknown_model(name))


def _from_folder(folder: Path, pretrained: str | None, name: str = "") -> _Source:
    config = read_config(folder)["model_cfg"]
    refuse_other_towers(config, str(folder))
    weights = _weights_in(folder, pretrained)
    return _Source(config, weights, f"local-dir:{folder}", name or str(folder), folder)


def _weights_in(folder: Path, pretrained: str | None) -> Path:
    if pretrained is not None:
        for path in (expand_user(pretrained), folder / pretrained):
            if os.path.isfile(path):
                return path
        raise FewShotError(f"{_PRETRAINED}: no file {pretrained} here or in {folder}")
    for found in _weights_files(folder):
        if len(found) == 1:
            return found[0]
        # Repositories have the same weights for other libraries beside open_clip's.
        own = [path for path in found if path.name.startswith("open_clip_")]
        if len(own) == 1:
            return own[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise FewShotError(
                f"{_MODEL}: {folder} has several weights files ({names}); "
                f"say which with {setting('pretrained', 'FILE')}"
            )
    raise FewShotError(
        f"{_MODEL}: {folder} has no weights; put a {' or '.join(SAFETENSORS + PICKLES)} file in it"
    )


def _weights_files(folder: Path) -> Iterator[list[Path]]:
    """A folder's weights files, the preferred kinds first."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for endings in (SAFETENSORS, PICKLES):
        of_kind = [path for path in files if path.suffix in endings]
        indices = [
            path
            for path in files
            if path.name.endswith(tuple(f"{ending}{INDEX_ENDING}" for ending in endings))
        ]
        parts = {part for index in indices for part in checkpoint_files(index)}
        yield indices + [path for path in of_kind if path not in parts]


def _from_architecture(name: str, pretrained: str | None) -> _Source:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = f"a tag ({', '.join(tags)}) or " if tags else ""
        raise FewShotError(
            f"{setting('model', name)} needs weights: pass {known}a checkpoint file with "
            f"{_PRETRAINED}"
        )
    description = f"{name} with {pretrained}"
    config = open_clip.get_model_config(name)
    refuse_other_towers(config, name)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        return _Source(config, _weights_file(name, pretrained, tags), name, description)
    # The tag knows what its weights were trained with, down to the activation function.
    preprocess = {key: value for key, value in tag.items() if key in ("mean", "std")}
    for key in ("interpolation", "resize_mode"):
        if tag.get(key):
            preprocess[key] = tag[key]
    quick_gelu = bool(tag.get("quick_gelu"))
    options = {"force_quick_gelu": quick_gelu, "force_preprocess_cfg": preprocess}
    with _quiet():
        weights = download_weights(tag, f"{name} {pretrained}")
    config = {**config, "quick_gelu": quick_gelu or config.get("quick_gelu", False)}
    return _Source(config, weights, name, description, options=options)


def _weights_file(name: str, pretrained: str, tags: list[str]) -> Path:
    path = expand_user(pretrained)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        found = [file.name for files in _weights_files(path) for file in files]
        files = f"one of its files ({', '.join(found)})" if found else "a file; it has no weights"
        raise FewShotError(f"{_PRETRAINED}: {pretrained} is a folder; pass {files}")
    if os.path.exists(path):
        raise FewShotError(
            f"{_PRETRAINED}: {pretrained} is not a regular file; pass a weights file"
        )
    known = f"a tag of {name} ({', '.join(tags)})" if tags else f"a tag ({name} has none)"
    raise FewShotError(f"{_PRETRAINED}: {pretrained} is neither a file nor {known}")


def _notes_on_activation(source: _Source, found: list[StateDict]) -> list[str]:
    """Tell where a model with GELU may get weights that were trained with QuickGELU.

    No weights file says its activation function, but the archives that OpenAI published can be
    told from others.

    Raises:
        FewShotError: The weights are OpenAI's and the model has GELU.
    """
    name = source.open_clip_name
    if source.config.get("quick_gelu") or "force_quick_gelu" in source.options:
        return []
    if source.folder is not None:
        remedy = 'set "quick_gelu": true in the "model_cfg" of its configuration'
    elif f"{name}-quickgelu" in open_clip.list_models():
        remedy = f"pass {setting('model', f'{name}-quickgelu')}"
    else:
        remedy = 'pass a folder whose configuration says "quick_gelu": true'
    if any(state.is_openai for state in found):
        raise FewShotError(
            f"the weights {source.weights} are OpenAI's, which need QuickGELU, and "
            f"{source.architecture} has GELU: {remedy}"
        )
    maker = _QUICK_GELU_MAKERS.search(f"{source.folder or ''} {source.weights}")
    if maker:
        return [
            f"{source.weights} is taken with GELU; if it is {maker.group()}'s, which needs "
            f"QuickGELU, {remedy}"
        ]
    if source.folder is None and f"{name}-quickgelu" in open_clip.list_models():
        return [
            f"{source.weights} does not say its activation function, so {name}'s GELU is taken; "
            f"for weights of OpenAI, DFN or MetaCLIP {remedy}"
        ]
    return []


def _build(source: _Source) -> nn.Module:
    try:
        with _quiet():
            model = open_clip.create_model(
                source.open_clip_name,
                load_weights=False,
                pretrained_text=False,
                device="cpu",
                **source.options,
            )
    except Exception as error:
        raise FewShotError(
            f"{_MODEL}: open_clip can't build {source.architecture}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    try:
        vision_tower(model)
        text_tower(model)
    except (TypeError, ValueError) as error:
        raise FewShotError(f"{_MODEL}: {source.description}: {first_line(error)}") from error
    return model.float()  # built in the default dtype, which may be another


def _unknown_model(name: str) -> str:
    if name.startswith(_HUB):
        return (
            f"{_MODEL}: {name.removeprefix(_HUB)} is not in Hugging Face's cache; fetch it with "
            f"hf download {name.removeprefix(_HUB)}, or pass its folder"
        )
    if name.startswith("local-dir:"):
        return f"{_MODEL}: pass the folder {name.removeprefix('local-dir:')} without local-dir:"
    if os.path.isfile(name):
        return (
            f"{_MODEL}: {name} is a file; pass its architecture and {setting('pretrained', name)}"
        )
    # Case, separators and OpenAI's "@336px" are the usual slips, and would spoil the likeness.
    names = {_plain(known): known for known in open_clip.list_models()}
    close = get_close_matches(_plain(name), names, n=3, cutoff=0.5)
    likely = names.get(_plain(name)) or names.get(_plain(name.split(":")[0]))
    if len(Path(name).parts) > 1 and not likely:
        hint = ", and no such repository in Hugging Face's cache" * bool(
            _REPOSITORY.fullmatch(name)
        )
        return f"{_MODEL}: there is no folder {name}{hint}"
    hint = f"; the nearest are {', '.join(names[key] for key in close)}" if close else ""
    return f"{_MODEL}: {name} is neither a folder nor an open_clip architecture{hint}"


def _plain(name: str) -> str:
    """A name without what people write in different ways."""
    return re.sub(r"[^a-z0-9+]+", "-", name.lower().strip()).replace("336px", "336")


def _fingerprint(source: _Source, preprocess: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([source.config, preprocess], sort_keys=True).encode())
    files = checkpoint_files(source.weights)
    if source.folder is not None and source.config["text_cfg"].get("hf_tokenizer_name"):
        files += tokenizer_files(source.folder)
    for path in files:
        with open_regular(path) as file:
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
