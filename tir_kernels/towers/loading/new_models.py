"""open_clip models made from a configuration, and their folders, for whoever trains one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]


def new_model(config: dict[str, Any]) -> tuple[Any, Tokenizer]:
    """A CLIP with random weights and its tokenizer, from open_clip's "model_cfg"."""
    model = open_clip.CLIP(**config)
    return model, open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])


def write_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write a configuration and float16 weights as a folder that open_clip loads.

    Args:
        model: Its state is written.
        config: open_clip's "model_cfg" and "preprocess_cfg".
        folder: Created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / HF_SAFE_WEIGHTS_NAME)


def read_model(folder: Path) -> tuple[Any, Tokenizer]:
    """The model of a folder, in evaluation mode, and its tokenizer."""
    name = f"local-dir:{folder}"
    return open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)


def contrastive_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """CLIP's loss of image features, text features and the scale of their cosines."""
    return open_clip.ClipLoss()
