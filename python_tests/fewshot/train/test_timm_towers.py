"""Models of open_clip with image towers of timm's: their texts, and training on them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewshot.training_cases import as_method, draw_episode, make_tokenizer
from timm_models import MODELS, SIGLIP_TEXT, TEXT
from tiny_clip import Untouched
from torch import Tensor

from tir_kernels.adapters import PromptContext, add_lora
from tir_kernels.fewshot import Episode, finetune_episode
from tir_kernels.towers import text_tower

# The equalities of a family in all its kinds take long together.
pytestmark = pytest.mark.slow

NAMES = ["cat", "dog", "a very long description of a tabby kitten"]
END, PAD = 1, 0


class WordTokenizer:
    """Stands in for SigLIP's: words in lower case without marks, an end, padding; no start."""

    context_length = 20

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        found = torch.full((len(texts), length), PAD)
        for row, text in enumerate(texts):
            words = "".join(c for c in text.lower() if c.isalnum() or c == " ").split()
            ids = [self._ids.setdefault(word, 2 + len(self._ids)) for word in words]
            kept = [*ids[: length - 1], END]
            found[row, : len(kept)] = torch.tensor(kept)
        return found


PLACES = {"context_length": 20}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "PE-Core": ({**TEXT, **PLACES, "vocab_size": 49408, "layers": 4}, make_tokenizer),
    "SigLIP": ({**SIGLIP_TEXT, **PLACES}, WordTokenizer),
    "EVA-02": ({**TEXT, **PLACES, "vocab_size": 49408}, make_tokenizer),
    "EVA-02 E": ({**TEXT, **PLACES, "vocab_size": 49408}, make_tokenizer),
    "ViTamin": ({**TEXT, **PLACES, "vocab_size": 49408}, make_tokenizer),
}


def make(family: str) -> tuple[Any, Any]:
    """A model with weights that float16 can hold, as prompts keep their words, and a tokenizer."""
    text, make_tokens = FAMILIES[family]
    return MODELS[family](text=text).half().float(), make_tokens()


def episode_for(model: Any) -> Episode:
    episode, size = draw_episode(3, NAMES), model.visual.trunk.patch_embed.img_size
    images = {each: getattr(episode, each) for each in ("support_images", "query_images")}
    return replace(episode, **{each: F.interpolate(of, size) for each, of in images.items()})


@pytest.mark.parametrize("family", ["PE-Core", "SigLIP"])
@torch.no_grad()
def test_the_opened_text_tower_is_the_untouched_one(family: str) -> None:
    model, tokenizer = make(family)
    before, plain, token_ids = Untouched(model), copy.deepcopy(model), tokenizer(NAMES)
    tower = text_tower(model)
    assert tower.is_causal is (family == "PE-Core")
    last = tower.last_position(token_ids)
    if family == "SigLIP":
        assert last.tolist() == [19] * 3  # the end of the padding, not of the text
    depth = len(tower.blocks)
    found, relevant = tower.encode(tower.embed(token_ids), last, depth - 2)
    torch.testing.assert_close(found, plain.encode_text(token_ids))
    with add_lora(model, rank=2, towers=["text"]):
        again, _ = tower.encode(tower.embed(token_ids), last)
        torch.testing.assert_close(again, found)
        torch.testing.assert_close(model.encode_text(token_ids), found)
    before.check()
    plain.text.transformer.resblocks = plain.text.transformer.resblocks[: depth - 1]
    torch.testing.assert_close(relevant, plain.encode_text(token_ids))


@pytest.mark.parametrize("num_vectors", [0, 2, 4])
@pytest.mark.parametrize("family", ["PE-Core", "SigLIP"])
@torch.no_grad()
def test_prompts_start_as_a_photo_of_a(family: str, num_vectors: int) -> None:
    model, tokenizer = make(family)
    found, _ = PromptContext(model, tokenizer, NAMES, num_vectors)()
    words = "of a" if num_vectors == 2 else "a photo of a"
    expected = model.encode_text(tokenizer([f"{words} {name}." for name in NAMES]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["tir", "lora"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name == "ViTamin" else ()) for name in FAMILIES],
)
def test_it_trains_and_leaves_the_model_as_it_was(family: str, method: str) -> None:
    model, tokenizer = make(family)
    before, episode = Untouched(model), episode_for(model)
    result = finetune_episode(model, tokenizer, episode, as_method(method, steps=4))
    assert result.losses[-1] < result.losses[0]
    assert result.query_logits.shape == (9, 3)
    before.check()


@torch.no_grad()
def test_the_bias_of_siglips_logits_changes_no_softmax() -> None:
    """And zero-shot logits are cosines of the model's own features."""
    model, tokenizer = make("SigLIP")
    episode, method = episode_for(model), as_method("zero-shot")
    found = finetune_episode(model, tokenizer, episode, method).query_logits
    texts = tokenizer([f"a photo of a {name}." for name in NAMES])
    images, texts = model.encode_image(episode.query_images, True), model.encode_text(texts, True)
    torch.testing.assert_close(found, 4 * images @ texts.T, atol=5e-3, rtol=0)
    own = images @ texts.T * model.logit_scale.exp() + model.logit_bias
    without = images @ texts.T * model.logit_scale.exp()
    torch.testing.assert_close(own.softmax(-1), without.softmax(-1))
    assert model.logit_bias.abs() > 1


@pytest.mark.slow
def test_text_block_depth_minus_2_decides_unless_given() -> None:
    model, tokenizer = make("PE-Core")
    losses = []
    for layer in (None, 2, 0):
        method = as_method("tir", steps=3, text_layer=layer)
        losses.append(finetune_episode(model, tokenizer, episode_for(model), method).losses)
    assert losses[0] == losses[1] != losses[2]
