"""Models as folders of their own, which ``load_model`` and the model's own library read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from tir_kernels.towers.loading.model_config import CONFIG_NAME

if TYPE_CHECKING:
    from tir_kernels.towers.loading.loaded import LoadedModel

WEIGHTS_NAME = "open_clip_model.safetensors"
_TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"
_TRANSFORMERS_CONFIG_NAMES = ("config.json", "preprocessor_config.json")


def library_of(loaded: LoadedModel) -> str:
    """Name of the library that the model is of, and whose folder :func:`save_model` writes."""
    return "open_clip" if _processor(loaded) is None else "transformers"


def _processor(loaded: LoadedModel) -> Any:
    """The image processor that comes with models of transformers alone."""
    return getattr(loaded.preprocess, "processor", None)


def save_model(loaded: LoadedModel, folder: Path) -> list[Path]:
    """Write a model as a local model of its library: configuration, weights and tokenizer.

    Args:
        loaded: The model, with the weights and the preprocessing that it has now.
        folder: Made if it is missing; files of these names in it are replaced.

    Returns:
        The files that were written.

    Raises:
        OSError: The folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    model: Any = loaded.model
    processor = _processor(loaded)
    if processor is None:
        name, settings = WEIGHTS_NAME, [folder / CONFIG_NAME]
        config: dict[str, Any] = {
            "model_cfg": loaded.config,
            "preprocess_cfg": asdict(loaded.preprocess.config),
        }
        settings[0].write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    else:  # of transformers
        name = _TRANSFORMERS_WEIGHTS_NAME
        settings = [folder / each for each in _TRANSFORMERS_CONFIG_NAMES]
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    weights = {key: each.detach().cpu() for key, each in model.state_dict().items()}
    # Weights that share memory, which the format refuses, are written once each.
    tensors = {
        key: each.clone(memory_format=torch.contiguous_format) for key, each in weights.items()
    }
    safetensors.torch.save_file(tensors, folder / name, {"format": "pt"})
    tokenizer: Any = getattr(loaded.tokenizer, "tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):  # one of transformers'
        tokenizer.save_pretrained(folder)
    own = {folder / name, *settings}
    return sorted((set(folder.iterdir()) - before) | own)
