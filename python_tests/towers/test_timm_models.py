"""timm's towers of many makes: each computes what the untouched model does, and the formula."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from oracle import pick_counts, plain_relevance
from timm_models import (
    MODELS,
    PREFIX,
    READS,
    encode,
    images_for,
    make_classes,
    trunk_of,
)
from tiny_clip import Untouched
from torch import Tensor, nn

from tir_kernels import JointSpace, WeightRule, adapters
from tir_kernels.towers import ImageEncoder, vision_tower

# The equalities of a family in all its kinds take long together.
pytestmark = pytest.mark.slow

PLACEMENTS = ("tokens", "attention", "both")
LAYERS = (1, 2)


def after_blocks(model: nn.Module, hidden: Tensor) -> Tensor:
    """(B, L, D) -> (B, E), by the untouched model's own code."""
    trunk = trunk_of(model)
    is_alone = trunk is model
    pooled = trunk.forward_head(trunk.norm(hidden), pre_logits=is_alone)
    return pooled if is_alone else model.visual.head(pooled)


def each_alone(model: nn.Module, hidden: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, E): the model's own pool of images of one token."""
    trunk = trunk_of(model)
    # Pools of patches skip the prefix, and those of prefixes see nothing else.
    copies = trunk.num_prefix_tokens + 1 if trunk.attn_pool is None else 1
    sequences = hidden.flatten(0, 1)[:, None].expand(-1, copies, -1)
    return after_blocks(model, sequences).unflatten(0, hidden.shape[:2])


def enter_blocks(model: nn.Module, images: Tensor) -> Iterator[Any]:
    """(B, L, D) and then, for each block, the options of its own forward."""
    trunk = trunk_of(model)
    embedded = trunk._pos_embed(trunk.patch_embed(images))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    yield trunk.norm_pre(tokens)
    for layer in range(len(trunk.blocks)):
        if rope is None:
            yield {}
        else:
            yield {"rope": rope[layer] if trunk.rope_mixed else rope}


def plain_features(
    model: nn.Module, images: Tensor, placement: str
) -> tuple[Tensor, dict[int, Tensor]]:
    """The re-weighted features by the model's own blocks, and the counts.

    A weight inside the softmax is its logarithm, added to the scores.
    """
    classes, prefix = make_classes(model), trunk_of(model).num_prefix_tokens
    table = torch.tensor([1.0, *(1 - 0.3 * (count - 3) for count in range(1, 6))])
    tokens, *options = enter_blocks(model, images)
    found = {}
    for layer, block in enumerate(trunk_of(model).blocks):
        if layer in LAYERS:
            space = JointSpace(norm_eps=None)
            relevance = plain_relevance(each_alone(model, tokens).detach(), classes, space, prefix)
            found[layer] = pick_counts(relevance, int(relevance.shape[-1] * 0.3))
            ones = torch.ones(len(tokens), prefix)
            weights = torch.cat([ones, table[found[layer].long()]], dim=1)
            if placement != "attention":
                tokens = weights[..., None] * tokens
            if placement != "tokens":
                options[layer]["attn_mask"] = weights.log()[:, None, None]
        tokens = block(tokens, **options[layer])
    return after_blocks(model, tokens), found


def assert_gradients(found: Tensor, expected: Tensor, model: nn.Module, plain: nn.Module) -> None:
    pairs = []
    for features, each in ((found, model), (expected, plain)):
        own = [
            p
            for name, p in trunk_of(each).named_parameters()
            if "low_rank" not in name and "head" not in name and p.requires_grad
        ]
        pairs.append(torch.autograd.grad(features.square().sum(), own, allow_unused=True))
    for grad, wanted in zip(*pairs, strict=True):
        assert (grad is None) == (wanted is None)
        if wanted is not None:
            scale = max(wanted.abs().max().item(), 0.1)
            torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("family", MODELS)
def test_weights_of_one_and_lora_of_zero_change_nothing(family: str) -> None:
    model = MODELS[family]()
    before, plain, images = Untouched(model), copy.deepcopy(model), images_for(model)
    expected = encode(plain, images)
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        for placement in (None, *PLACEMENTS, "values"):
            handle = None
            if placement is not None:
                handle = adapters.add_reweighting(model, LAYERS, placement, rule="none")
                handle.set_class_embeddings(make_classes(model))
            encoder = ImageEncoder(model)
            for found in (encode(model, images), encoder.features(encoder.embed(images))):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                assert_gradients(found, encode(plain, images), model, plain)
            if handle is not None:
                handle.remove()
    assert torch.equal(encode(model, images), expected)
    before.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", MODELS)
def test_computes_the_formula(family: str, placement: str) -> None:
    model = MODELS[family]()
    plain, images = copy.deepcopy(model), images_for(model)
    expected, counts = plain_features(plain, images, placement)
    assert not torch.allclose(expected, encode(plain, images), rtol=1e-3, atol=1e-4)
    rule = WeightRule("linear", strength=0.3)
    with adapters.add_reweighting(model, LAYERS, placement, rule) as handle:
        handle.set_class_embeddings(make_classes(model))
        encoder = ImageEncoder(model)
        for found in (encode(model, images), encoder.features(encoder.embed(images))):
            for layer in LAYERS:
                assert torch.equal(handle.last_counts[layer], counts[layer].int())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert_gradients(found, expected, model, plain)


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_lora_is_that_of_the_merged_weights(family: str, passes: bool) -> None:
    model = MODELS[family]().double()
    images = images_for(model).double()
    before, merged = Untouched(model), copy.deepcopy(model)
    with adapters.add_lora(
        model, rank=3, alpha=5, dropout=0.5, towers=["visual"], passes_input_gradient=passes
    ) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.2)
        assert len(lora.factors()) == 3 * len(trunk_of(model).blocks)
        for name, (a, b) in lora.factors().items():
            _, layer, projection = name.split(".")
            attention = trunk_of(merged).blocks[int(layer)].attn
            if attention.qkv is None:
                weight = getattr(attention, f"{projection}_proj").weight
            else:
                weight = attention.qkv.weight.chunk(3)["qkv".index(projection)]
            weight.add_(b @ a * 5 / 3**0.5)
        expected = encode(merged, images)
        for class_token_only in (True, False):
            encoder = ImageEncoder(model, class_token_only)
            for found in (encode(model, images), encoder.features(encoder.embed(images))):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        path = lora.module_paths["visual.1"]
        assert model.get_submodule(path) is trunk_of(model).blocks[1].attn
    assert not torch.allclose(expected, encode(model, images), atol=1e-2)
    before.check()
    adapters.add_lora(model, rank=3, alpha=5, towers=["visual"]).merge()
    before.check()


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_compared_token_is_the_models_pool_of_that_token_alone(family: str) -> None:
    model = MODELS[family]()
    tower, prefix = vision_tower(model), PREFIX.get(family, 1)
    assert tower.num_prefix_tokens == prefix
    assert tower.reads == READS.get(family)
    hidden = torch.randn(2, prefix + 4, trunk_of(model).embed_dim)
    exact = each_alone(copy.deepcopy(model).double(), hidden.double())[:, prefix:]
    own = each_alone(model, hidden)[:, prefix:]
    error = (tower.patch_features(hidden) - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * (own - exact).abs().max() + rounding
    width = 32 if isinstance(model, CustomTextCLIP) else trunk_of(model).embed_dim
    assert exact.shape == (2, 4, width)


@pytest.mark.parametrize("family", ["PE-Core", "SigLIP", "EVA-02", "shared keys"])
@torch.no_grad()
def test_in_bfloat16(family: str) -> None:
    """In an autocast region and as a model of that type, as near to float32 as timm's own is."""
    model = MODELS[family]()
    images, classes = images_for(model), make_classes(model)
    exact = encode(model, images)

    def errors(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        plain = encode(model, images)
        with (
            adapters.add_lora(model, rank=2, towers=["visual"]),
            adapters.add_reweighting(model, LAYERS, "both", "none") as handle,
        ):
            handle.set_class_embeddings(classes)
            found = encode(model, images)
        assert found.dtype == plain.dtype
        return (found.float() - exact).abs().max(), (plain.float() - exact).abs().max()

    with torch.autocast("cpu", torch.bfloat16):
        found, own = errors(model, images)
    assert found <= 2 * own + torch.finfo(torch.bfloat16).eps
    found, own = errors(model.bfloat16(), images.bfloat16())
    assert found <= 2 * own + torch.finfo(torch.bfloat16).eps


@torch.no_grad()
def test_a_projection_without_bias_is_part_of_the_joint_space() -> None:
    model = MODELS["ViTamin"]()
    tower, hidden = vision_tower(model), torch.randn(2, 3, 384)
    assert tower.compared_tokens(hidden) is hidden
    assert tower.joint_space.norm_weight is model.visual.trunk.fc_norm.weight
    assert torch.equal(tower.joint_space.proj, model.visual.head.proj.weight.T)


def test_only_the_first_tokens_are_computed_in_the_last_block() -> None:
    for family, count in READS.items():
        model, lengths = MODELS[family](), []
        with adapters.add_lora(model, rank=2, towers=["visual"]), torch.no_grad():
            last = trunk_of(model).blocks[-1]
            last.mlp.register_forward_hook(lambda *call, to=lengths: to.append(call[2].shape[1]))
            encoder = ImageEncoder(model)
            encoder.features(encoder.embed(images_for(model)))
        assert lengths == [count], family
