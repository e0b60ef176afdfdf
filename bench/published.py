"""The baseline: how the method's published program computes a step and an episode.

Plain PyTorch with the structure of the CLIP-LoRA family of programs, to which the method's (arXiv
2605.25799) belongs. The mathematics are those of the few-shot engine. What the engine leaves out is
done here: B·A is multiplied out, prompts fill the model's whole context, attention is materialised,
every token passes every block, the patch embedding runs at every step, each batch that is
classified has a text pass of its own, and each episode reads its model from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench.plain_clip import Training

from .plain_clip import PlainStep, precision
from .workload import EpisodeFiles

IMAGES_PER_BATCH = 64  # when classifying; the engine's number


class PublishedStep(PlainStep):
    """A :class:`PlainStep` with all the work that the published program does."""

    def _text_length(self, token_ids: Tensor) -> int:
        """The whole context, padding included."""
        return token_ids.shape[1]

    def _project(self, block: nn.Module, tokens: Tensor) -> list[Tensor]:
        """Three projections, each with a product of its own for the change B·A of its weight."""
        attention = block.attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        parts = []
        for weight, bias, a, b in zip(weights, biases, *self.lora[block], strict=True):
            change = F.linear(self._lora_input(tokens), b @ a)
            parts.append(F.linear(tokens, weight, bias) + change * self._lora_scaling)
        return parts

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """(Q, 3, H, W) -> (Q, C) float32 logits in evaluation mode."""
        self.drops = False
        return torch.cat([self.logits(batch) for batch in images.split(IMAGES_PER_BATCH)]).float()


def run_episode(folder: Path, files: EpisodeFiles, training: Training) -> tuple[list[float], float]:
    """Load the model and the images, train, classify: the losses, and the share that is right.

    Args:
        folder: The model's, with ``open_clip_config.json`` and weights.
        files: The episode.
        training: Settings.
    """
    model, preprocess, tokenizer = _load(folder, training.runtime.device)
    torch.manual_seed(files.index)
    support, queries = (
        read_images(names, preprocess, training.runtime.device)
        for names in (files.support, files.queries)
    )
    with precision(training):
        step = PublishedStep(model, tokenizer, files.class_names, training)
        losses = step.train(
            support, files.labels(files.support).to(training.runtime.device), training.method.steps
        )
        guesses = step.classify(queries).argmax(1).cpu()
    return losses, (guesses == files.labels(files.queries)).float().mean().item()


def _load(folder: Path, device: str) -> tuple[nn.Module, Callable, Callable]:
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, device=device)
    return model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(name)


def read_images(
    files: Sequence[Path | IO[bytes]], preprocess: Callable[[Image.Image], Tensor], device: str
) -> Tensor:
    """(images, 3, H, W) float32."""
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(preprocess(image.convert("RGB")))
    return torch.stack(images).to(device)
