"""What holds for every method, as asserts that its own tests call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.train.test_resume import Keeper, StopError, train
from fewshot.training_cases import EPISODES, make_model, make_tokenizer
from torch import nn

from tir_kernels import fewshot
from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.fewshot import Episode, EpisodeResult, finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods import Method


def prompt_model() -> nn.Module:
    """A model whose words' embeddings are such as the program keeps them."""
    made = make_model()
    made.token_embedding.half().float()
    return made


def learn(
    model: nn.Module, method: Method, episode: Episode = EPISODES[0], **more: Any
) -> EpisodeResult:
    """The result of one episode."""
    return finetune_episode(model, make_tokenizer(), episode, method, **more)


def assert_at_once_is_as_alone(
    model: nn.Module, method: Method, episodes: Sequence[Episode], atol: float
) -> None:
    """Losses within ``atol``, and logits within four times as much."""
    together = finetune_episodes(model, make_tokenizer(), episodes, method)
    for episode, found in zip(episodes, together, strict=True):
        alone = learn(model, method, episode)
        torch.testing.assert_close(found.losses, alone.losses, atol=atol, rtol=1e-3)
        torch.testing.assert_close(found.query_logits, alone.query_logits, atol=4 * atol, rtol=1e-3)


def assert_stopped_is_as_never_stopped(method: Method, precision: str, *stops: int) -> None:
    """A training that is stopped behind so many steps, and goes on, gives the same bits."""
    expected, _ = train(method, None, precision)
    keeper = Keeper(stops)
    for _ in stops:
        with pytest.raises(StopError):
            train(method, keeper, precision)
    found, _ = train(method, keeper, precision)
    assert len(set(found.losses)) > 1
    assert found.losses == expected.losses
    assert torch.equal(found.query_logits, expected.query_logits)
    for name, value in expected.trained.items():
        assert torch.equal(found.trained[name], value), name


def assert_a_saved_classifier_answers_the_same(method: Any, folder: Path) -> None:
    """And each image's answer is its own."""
    write_image_folder(folder / "images")
    settings = fewshot.FitSettings(shots=2, folds=0)
    made = fewshot.fit(folder / "images", str(model_directory()), method=method, settings=settings)
    paths = sorted(folder.rglob("*.png"))[:6]
    expected = made.predict(paths)
    alone = torch.cat([made.predict([path]) for path in paths])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    made.save(folder / "classifier")
    assert torch.equal(fewshot.load_classifier(folder / "classifier").predict(paths), expected)
