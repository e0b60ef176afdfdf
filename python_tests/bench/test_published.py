"""The published program's rendering computes what our engine computes, at greater length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

open_clip = pytest.importorskip("open_clip")

from fewshot.training_cases import StartingFrom  # noqa: E402

from bench import published  # noqa: E402
from bench.formulas import materialised_attention  # noqa: E402
from bench.plain_clip import PlainStep, Training  # noqa: E402
from bench.published import PublishedStep  # noqa: E402
from bench.settings import Settings  # noqa: E402
from bench.workload import Workload  # noqa: E402
from tir_kernels.fewshot import Episode, Runtime, finetune_episode  # noqa: E402
from tir_kernels.fewshot.methods.tir import TIR  # noqa: E402

NAMES = ["cat", "dog", "a very long description of a kitten"]
CONTEXT = 20
# Strength 0.3 gives no token the weight 0, so that none tie.
METHOD = TIR(steps=5, lora_lr=1e-3, lora_dropout=0.0, context_lr=0.01, strength=0.3)
TRAINING = Training(METHOD, Runtime(), shots=2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 5, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    model = open_clip.CLIP(16, vision, text).eval().requires_grad_(False)
    with torch.no_grad():  # larger weights, so that images and classes differ
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Support, its labels, queries: more of them than a batch holds."""
    generator = torch.Generator().manual_seed(0)
    support, queries = (torch.randn(n, 3, 32, 32, generator=generator) for n in (6, 70))
    return support, torch.arange(3).repeat_interleave(2), queries


def start_of(step: PlainStep) -> dict[str, torch.Tensor]:
    """LoRA's A by the names that the engine knows."""
    towers = {"visual": step.model.visual.transformer, "text": step.model.transformer}
    return {
        f"{tower}.{layer}.{projection}": a.detach().clone()
        for tower, transformer in towers.items()
        for layer, block in enumerate(transformer.resblocks)
        for projection, a in zip("qkv", step.lora[block][0], strict=True)
    }


@pytest.mark.parametrize("method", ["tir", "lora"])
def test_losses_and_logits_are_those_of_the_engine(model, tokenizer, images, method) -> None:
    support, labels, queries = images
    training = TRAINING if method == "tir" else TRAINING.of_method("lora")
    torch.manual_seed(1)
    step = PublishedStep(model, tokenizer, NAMES, training)
    start = StartingFrom(training.method, start_of(step))
    losses = step.train(support, labels, training.method.steps)
    episode = Episode(NAMES, support, labels, queries)
    ours = finetune_episode(model, tokenizer, episode, start)
    torch.testing.assert_close(losses, ours.losses, atol=1e-5, rtol=0)
    assert losses[0] - losses[-1] > 0.1, "it has learned"
    torch.testing.assert_close(step.classify(queries), ours.query_logits, atol=1e-4, rtol=0)


def test_weights_and_factors_count(model, tokenizer, images) -> None:
    support, labels, _ = images

    def first_loss(changes: Training) -> float:
        step = PublishedStep(model, tokenizer, NAMES, changes)
        return step.loss(support, labels).item()

    assert abs(first_loss(TRAINING) - first_loss(TRAINING.of_method("lora"))) > 1e-3
    step = PublishedStep(model, tokenizer, NAMES, TRAINING)
    before = step.loss(support, labels).item()
    for _, b in step.lora.values():
        nn.init.normal_(b, std=0.05)
    assert abs(step.loss(support, labels).item() - before) > 1e-3


def test_dropout_is_for_training_only(model, tokenizer, images) -> None:
    support, _, queries = images
    step = PublishedStep(model, tokenizer, NAMES, TRAINING.having(lora_dropout=0.5))
    for _, b in step.lora.values():
        nn.init.normal_(b, std=0.05)
    assert not torch.equal(step.logits(support), step.logits(support))
    torch.testing.assert_close(step.classify(queries), step.classify(queries), atol=0, rtol=0)


def test_it_does_the_published_work(model, tokenizer, images) -> None:
    support, labels, queries = images
    width = 32  # of both towers

    def flops(step: PlainStep) -> int:
        with FlopCounterMode(display=False) as counter:
            step.loss(support, labels)
        return counter.get_total_flops()

    class OnlyLonger(PublishedStep):
        _project = PlainStep._project

    full = flops(PublishedStep(model, tokenizer, NAMES, TRAINING))
    low_rank = flops(OnlyLonger(model, tokenizer, NAMES, TRAINING))
    rank = METHOD.lora_rank
    image_products, text_products = 5 * 3, 3 * 3  # blocks, each with q, k and v
    expected = 0
    for count, rows in ((image_products, 6 * 17), (text_products, 3 * CONTEXT)):
        expected += 2 * count * (rows * width**2 + rank * width**2 - 2 * rows * width * rank)
    assert full - low_rank == expected

    lengths = []

    def note(q, k, v, bias):
        lengths.append(q.shape[2])
        return materialised_attention(q, k, v, bias)

    PublishedStep(model, tokenizer, NAMES, TRAINING, note).classify(queries)
    one_batch = [CONTEXT] * 3 + [17] * 5
    assert lengths == one_batch * 2, "the text passes through its tower with each batch"


def test_a_plain_step_cuts_its_prompts(model, tokenizer) -> None:
    plain = PlainStep(model, tokenizer, NAMES[:2], TRAINING)
    whole = PublishedStep(model, tokenizer, NAMES[:2], TRAINING)
    lengths = [1 + 4 + step.after.shape[1] for step in (plain, whole)]
    assert lengths == [8, CONTEXT]  # start, a photo of a, the name, full stop, end


@pytest.mark.slow
def test_each_episode_reads_its_model_and_images(monkeypatch) -> None:
    settings = Settings(ways=2, queries=1)
    workload = Workload(settings, [1])
    loads, files = [], []
    load, read = published._load, published.read_images

    def noting_load(folder, device):
        loads.append(folder)
        return load(folder, device)

    def noting_read(names, *rest):
        files.extend(names)
        return read(names, *rest)

    monkeypatch.setattr(published, "_load", noting_load)
    monkeypatch.setattr(published, "read_images", noting_read)
    training = replace(TRAINING.having(steps=2, lora_dropout=0.25), shots=1)
    for index in range(2):
        drawn = workload.files(index, 1)
        losses, accuracy = published.run_episode(workload.model_folder, drawn, training)
        assert len(losses) == 2
        assert accuracy in (0, 0.5, 1)
    assert loads == [workload.model_folder] * 2
    assert len(files) == 2 * 4
    assert all(file.suffix == ".png" for file in files)
