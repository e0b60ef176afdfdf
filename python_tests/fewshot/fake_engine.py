"""A stand-in for model and training, so that the driver can be tested in milliseconds.

Run as a program it is ``tir-finetune`` with both in place, for tests that kill it.
"""

import functools
import os
import sys
import time
from dataclasses import replace
from unittest import mock

import torch

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.engine import EpisodeResult, NonFiniteLossError
from tir_kernels.fewshot.episodes import episode_seed
from tir_kernels.fewshot.models import LoadedModel


def fake_finetune(
    model,
    tokenizer,
    class_names,
    support_images,
    support_labels,
    query_images,
    config,
    *,
    lora_init=None,
    on_step=None,
):
    """Nearest centroid on mean colours, plus noise that belongs to the seed and the method."""
    losses = []
    steps = 0 if config.method == "zero-shot" else config.steps
    for step in range(steps):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        losses.append(1 / (step + 1))
        on_step(step, losses[-1])
    if config.method == "lora" and os.environ.get("FAKE_NAN") in class_names:
        raise NonFiniteLossError(steps, [*losses, float("nan")])
    features = support_images.mean((2, 3))
    centroids = torch.stack(
        [features[support_labels == label].mean(0) for label in range(len(class_names))]
    )
    noise = torch.randn(
        len(query_images),
        len(class_names),
        generator=torch.Generator().manual_seed(config.seed + len(config.method)),
    )
    logits = -torch.cdist(query_images.mean((2, 3)), centroids) + 0.1 * noise
    return EpisodeResult(losses=losses, query_logits=logits, support_accuracy=1.0)


def at_once(finetune=None):
    """``finetune_episodes`` by a stand-in for ``finetune_episode``, one after the other."""

    def finetune_episodes(model, tokenizer, episodes, config, *, on_step=None):
        results = []
        for position, episode in enumerate(episodes):
            try:
                results.append(
                    (finetune or fake_finetune)(
                        model,
                        tokenizer,
                        episode.class_names,
                        episode.support_images,
                        episode.support_labels,
                        episode.query_images,
                        replace(config, seed=episode_seed(config.seed, episode.index)),
                        on_step=functools.partial(on_step, position),
                    )
                )
            except NonFiniteLossError as error:
                results.append(error)
        return results

    return finetune_episodes


def small_preprocess(image):
    """An (3, 8, 8) tensor in [0, 1] from a PIL image."""
    pixels = torch.frombuffer(bytearray(image.resize((8, 8)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(8, 8, 3).permute(2, 0, 1).float() / 255


def fake_model(name="fake", pretrained=None, *, device="cpu"):
    return LoadedModel(torch.nn.Identity(), small_preprocess, lambda texts: None, name, name)


def run_main(arguments):
    """``tir-finetune`` on the stand-ins."""
    with (
        mock.patch("tir_kernels.fewshot.models.load_model", fake_model),
        mock.patch("tir_kernels.fewshot.engine.finetune_episodes", at_once()),
    ):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run_main(sys.argv[1:]))
