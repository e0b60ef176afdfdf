"""Images per second of an open classifier, and of plain open_clip on the same inputs.

    pytest bench/micro/test_predict.py --benchmark-only

Both get preprocessed images, and give class logits: open_clip by ``encode_image`` and one product
with class embeddings. ``extra_info`` has the images per second. Nothing here asserts a time.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from bench.clip_model import load_sizes, make_model, make_tokenizer
from bench.micro.timed import DEVICE, measure_rounds
from tir_kernels.fewshot import Classifier, Episode, Runtime, finetune_episode, methods
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.towers.loading.loaded import LoadedModel

MODEL, BATCH, ROUNDS = ("ViT-B-16", 256, 20) if DEVICE == "cuda" else ("ViT-B-32", 16, 5)
NAMES = ("forest", "river", "highway", "pasture", "industrial site")


@pytest.fixture(scope="module")
def parts():
    """A model, its tokenizer and a batch of inputs on the device."""
    sizes = load_sizes(MODEL)
    side = sizes.vision["image_size"]
    images = torch.randn(BATCH, 3, side, side, device=DEVICE)
    return make_model(sizes, DEVICE), make_tokenizer(sizes), images


class _Preprocess:
    """What a classifier asks of the preprocessing: the shape of an image."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = tuple(shape)


def _classifier(parts, name: str, precision: str) -> Classifier:
    model, tokenizer, images = parts
    method = methods.method_class(name)(steps=1)
    runtime = Runtime(device=DEVICE, precision=precision)
    labels = torch.arange(len(NAMES))
    episode = Episode(list(NAMES), images[: len(NAMES)], labels, images[:0])
    result = finetune_episode(model, tokenizer, episode, method, runtime=runtime)
    base = BaseModel(MODEL, None, MODEL, "")
    about = About(NAMES, NAMES, method, base, 0, 1, 1, precision, (1,) * len(NAMES))
    loaded = LoadedModel(model, _Preprocess(images.shape[1:]), tokenizer, MODEL, "")
    return Classifier(about, loaded, result.trained, runtime)


def _measured(benchmark, classify) -> None:
    measure_rounds(benchmark, classify, ROUNDS, warmup_rounds=3)
    if benchmark.stats is not None:
        benchmark.extra_info["images per second"] = BATCH / benchmark.stats.stats.median


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["open_clip", "lora", "reweighted"])
def test_images_per_second(benchmark, parts, way, precision) -> None:
    model, _, images = parts
    if way == "open_clip":
        classes = F.normalize(torch.randn(len(NAMES), model.visual.output_dim, device=DEVICE))
        low = torch.autocast(DEVICE, torch.bfloat16) if precision != "float32" else nullcontext()

        def classify() -> None:
            with torch.no_grad(), low:
                features = model.encode_image(images, normalize=True)
            (100 * features.float() @ classes.T).cpu()

        _measured(benchmark, classify)
        return
    name = methods.DEFAULT_METHODS[0] if way == "reweighted" else way
    with _classifier(parts, name, precision).open() as scorer:
        _measured(benchmark, lambda: scorer.logits(images))
