"""Models by architecture name or from a local folder, always with weights, always in float32."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import nn

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import open_regular
from tir_kernels.text import Notice, setting
from tir_kernels.towers import text_tower, vision_tower
from tir_kernels.towers.loading.checkpoints import checkpoint_files, read_checkpoint
from tir_kernels.towers.loading.hub import has_transformers, load_tokenizer, tokenizer_files
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.model_config import check_config
from tir_kernels.towers.loading.placement import moved, usable_device
from tir_kernels.towers.loading.preprocess import Preprocess
from tir_kernels.towers.loading.sources import (
    NO_TRANSFORMERS,
    Source,
    find_source,
    folder_of,
    is_of_transformers,
    quiet,
    unreadable,
    weights_in,
)
from tir_kernels.towers.loading.weights import StateDict, load_weights, state_dicts

_MODEL = setting("model")

# Whose published CLIP weights need QuickGELU, by what files and folders of them are called.
_QUICK_GELU_MAKERS = re.compile(r"openai|dfn|metaclip(?!-?_?2)", re.IGNORECASE)


def load_model(
    name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a model for fine-tuning.

    Args:
        name: A folder with ``open_clip_config.json`` and weights, a folder of transformers with
            ``config.json``, weights, image processor and tokenizer, a repository of such a folder
            in Hugging Face's cache (``hf-hub:OWNER/NAME``), or an open_clip architecture.
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
        folder = folder_of(name)
        if folder is not None and is_of_transformers(folder):
            return _load_transformers(folder, pretrained, target)
        return _load(find_source(name, pretrained), target)


def _load_transformers(folder: Path, pretrained: str | None, target: torch.device) -> LoadedModel:
    if not has_transformers():
        raise FewShotError(f"{_MODEL}: {folder} {NO_TRANSFORMERS}")
    from tir_kernels.towers.loading.transformers_folder import load_transformers_folder

    try:
        with quiet():
            loaded = load_transformers_folder(folder, weights_in(folder, pretrained))
    except OSError as error:
        raise unreadable(folder, error) from error
    moved(loaded.model, target)
    return loaded


def _load(source: Source, target: torch.device) -> LoadedModel:
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
        with quiet():
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


def _notes_on_activation(source: Source, found: list[StateDict]) -> list[str]:
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


def _build(source: Source) -> nn.Module:
    try:
        with quiet():
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


def _fingerprint(source: Source, preprocess: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([source.config, preprocess], sort_keys=True).encode())
    files = checkpoint_files(source.weights)
    if source.folder is not None and source.config["text_cfg"].get("hf_tokenizer_name"):
        files += tokenizer_files(source.folder)
    for path in files:
        with open_regular(path) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
