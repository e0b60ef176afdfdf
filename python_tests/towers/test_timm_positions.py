"""Rotary positions where images have any size, and towers of timm's that are refused."""

import copy
import pickle
from functools import partial
from unittest import mock

import open_clip
import pytest
import torch
from timm_models import (
    MODELS,
    TEXT,
    encode,
    make_alone,
    make_classes,
    make_eva,
    make_in_clip,
    trunk_of,
)
from tiny_clip import Untouched
from torch import Tensor, nn

from tir_kernels import adapters, analysis
from tir_kernels.adapters import MostAttended
from tir_kernels.analysis.measures import BlockView, Finding
from tir_kernels.towers import ImageEncoder, vision_tower
from tir_kernels.towers.protocol import Block

# The equalities of a family in all its kinds take long together.
pytestmark = pytest.mark.slow

make_any_size = MODELS["DINOv3"]


def draw(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32), (16, 64)])
@torch.no_grad()
def test_images_of_any_size(size: tuple[int, int]) -> None:
    """16 x 64 pixels have as many patches as the 32 x 32 that the tower is made for."""
    model, images = make_any_size(), draw(*size)
    expected = model(images)
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        encoder = ImageEncoder(model)
        torch.testing.assert_close(encoder.features(encoder.embed(images)), expected)
    square = model(images.reshape(2, 3, 32, 32)) if size == (16, 64) else None
    assert square is None or not torch.allclose(square, expected, atol=1e-3)


@torch.no_grad()
def test_the_first_token_alone_has_its_keys_in_place() -> None:
    model, images = make_alone("vit_small_patch16_dinov3", global_pool="token"), draw(32, 48)
    expected = model(images)
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        encoder = ImageEncoder(model)
        torch.testing.assert_close(encoder.features(encoder.embed(images)), expected)


def test_positions_seen_in_inference_mode_can_be_trained_on() -> None:
    for family, size in (("DINOv3", (32, 48)), ("EVA-02", (32, 32)), ("mixed rotary", (32, 32))):
        tower = vision_tower(MODELS[family]())
        with torch.inference_mode():
            tokens = tower.embed(draw(*size))
            expected = tower.blocks[1](tokens)
        tokens = tokens.clone().requires_grad_()
        for _ in range(2):
            found = tower.blocks[1](tokens)
            torch.testing.assert_close(found, expected)
            found.sum().backward()


@torch.no_grad()
def test_tokens_of_an_unknown_grid_are_refused() -> None:
    model, images = make_any_size(), draw(32, 48)
    tower = vision_tower(model)
    tokens = tower.embed(images)
    with pytest.raises(ValueError, match=r"24 patches were not embedded .* 4 x 4, so their pos"):
        vision_tower(model).blocks[0](tokens)
    with pytest.raises(ValueError, match="have 6 x 4 patches, but others before had 4 x 6"):
        tower.embed(draw(48, 32))
    tower.embed(images)
    model.set_input_size(img_size=(32, 48))
    assert torch.equal(vision_tower(model).blocks[0](tokens), tower.blocks[0](tokens))


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("DINOv3", (32, 32)),
        ("DINOv3", (16, 64)),
        ("DINOv3", (32, 48)),
        ("EVA-02", (32, 32)),
        ("PE-Core", (32, 32)),
        ("mixed rotary", (32, 32)),
        ("shared keys", (32, 32)),
    ],
)
@torch.no_grad()
def test_an_order_by_attention_sees_what_its_pass_compares(
    family: str, size: tuple[int, int]
) -> None:
    model, seen, entered, compared = MODELS[family](), [], [], []

    class Spy(MostAttended):
        def __call__(self, block: Block, layer: int, hidden: Tensor, prefix: int) -> Tensor:
            seen.append(block.attention_of(hidden))
            return super().__call__(block, layer, hidden, prefix)

    before, attention = Untouched(model), trunk_of(model).blocks[1].attn
    plain = copy.deepcopy(attention)
    with adapters.add_reweighting(model, [1], "attention", "none", order=Spy()) as handle:
        handle.set_class_embeddings(make_classes(model))
        hook = attention.register_forward_pre_hook(
            lambda _, inputs, options: entered.append((inputs[0], options["rope"])),
            with_kwargs=True,
        )
        encode(model, draw(*size))
        hook.remove()
    before.check()

    def compare(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        compared.extend([query, key])
        return value

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", compare):
        plain(entered[0][0], rope=entered[0][1])
    torch.testing.assert_close([seen[0].query, seen[0].key], compared)


def test_random_positions_while_training_are_refused() -> None:
    for options in (
        {"patch_drop_rate": 0.5},
        {"rope_type": "dinov3", "rope_jitter_coords": 2.0},
    ):
        model = make_eva(use_rot_pos_emb=True, **options)
        tower = vision_tower(model.train())
        with pytest.raises(ValueError, match=r"at random while training.* call model\.eval\(\)"):
            tower.embed(draw(32, 32))
        model.eval()
        tokens = tower.embed(draw(32, 32))
        model.train()
        with pytest.raises(ValueError, match="at random while training"):
            tower.blocks[0](tokens)


@pytest.mark.parametrize(
    ("name", "kind", "pool", "proj"),
    [
        ("test_convnext", "ConvNeXt", "avg", "linear"),
        ("test_resnet", "ResNet", "avg", "linear"),
        ("test_byobnet", "ByobNet", "avg", "linear"),
        ("fastvit_t8", "FastVit", "avg", None),
        ("levit_128s", "LevitDistilled", "avg", "linear"),
    ],
)
def test_other_towers_of_timm_are_refused_by_name(
    name: str, kind: str, pool: str, proj: str | None
) -> None:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 224}
    model = open_clip.model.CustomTextCLIP(16, vision, TEXT)
    before = Untouched(model)
    for add in (
        lambda: adapters.add_reweighting(model),
        lambda: adapters.add_lora(model, towers=["visual"]),
        lambda: vision_tower(model.visual),
    ):
        with pytest.raises(ValueError, match=rf"tower is timm's {kind} \({name}\), which is not"):
            add()
    before.check()
    with pytest.raises(TypeError, match=rf"VisionTransformer or Eva, .* its tower is {kind}"):
        vision_tower(model.visual.trunk)


def test_a_distilled_tower_in_a_clip_model_is_refused() -> None:
    model = make_in_clip("deit_small_distilled_patch16_224", "token", "linear")
    with pytest.raises(ValueError, match="timm's VisionTransformerDistilled"):
        vision_tower(model)


def test_other_attentions_of_eva_take_placement_tokens_only() -> None:
    model = make_eva(attn_drop_rate=0.1)
    before = Untouched(model)
    for add in (
        partial(adapters.add_lora, model, towers=["visual"]),
        partial(adapters.add_reweighting, model, placement="attention"),
    ):
        with pytest.raises(TypeError, match="EvaAttention or AttentionRope without dropout"):
            add()
        before.check()
    with adapters.add_reweighting(model) as handle:
        handle.set_class_embeddings(torch.randn(5, 32))
        assert model(draw(32, 32)).isfinite().all()
    model.blocks[0].attn = nn.Identity()
    with pytest.raises(TypeError, match="got Identity"):
        adapters.add_lora(model, towers=["visual"])


def test_masks_of_timm_still_work_under_lora() -> None:
    model, tokens = make_eva(), torch.randn(2, 17, 32)
    block, kept = model.blocks[0], torch.rand(2, 1, 17, 17) < 0.7
    kept |= torch.eye(17, dtype=torch.bool)
    options = ({"attn_mask": kept}, {"is_causal": True}, {"attn_mask": kept.float().log()})
    expected = [block(tokens, **each) for each in options]
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        for each, wanted in zip(options, expected, strict=True):
            torch.testing.assert_close(block(tokens, **each), wanted)


@torch.no_grad()
def test_copies_have_positions_and_handles_of_their_own() -> None:
    model = MODELS["EVA-02"]()
    images, classes = draw(32, 32), make_classes(model)
    with adapters.add_reweighting(model, [1], "attention", order=MostAttended()) as handle:
        handle.set_class_embeddings(classes)
        expected = encode(model, images)
        copied = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
        model.visual.trunk.rope.pos_embed.zero_()
        assert not torch.equal(encode(model, images), expected)
        for each in (copied, loaded):
            assert torch.equal(encode(each, images), expected)
            block = adapters.reweighting_of(each)._places[0][0]
            assert block.module is each.visual.trunk.blocks[1]
            positions = block._rope(17)
            assert positions is each.visual.trunk.rope.get_embed()


@pytest.mark.slow
@torch.no_grad()
def test_adapted_towers_compile_whole() -> None:
    for family in ("EVA-02", "DINOv3", "SigLIP"):
        model = MODELS[family]()
        with (
            adapters.add_lora(model, rank=2, towers=["visual"]),
            adapters.add_reweighting(model, [1], "both") as handle,
        ):
            handle.set_class_embeddings(make_classes(model))
            trunk = trunk_of(model)
            compiled = torch.compile(trunk, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(draw(32, 32)), trunk(draw(32, 32)))
        torch.compiler.reset()


@pytest.mark.parametrize("family", ["PE-Core", "SigLIP", "EVA-02 E", "DINOv3", "shared keys"])
def test_measures_read_what_the_blocks_compare(family: str) -> None:
    model, images = MODELS[family](), draw(32, 32)
    before, outputs, seen = Untouched(model), [], []
    hooks = [
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
        for block in trunk_of(model).blocks
    ]
    with torch.no_grad():
        encode(model, images)
    for hook in hooks:
        hook.remove()

    class Reading:
        name = "reading"

        def of_block(self, view: BlockView) -> list[Finding]:
            seen.append((view.output, view.attention, view.relevance))
            return []

    analysis.measure(model, images, [Reading()], class_embeddings=make_classes(model))
    before.check()
    prefix = trunk_of(model).num_prefix_tokens
    for (output, attention, relevance), expected in zip(seen, outputs, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        received = attention.received_from_patches.sum(-1)
        torch.testing.assert_close(received, torch.ones(2, 2))
        assert attention.entropy.shape == (2, 2, prefix + 16)
        assert relevance.shape == (2, 5, 16)
