from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, convert_weights_to_lp
from open_clip.transformer import TextTransformer
from tiny_clip import (
    END_OF_TEXT,
    OWN_BLOCKS,
    TEXT,
    Untouched,
    make_class_embeddings,
    make_clip,
    make_coca,
    make_images,
    make_token_ids,
    swap_token_order,
)
from torch import Tensor, nn

from tir_kernels import JointSpace, adapters
from tir_kernels.towers import ImageEncoder, opened_attention, text_tower, vision_tower

TEXT_VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "clip": make_clip,
    "custom text": lambda: make_clip(custom_text=True),
    "length first": lambda: swap_token_order(make_clip()),
    "custom text, length first": lambda: swap_token_order(make_clip(custom_text=True)),
    "projection with bias": lambda: make_clip(text={"proj_bias": True}),
    "no projection": lambda: make_clip(text={"proj_type": "none"}),
    "quick gelu": lambda: make_clip(quick_gelu=True),
    "not causal": lambda: make_clip(text={"no_causal_mask": True}, custom_text=True),
    "end of text by id": lambda: make_clip(text={"pool_type": "eos", "eos_id": END_OF_TEXT}),
    "first token": lambda: make_clip(text={"pool_type": "first"}, custom_text=True),
    "last token": lambda: make_clip(text={"pool_type": "last"}),
    "own blocks": lambda: make_clip(text=OWN_BLOCKS),
    "class token": lambda: make_clip(text={"embed_cls": True}, custom_text=True),
    "class token, masked at its place": lambda: with_text(embed_cls=True, correct_cls_mask=True),
    "class token, not causal": lambda: with_text(embed_cls=True, no_causal_mask=True),
    "class token, own blocks": lambda: with_text(embed_cls=True, **OWN_BLOCKS),
    "class token, length first": lambda: swap_token_order(with_text(embed_cls=True)),
    "padding masked": lambda: with_text(no_causal_mask=True, use_pad_mask=True),
    "tokens too": lambda: make_clip(text={"output_tokens": True}, custom_text=True),
    "CoCa": make_coca,
}


def with_text(**options: Any) -> nn.Module:
    """A model with a text tower that a configuration can't ask for."""
    model = make_clip(custom_text=True)
    sizes = {**TEXT, "output_dim": 16, "pool_type": "argmax"}
    model.text = TextTransformer(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def encode_text(model: nn.Module, token_ids: Tensor) -> Tensor:
    """The class embeddings by the model's own modules, which CoCa would normalise."""
    if not hasattr(model, "text"):
        return model.encode_text(token_ids)
    found = model.text(token_ids)
    return found[0] if isinstance(found, tuple) else found


MASKED = ("padding masked", "CoCa")


def normalise(space: JointSpace, tokens: Tensor) -> Tensor:
    if space.norm_eps is None:
        return tokens
    width = tokens.shape[-1:]
    return F.layer_norm(tokens, width, space.norm_weight, space.norm_bias, space.norm_eps)


def project(space: JointSpace, tokens: Tensor) -> Tensor:
    return tokens if space.proj is None else tokens @ space.proj


@pytest.mark.parametrize(
    ("options", "prune"),
    [
        ({}, {}),
        ({"norm_kwargs": {"eps": 0.1}}, {}),
        ({"norm_kwargs": {"elementwise_affine": False}}, {}),
        ({"pool_type": "avg"}, {}),
        ({"pool_type": "avg", "final_ln_after_pool": True}, {}),
        ({}, {"prune_head": True}),
        ({}, {"prune_head": False, "prune_norm": True}),
    ],
)
@torch.no_grad()
def test_joint_space_is_what_the_tower_ends_with(
    options: dict[str, Any], prune: dict[str, bool]
) -> None:
    tower = make_clip(options).visual
    if prune:
        tower.prune_intermediate_layers([5], **prune)
    outputs = []
    hook = tower.transformer.register_forward_hook(lambda *call: outputs.append(call[2]))
    expected = tower(make_images())
    hook.remove()
    space = vision_tower(tower).joint_space
    if options.get("final_ln_after_pool"):
        found = project(space, normalise(space, tower._global_pool(outputs[0])[0]))
    else:
        found = project(space, tower._global_pool(normalise(space, outputs[0]))[0])
    torch.testing.assert_close(found, expected)


def test_vision_tower_of_a_model_and_on_its_own() -> None:
    model = make_clip()
    assert vision_tower(model).module is model.visual
    assert vision_tower(model.visual).module is model.visual
    model = make_clip(custom_text=True)
    assert vision_tower(model).module is model.visual


def test_other_image_towers_are_refused() -> None:
    resnet = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}
    with pytest.raises(TypeError, match="its tower is ModifiedResNet"):
        vision_tower(CLIP(16, resnet, TEXT))
    with pytest.raises(TypeError, match="its tower is Linear"):
        vision_tower(nn.Linear(2, 2))
    cosine = make_clip({"scaled_cosine_attn": True})
    with pytest.raises(ValueError, match="fails in open_clip itself"):
        vision_tower(cosine)
    with pytest.raises(RuntimeError, match="3D"):
        cosine.encode_image(make_images())


@pytest.mark.parametrize("class_token_only", [True, False])
@torch.no_grad()
def test_the_last_block_may_run_for_the_class_token_alone(class_token_only: bool) -> None:
    """Where LoRA has opened its attention."""
    model = make_clip(OWN_BLOCKS)
    tower = vision_tower(model)
    with adapters.add_lora(model, rank=2) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.3)
        encoder = ImageEncoder(tower, class_token_only)
        tokens = encoder.embed(make_images())
        first = tower.blocks[-1].first_tokens(tokens, 1)
        assert first is not None
        torch.testing.assert_close(first, tower.blocks[-1](tokens)[:, :1])
        expected = model.encode_image(make_images())
        torch.testing.assert_close(encoder.features(tokens), expected)


@torch.no_grad()
def test_a_tower_without_a_pool_takes_adapters() -> None:
    model = make_clip({"pool_type": "none"})
    expected = model.encode_image(make_images())
    assert expected.shape == (4, 17, 16)
    for placement in ("tokens", "attention"):
        with adapters.add_reweighting(model, placement=placement, rule="none") as handle:
            handle.set_class_embeddings(make_class_embeddings())
            torch.testing.assert_close(model.encode_image(make_images()), expected)
    with adapters.add_lora(model):
        torch.testing.assert_close(model.encode_image(make_images()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_opened", [False, True])
@pytest.mark.parametrize("variant", TEXT_VARIANTS)
@torch.no_grad()
def test_encode_is_the_models_encode_text(
    variant: str, is_opened: bool, dtype: torch.dtype
) -> None:
    model = TEXT_VARIANTS[variant]().to(dtype)
    before = Untouched(model)
    with opened_attention(model) if is_opened else nullcontext():
        check_encoding(model, variant)
    before.check()


def check_encoding(model: nn.Module, variant: str) -> None:
    tower = text_tower(model)
    for block in tower.blocks:
        assert model.get_submodule(block.path) is block.module
        assert model.get_submodule(block.attention_path) is block.module.attn
    token_ids = make_token_ids()
    token_ids[1, 2] = 0  # a word whose number is that of padding, as CLIP's "!"
    last, key_mask = tower.last_position(token_ids), tower.key_mask(token_ids)
    embeddings = tower.embed(token_ids)
    found, intermediate = tower.encode(embeddings, last, key_mask=key_mask)
    torch.testing.assert_close(found, encode_text(model, token_ids))
    assert torch.equal(found, intermediate)
    assert (key_mask is None) == ("class token" not in variant and variant not in MASKED)
    if key_mask is not None:
        with pytest.raises(ValueError, match="key_mask must be given"):
            tower.encode(embeddings, last)


@pytest.mark.parametrize("variant", ["clip", "custom text", "projection with bias"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_intermediate_embeddings_are_those_of_a_tower_that_ends_there(
    variant: str, layer: int
) -> None:
    model = TEXT_VARIANTS[variant]()
    tower = text_tower(model)
    token_ids = make_token_ids()
    embeddings = tower.embed(token_ids)
    final, intermediate = tower.encode(embeddings, tower.last_position(token_ids), layer)
    torch.testing.assert_close(final, model.encode_text(token_ids))
    getattr(model, "text", model).transformer.prune_intermediate_layers([layer])
    torch.testing.assert_close(intermediate, model.encode_text(token_ids))


@torch.no_grad()
def test_what_follows_the_end_of_text_does_not_matter() -> None:
    model = make_clip()
    tower = text_tower(model)
    token_ids = make_token_ids()
    last = tower.last_position(token_ids)
    assert last.tolist() == [4, 7, 6]
    cut = tower.embed(token_ids[:, :8])
    torch.testing.assert_close(tower.encode(cut, last)[0], model.encode_text(token_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("custom_text", [True, False])
@torch.no_grad()
def test_mixed_precision_weights(dtype: torch.dtype, custom_text: bool) -> None:
    """As open_clip's precision="bf16" leaves them: embeddings and norms in float32."""
    model = make_clip(custom_text=custom_text, cast_dtype=dtype)
    convert_weights_to_lp(model, dtype)
    tower = text_tower(model)
    token_ids = make_token_ids()
    found, _ = tower.encode(tower.embed(token_ids), tower.last_position(token_ids))
    expected = model.encode_text(token_ids)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("pool_type", "positions"),
    [("argmax", [4, 7, 6]), ("eos", [4, 7, 6]), ("first", [0, 0, 0]), ("last", [11, 11, 11])],
)
def test_last_position(pool_type: str, positions: list[int]) -> None:
    tower = text_tower(make_clip(text={"pool_type": pool_type, "eos_id": END_OF_TEXT}))
    assert tower.last_position(make_token_ids()).tolist() == positions


def test_other_text_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="'none' keeps every token"):
        text_tower(make_clip(text={"pool_type": "none"})).last_position(make_token_ids())
    with pytest.raises(
        ValueError, match=r"\(scaled_cosine_attn\), whose forward pass fails in open"
    ):
        text_tower(make_clip(text={"scaled_cosine_attn": True}))
    model = make_clip(custom_text=True)
    model.text = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="with text tower Linear"):
        text_tower(model)
    with pytest.raises(TypeError, match="got VisionTransformer"):
        text_tower(model.visual)


@pytest.mark.parametrize("layer", [-1, 3])
def test_an_intermediate_layer_that_is_not_there_is_refused(layer: int) -> None:
    tower = text_tower(make_clip())
    token_ids = make_token_ids()
    with pytest.raises(ValueError, match=f"layer must lie between 0 and 2; got {layer}"):
        tower.encode(tower.embed(token_ids), tower.last_position(token_ids), layer)
