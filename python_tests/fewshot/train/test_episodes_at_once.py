"""Episodes trained at once give what each gives alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fewshot.training_cases import (
    EPISODES,
    METHOD,
    NAMES,
    as_method,
    assert_each_as_alone,
    assert_same,
    draw_episode,
    make_model,
    make_tokenizer,
    steady_model,
)
from tiny_clip import Untouched
from torch import Tensor, nn

from tir_kernels.demo import model_directory
from tir_kernels.fewshot import (
    Episode,
    EpisodeResult,
    NonFiniteLossError,
    Runtime,
    episodes_that_fit,
    finetune_episode,
    finetune_episodes,
)
from tir_kernels.fewshot.methods.tir import TIR
from tir_kernels.fewshot.train import batch as batch_of_episodes
from tir_kernels.fewshot.train import loop
from tir_kernels.towers.loading.models import load_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", ["tir", "lora", "zero-shot"])
def test_at_once_is_as_alone(tokenizer, name: str, dropout: float) -> None:
    method = as_method(name) if name == "zero-shot" else as_method(name, lora_dropout=dropout)
    model = steady_model(method)
    together = finetune_episodes(model, tokenizer, EPISODES, method)
    for episode, result in zip(EPISODES, together, strict=True):
        expected = finetune_episode(model, tokenizer, episode, method)
        assert_same(result, expected)
        if name != "zero-shot":
            assert len(expected.losses) == method.steps
            assert expected.losses[0] != expected.losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["attention", "both", "values"])
def test_placements(tokenizer, placement: str) -> None:
    method = replace(METHOD, placement=placement, steps=5)
    model = steady_model(method)
    together = finetune_episodes(model, tokenizer, EPISODES, method)
    assert_each_as_alone(model, EPISODES, method, together)


@pytest.mark.slow
@pytest.mark.parametrize("context_tokens", [0, 7])
def test_contexts(tokenizer, context_tokens: int) -> None:
    method = replace(METHOD, context_tokens=context_tokens, steps=5)
    model = steady_model(method)
    together = finetune_episodes(model, tokenizer, EPISODES[1:], method)
    assert_each_as_alone(model, EPISODES[1:], method, together)


def test_episodes_of_other_shapes_are_trained_beside(model, tokenizer) -> None:
    method = replace(METHOD, steps=3)
    episodes = [
        EPISODES[0],
        draw_episode(4, ["sun", "moon"], shots=1),
        EPISODES[1],
        draw_episode(5, ["one", "two", "three"], shots=3, queries=0),
    ]
    steps: list[tuple[int, int]] = []
    results = finetune_episodes(
        model, tokenizer, episodes, method, on_step=lambda i, step, loss: steps.append((i, step))
    )
    assert_each_as_alone(model, episodes, method, results)
    assert sorted(steps) == [(i, step) for i in range(4) for step in range(3)]
    assert finetune_episodes(model, tokenizer, [], method) == []


def before_each_batch(monkeypatch, note: Callable[[list[Episode]], Any]) -> None:
    """Call ``note`` with the episodes of each batch before it is trained."""
    finetune_batch = loop.finetune_batch

    def noted(job, episodes, on_step):
        note(episodes)
        return finetune_batch(job, episodes, on_step)

    monkeypatch.setattr(loop, "finetune_batch", noted)


def note_sizes(monkeypatch) -> list[int]:
    sizes: list[int] = []
    before_each_batch(monkeypatch, lambda episodes: sizes.append(len(episodes)))
    return sizes


@pytest.mark.parametrize("parallel", [1, 2])
def test_at_most_so_many_at_once(model, tokenizer, parallel: int, monkeypatch) -> None:
    sizes = note_sizes(monkeypatch)
    method = replace(METHOD, steps=2)
    limited = finetune_episodes(
        model, tokenizer, EPISODES, method, runtime=Runtime(parallel=parallel)
    )
    assert sizes == ([1, 1, 1] if parallel == 1 else [2, 1])
    for ours, theirs in zip(
        limited, finetune_episodes(model, tokenizer, EPISODES, method), strict=True
    ):
        assert_same(ours, theirs)


def test_too_little_memory_halves_the_group_and_says_so(model, tokenizer, monkeypatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    method = replace(METHOD, steps=2)
    expected = finetune_episodes(model, tokenizer, EPISODES, method)
    before_each_batch(monkeypatch, lambda episodes: len(episodes) > 1 and fail())
    with pytest.warns(UserWarning, match="3 episodes at once do not fit") as seen:
        results = finetune_episodes(model, tokenizer, EPISODES, method)
    assert len(seen) == 2
    for ours, theirs in zip(results, expected, strict=True):
        assert_same(ours, theirs)

    before_each_batch(monkeypatch, lambda episodes: fail())
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises(torch.OutOfMemoryError):
        finetune_episodes(model, tokenizer, EPISODES, method)


def test_lack_of_memory_on_a_cpu_halves_the_group_too(model, tokenizer, monkeypatch) -> None:
    def fail() -> Tensor:
        return torch.empty(2**60)  # a RuntimeError of PyTorch's own

    before_each_batch(monkeypatch, lambda episodes: len(episodes) > 1 and fail())
    with pytest.warns(UserWarning, match="3 episodes at once do not fit"):
        results = finetune_episodes(model, tokenizer, EPISODES, replace(METHOD, steps=1))
    assert all(isinstance(result, EpisodeResult) for result in results)
    before_each_batch(monkeypatch, lambda episodes: fail())
    with pytest.raises(torch.OutOfMemoryError, match="allocate"):
        finetune_episode(model, tokenizer, EPISODES[0], METHOD)


@pytest.mark.parametrize(
    "method", [as_method("tir", steps=2, lora_dropout=0.25), as_method("zero-shot")]
)
def test_the_settings_of_the_process_are_no_matter(model, tokenizer, method) -> None:
    expected = finetune_episodes(model, tokenizer, EPISODES[:2], method)
    empty = [replace(each, query_images=each.query_images[:0]) for each in EPISODES[:2]]
    dtype = torch.get_default_dtype()
    try:
        for other, device in ((torch.float16, "cpu"), (torch.float64, "meta")):
            torch.set_default_dtype(other)
            mode = torch.inference_mode() if device == "cpu" else torch.no_grad()
            with torch.device(device), mode, torch.autocast("cpu", dtype=torch.bfloat16):
                results = finetune_episodes(model, tokenizer, EPISODES[:2], method)
                without = finetune_episodes(model, tokenizer, empty, method)
            assert all(result.query_logits.dtype == torch.float32 for result in without)
            for ours, theirs in zip(results, expected, strict=True):
                assert ours.losses == theirs.losses
                # Where LoRA is off, PyTorch's own attention has a kernel that it passes over if a
                # default device is set: another order of additions.
                torch.testing.assert_close(
                    ours.query_logits, theirs.query_logits, rtol=1e-6, atol=1e-6
                )
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [None, "auto"])
def test_an_overflow_in_float16_does_not_touch_the_others(model, tokenizer, parallel) -> None:
    method = replace(METHOD, steps=3)
    runtime = Runtime(precision="float16", parallel=parallel)
    huge = replace(EPISODES[1], support_images=EPISODES[1].support_images * 1e4)
    episodes = [EPISODES[0], huge, EPISODES[2]]
    results = finetune_episodes(model, tokenizer, episodes, method, runtime=runtime)
    for index in (0, 2):
        own = finetune_episode(model, tokenizer, episodes[index], method, runtime=runtime)
        assert results[index].losses == own.losses
        assert torch.equal(results[index].query_logits, own.query_logits)
    with pytest.raises(ValueError, match=r"parallel must be 1 with precision='float16'.*got 2"):
        finetune_episodes(model, tokenizer, episodes, method, runtime=replace(runtime, parallel=2))


def test_a_loss_that_is_not_finite_does_not_touch_the_others(tokenizer) -> None:
    model = steady_model(METHOD)
    broken = replace(EPISODES[1], support_images=EPISODES[1].support_images * math.nan)
    untouched = Untouched(model)
    results = finetune_episodes(model, tokenizer, [EPISODES[0], broken, EPISODES[2]], METHOD)
    untouched.check()
    assert isinstance(results[1], NonFiniteLossError)
    assert results[1].step == 0
    for index in (0, 2):
        assert_same(results[index], finetune_episode(model, tokenizer, EPISODES[index], METHOD))
    with pytest.raises(NonFiniteLossError):
        finetune_episode(model, tokenizer, broken, METHOD)


def test_what_cannot_be_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="parallel must be at least 1; got 0"):
        Runtime(parallel=0)
    with pytest.raises(TypeError, match="parallel must be an int, 'auto' or None; got str"):
        Runtime(parallel="two")
    bad = replace(EPISODES[0], support_labels=torch.full((6,), 3))
    with pytest.raises(ValueError, match="support_labels must lie between 0 and 2"):
        finetune_episodes(model, tokenizer, [EPISODES[1], bad], METHOD)
    for shots in (0, 4):
        with pytest.raises(ValueError, match=f"shots={shots} of 3 classes take .*; got 6"):
            finetune_episodes(model, tokenizer, [replace(EPISODES[0], shots=shots)], METHOD)


def test_the_last_block_does_less(model, tokenizer, monkeypatch) -> None:
    lengths = []
    block = model.visual.transformer.resblocks[-1]
    block.mlp.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    try:
        method = replace(METHOD, steps=1)
        finetune_episodes(model, tokenizer, EPISODES[:1], method)
        assert set(lengths) == {1}
        lengths.clear()
        finetune_episodes(model, tokenizer, EPISODES[:1], replace(method, layers=(1, 4)))
        assert set(lengths) == {17}, "a re-weighted block needs all its tokens"
    finally:
        block.mlp._forward_hooks.clear()


@pytest.mark.slow
def test_at_once_is_as_alone_over_a_whole_training() -> None:
    """On a trained model: of one with random weights, tiny gradients make Adam chaotic."""
    loaded = load_model(str(model_directory()))
    names = ["red circle", "blue square", "green star"]
    generator = torch.Generator().manual_seed(0)

    def image_of(label: int) -> Tensor:
        drawn = torch.randn(3, 64, 64, generator=generator) * 0.2
        drawn[label, 16 + 8 * label :, 20:50] += 1.5
        return drawn

    def episode(index: int) -> Episode:
        labels = torch.arange(3)
        images = [torch.stack([image_of(label) for label in range(3)]) for _ in range(2)]
        return Episode(names, images[0], labels, images[1], index)

    episodes = [episode(index) for index in (4, 7)]
    method = TIR(lora_dropout=0.0)  # the method's own settings
    together = finetune_episodes(loaded.model, loaded.tokenizer, episodes, method)
    for each, result in zip(episodes, together, strict=True):
        expected = finetune_episode(loaded.model, loaded.tokenizer, each, method)
        assert len(result.losses) == 100
        assert result.losses[-1] < result.losses[0] / 1.3
        torch.testing.assert_close(result.losses, expected.losses, atol=1e-4, rtol=0)
        assert torch.equal(result.query_logits.argmax(1), expected.query_logits.argmax(1))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpoints_change_nothing_and_keep_less(model, tokenizer, dropout: float) -> None:
    method = replace(METHOD, lora_dropout=dropout, steps=5)
    kept = finetune_episodes(model, tokenizer, EPISODES[:1], method)
    again = finetune_episodes(
        model, tokenizer, EPISODES[:1], method, runtime=Runtime(checkpoint=True)
    )
    assert kept[0].losses == again[0].losses
    assert torch.equal(kept[0].query_logits, again[0].query_logits)


def test_checkpoints_let_more_episodes_fit(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(loop, "_CPU_IMAGES", 10**9)
    monkeypatch.setattr(loop, "available_bytes", lambda device: 2**30)
    fitting = [
        episodes_that_fit(model, tokenizer, EPISODES[0], METHOD, Runtime(checkpoint=checkpoint))
        for checkpoint in (False, True)
    ]
    assert 1 < fitting[0] < fitting[1] / 1.5


@pytest.mark.parametrize("available", [0, 2**40])
def test_auto_takes_what_fits(model, tokenizer, monkeypatch, available: int) -> None:
    monkeypatch.setattr(loop, "available_bytes", lambda device: available)
    sizes = note_sizes(monkeypatch)
    method = replace(METHOD, steps=2)
    episodes = [draw_episode(index, NAMES[0]) for index in range(3)]
    results = finetune_episodes(
        model, tokenizer, episodes, method, runtime=Runtime(parallel="auto")
    )
    assert sizes == ([3] if available else [1, 1, 1])
    assert_each_as_alone(model, episodes, method, results)


def test_what_a_step_keeps_is_counted(model, tokenizer) -> None:
    """More episodes keep more, in proportion; the model's own parameters do not count."""
    job = batch_of_episodes.Job(model, tokenizer, METHOD, 0, Runtime())

    def kept(count: int) -> int:
        alike = [replace(EPISODES[0], index=index) for index in range(count)]
        return batch_of_episodes.cost_of_a_step(job, alike).kept_bytes

    assert kept(3) == pytest.approx(3 * kept(1), rel=0.15)


def test_a_users_hook_is_still_called(model, tokenizer) -> None:
    calls = []
    mlp = model.visual.transformer.resblocks[0].mlp
    handle = mlp.register_forward_hook(lambda *arguments: calls.append(1))
    try:
        finetune_episodes(model, tokenizer, EPISODES[:1], replace(METHOD, steps=2))
    finally:
        handle.remove()
    assert len(calls) >= 2
