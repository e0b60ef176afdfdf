"""Episodes trained at once give what each gives alone."""

from __future__ import annotations

import copy
import functools
import math
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tir_kernels.demo import model_directory
from tir_kernels.fewshot import (
    Episode,
    EpisodeResult,
    FewShotConfig,
    NonFiniteLossError,
    Savings,
    finetune_episode,
    finetune_episodes,
)
from tir_kernels.fewshot.episode import episode_seed
from tir_kernels.fewshot.train import loop as engine
from tir_kernels.towers.loading.models import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "clip"))
from tiny_clip import Untouched

# Class names of one to many tokens, so that the prompts of episodes differ in length.
NAMES = [
    ["cat", "dog", "a very long description of a tabby kitten"],
    ["sea", "lake", "pond"],
    ["annual crop", "river bank", "industrial site"],
]
CONFIG = FewShotConfig(steps=12, lora_lr=2e-3, lora_dropout=0.0, context_lr=0.02, strength=0.3)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": 5, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    return open_clip.CLIP(16, vision, text).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@functools.cache
def make_tokenizer() -> Any:
    return open_clip.SimpleTokenizer(context_length=20)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def draw_episode(index: int, names: list[str], shots: int = 2, queries: int = 3) -> Episode:
    generator = torch.Generator().manual_seed(index)

    def images(count: int) -> Tensor:
        return torch.randn(count, 3, 32, 32, generator=generator)

    labels = torch.arange(len(names)).repeat_interleave(shots)
    return Episode(names, images(len(labels)), labels, images(queries * len(names)), index)


EPISODES = [draw_episode(index, names) for index, names in zip((3, 0, 8), NAMES, strict=True)]
ATOL = 1e-4


@functools.cache
def steady_model(config: FewShotConfig) -> nn.Module:
    """A model whose training does not hang on a last bit.

    In some a token is selected by a hair, or a gradient is nothing but rounding, of which Adam
    takes the sign: no two ways to compute those agree. Ten times what rounding does must not show
    in the model that is compared.
    """

    def ends(model: nn.Module, change: float) -> list[Tensor]:
        episodes = [
            replace(e, support_images=e.support_images * (1 + change * noise))
            for e, noise in zip(EPISODES, noises, strict=True)
        ]
        results = finetune_episodes(model, make_tokenizer(), episodes, config)
        return [result.query_logits for result in results]

    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(e.support_images.shape, generator=generator) for e in EPISODES]
    for seed in range(30):
        model = make_model(seed)
        expected = ends(model, 0.0)
        if all(
            torch.allclose(one, other, atol=ATOL, rtol=0)
            for change in (1e-6, -1e-6)
            for one, other in zip(ends(model, change), expected, strict=True)
        ):
            return model
    raise AssertionError("every model's training hangs on a last bit")


def alone(model: nn.Module, tokenizer: Any, episode: Episode, config: FewShotConfig):
    return finetune_episode(
        model,
        tokenizer,
        episode.class_names,
        episode.support_images,
        episode.support_labels,
        episode.query_images,
        replace(config, seed=episode_seed(config.seed, episode.index)),
    )


def assert_same(ours: EpisodeResult, theirs: EpisodeResult, atol: float = ATOL) -> None:
    assert isinstance(ours, EpisodeResult), ours
    torch.testing.assert_close(
        torch.tensor(ours.losses), torch.tensor(theirs.losses), atol=atol, rtol=0
    )
    torch.testing.assert_close(ours.query_logits, theirs.query_logits, atol=atol, rtol=0)
    assert ours.support_accuracy == theirs.support_accuracy
    assert (ours.context is None) == (theirs.context is None)
    if ours.context is not None:
        torch.testing.assert_close(ours.context, theirs.context, atol=atol, rtol=0)
    assert list(ours.lora) == list(theirs.lora)
    for name, factors in ours.lora.items():
        for one, other in zip(factors, theirs.lora[name], strict=True):
            # Adam divides by the size of a gradient: where that is near 0, rounding decides.
            assert (one - other).abs().mean() < atol / 10, name


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("method", ["tir", "lora", "zero-shot"])
def test_at_once_is_as_alone(tokenizer, method: str, dropout: float) -> None:
    config = replace(CONFIG, method=method, lora_dropout=dropout)
    model = steady_model(config)
    together = finetune_episodes(model, tokenizer, EPISODES, config)
    for episode, result in zip(EPISODES, together, strict=True):
        expected = alone(model, tokenizer, episode, config)
        assert_same(result, expected)
        if method != "zero-shot":
            assert len(expected.losses) == config.steps
            assert expected.losses[0] != expected.losses[-1]


@pytest.mark.parametrize("placement", ["attention", "both"])
def test_placements(tokenizer, placement: str) -> None:
    config = replace(CONFIG, placement=placement, steps=5)
    model = steady_model(config)
    together = finetune_episodes(model, tokenizer, EPISODES, config)
    for episode, result in zip(EPISODES, together, strict=True):
        assert_same(result, alone(model, tokenizer, episode, config))


@pytest.mark.parametrize("context_tokens", [0, 7])
def test_contexts(tokenizer, context_tokens: int) -> None:
    config = replace(CONFIG, context_tokens=context_tokens, steps=5)
    model = steady_model(config)
    together = finetune_episodes(model, tokenizer, EPISODES[1:], config)
    for episode, result in zip(EPISODES[1:], together, strict=True):
        assert_same(result, alone(model, tokenizer, episode, config))


def test_episodes_of_other_shapes_are_trained_beside(model, tokenizer) -> None:
    config = replace(CONFIG, steps=3)
    episodes = [
        EPISODES[0],
        draw_episode(4, ["sun", "moon"], shots=1),
        EPISODES[1],
        draw_episode(5, ["one", "two", "three"], shots=3, queries=0),
    ]
    steps: list[tuple[int, int]] = []
    results = finetune_episodes(
        model, tokenizer, episodes, config, on_step=lambda i, step, loss: steps.append((i, step))
    )
    for episode, result in zip(episodes, results, strict=True):
        assert_same(result, alone(model, tokenizer, episode, config))
    assert sorted(steps) == [(i, step) for i in range(4) for step in range(3)]
    assert finetune_episodes(model, tokenizer, [], config) == []


@pytest.mark.parametrize("parallel", [1, 2])
def test_at_most_so_many_at_once(model, tokenizer, parallel: int, monkeypatch) -> None:
    sizes = []
    finetune_group = engine._finetune_batch

    def record(model, tokenizer, episodes, *rest):
        sizes.append(len(episodes))
        return finetune_group(model, tokenizer, episodes, *rest)

    monkeypatch.setattr(engine, "_finetune_batch", record)
    config = replace(CONFIG, steps=2)
    limited = finetune_episodes(model, tokenizer, EPISODES, config, parallel=parallel)
    assert sizes == ([1, 1, 1] if parallel == 1 else [2, 1])
    for ours, theirs in zip(
        limited, finetune_episodes(model, tokenizer, EPISODES, config), strict=True
    ):
        assert_same(ours, theirs)


def test_too_little_memory_halves_the_group_and_says_so(model, tokenizer, monkeypatch) -> None:
    finetune_group = engine._finetune_batch

    def with_little_memory(model, tokenizer, episodes, *rest):
        if len(episodes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return finetune_group(model, tokenizer, episodes, *rest)

    config = replace(CONFIG, steps=2)
    expected = finetune_episodes(model, tokenizer, EPISODES, config)
    monkeypatch.setattr(engine, "_finetune_batch", with_little_memory)
    with pytest.warns(UserWarning, match="3 episodes at once do not fit") as seen:
        results = finetune_episodes(model, tokenizer, EPISODES, config)
    assert len(seen) == 2
    for ours, theirs in zip(results, expected, strict=True):
        assert_same(ours, theirs)

    def without_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_finetune_batch", without_memory)
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises(torch.OutOfMemoryError):
        finetune_episodes(model, tokenizer, EPISODES, config)


def test_lack_of_memory_on_a_cpu_halves_the_group_too(model, tokenizer, monkeypatch) -> None:
    finetune_group = engine._finetune_batch

    def with_little_memory(model, tokenizer, episodes, *rest):
        if len(episodes) > 1:
            torch.empty(2**60)  # a RuntimeError of PyTorch's own
        return finetune_group(model, tokenizer, episodes, *rest)

    monkeypatch.setattr(engine, "_finetune_batch", with_little_memory)
    with pytest.warns(UserWarning, match="3 episodes at once do not fit"):
        results = finetune_episodes(model, tokenizer, EPISODES, replace(CONFIG, steps=1))
    assert all(isinstance(result, EpisodeResult) for result in results)
    monkeypatch.setattr(engine, "_finetune_batch", lambda *arguments: torch.empty(2**60))
    with pytest.raises(torch.OutOfMemoryError, match="allocate"):
        alone(model, tokenizer, EPISODES[0], CONFIG)


@pytest.mark.parametrize("method", ["tir", "zero-shot"])
def test_the_settings_of_the_process_are_no_matter(model, tokenizer, method) -> None:
    config = replace(CONFIG, method=method, steps=2, lora_dropout=0.25)
    expected = finetune_episodes(model, tokenizer, EPISODES[:2], config)
    empty = [replace(each, query_images=each.query_images[:0]) for each in EPISODES[:2]]
    dtype = torch.get_default_dtype()
    try:
        for other, device in ((torch.float16, "cpu"), (torch.float64, "meta")):
            torch.set_default_dtype(other)
            mode = torch.inference_mode() if device == "cpu" else torch.no_grad()
            with torch.device(device), mode, torch.autocast("cpu", dtype=torch.bfloat16):
                results = finetune_episodes(model, tokenizer, EPISODES[:2], config)
                without = finetune_episodes(model, tokenizer, empty, config)
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


@pytest.mark.parametrize("parallel", [None, "auto"])
def test_an_overflow_in_float16_does_not_touch_the_others(model, tokenizer, parallel) -> None:
    config = replace(CONFIG, precision="float16", steps=3)
    huge = replace(EPISODES[1], support_images=EPISODES[1].support_images * 1e4)
    episodes = [EPISODES[0], huge, EPISODES[2]]
    results = finetune_episodes(model, tokenizer, episodes, config, parallel=parallel)
    for index in (0, 2):
        own = alone(model, tokenizer, episodes[index], config)
        assert results[index].losses == own.losses
        assert torch.equal(results[index].query_logits, own.query_logits)
    with pytest.raises(ValueError, match=r"parallel must be 1 with precision='float16'.*got 2"):
        finetune_episodes(model, tokenizer, episodes, config, parallel=2)


def test_a_loss_that_is_not_finite_does_not_touch_the_others(tokenizer) -> None:
    model = steady_model(CONFIG)
    broken = replace(EPISODES[1], support_images=EPISODES[1].support_images * math.nan)
    untouched = Untouched(model)
    results = finetune_episodes(model, tokenizer, [EPISODES[0], broken, EPISODES[2]], CONFIG)
    untouched.check()
    assert isinstance(results[1], NonFiniteLossError)
    assert results[1].step == 0
    for index in (0, 2):
        assert_same(results[index], alone(model, tokenizer, EPISODES[index], CONFIG))
    with pytest.raises(NonFiniteLossError):
        alone(model, tokenizer, broken, CONFIG)


def test_what_cannot_be_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="parallel must be at least 1; got 0"):
        finetune_episodes(model, tokenizer, EPISODES, CONFIG, parallel=0)
    with pytest.raises(TypeError, match="parallel must be an int, 'auto' or None; got str"):
        finetune_episodes(model, tokenizer, EPISODES, CONFIG, parallel="two")
    bad = replace(EPISODES[0], support_labels=torch.full((6,), 3))
    with pytest.raises(ValueError, match="support_labels must lie between 0 and 2"):
        finetune_episodes(model, tokenizer, [EPISODES[1], bad], CONFIG)


# What a saving leaves out are products or, with "image_batches", passes; the other two are fused
# layers and, on a GPU, launches.
LESS_WORK = [
    "cache_patch_embedding",
    "class_token_only",
    "cut_prompts",
    "low_rank_products",
    "frozen_weights",
    "shared_text_pass",
]


@functools.cache
def usual_results(config: FewShotConfig) -> list[Any]:
    return finetune_episodes(steady_model(config), make_tokenizer(), EPISODES, config)


@pytest.mark.parametrize("switched_off", [*LESS_WORK, "image_batches", "fused_layers"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_savings_are_exact(tokenizer, switched_off: str, dropout: float) -> None:
    config = replace(CONFIG, lora_dropout=dropout)
    model = steady_model(config)
    untouched = Untouched(model)
    whole = finetune_episodes(
        model, tokenizer, EPISODES, config, savings=Savings(**{switched_off: False})
    )
    untouched.check()
    for ours, theirs in zip(usual_results(config), whole, strict=True):
        assert_same(ours, theirs)


def test_every_saving_has_a_test() -> None:
    tested = {*LESS_WORK, "image_batches", "fused_layers", "step_graph"}
    assert tested == {field.name for field in fields(Savings)}


@pytest.mark.parametrize("switched_off", LESS_WORK)
def test_savings_save(model, tokenizer, switched_off: str) -> None:
    def operations(savings: Savings) -> int:
        # The fused layers multiply where the counter does not see it.
        savings = replace(savings, fused_layers=False)
        config = replace(CONFIG, steps=2, lora_rank=4)
        # More than one batch of images: only then are there text passes to share.
        episode = draw_episode(0, NAMES[0], queries=30)
        with FlopCounterMode(display=False) as counter:
            finetune_episodes(model, tokenizer, [episode], config, savings=savings)
        return counter.get_total_flops()

    assert operations(Savings()) < operations(Savings(**{switched_off: False}))


def test_images_are_classified_in_batches(model, tokenizer) -> None:
    sizes = []
    handle = model.visual.conv1.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    )
    try:
        for batches in (True, False):
            finetune_episodes(
                model,
                tokenizer,
                EPISODES[:2],
                replace(CONFIG, steps=1),
                savings=Savings(image_batches=batches),
            )
    finally:
        handle.remove()
    training, support, queries = 12, 12, 18
    assert sizes == [training, support, queries] + [training] + [2] * ((support + queries) // 2)


def test_the_last_block_does_less(model, tokenizer, monkeypatch) -> None:
    lengths = []
    block = model.visual.transformer.resblocks[-1]
    block.mlp.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    try:
        config = replace(CONFIG, steps=1)
        finetune_episodes(model, tokenizer, EPISODES[:1], config)
        assert set(lengths) == {1}
        lengths.clear()
        finetune_episodes(model, tokenizer, EPISODES[:1], replace(config, layers=(1, 4)))
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
    config = FewShotConfig(lora_dropout=0.0, shots=1)  # the method's own settings
    together = finetune_episodes(loaded.model, loaded.tokenizer, episodes, config)
    for each, result in zip(episodes, together, strict=True):
        expected = alone(loaded.model, loaded.tokenizer, each, config)
        assert len(result.losses) == 100
        assert result.losses[-1] < result.losses[0] / 1.3
        torch.testing.assert_close(result.losses, expected.losses, atol=1e-4, rtol=0)
        assert torch.equal(result.query_logits.argmax(1), expected.query_logits.argmax(1))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpoints_change_nothing_and_keep_less(model, tokenizer, dropout: float) -> None:
    config = replace(CONFIG, lora_dropout=dropout, steps=5)
    kept = finetune_episodes(model, tokenizer, EPISODES[:1], config)
    again = finetune_episodes(model, tokenizer, EPISODES[:1], config, checkpoint=True)
    assert kept[0].losses == again[0].losses
    assert torch.equal(kept[0].query_logits, again[0].query_logits)


def test_checkpoints_let_more_episodes_fit(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(engine, "_CPU_IMAGES", 10**9)
    monkeypatch.setattr(engine, "available_bytes", lambda device: 2**30)
    fitting = [
        engine.episodes_that_fit(model, tokenizer, EPISODES[0], CONFIG, checkpoint=checkpoint)
        for checkpoint in (False, True)
    ]
    assert 1 < fitting[0] < fitting[1] / 1.5


@pytest.mark.parametrize("available", [0, 2**40])
def test_auto_takes_what_fits(model, tokenizer, monkeypatch, available: int) -> None:
    monkeypatch.setattr(engine, "available_bytes", lambda device: available)
    sizes = []
    finetune_group = engine._finetune_batch

    def noted(model, tokenizer, episodes, *rest):
        sizes.append(len(episodes))
        return finetune_group(model, tokenizer, episodes, *rest)

    monkeypatch.setattr(engine, "_finetune_batch", noted)
    config = replace(CONFIG, steps=2)
    episodes = [draw_episode(index, NAMES[0]) for index in range(3)]
    results = finetune_episodes(model, tokenizer, episodes, config, parallel="auto")
    assert sizes == ([3] if available else [1, 1, 1])
    for episode, result in zip(episodes, results, strict=True):
        assert_same(result, alone(model, tokenizer, episode, config))


def test_what_a_step_keeps_is_counted(model, tokenizer) -> None:
    """More episodes keep more, in proportion; the model's own parameters do not count."""
    from contextlib import ExitStack

    from tir_kernels.fewshot.train.batch import EpisodeBatch

    def kept(count: int) -> int:
        with ExitStack() as stack:
            engine._prepare(stack, model, CONFIG, Savings())
            batch = EpisodeBatch(
                model, tokenizer, [NAMES[0]] * count, [1] * count, CONFIG, stack, None, Savings()
            )
            images = torch.stack([EPISODES[0].support_images] * count)
            labels = torch.stack([EPISODES[0].support_labels] * count)
            return batch.bytes_of_a_step(images, labels)

    assert kept(3) == pytest.approx(3 * kept(1), rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_of_the_step_changes_nothing(model, tokenizer, precision: str) -> None:
    model = copy.deepcopy(model).cuda()
    config = replace(CONFIG, device="cuda", precision=precision, lora_dropout=0.25)
    heard: list[tuple[int, int, float]] = []
    graphed = finetune_episodes(
        model, tokenizer, EPISODES, config, on_step=lambda *step: heard.append(step)
    )
    plain = finetune_episodes(model, tokenizer, EPISODES, config, savings=Savings(step_graph=False))
    for one, other in zip(graphed, plain, strict=True):
        assert_same(one, other, atol=1e-4 if precision == "float32" else 1e-2)
    assert sorted(heard) == sorted(
        (position, step, loss)
        for position, result in enumerate(graphed)
        for step, loss in enumerate(result.losses)
    )


@pytest.mark.parametrize("frozen_weights", [True, False])
def test_a_users_gradients_are_left_alone(model, tokenizer, frozen_weights: bool) -> None:
    model = copy.deepcopy(model)
    weight = model.visual.proj
    weight.grad = gradient = torch.ones_like(weight)
    savings = Savings(frozen_weights=frozen_weights)
    finetune_episodes(model, tokenizer, EPISODES[:1], replace(CONFIG, steps=2), savings=savings)
    assert weight.grad is gradient
    assert (gradient == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not weight)


def test_a_users_hook_is_still_called(model, tokenizer) -> None:
    calls = []
    mlp = model.visual.transformer.resblocks[0].mlp
    handle = mlp.register_forward_hook(lambda *arguments: calls.append(1))
    try:
        finetune_episodes(model, tokenizer, EPISODES[:1], replace(CONFIG, steps=2))
    finally:
        handle.remove()
    assert len(calls) >= 2
