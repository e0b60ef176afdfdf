"""Features of episodes' images are made once for all methods that leave the image tower alone."""

import pytest
import torch
from fewshot.training_cases import EPISODES, make_model, make_tokenizer

from tir_kernels.fewshot import Runtime, methods
from tir_kernels.fewshot.methods.lora import LoRA
from tir_kernels.fewshot.train.batch import Job
from tir_kernels.fewshot.train.inputs import SharedInputs
from tir_kernels.fewshot.train.loop import finetune


@pytest.fixture
def counted():
    """A model, and the numbers of images that its tower has seen."""
    model, seen = make_model(), []
    model.visual.conv1.register_forward_hook(lambda *parts: seen.append(len(parts[1][0])))
    return model, seen


def run(model, method, shared=None):
    more = {} if shared is None else {"shared": shared}
    return finetune(Job(model, make_tokenizer(), method, 0, Runtime(), **more), EPISODES[:2])


def test_each_image_is_seen_once(counted):
    model, seen = counted
    shared = SharedInputs()
    frozen = [
        methods.ZeroShot(),
        methods.LinearProbe(),
        methods.TipAdapter(),
        LoRA(lora_towers="text", steps=2),
    ]
    found = [run(model, method, shared) for method in frozen]
    images = sum(len(each.support_images) + len(each.query_images) for each in EPISODES[:2])
    assert sum(seen) == images
    for method, results in zip(frozen, found, strict=True):
        for own, alone in zip(results, run(model, method), strict=True):
            torch.testing.assert_close(own.query_logits, alone.query_logits)


def test_a_tuned_tower_sees_them_anew(counted):
    model, seen = counted
    shared = SharedInputs()
    run(model, methods.ZeroShot(), shared)
    before = sum(seen)
    found = run(model, LoRA(steps=1), shared)
    assert sum(seen) > before
    expected = run(model, LoRA(steps=1))
    torch.testing.assert_close(found[0].query_logits, expected[0].query_logits)


def test_other_episodes_are_forgotten(counted):
    model, seen = counted
    shared = SharedInputs()
    run(model, methods.ZeroShot(), shared)
    before = sum(seen)
    shared.keep_only(EPISODES[2:])
    run(model, methods.ZeroShot(), shared)
    assert sum(seen) == 2 * before
