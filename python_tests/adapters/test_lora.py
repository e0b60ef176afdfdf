import copy

import pytest
import torch
from tiny_clip import Untouched, make_clip, make_images, make_token_ids, swap_token_order
from torch import Tensor, nn

from tir_kernels import adapters
from tir_kernels.adapters.low_rank import LowRank, LowRankSettings, PhiloxRandomness
from tir_kernels.towers.open_clip import OpenClipBlock
from tir_kernels.towers.opening import put_on

VARIANTS = {
    "clip": make_clip,
    "custom text": lambda: make_clip(custom_text=True),
    "length first": lambda: swap_token_order(make_clip()),
    "quick gelu, layer scale": lambda: make_clip(
        {"ls_init_value": 0.3}, {"ls_init_value": 0.3}, quick_gelu=True
    ),
}


def make_low_rank(
    width: int, rank: int, dropout: float, passes: bool, num_episodes: int | None = None
) -> LowRank:
    """The change of query, key and value, with alpha 8."""
    return LowRank((3, width, width), LowRankSettings(rank, 8, dropout, passes, num_episodes))


def encode(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = make_images().to(model.visual.proj.dtype)
    return model.encode_image(images), model.encode_text(make_token_ids())


def randomise(lora: adapters.LoRA, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def opened(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    put_on(attention, object(), OpenClipBlock.opened)
    return attention


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
def test_input_gradient(passes: bool) -> None:
    """With it the tokens get the gradient of the merged weights, without it the frozen ones'."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    weight = attention.in_proj_weight
    adapted = opened(attention)
    adapted.low_rank = make_low_rank(32, 4, 0.0, passes)
    nn.init.normal_(adapted.low_rank.b, std=0.2)
    tokens, upstream = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 96)

    rows = tokens @ weight.T + adapted.low_rank(tokens)
    (grad,) = torch.autograd.grad(rows, tokens, upstream)

    change = (adapted.low_rank.b @ adapted.low_rank.a).flatten(0, 1) * 8 / 4**0.5
    expected = upstream @ (weight + change if passes else weight)
    torch.testing.assert_close(grad, expected)
    # The whole module, where the scores' own dependence on q and k is that of the adapted weights.
    output = adapted(tokens, tokens, tokens)[0]
    (whole,) = torch.autograd.grad(output.square().sum(), tokens)
    merged = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    merged.load_state_dict(attention.state_dict(), strict=False)  # which has LoRA's factors too
    merged.in_proj_weight.data += change.detach()
    reference = merged(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(output, reference)
    (of_merged,) = torch.autograd.grad(reference.square().sum(), tokens)
    assert torch.allclose(whole, of_merged, atol=1e-5) is passes


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


def test_mean_of_dropout_is_the_quiet_result() -> None:
    low_rank = make_low_rank(8, 4, 0.25, True)
    nn.init.normal_(low_rank.b)
    tokens = torch.randn(1, 2, 8)
    with torch.no_grad():
        noisy = low_rank(tokens.expand(20000, 2, 8))
        low_rank.eval()
        quiet = low_rank(tokens)[0]
    error = noisy.std(0) / 20000**0.5
    assert ((noisy.mean(0) - quiet).abs() < 5 * error).all()


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


@pytest.mark.parametrize("placement", ["tokens", "attention", "both"])
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
    before = Untouched(model)
    with pytest.raises(kind, match=message):
        adapters.add_lora(model, **arguments)
    before.check()


def test_attention_of_another_kind_is_refused_and_nothing_changes() -> None:
    model = make_clip(text={"qk_norm": True})
    before = Untouched(model)
    with pytest.raises(TypeError, match=r"nn\.MultiheadAttention.*got Attention"):
        adapters.add_lora(model)
    before.check()
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
    model = make_clip()
    with adapters.add_lora(model, rank=4) as lora:
        randomise(lora)
        exact = model.encode_image(make_images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.encode_image(make_images())
        assert torch.cosine_similarity(output.float(), exact, dim=1).min() > 0.999
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


def test_one_input_only() -> None:
    attention = opened(nn.MultiheadAttention(32, 2, batch_first=True))
    tokens = torch.randn(1, 3, 32)
    with pytest.raises(ValueError, match="takes one input"):
        attention(tokens, tokens.clone(), tokens)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("num_episodes", [None, 2])
def test_frozen_projection_is_what_its_parts_are(num_episodes, dropout: float, precision: str):
    """The one function with its own gradient equals projection and change, one after the other."""
    low_rank = make_low_rank(24, 4, dropout, False, num_episodes)
    nn.init.normal_(low_rank.b, std=0.3)
    low_rank.randomness = PhiloxRandomness(
        torch.arange(num_episodes or 1), torch.tensor([3]), stream=2
    )
    weight, bias = torch.randn(72, 24) / 5, torch.randn(72)
    tokens, grad = torch.randn(4, 7, 24), torch.randn(4, 7, 72)

    def composed(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.linear(tokens, weight, bias) + low_rank(tokens)

    def in_parts(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([low_rank.project(tokens, weight, bias, k, 1) for k in range(3)], -1)

    def results(project, dtype: torch.dtype, is_exact: bool = False) -> list[Tensor]:
        own = tokens.to(dtype).requires_grad_()
        is_cast = precision == "autocast" and not is_exact
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            output = project(own, weight.to(dtype), bias.to(dtype)).float()
        inputs = [own, low_rank.a, low_rank.b]
        return [output.detach(), *(g.float() for g in torch.autograd.grad(output, inputs, grad))]

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    theirs = results(composed, dtype)
    for project in (low_rank.project, in_parts):
        ours = results(project, dtype)
        if precision == "float32":
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            continue
        exact = results(composed, torch.float32, is_exact=True)
        for one, other, expected in zip(ours, theirs, exact, strict=True):
            rounding = torch.finfo(torch.bfloat16).eps * expected.abs().max()
            assert (one - expected).abs().max() <= 2 * (other - expected).abs().max() + rounding


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


def make_projection(passes_input_gradient: bool) -> tuple[LowRank, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    low_rank = make_low_rank(24, 4, 0.0, passes_input_gradient)
    with torch.no_grad():
        for parameter in low_rank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight = torch.randn(72, 24, generator=generator) / 5
    return low_rank, weight, torch.randn(4, 7, 24, generator=generator)


def test_a_penalty_on_a_gradient_is_exact_or_refused() -> None:
    def penalty(passes_input_gradient: bool) -> tuple[Tensor, Tensor]:
        low_rank, weight, tokens = make_projection(passes_input_gradient)
        projected = low_rank.project(tokens, weight, None)
        (grad,) = torch.autograd.grad(projected.sum(), low_rank.a, create_graph=True)
        return grad.square().sum() + low_rank.b.sum(), low_rank.b

    with pytest.raises(RuntimeError, match=r"second derivative here: .*passes_input_gradient=True"):
        torch.autograd.grad(*penalty(False))
    (grad,) = torch.autograd.grad(*penalty(True))
    assert (grad != 1).any()


def test_a_backward_pass_inside_autocast_is_the_same() -> None:
    low_rank, weight, tokens = make_projection(False)
    inputs = [tokens.requires_grad_(), *low_rank.parameters()]

    def loss() -> Tensor:
        return low_rank.project(tokens, weight, None).square().sum()

    expected = torch.autograd.grad(loss(), inputs)
    outside = loss()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(outside, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
