"""timm's VisionTransformer as a tower: registers stay as they are, and texts are refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import pick_counts, plain_relevance
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from tiny_clip import Untouched, make_images
from torch import Tensor, nn

from tir_kernels import adapters, towers

PLACEMENTS = ("tokens", "attention", "both", "values")
REGISTERS = 4


def make_vit(**options: Any) -> VisionTransformer:
    """16 patches, a class token and 4 registers of width 32, and 6 blocks with layer scale."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
    usual = {"reg_tokens": REGISTERS, "init_values": 0.3, "num_classes": 0}
    model = VisionTransformer(**{**sizes, **usual, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


VARIANTS: dict[str, Callable[[], VisionTransformer]] = {
    "registers": make_vit,
    "no registers": lambda: make_vit(reg_tokens=0),
    "no class token": lambda: make_vit(class_token=False, global_pool="avg"),
    "no prefix": lambda: make_vit(class_token=False, reg_tokens=0, global_pool="avg"),
    "average": lambda: make_vit(global_pool="avg"),
    "qk norm": lambda: make_vit(qk_norm=True, scale_attn_norm=True),
    "positions of patches alone": lambda: make_vit(no_embed_class=True, pre_norm=True),
}
PREFIX = {"no registers": 1, "no class token": REGISTERS, "no prefix": 0}


def make_classes(*groups: int) -> Tensor:
    return torch.randn(*groups, 5, 32, generator=torch.Generator().manual_seed(2))


def plain_block(block: Any, tokens: Tensor, weights: Tensor, placement: str) -> Tensor:
    ones = torch.ones_like(weights)
    inside = weights if placement in ("attention", "both") else ones
    if placement in ("tokens", "both"):
        tokens = weights[..., None] * tokens
    attention, normed = block.attn, block.norm1(tokens)
    projected = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k.mT * attention.scale
    terms = inside.clamp(min=0)[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    of_values = (weights if placement == "values" else ones)[:, None, :, None]
    attended = (terms / terms.sum(-1, keepdim=True)) @ (of_values * v)
    attended = attention.proj(attention.norm(attended.transpose(1, 2).flatten(2)))
    tokens = tokens + block.ls1(attended)
    return tokens + block.ls2(block.mlp(block.norm2(tokens)))


def plain_features(
    model: VisionTransformer, images: Tensor, classes: Tensor, placement: str, prefix: int
) -> tuple[Tensor, list[Tensor]]:
    """The re-weighted tower, block by block, and the counts of blocks 2 and 4."""
    tower = towers.vision_tower(model)
    table = torch.tensor([1.0, *(1 - 0.5 * (count - 3) for count in range(1, 6))])
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    all_counts = []
    for layer, block in enumerate(model.blocks):
        weights = torch.ones(tokens.shape[:2])
        if layer in (2, 4):
            relevance = plain_relevance(tokens.detach(), classes, tower.joint_space, prefix)
            all_counts.append(pick_counts(relevance, int(16 * 0.3)))
            weights = torch.cat([weights[:, :prefix], table[all_counts[-1].long()]], dim=1)
        tokens = plain_block(block, tokens, weights, placement)
    return model.forward_head(model.norm(tokens)), all_counts


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_the_formula_and_leaves_registers(variant: str, placement: str) -> None:
    model = VARIANTS[variant]()
    before, images, classes = Untouched(model), make_images(), make_classes()
    prefix = PREFIX.get(variant, 1 + REGISTERS)
    assert towers.vision_tower(model).num_prefix_tokens == prefix
    expected, counts = plain_features(model, images, classes, placement, prefix)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes)
        found = model(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert [c.shape for c in handle.last_counts.values()] == [(4, 16), (4, 16)]
        assert all(map(torch.equal, handle.last_counts.values(), counts))
        grads = torch.autograd.grad(found.square().sum(), parameters)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = max(expected_grad.abs().max().item(), 0.1)  # that of k_norm's offset is 0
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5 * scale)
    before.check()


@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral_adapters_change_nothing(variant: str) -> None:
    model = VARIANTS[variant]()
    images, plain = make_images(), copy.deepcopy(model)
    parameters = list(plain.parameters())
    expected = plain(images)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        encoder = towers.ImageEncoder(model)
        for placement in (None, *PLACEMENTS):
            handle = None
            if placement is not None:
                handle = adapters.add_reweighting(model, [-1, 2], placement, rule="none")
                handle.set_class_embeddings(make_classes())
            for found in (model(images), encoder.features(encoder.embed(images))):
                torch.testing.assert_close(found, expected)
                own = [p for name, p in model.named_parameters() if "low_rank" not in name]
                grads = torch.autograd.grad(found.square().sum(), own)
                torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-4, atol=1e-5)
            if handle is not None:
                handle.remove()
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("passes", [True, False])
@torch.no_grad()
def test_lora_is_that_of_the_merged_weights(variant: str, passes: bool) -> None:
    model = VARIANTS[variant]()
    before, images, merged = Untouched(model), make_images(), copy.deepcopy(model)
    with adapters.add_lora(
        model, rank=3, alpha=5, dropout=0.5, towers=["visual"], passes_input_gradient=passes
    ) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.2)
        assert list(lora.factors())[:4] == ["visual.0.q", "visual.0.k", "visual.0.v", "visual.1.q"]
        for name, (a, b) in lora.factors().items():
            _, layer, projection = name.split(".")
            parts = merged.blocks[int(layer)].attn.qkv.weight.chunk(3)
            parts["qkv".index(projection)].add_(b @ a * 5 / 3**0.5)
        expected = merged(images)
        torch.testing.assert_close(model(images), expected)
        for class_token_only in (True, False):
            encoder = towers.ImageEncoder(model, class_token_only)
            torch.testing.assert_close(encoder.features(encoder.embed(images)), expected)
        assert (model(images) - make_vit()(images)).abs().max() > 1e-2
        assert model.get_submodule(lora.module_paths["visual.3"]) is model.blocks[3].attn
    before.check()


@torch.no_grad()
def test_the_last_block_computes_its_class_token_alone() -> None:
    model, lengths = make_vit(), []
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        model.blocks[-1].mlp.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
        for class_token_only in (True, False):
            encoder = towers.ImageEncoder(model, class_token_only)
            encoder.features(encoder.embed(make_images()))
    assert lengths == [1, 1 + REGISTERS + 16]


@torch.no_grad()
def test_features_are_those_before_the_classifier() -> None:
    model = make_vit(num_classes=7)
    encoder = towers.ImageEncoder(model)
    features = encoder.features(encoder.embed(make_images()))
    torch.testing.assert_close(model.head(features), model(make_images()))


@pytest.mark.parametrize("variant", ["registers", "average", "no prefix"])
@torch.no_grad()
def test_patch_features_are_normalised_patches(variant: str) -> None:
    model = VARIANTS[variant]()
    tower = towers.vision_tower(model)
    hidden = torch.randn(2, tower.num_prefix_tokens + 16, 32)
    norm = model.fc_norm if variant in ("average", "no prefix") else model.norm
    found = tower.patch_features(hidden)
    torch.testing.assert_close(found, norm(hidden)[:, tower.num_prefix_tokens :])
    assert found.shape == (2, 16, 32)


@torch.no_grad()
def test_an_opened_tower_stands_for_its_model() -> None:
    model, images = make_vit(), make_images()
    tower = towers.vision_tower(model)
    assert towers.vision_tower(tower) is tower
    with adapters.add_reweighting(tower, placement="both") as handle:
        handle.set_class_embeddings(make_classes())
        expected = model(images)
        encoder = towers.ImageEncoder(tower)
        torch.testing.assert_close(encoder.features(encoder.embed(images)), expected)
    with adapters.add_lora(tower, rank=2, towers=["visual"]) as lora:
        assert len(list(lora.parameters())) == 2 * 6


def test_the_published_model_with_registers() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, depth=4)
    with adapters.add_reweighting(model.eval(), [1], "attention") as handle, torch.no_grad():
        handle.set_class_embeddings(torch.randn(5, 384))
        assert model(torch.randn(1, 3, 28, 28)).shape == (1, 384)
        assert handle.last_counts[1].shape == (1, 4)


def test_what_needs_texts_says_so() -> None:
    model = make_vit()
    before = Untouched(model)
    with pytest.raises(TypeError, match=r"since this needs texts; got VisionTransformer"):
        adapters.add_lora(model)
    with pytest.raises(TypeError, match=r"since this needs texts; got VisionTransformer"):
        adapters.PromptContext(model, lambda texts: torch.zeros(len(texts), 12).long(), ["cat"])
    before.check()


def test_unsuitable_towers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"by its AttentionPoolPrr; what .*Latent"):
        towers.vision_tower(make_vit(global_pool="prr"))
    placed = make_vit(global_pool="map")
    placed.attn_pool = AttentionPoolLatent(32, num_heads=2, pos_embed="abs", feat_size=21)
    with pytest.raises(ValueError, match="by its AttentionPoolLatent with positions"):
        towers.vision_tower(placed)
    with pytest.raises(ValueError, match=r"keeps all its tokens \(global_pool=''\)"):
        towers.vision_tower(make_vit(global_pool=""))
    dropping = make_vit(attn_drop_rate=0.1)
    before = Untouched(dropping)
    for add in (
        lambda: adapters.add_lora(dropping, towers=["visual"]),
        lambda: adapters.add_reweighting(dropping, placement="both"),
    ):
        with pytest.raises(TypeError, match="timm's Attention without dropout"):
            add()
        before.check()
    with adapters.add_reweighting(dropping) as handle:
        handle.set_class_embeddings(make_classes())
        dropping(make_images())
    parallel = make_vit(block_fn=ParallelScalingBlock)
    with pytest.raises(TypeError, match="block of kind ParallelScalingBlock"):
        adapters.add_reweighting(parallel)
    with pytest.raises(TypeError, match=r"use timm's Attention without .*; got NoneType"):
        adapters.add_lora(parallel, towers=["visual"])


def test_the_joint_space_is_the_norm_alone() -> None:
    space = towers.vision_tower(make_vit()).joint_space
    assert space.proj is None
    tokens = torch.randn(2, 3, 32)
    norm = F.layer_norm(tokens, (32,), space.norm_weight, space.norm_bias, space.norm_eps)
    torch.testing.assert_close(norm, make_vit().norm(tokens))
