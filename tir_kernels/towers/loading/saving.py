"""Models as folders of their own, which open_clip and ``load_model`` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import safetensors.torch
import torch

from tir_kernels.towers.loading.model_config import CONFIG_NAME

if TYPE_CHECKING:
    from tir_kernels.towers.loading.loaded import LoadedModel

WEIGHTS_NAME = "open_clip_model.safetensors"


def save_model(loaded: LoadedModel, folder: Path) -> list[Path]:
    """Write a model as a local model of open_clip: configuration, weights and tokenizer.

    Args:
        loaded: The model, with the weights that it has now.
        folder: Made if it is missing; files of these names in it are replaced.

    Returns:
        The files that were written.

    Raises:
        OSError: The folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "model_cfg": loaded.config,
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(loaded.model),
    }
    weights = {name: each.detach().cpu() for name, each in loaded.model.state_dict().items()}
    before = set(folder.iterdir())
    # Weights that share memory, which the format refuses, are written once each.
    tensors = {
        name: each.clone(memory_format=torch.contiguous_format) for name, each in weights.items()
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tokenizer: Any = getattr(loaded.tokenizer, "tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):  # one of transformers'
        tokenizer.save_pretrained(folder)
    own = {folder / WEIGHTS_NAME, folder / CONFIG_NAME}
    return sorted((set(folder.iterdir()) - before) | own)
