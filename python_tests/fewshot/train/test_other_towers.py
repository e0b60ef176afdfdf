"""Training on towers that pool by attention, mask padding or have blocks of their own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fewshot.training_cases import EPISODES, as_method, make_tokenizer
from oracle import plain_relevance
from tiny_clip import (
    ATTENTION_POOL,
    OWN_BLOCKS,
    Untouched,
    each_alone,
    make_clip,
    make_coca,
)
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.analysis import measure
from tir_kernels.analysis.measures import BlockView
from tir_kernels.fewshot import finetune_episode, finetune_episodes
from tir_kernels.fewshot.track.pictures import MapMaker
from tir_kernels.towers import vision_tower

WORDS = {"context_length": 20, "vocab_size": 49408}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "CoCa": lambda: make_coca(WORDS),
    "own blocks": lambda: make_clip(OWN_BLOCKS, {**WORDS, **OWN_BLOCKS}),
    "attention pool, not causal": lambda: make_clip(
        ATTENTION_POOL, {**WORDS, "no_causal_mask": True, "pool_type": "last"}, custom_text=True
    ),
    "patch dropout": lambda: make_clip({"patch_dropout": 0.5}, WORDS).train(),
}


def features(output: Any) -> Tensor:
    return F.normalize(output[0] if isinstance(output, tuple) else output, dim=-1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_zero_shot_logits_are_the_models_own(name: str) -> None:
    model, episode = MODELS[name](), EPISODES[0]
    found = finetune_episode(model, make_tokenizer(), episode, as_method("zero-shot"))
    prompts = make_tokenizer()([f"a photo of a {each}." for each in episode.class_names])
    model.eval()
    texts = model.text(prompts) if hasattr(model, "text") else model.encode_text(prompts)
    expected = 4 * features(model.visual(episode.query_images)) @ features(texts).T
    # The published program keeps the words of its prompts in float16.
    torch.testing.assert_close(found.query_logits, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("placement", ["tokens", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_leaves_the_model_as_it_was(name: str, placement: str) -> None:
    model = MODELS[name]()
    before = Untouched(model)
    method = as_method("tir", steps=4, placement=placement)
    result = finetune_episode(model, make_tokenizer(), EPISODES[0], method)
    assert result.losses[-1] < result.losses[0]
    before.check()


class _Expecting:
    """Notes the relevance in block depth - 2 by the tower's own pool."""

    name = "expecting"
    every = 1

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def start(self, episodes: Any) -> None:
        pass

    @torch.no_grad()
    def observe(self, step: int, learner: Any, inputs: Tensor) -> None:
        classes = learner.classes()
        learner.show_classes(classes)
        self._classes = classes[1]  # of the text block that decides
        measure(vision_tower(self._model), inputs.flatten(0, 1), [self])

    def of_block(self, view: BlockView) -> tuple[()]:
        if view.block == view.num_blocks - 2:
            alone = each_alone(self._model.visual, view.hidden)
            self.relevance = plain_relevance(alone, self._classes, JointSpace(norm_eps=None), 1)
        return ()


def test_maps_hold_the_relevance_of_pooled_tokens() -> None:
    model, method = MODELS["CoCa"](), as_method("tir", steps=2)
    maker = MapMaker(model, method, lambda images: np.zeros((len(images), 32, 32, 3), np.uint8))
    expecting = _Expecting(model)
    finetune_episodes(model, make_tokenizer(), EPISODES[:1], method, observers=[expecting, maker])
    maps = maker.maps(EPISODES[0], "arm")
    assert maps is not None
    np.testing.assert_allclose(maps.relevance, expecting.relevance.numpy(), atol=2e-3)
    assert maps.counts.sum() == 6 * 3 * int(16 * method.top_ratio)
