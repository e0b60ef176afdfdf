"""Deep prompts against hooks of PyTorch's that do the same to the model's own modules."""

import copy
from functools import partial

import pytest
import torch
from hooked_modules import hooked
from reweighted_tower import VARIANTS
from tiny_clip import (
    ATTENTION_POOL,
    OWN_BLOCKS,
    Untouched,
    make_clip,
    make_images,
    make_token_ids,
)

from tir_kernels import adapters
from tir_kernels.towers import ImageEncoder, text_tower, vision_tower

MODELS = ("clip", "length first", "no first norm, layer scale", "own blocks")
SLOW = pytest.mark.slow


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_hooks(norm, blocks, prompts):
    """Those of (J, G, n, D) prompts for four images."""
    own = [each.repeat_interleave(4 // len(each), 0) for each in prompts]
    count = prompts.shape[2]
    places = [(norm, lambda tokens: torch.cat([tokens, own[0]], 1), False)]
    for block, each in zip(blocks[1:], own[1:], strict=False):
        places.append((block, lambda t, each=each: torch.cat([t[:, :-count], each], 1), True))
    return places


@pytest.mark.parametrize("depth", [pytest.param(1, marks=SLOW), 3, pytest.param(6, marks=SLOW)])
@pytest.mark.parametrize("name", ["clip", *(pytest.param(each, marks=SLOW) for each in MODELS[1:])])
@torch.no_grad()
def test_images(name, depth):
    model, images, prompts = VARIANTS[name](), make_images(4), draw(depth, 2, 3, 32)
    tower = model.visual
    places = image_hooks(tower.ln_pre, tower.transformer.resblocks, prompts)
    with hooked(places, not tower.transformer.batch_first):
        expected = model.encode_image(images)
    plain = model.encode_image(images)
    assert (expected - plain).abs().max() > 0.01
    before = Untouched(model)
    with adapters.add_image_prompts(model, depth) as handle:
        handle.set_prompts(prompts)
        encoder = ImageEncoder(model)
        for found in (model.encode_image(images), encoder.features(encoder.embed(images))):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    before.check()
    assert torch.equal(model.encode_image(images), plain)


def timm_tower():
    timm_models = pytest.importorskip("timm_models")
    model = timm_models.make_alone("deit_tiny_patch16_224")
    return model, model.norm_pre, model.blocks, model


def transformers_tower():
    small_transformers = pytest.importorskip("small_transformers")
    model = small_transformers.make_clip()
    tower = model.vision_model
    features = partial(small_transformers.image_features, model)
    return model, tower.pre_layrnorm, tower.encoder.layers, features


@pytest.mark.slow
@pytest.mark.parametrize("make", [timm_tower, transformers_tower])
@torch.no_grad()
def test_images_of_other_families(make):
    model, norm, blocks, features = make()
    images, prompts = make_images(4), draw(len(blocks), 2, 3, 32)
    with hooked(image_hooks(norm, blocks, prompts)):
        expected = features(images)
    assert (expected - features(images)).abs().max() > 0.01
    before = Untouched(model)
    with adapters.add_image_prompts(model, len(blocks)) as handle:
        handle.set_prompts(prompts)
        encoder = ImageEncoder(model)
        for found in (features(images), encoder.features(encoder.embed(images))):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    before.check()


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_texts(depth):
    model, token_ids, prompts = make_clip(), make_token_ids(4), draw(depth - 1, 2, 2, 24)
    own = prompts.repeat_interleave(2, 1)
    blocks = model.transformer.resblocks[1:depth]
    places = [
        (block, lambda t, each=each: torch.cat([t[:, :1], each, t[:, 3:]], 1), True)
        for block, each in zip(blocks, own, strict=True)
    ]
    with hooked(places):
        expected = model.encode_text(token_ids)
    tower = text_tower(model)
    with adapters.add_text_prompts(model, depth, first=1) as handle:
        handle.set_prompts(prompts)
        last = tower.last_position(token_ids)
        found = tower.encode(tower.embed(token_ids), last)[0]
        torch.testing.assert_close(model.encode_text(token_ids), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(expected, model.encode_text(token_ids)) is (depth == 1)


@torch.no_grad()
def test_what_enters_a_block_ends_with_its_prompts_to_the_bit():
    model, prompts, entered = make_clip(), draw(4, 2, 3, 32), []
    blocks = model.visual.transformer.resblocks
    for block in blocks:
        block.ln_1.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with adapters.add_image_prompts(model, 4) as handle:
        handle.set_prompts(prompts)
        model.encode_image(make_images(4))
    assert [each.shape for each in entered] == [(4, 20, 32)] * 6
    for hidden, own in zip(entered[1:4], prompts[1:], strict=True):
        assert torch.equal(hidden[:, -3:], own.repeat_interleave(2, 0))
    first = model.visual.ln_pre(prompts[0]).repeat_interleave(2, 0)
    assert torch.equal(entered[0][:, -3:], first)
    assert not torch.isclose(entered[4][:, -3:], prompts[3].repeat_interleave(2, 0)).any(2).all()


@pytest.mark.parametrize("depth", [2, 6])
@torch.no_grad()
def test_the_class_token_alone_attends_to_prompts(depth):
    """With LoRA on, the last block computes nothing else where it has no prompts of its own."""
    model, images = make_clip(), make_images(4)
    with adapters.add_lora(model, dropout=0.0), adapters.add_image_prompts(model, depth) as handle:
        handle.set_prompts(draw(depth, 1, 3, 32))
        whole, alone = (ImageEncoder(model, class_token_only=each) for each in (False, True))
        tokens = whole.embed(images)
        last = vision_tower(model).blocks[-1]
        assert (last.first_tokens(draw(4, 20, 32), 1) is None) is (depth == 6)
        expected = whole.features(tokens)
        torch.testing.assert_close(alone.features(tokens), expected, atol=1e-5, rtol=1e-5)


def test_gradients_with_checkpoints_are_those_without():
    model, images = make_clip().requires_grad_(False), make_images(4)
    found = []
    for checkpoint in (False, True):
        prompts = draw(4, 2, 3, 32).requires_grad_()
        with adapters.add_image_prompts(model, 4) as handle:
            handle.set_prompts(prompts)
            encoder = ImageEncoder(model, checkpoint=checkpoint)
            encoder.features(encoder.embed(images)).square().sum().backward()
        found.append(prompts.grad)
    assert (found[0].abs().amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_a_copy_has_prompts_of_its_own():
    model, images = make_clip(), make_images(2)
    with adapters.add_image_prompts(model, 2) as handle:
        handle.set_prompts(draw(2, 1, 2, 32))
        expected = model.encode_image(images)
        other = copy.deepcopy(model)
        handle.set_prompts(draw(2, 1, 2, 32, seed=1))
        assert not torch.allclose(model.encode_image(images), expected)
        assert torch.equal(other.encode_image(images), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_clip(ATTENTION_POOL),
        lambda: make_clip({"pool_type": "avg"}),
        pytest.param(lambda: pytest.importorskip("timm_models").make_eva(), marks=SLOW),
        pytest.param(lambda: pytest.importorskip("small_transformers").make_siglip(), marks=SLOW),
    ],
    ids=["attention pool", "mean", "rotary", "SigLIP"],
)
def test_towers_that_take_them_for_patches_are_refused(make):
    model = make()
    before = Untouched(model)
    with pytest.raises(TypeError, match="deep prompts need an image tower that pools its class"):
        adapters.add_image_prompts(model, 2)
    before.check()


def test_wrong_arguments_are_refused():
    model = make_clip(OWN_BLOCKS)
    for depth in (0, 7):
        with pytest.raises(ValueError, match=f"depth must lie between 1 and 6.*got {depth}"):
            adapters.add_image_prompts(model, depth)
    with pytest.raises(ValueError, match=r"depth must lie between 1 and 3.*got 4"):
        adapters.add_text_prompts(model, 4, first=1)
    with pytest.raises(ValueError, match="first must be at least 0; got -1"):
        adapters.add_text_prompts(model, 2, first=-1)
    before = Untouched(model)
    with adapters.add_image_prompts(model, 2) as handle:
        with pytest.raises(RuntimeError, match="has deep prompts already"):
            adapters.add_image_prompts(model, 2)
        with pytest.raises(RuntimeError, match=r"call handle\.set_prompts"):
            model.encode_image(make_images(2))
        for shape in [(2, 3, 32), (1, 1, 3, 32), (2, 0, 3, 32), (2, 1, 0, 32)]:
            with pytest.raises(ValueError, match=r"must have shape \(2, G, n, D\)"):
                handle.set_prompts(torch.zeros(shape))
        handle.set_prompts(draw(2, 3, 1, 32))
        with pytest.raises(ValueError, match="3 groups, into which a batch of 4 does not divide"):
            model.encode_image(make_images(4))
    before.check()
