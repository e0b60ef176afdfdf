"""What a loaded model comes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tir_kernels.towers.loading.preprocess import Preprocess


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that goes with it.

    Args:
        model: An open_clip model, or one of transformers, in evaluation mode, float32, frozen.
        preprocess: Makes the model's (3, H, W) float32 input from an RGB image.
        tokenizer: The model's tokenizer.
        description: The model in words.
        fingerprint: Digest of its configuration, preprocessing, weights and tokenizer.
        notes: What of the weights was chosen, changed, left out or can't be known.
        config: open_clip's "model_cfg", or the configuration of a model of transformers.
    """

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Callable[..., Tensor]
    description: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
