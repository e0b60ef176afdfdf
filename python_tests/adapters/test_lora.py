import copy

import pytest
import torch
from low_rank_parts import encode, make_low_rank
from tiny_clip import (
    OWN_BLOCKS,
    Untouched,
    make_clip,
    make_coca,
    make_images,
    refused,
    swap_token_order,
)
from torch import nn

from tir_kernels import adapters
from tir_kernels.adapters.low_rank import LowRank

VARIANTS = {
    "clip": make_clip,
    "custom text": lambda: make_clip(custom_text=True),
    "length first": lambda: swap_token_order(make_clip()),
    "quick gelu, layer scale": lambda: make_clip(
        {"ls_init_value": 0.3}, {"ls_init_value": 0.3}, quick_gelu=True
    ),
    "own blocks": lambda: make_clip(OWN_BLOCKS, OWN_BLOCKS),
    "CoCa": make_coca,
}


def randomise(lora: adapters.LoRA, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def merge(model: nn.Module, lora: adapters.LoRA) -> nn.Module:
    """A copy of the unadapted model whose projections are W + B A alpha / sqrt(rank)."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, (a, b) in lora.factors().items():
            tower, layer, projection = name.split(".")
            owner = merged.visual if tower == "visual" else getattr(merged, "text", merged)
            packed = owner.transformer.resblocks[int(layer)].attn.in_proj_weight
            rows = dict(zip("qkv", packed.chunk(3), strict=True))[projection]
            rows += b.to(rows.dtype) @ a.to(rows.dtype) * lora.alpha / lora.rank**0.5
    return merged


@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_what_the_merged_weights_compute(variant: str) -> None:
    model = VARIANTS[variant]()
    plain = copy.deepcopy(model)
    with adapters.add_lora(model, rank=3, alpha=5, dropout=0.5) as lora, torch.no_grad():
        randomise(lora)
        torch.testing.assert_close(encode(model), encode(merge(plain, lora)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_as_the_model_it_is_added_to(variant: str) -> None:
    model = VARIANTS[variant]()
    with torch.no_grad():
        before = encode(model)
        with adapters.add_lora(model):
            torch.testing.assert_close(encode(model), before)


def test_factors_start_as_published() -> None:
    model = make_clip()
    torch.manual_seed(4)
    with adapters.add_lora(model) as lora:
        assert (lora.rank, lora.alpha, lora.dropout) == (16, 8, 0.25)
        factors = lora.factors()
        assert set(factors) == {
            f"{tower}.{layer}.{projection}"
            for tower, depth in (("visual", 6), ("text", 3))
            for layer in range(depth)
            for projection in "qkv"
        }
        for name, (a, b) in factors.items():
            width = 32 if name.startswith("visual") else 24
            assert a.shape == (16, width)
            assert b.shape == (width, 16)
            assert not b.any()
        # nn.Linear draws from U(-1/sqrt(width), 1/sqrt(width)).
        drawn = torch.cat([a for name, (a, _) in factors.items() if name.startswith("visual")])
        assert 0.98 / 32**0.5 < drawn.abs().max() <= 1 / 32**0.5
        assert drawn.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.05)


def test_factors_get_the_gradients_of_the_merged_weights() -> None:
    # In float32 the terms of a gradient that nearly cancel would leave little to compare.
    model = make_clip().double()
    plain = copy.deepcopy(model)
    with adapters.add_lora(model, rank=3, alpha=5) as lora:
        randomise(lora)
        merged = merge(plain, lora)
        for adapted in (model, merged):
            images, texts = encode(adapted)
            (images.square().sum() + texts.square().sum()).backward()
        scaling = lora.alpha / lora.rank**0.5
        for place, path in lora.module_paths.items():
            grad = merged.get_submodule(path).in_proj_weight.grad.view(
                3, -1, 32 if "v" in place else 24
            )
            low_rank = model.get_submodule(path).low_rank
            expected_a = scaling * low_rank.b.mT.double() @ grad
            expected_b = scaling * grad @ low_rank.a.mT.double()
            torch.testing.assert_close(low_rank.a.grad, expected_a.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(low_rank.b.grad, expected_b.float(), rtol=1e-5, atol=1e-6)


def test_only_b_learns_at_first() -> None:
    model = make_clip()
    with adapters.add_lora(model) as lora:
        images, texts = encode(model)
        (images.square().sum() + texts.square().sum()).backward()
        for low_rank in (m for m in model.modules() if isinstance(m, LowRank)):
            assert not low_rank.a.grad.any()
            assert low_rank.b.grad.flatten(1).any(1).all()
        assert len(list(lora.parameters())) == 2 * 9


@pytest.mark.parametrize("passes", [True, False])
def test_factors_learn_whether_or_not_the_input_does(passes: bool) -> None:
    model = make_clip()
    with adapters.add_lora(model, dropout=0.0, passes_input_gradient=passes) as lora:
        randomise(lora)
        for part in encode(model):
            part.square().sum().backward()
        assert all(p.grad.flatten(1).any(1).all() for p in lora.parameters())


def test_dropout_acts_in_training_alone_and_differs_between_projections() -> None:
    model = make_clip()
    images = make_images()
    with adapters.add_lora(model, rank=4, dropout=0.5) as lora, torch.no_grad():
        randomise(lora)
        quiet = model.encode_image(images)
        assert torch.equal(model.encode_image(images), quiet)
        lora.train()
        assert not model.visual.transformer.training  # the model's own mode is its owner's matter
        assert not torch.equal(model.encode_image(images), model.encode_image(images))
        torch.manual_seed(5)
        noisy = model.encode_image(images)
        torch.manual_seed(5)
        assert torch.equal(model.encode_image(images), noisy)
        lora.train(False)
        assert torch.equal(model.encode_image(images), quiet)
        model.train()
        assert not torch.equal(model.encode_image(images), quiet)
    tokens = torch.randn(2, 6, 32)
    low_rank = make_low_rank(32, 32, 0.5, True)
    with torch.no_grad():
        low_rank.a.copy_(torch.eye(32))
        low_rank.b.copy_(torch.eye(32))
        q, k, v = low_rank(tokens).chunk(3, -1)
    dropped = [(part == 0) for part in (q, k, v)]
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[1], dropped[2])
    kept = ~dropped[0]
    torch.testing.assert_close(q[kept], tokens[kept] * 2 * 8 / 32**0.5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", [True, False])
def test_remove_restores_the_model(variant: str, mode: bool) -> None:
    model = VARIANTS[variant]().train(mode)
    before = Untouched(model)
    lora = adapters.add_lora(model)
    randomise(lora)
    for part in encode(model):
        part.sum().backward()
    lora.remove()
    before.check()
    lora.remove()
    before.check()
    assert list(lora.parameters()) == []
    adapters.add_lora(model).remove()
    before.check()


def test_state_dict_keeps_the_keys_of_the_model() -> None:
    model = make_clip()
    keys = list(model.state_dict())
    with adapters.add_lora(model):
        adapted = list(model.state_dict())
        assert [key for key in adapted if ".low_rank." not in key] == keys


def test_changes_of_mode_and_type_survive_removal() -> None:
    model = make_clip()
    with adapters.add_lora(model):
        model.train()
        model.bfloat16()
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_context_ends_with_removal_even_after_an_error() -> None:
    model = make_clip()
    before = Untouched(model)
    with pytest.raises(KeyError), adapters.add_lora(model):
        raise KeyError
    before.check()


def test_a_second_lora_is_refused() -> None:
    model = make_clip()
    with adapters.add_lora(model) as first:
        with pytest.raises(RuntimeError, match=r"LoRA already.*remove\(\)"):
            adapters.add_lora(model)
        with pytest.raises(RuntimeError, match="LoRA already"):
            adapters.add_lora(model, towers=["text"])
        assert len(list(first.parameters())) == 2 * 9


def test_towers_can_be_adapted_apart() -> None:
    model = make_clip()
    before = Untouched(model)
    visual = adapters.add_lora(model, rank=2, towers=["visual"])
    text = adapters.add_lora(model, rank=5, towers=["text"])
    with torch.no_grad():
        images, texts = encode(model)
        randomise(text)
        assert torch.equal(encode(model)[0], images)
        assert not torch.allclose(encode(model)[1], texts)
    visual.remove()
    assert len(list(text.parameters())) == 2 * 3
    text.remove()
    before.check()


@pytest.mark.parametrize("placement", ["tokens", "attention", "both", "values"])
@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("remove_lora_first", [True, False])
def test_together_with_reweighting(
    placement: str, lora_first: bool, remove_lora_first: bool
) -> None:
    model = make_clip()
    plain = copy.deepcopy(model)
    before = Untouched(model)
    classes = torch.randn(5, 16)

    def reweight(target: nn.Module) -> adapters.Reweighting:
        handle = adapters.add_reweighting(target, placement=placement)
        handle.set_class_embeddings(classes)
        return handle

    if lora_first:
        lora = adapters.add_lora(model)
        handle = reweight(model)
    else:
        handle = reweight(model)
        lora = adapters.add_lora(model)
    randomise(lora)
    merged = merge(plain, lora)
    with torch.no_grad():
        with reweight(merged):
            torch.testing.assert_close(encode(model), encode(merged))
            if remove_lora_first:
                lora.remove()
                with reweight(plain):
                    torch.testing.assert_close(encode(model), encode(plain))
                handle.remove()
        if not remove_lora_first:
            handle.remove()
            torch.testing.assert_close(encode(model), encode(merged))
            lora.remove()
    before.check()


def test_set_factors() -> None:
    model = make_clip()
    with adapters.add_lora(model, rank=2) as lora:
        untouched = lora.factors()["text.1.k"][0].clone()
        a, b = torch.randn(2, 32), torch.randn(32, 2)
        lora.set_factors(a={"visual.3.v": a}, b={"visual.3.v": b})
        factors = lora.factors()
        assert torch.equal(factors["visual.3.v"][0], a)
        assert torch.equal(factors["visual.3.v"][1], b)
        assert torch.equal(factors["text.1.k"][0], untouched)
        with pytest.raises(ValueError, match=r"'visual.9.q' names no LoRA factor.*'visual.0.q'"):
            lora.set_factors(a={"visual.9.q": a})
        with pytest.raises(ValueError, match=r"LoRA B of 'text.0.q'.*\(24, 2\).*\(32, 2\)"):
            lora.set_factors(b={"text.0.q": b})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1; got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int; got float"),
        ({"rank": True}, TypeError, "rank must be an int; got bool"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must lie in"),
        ({"towers": ["image"]}, ValueError, "towers must be some of visual, text"),
        ({"towers": []}, ValueError, "towers must be some of visual, text"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, kind: type, message: str) -> None:
    model = make_clip()
    with refused(model, kind, message):
        adapters.add_lora(model, **arguments)


def test_attention_of_another_kind_is_refused_and_nothing_changes() -> None:
    model = make_clip(text={"qk_norm": True})
    model.transformer.resblocks[1].attn.attn_drop.p = 0.1
    with refused(model, TypeError, r"nn\.MultiheadAttention.*no dropout.*got Attention"):
        adapters.add_lora(model)
    with adapters.add_lora(model, towers=["visual"]) as lora:
        assert len(lora.factors()) == 3 * 6


def test_low_precision_models_train() -> None:
    """Weights of a model that is bfloat16 throughout, with factors in float32."""
    model = make_clip().bfloat16()
    with adapters.add_lora(model, rank=4) as lora:
        randomise(lora)
        output = model.encode_image(make_images().bfloat16())
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        gradients = [p.grad for p in lora.parameters() if p.grad is not None]
        assert len(gradients) == 2 * 6
        assert all(grad.dtype == torch.float32 and grad.any() for grad in gradients)


def test_autocast() -> None:
    model, images = make_clip(), make_images(64)
    plain = copy.deepcopy(model)
    with adapters.add_lora(model, rank=4) as lora:
        randomise(lora)
        exact = model.encode_image(images)
        merged = merge(plain, lora)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.encode_image(images)
            error_of_pytorch = (merged.encode_image(images) - exact).norm()
        assert (output - exact).norm() <= 2 * error_of_pytorch < 0.1 * exact.norm()
        output.float().square().sum().backward()
        assert all(
            p.grad.any() for name, p in model.visual.named_parameters() if "low_rank" in name
        )


def test_gradient_checkpointing_repeats_the_same_dropout() -> None:
    model = make_clip()
    with adapters.add_lora(model, rank=4, dropout=0.5) as lora:
        randomise(lora)
        lora.train()
        gradients = []
        for enabled in (False, True):
            model.set_grad_checkpointing(enabled)
            torch.manual_seed(6)
            outputs = encode(model)
            parameters = list(lora.parameters())
            loss = sum(part.square().sum() for part in outputs)
            gradients.append(torch.autograd.grad(loss, parameters))
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@torch.no_grad()
def test_what_was_compiled_before_notices() -> None:
    torch.compiler.reset()
    model, images = make_clip({"layers": 2}), make_images()
    compiled = torch.compile(model.visual, backend="eager", fullgraph=True)
    plain = compiled(images)
    with adapters.add_lora(model, rank=2) as lora:
        randomise(lora)
        adapted = model.visual(images)
        assert (adapted - plain).abs().max() > 1e-3
        torch.testing.assert_close(compiled(images), adapted)
    torch.testing.assert_close(compiled(images), plain)
    torch.compiler.reset()


def test_seeded_dropout_needs_a_next_step_to_change() -> None:
    model, images = make_clip(), make_images()
    with adapters.add_lora(model, 4, dropout=0.5) as lora:
        lora.set_factors(b={name: torch.randn_like(b) for name, (_, b) in lora.factors().items()})
        lora.seed([5])
        lora.train()
        first, again = model.encode_image(images), model.encode_image(images)
        lora.next_step()
        later = model.encode_image(images)
        lora.seed([5])
        assert torch.equal(model.encode_image(images), first)
    assert torch.equal(first, again)
    assert not torch.allclose(first, later)
