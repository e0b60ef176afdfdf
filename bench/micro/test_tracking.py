"""The time of a training with its measures read every 10 steps, and without.

    pytest bench/micro/test_tracking.py --benchmark-only

Each training has 10 steps and, tracked, two readings, so twice the share of those in a long one.
Nothing here asserts a time.
"""

from __future__ import annotations

import pytest
import torch

from bench.clip_model import load_sizes, make_model, make_tokenizer
from bench.micro.timed import DEVICE, measure_rounds
from tir_kernels.analysis import MEASURES
from tir_kernels.fewshot import Episode, Runtime, Tracker, finetune_episode, methods

NAMES = ["forest", "river", "highway", "pasture", "industrial site"]
SHOTS = 1 if DEVICE == "cpu" else 5
METHOD = methods.method_class("lora")(steps=10)


@pytest.mark.parametrize("measures", ["none", "all", *MEASURES])
def test_training(benchmark, measures) -> None:
    sizes = load_sizes("ViT-B-16")
    model, tokenizer = make_model(sizes, DEVICE), make_tokenizer(sizes)
    side = sizes.vision["image_size"]
    images = torch.randn(len(NAMES) * SHOTS, 3, side, side, device=DEVICE)
    labels = torch.arange(len(NAMES)).repeat_interleave(SHOTS)
    episode = Episode(NAMES, images, labels, images[:0])

    def train() -> None:
        chosen = None if measures == "all" else [measures]
        observers = [] if measures == "none" else [Tracker(model, 10, chosen)]
        runtime = Runtime(device=DEVICE)
        finetune_episode(model, tokenizer, episode, METHOD, runtime=runtime, observers=observers)

    measure_rounds(benchmark, train, rounds=1 if DEVICE == "cpu" else 5)
