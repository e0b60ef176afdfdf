"""Defaults that count from a tower's depth, in towers of the depths that published models have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fewshot.training_cases import draw_episode, make_tokenizer
from timm_models import TEXT, make_in_clip
from towers.families import FAMILIES, Family

from tir_kernels import adapters
from tir_kernels.fewshot import finetune_episode
from tir_kernels.fewshot.methods import Kit, method_class
from tir_kernels.fewshot.methods.prompts import default_logit_scale
from tir_kernels.towers import ImageEncoder, text_tower, vision_tower

pytestmark = pytest.mark.slow
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


# Vision blocks of published models, such as MobileCLIP-B, ViT-L, SO400M, H, g, E, and PE-Core G.
@pytest.mark.parametrize("depth", [4, 5, 12, 24, 27, 32, 40, 50, 64])
def test_re_weighted_blocks_count_from_the_last(depth: int) -> None:
    sizes = {"depth": depth, "embed_dim": 16}
    model = make_in_clip("vit_base_patch16_siglip_224", "map", proj="linear", **sizes)
    assert len(vision_tower(model).blocks) == depth
    with adapters.add_reweighting(model) as handle:
        assert handle.layers == (depth - 4, depth - 2)
    if depth == 12:
        assert handle.layers == (8, 10)  # as published


@FAMILY
def test_of_each_family(family: Family) -> None:
    model, tokenizer = family.make()
    with adapters.add_reweighting(model) as handle:
        assert handle.layers == (1, 3)
    if tokenizer is None:
        return
    depth = len(text_tower(model).blocks)
    assert depth == (24 if "PE-Core" in family.name else 3)
    episode = draw_episode(0, ["cat", "dog", "cow"])
    results = []
    for layer in (None, depth - 2, 0):
        method = method_class("tir")(steps=2, text_layer=layer)
        results.append(finetune_episode(model, tokenizer, episode, method).query_logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@torch.no_grad()
def test_the_relevance_of_a_24_block_text_is_that_of_its_block_22() -> None:
    (family,) = (each for each in FAMILIES if "PE-Core" in each.name)
    model, tokenizer = family.make()
    names = ["cat", "dog", "cow"]
    kit = Kit(model, tokenizer, ImageEncoder(model), [names], [0], 1, 1, "auto")
    method = method_class("tir")(context_tokens=0)
    with method.start(kit) as learner:
        _, deciding = learner.classes()
    shorter: Any = copy.deepcopy(model)
    shorter.text.transformer.resblocks = shorter.text.transformer.resblocks[:23]
    expected = shorter.encode_text(tokenizer([f"a photo of a {name}." for name in names]))
    torch.testing.assert_close(deciding[0], expected, rtol=1e-3, atol=1e-4)


def test_a_text_of_one_block_decides_by_that() -> None:
    text = {**TEXT, "layers": 1, "vocab_size": 49408, "context_length": 20}
    model = make_in_clip("vit_pe_core_tiny_patch16_384", "map", text=text, attn_pool_num_heads=4)
    episode = draw_episode(0, ["cat", "dog", "cow"])
    for layer in (None, 0):
        method = method_class("tir")(steps=1, text_layer=layer)
        found = finetune_episode(model, make_tokenizer(), episode, method).query_logits
        assert found.isfinite().all()


@FAMILY
def test_logits_have_the_published_scale_and_no_bias_whatever_the_model_has(
    family: Family,
) -> None:
    """4 times cosines, 2 of one shot; SigLIP's scale, bias and sigmoid play no part."""
    model, tokenizer = family.make()
    if tokenizer is None:
        pytest.skip("it has no texts to compare with")
    for shots, scale in ((1, 2.0), (2, 4.0), (5, 4.0)):
        assert default_logit_scale(None, shots) == scale
        episode = draw_episode(0, ["cat", "dog", "cow"], shots=shots)
        found = finetune_episode(model, tokenizer, episode, method_class("zero-shot")())
        assert found.query_logits.abs().max() <= scale * (1 + 1e-5)
        own: Any = copy.deepcopy(model)
        with torch.no_grad():
            for name in ("logit_scale", "logit_bias"):
                if isinstance(getattr(own, name, None), torch.Tensor):
                    getattr(own, name).add_(3.0)
        again = finetune_episode(own, tokenizer, episode, method_class("zero-shot")())
        assert torch.equal(found.query_logits, again.query_logits)
