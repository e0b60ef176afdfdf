"""CLIP, SigLIP and SigLIP 2 of transformers as towers, against the library's own modules."""

import copy
import sys
from typing import Any

import pytest
import torch
from oracle import pick_counts, plain_relevance
from programs import output_of
from small_transformers import (
    END_OF_TEXT,
    MODELS,
    WIDTHS,
    image_features,
    inputs_of,
    make_clip,
    make_siglip,
    make_siglip2,
    text_features,
    transformers,
)
from tiny_clip import Untouched, make_images, make_token_ids, refused
from torch import Tensor, nn

from tir_kernels import JointSpace, adapters, towers

PLACEMENTS = ("tokens", "attention", "both", "values")
OWN = ("eager", "sdpa")


# The equalities of a family in all its kinds take long together.
pytestmark = pytest.mark.slow


def classes_for(kind: str, *groups: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*groups, 5, WIDTHS[kind], generator=generator)


def each_alone(model: Any, hidden: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, E): what the library's own pool gives for each token without others."""
    tower = model.vision_model
    normed = tower.post_layernorm(hidden)
    if hasattr(model, "visual_projection"):
        return model.visual_projection(normed)
    return torch.stack([tower.head(token[:, None]) for token in normed.unbind(1)], 1)


def plain_layer(layer: Any, tokens: Tensor, weights: Tensor, placement: str) -> Tensor:
    ones = torch.ones_like(weights)
    inside = weights if placement in ("attention", "both") else ones
    if placement in ("tokens", "both"):
        tokens = weights[..., None] * tokens
    attention, normed = layer.self_attn, layer.layer_norm1(tokens)
    q, k, v = (
        getattr(attention, f"{name}_proj")(normed).unflatten(-1, (2, 16)).transpose(1, 2)
        for name in "qkv"
    )
    scores = q @ k.mT / 4
    terms = inside.clamp(min=0)[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    of_values = (weights if placement == "values" else ones)[:, None, :, None]
    attended = (terms / terms.sum(-1, keepdim=True)) @ (of_values * v)
    tokens = tokens + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return tokens + layer.mlp(layer.layer_norm2(tokens))


def plain_features(
    model: Any, kind: str, images: Tensor, classes: Tensor, placement: str
) -> tuple[Tensor, Tensor]:
    """The tower with block 1 re-weighted, and the counts there."""
    tower, prefix = model.vision_model, int(kind == "clip")
    given = inputs_of(model, images)
    shapes = [given["spatial_shapes"]] if kind == "siglip2" else []
    tokens = tower.embeddings(given["pixel_values"], *shapes)
    tokens = tower.pre_layrnorm(tokens) if kind == "clip" else tokens
    table = torch.tensor([1.0, *(1 - 0.5 * (count - 3) for count in range(1, 6))])
    for index, layer in enumerate(tower.encoder.layers):
        weights = torch.ones(tokens.shape[:2])
        if index == 1:
            alone = each_alone(model, tokens.detach())
            relevance = plain_relevance(alone, classes, JointSpace(norm_eps=None), prefix)
            counts = pick_counts(relevance, int(16 * 0.3))
            weights = torch.cat([weights[:, :prefix], table[counts.long()]], dim=1)
        tokens = plain_layer(layer, tokens, weights, placement)
    normed = tower.post_layernorm(tokens)
    if kind == "clip":
        return model.visual_projection(normed[:, 0]), counts
    return tower.head(normed), counts


def gradients(features: Tensor, model: nn.Module) -> list[Tensor]:
    own = [p for name, p in model.named_parameters() if "low_rank" not in name]
    found = torch.autograd.grad(features.square().sum(), own, allow_unused=True)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("implementation", OWN)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_computes_the_formula(kind: str, placement: str, implementation: str) -> None:
    model, images, classes = MODELS[kind](implementation), make_images(), classes_for(kind)
    before = Untouched(model)
    expected, counts = plain_features(model, kind, images, classes, placement)
    with adapters.add_reweighting(model, [1], placement) as handle:
        handle.set_class_embeddings(classes)
        found = image_features(model, images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(handle.last_counts[1], counts)
        found_grads, grads = gradients(found, model), gradients(expected, model)
    assert len(found_grads) == len(grads) > 40
    for grad, expected_grad in zip(found_grads, grads, strict=True):
        scale = max(expected_grad.abs().max().item(), 1)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5 * scale)
    before.check()


@pytest.mark.parametrize("implementation", OWN)
@pytest.mark.parametrize("kind", MODELS)
def test_neutral_adapters_change_nothing(kind: str, implementation: str) -> None:
    model, images, ids = MODELS[kind](implementation), make_images(), make_token_ids()
    expected, texts = image_features(model, images), text_features(model, ids)
    grads = gradients(expected, model)
    with adapters.add_lora(model, rank=2):
        for placement in (None, *PLACEMENTS):
            handle = None
            if placement is not None:
                handle = adapters.add_reweighting(model, [-1, 1], placement, rule="none")
                handle.set_class_embeddings(classes_for(kind))
            encoder = towers.ImageEncoder(model)
            for found in (image_features(model, images), encoder.features(encoder.embed(images))):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                found_grads = gradients(found, model)
                torch.testing.assert_close(found_grads, grads, rtol=1e-4, atol=1e-4)
            if handle is not None:
                handle.remove()
        torch.testing.assert_close(text_features(model, ids), texts)
    assert torch.equal(image_features(model, images), expected)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_half_precision(kind: str) -> None:
    model, images = MODELS[kind]().bfloat16(), make_images()
    ids, tower = make_token_ids(), towers.text_tower(model)
    expected = image_features(model, images.bfloat16())
    for placement in PLACEMENTS:
        with adapters.add_reweighting(model, [1], placement, rule="none") as handle:
            handle.set_class_embeddings(classes_for(kind))
            found = image_features(model, images.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
    found, _ = tower.encode(tower.embed(ids).float(), tower.last_position(ids))
    torch.testing.assert_close(found, text_features(model, ids))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_patch_features_are_those_of_each_token_alone(kind: str) -> None:
    model = MODELS[kind]()
    tower = towers.vision_tower(model)
    hidden = torch.randn(2, tower.num_prefix_tokens + 16, 32)
    found = tower.patch_features(hidden)
    assert found.shape == (2, 16, WIDTHS[kind])
    expected = each_alone(model, hidden)[:, tower.num_prefix_tokens :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_lora_is_that_of_the_merged_weights(kind: str, passes: bool) -> None:
    model, images, ids = MODELS[kind](), make_images(), make_token_ids()
    before, merged, unadapted = Untouched(model), copy.deepcopy(model), copy.deepcopy(model)
    with adapters.add_lora(
        model, rank=3, alpha=5, dropout=0.5, passes_input_gradient=passes
    ) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.2)
        factors = lora.factors()
        assert list(factors)[:4] == ["visual.0.q", "visual.0.k", "visual.0.v", "visual.1.q"]
        for name, (a, b) in factors.items():
            place, _, projection = name.rpartition(".")
            attention = merged.get_submodule(lora.module_paths[place])
            getattr(attention, f"{projection}_proj").weight.add_(b @ a * 5 / 3**0.5)
        expected = image_features(merged, images)
        assert (expected - image_features(unadapted, images)).abs().max() > 1e-2
        torch.testing.assert_close(image_features(model, images), expected, rtol=1e-4, atol=1e-5)
        for class_token_only in (True, False):
            encoder = towers.ImageEncoder(model, class_token_only)
            found = encoder.features(encoder.embed(images))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        expected = text_features(merged, ids)
        assert (expected - text_features(unadapted, ids)).abs().max() > 1e-2
        torch.testing.assert_close(text_features(model, ids), expected, rtol=1e-4, atol=1e-5)
    before.check()


@torch.no_grad()
def test_the_last_block_computes_its_class_token_alone() -> None:
    model, lengths = make_clip(), []
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        mlp = model.vision_model.encoder.layers[-1].mlp
        mlp.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
        for class_token_only in (True, False):
            encoder = towers.ImageEncoder(model, class_token_only)
            encoder.features(encoder.embed(make_images()))
    assert lengths == [1, 17]


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@torch.no_grad()
def test_clip_image_towers_alone(kind: str) -> None:
    config = make_clip().config.vision_config
    model, images = getattr(transformers, kind)(config).eval(), make_images()
    output = model(images)
    expected = output.image_embeds if "Projection" in kind else output.pooler_output
    with adapters.add_lora(model, rank=2, towers=["visual"]) as lora:
        assert model.get_submodule(lora.module_paths["visual.1"]).q_proj.in_features == 32
        encoder = towers.ImageEncoder(model)
        torch.testing.assert_close(encoder.features(encoder.embed(images)), expected)
    with pytest.raises(TypeError, match=f"since this needs texts; got {kind}"):
        adapters.add_lora(model)


@torch.no_grad()
def test_siglip_towers_alone() -> None:
    model, images, ids = make_siglip(), make_images(), make_token_ids()
    encoder = towers.ImageEncoder(model.vision_model)
    found = encoder.features(encoder.embed(images))
    torch.testing.assert_close(found, image_features(model, images))
    tower = towers.text_tower(model.text_model)
    found, _ = tower.encode(tower.embed(ids), tower.last_position(ids))
    torch.testing.assert_close(found, text_features(model, ids))


def test_towers_that_cannot_be_opened_are_refused() -> None:
    with pytest.raises(ValueError, match="no image features; set vision_use_head"):
        towers.vision_tower(make_siglip(vision_use_head=False))
    dropping = make_siglip(attention_dropout=0.1)
    for add in (
        lambda: adapters.add_lora(dropping, towers=["visual"]),
        lambda: adapters.add_reweighting(dropping, [1], placement="both"),
    ):
        with refused(dropping, TypeError, "Set attention_dropout to 0"):
            add()
    model = make_clip()
    model.vision_model.encoder.layers[2].self_attn.k_proj = nn.utils.parametrizations.weight_norm(
        nn.Linear(32, 32)
    )
    with refused(model, TypeError, "model's k_proj is a ParametrizedLinear"):
        adapters.add_lora(model)


def test_models_of_an_old_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_clip()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    for open_it in (towers.vision_tower, towers.text_tower):
        with pytest.raises(ValueError, match=r"of transformers 4\.57\.6, .*pip install"):
            open_it(model)


def test_images_that_siglip2_cannot_pack_are_refused() -> None:
    tower = towers.vision_tower(make_siglip2())
    with pytest.raises(ValueError, match=r"multiples of the patches' 8 pixels; got 32 x 36"):
        tower.embed(torch.randn(1, 3, 32, 36))


@torch.no_grad()
def test_siglip2_takes_images_of_any_grid() -> None:
    model, images = make_siglip2(), make_images()[..., :16]
    packed = torch.stack([
        image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(8, -1)
        for image in images
    ])  # fmt: skip
    expected = model.get_image_features(
        pixel_values=packed,
        pixel_attention_mask=torch.ones(4, 8, dtype=torch.int64),
        spatial_shapes=torch.tensor([[4, 2]] * 4),
    ).pooler_output
    encoder = towers.ImageEncoder(model)
    torch.testing.assert_close(encoder.features(encoder.embed(images)), expected)


@pytest.mark.parametrize("implementation", OWN)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_padded_patches_are_refused(placement: str, implementation: str) -> None:
    model = make_siglip2(implementation)
    given = inputs_of(model, make_images())
    given["pixel_attention_mask"][1, 8:] = 0
    given["spatial_shapes"][1, 0] = 2
    with adapters.add_reweighting(model, [1], placement) as handle:
        handle.set_class_embeddings(classes_for("siglip2"))
        with pytest.raises(ValueError, match="pixel_attention_mask hides padded patches"):
            model.get_image_features(**given)
    model.get_image_features(**given)


@pytest.mark.slow
def test_nothing_is_imported_for_other_models() -> None:
    script = (
        "import sys, timm\n"
        "from tir_kernels import adapters, towers\n"
        "model = timm.create_model('vit_tiny_patch16_224', depth=1)\n"
        "towers.vision_tower(model)\n"
        "try: towers.vision_tower(model.head)\n"
        "except TypeError as error: assert 'a CLIPModel' in str(error)\n"
        "print([name for name in sys.modules if 'modeling_clip' in name or 'siglip' in name])"
    )
    assert output_of(script) == "[]"


def texts_without_padding_of_zero() -> Tensor:
    """As transformers' tokenizer of CLIP pads: with the end-of-text token itself."""
    ids = make_token_ids()
    return ids.where(ids != 0, END_OF_TEXT)


@pytest.mark.parametrize("implementation", OWN)
@pytest.mark.parametrize("end", [2, END_OF_TEXT])
@torch.no_grad()
def test_clip_texts(end: int, implementation: str) -> None:
    model = make_clip(implementation, eos_token_id=end)
    tower = towers.text_tower(model)
    for ids in (make_token_ids(), texts_without_padding_of_zero()):
        assert tower.last_position(ids).tolist() == [4, 7, 6]
        expected = text_features(model, ids)
        for length in (12, 8):
            cut = ids[:, :length]
            found, _ = tower.encode(tower.embed(cut), tower.last_position(cut))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", OWN)
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
@torch.no_grad()
def test_siglip_texts(kind: str, implementation: str) -> None:
    model, ids = MODELS[kind](implementation), make_token_ids()
    tower = towers.text_tower(model)
    assert not tower.is_causal
    assert tower.last_position(ids).tolist() == [11, 11, 11]
    found, first = tower.encode(tower.embed(ids), tower.last_position(ids), 0)
    torch.testing.assert_close(found, text_features(model, ids))
    del model.text_model.encoder.layers[1:]
    torch.testing.assert_close(first, text_features(model, ids))
