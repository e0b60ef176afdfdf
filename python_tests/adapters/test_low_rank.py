"""The low-rank change of one projection, without a model around it."""

import pytest
import torch
from low_rank_parts import make_low_rank, opened
from torch import Tensor, nn

from tir_kernels.adapters import frozen_projection
from tir_kernels.adapters.low_rank import LowRank, PhiloxRandomness


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


def test_one_input_only() -> None:
    attention = opened(nn.MultiheadAttention(32, 2, batch_first=True))
    tokens = torch.randn(1, 3, 32)
    with pytest.raises(ValueError, match="takes one input"):
        attention(tokens, tokens.clone(), tokens)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("num_episodes", [None, 2, 4])  # fewer than the three maps, and more
@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_frozen_projection_is_what_its_parts_are(
    monkeypatch, is_on_gpu: bool, num_episodes: int | None, dropout: float, precision: str
) -> None:
    """The one function with its own gradient equals projection and change, one after the other."""
    for choice in ("writes_transposed", "drops_as_it_reads"):
        monkeypatch.setattr(frozen_projection, choice, lambda rows: is_on_gpu)
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
