"""Numbers at the ends of float32's range give what the formulas say, or the documented bound."""

import math

import oracle
import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, WeightRule

EPS = torch.finfo(torch.float32).eps
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
NAMES = ("output", "grad q", "grad k", "grad v", "grad weights")

exact_backends = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)


def attend(
    weights: Tensor, backend: str, device: str, dtype: torch.dtype, upstream: float = 1.0
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, result and float64's result of the output and all gradients."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(1, 2, 9, 16, generator=generator) for _ in range(4)]
    q, k, v, grad_output = (t.to(device, dtype) for t in drawn)
    grad_output = (upstream * grad_output).to(dtype)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, weights.to(device))]
    output = tir_kernels.weighted_attention(*leaves, scale=0.25, backend=backend)
    ours = (output.detach(), *torch.autograd.grad(output, leaves, grad_output))
    exact, _ = oracle.exact_attention(q, k, v, weights.to(device), 0.25, grad_output)
    return list(zip(NAMES, ours, exact, strict=True))


def check(results: list[tuple[str, Tensor, Tensor]], weights: Tensor) -> None:
    """A logarithm of the weight is added to each score, and rounded with it."""
    largest_log = weights[weights > 0].double().log().abs().max().item()
    for name, ours, exact in results:
        assert ours.isfinite().all(), name
        step = max(2 * EPS * (1 + largest_log), 8 * torch.finfo(ours.dtype).eps)
        error = (ours.double() - exact).abs().max()
        # Below the smallest normal number a result may be 0.
        assert error <= step * exact.abs().max() + 8 * SMALLEST_NORMAL, name


def draw_weights() -> Tensor:
    return torch.rand(1, 9, generator=torch.Generator().manual_seed(6)) + 0.5


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1.0, 1e30, 1e37, 2e38])
def test_weights_of_any_size(backend: str, device: str, size: float) -> None:
    weights = draw_weights() * size
    results = attend(weights, backend, device, torch.float32, upstream=min(1.0, size * 1e36))
    check(results, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_common_factor_of_all_weights_changes_nothing(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    weights = draw_weights()
    expected = attend(weights, backend, device, dtype)
    for power in (-120.0, 120.0):
        found = attend(weights * 2.0**power, backend, device, dtype)
        for (name, one, _), (_, other, _) in zip(found, expected, strict=True):
            other = other * 2.0**-power if name == "grad weights" else other
            error = (one.float() - other.float()).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * other.float().abs().max(), name


def test_weights_of_many_sizes_in_one_image(backend: str, device: str) -> None:
    for sizes in (
        [1e38, 1e25, 1e3, 1e37, 0.0, 1e20, 1e10, -1.0, -1e38],
        [1e-10, 1e-20, 1e-30, 1e-37, 0.0, 1e-25, 1e-12, -1.0, -1e-38],
    ):
        weights = draw_weights() * torch.tensor(sizes)
        check(attend(weights, backend, device, torch.float32, upstream=1e-3), weights)


@pytest.mark.parametrize("huge", [1.0, 1e25, 1e36])
def test_a_key_of_tiny_weight_wins_beside_huge_ones(backend: str, device: str, huge: float) -> None:
    generator = torch.Generator().manual_seed(8)
    q, k, v, upstream = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(4))
    weights = draw_weights() * huge
    weights[0, 4] = 1e-30
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 4, 0] = 4 * (math.log(huge) - math.log(1e-30) + 2)
    scores = q.double() @ k.double().mT * 0.25 + weights.double().log()
    assert 0.2 < scores.softmax(-1)[..., 4].mean() < 0.8
    inputs = [t.to(device) for t in (q, k, v, weights)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = tir_kernels.weighted_attention(*leaves, scale=0.25, backend=backend)
    upstream = upstream.to(device) * 1e-6
    ours = (output.detach(), *torch.autograd.grad(output, leaves, upstream))
    oracle.assert_attention_as_accurate(ours, *inputs, 0.25, upstream)


@exact_backends
def test_a_tiny_weight_beside_ordinary_ones_has_its_gradient(backend: str, device: str) -> None:
    """It is near that of a weight of 0, not 0."""
    weights = draw_weights()
    weights[0, 2:5] = torch.tensor([1e-44, 1e-39, 1e-30])
    check(attend(weights, backend, device, torch.float32), weights)


@exact_backends
@pytest.mark.parametrize("size", [5e-39, 1e-40, 1e-44])
def test_denormal_weights(backend: str, device: str, size: float) -> None:
    weights = draw_weights() * size
    weights[0, 0] = 0.0
    assert (weights < SMALLEST_NORMAL).all()
    assert (weights[0, 1:] > 0).all()
    check(attend(weights, backend, device, torch.float32, upstream=size * 1e36), weights)


@exact_backends
def test_a_gradient_beyond_float32_is_infinite_and_no_nan(backend: str, device: str) -> None:
    weights = draw_weights() * 1e-42
    for name, ours, exact in attend(weights, backend, device, torch.float32):
        if name == "grad weights":
            assert torch.equal(ours, exact.float())
            assert ours.isinf().all()
        else:
            assert ours.isfinite().all()


def test_gpu_kernels_take_denormal_weights_for_zero(backend: str, device: str) -> None:
    """The documented bound; a sum of such weights is no attention at all."""
    if backend in ("reference", "cpu"):
        pytest.skip("exact there")
    weights = draw_weights() * 1e-40
    for _, ours, _ in attend(weights, backend, device, torch.float32):
        assert ours.isfinite().all()
    q = torch.randn(1, 1, 9, 16, device=device)
    output = tir_kernels.weighted_attention(q, q, q, weights.to(device), backend=backend)
    assert (output == 0).all()


def test_a_rule_of_huge_strength(backend: str, device: str) -> None:
    """The fused operator's backward pass looks its weights up by itself."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, 10, 16, generator=generator).to(device) for _ in range(3))
    tokens = torch.randn(1, 10, 8, generator=generator).to(device)
    classes = torch.randn(3, 8, generator=generator).to(device)

    def gradients(strength: float) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        output = tir_kernels.reweighted_attention(
            *leaves, tokens, classes, rule=WeightRule(strength=strength), num_prefix_tokens=0,
            backend=backend,
        )  # fmt: skip
        return output.detach(), *torch.autograd.grad(output.square().sum(), leaves)

    # Where a weight is far above 1, a common factor of all weights changes nothing.
    for one, other in zip(gradients(1e37), gradients(1e30), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


SPACES = {
    "norm and projection": lambda draw: JointSpace(
        draw(32).abs() + 0.5, draw(32), 1e-5, draw(32, 16)
    ),
    "projection": lambda draw: JointSpace(norm_eps=None, proj=draw(32, 16)),
    "tiny projection": lambda draw: JointSpace(norm_eps=None, proj=1e-25 * draw(32, 16)),
    "huge gains": lambda draw: JointSpace(1e30 * draw(32), None, 1e-5, draw(32, 16)),
    "nothing": lambda draw: None,
}


@exact_backends
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("class_size", [1e-25, 1.0, 1e25])
def test_relevance_of_tokens_of_any_size(backend: str, space: str, class_size: float) -> None:
    generator = torch.Generator().manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    joint_space = SPACES[space](draw)
    classes = class_size * draw(5, 32 if joint_space is None else 16)
    drawn = draw(2, 9, 32)
    for size in (1e-30, 1e-10, 1.0, 1e14, 1e17, 1e20, 1e30, 5e37):
        tokens = drawn * size
        ours = tir_kernels.token_relevance(
            tokens, classes, joint_space=joint_space, backend=backend
        )
        exact, _ = oracle.exact_relevance(
            tokens, classes, joint_space or JointSpace(norm_eps=None), 1
        )
        error = (ours.double() - exact).abs().max()
        assert error <= 16 * EPS * exact.abs().max() + SMALLEST_NORMAL, f"tokens of size {size}"


@pytest.mark.parametrize("space", ["norm and projection", "nothing"])
def test_relevance_up_to_the_documented_norm(backend: str, device: str, space: str) -> None:
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    joint_space = SPACES[space](draw)
    tokens, classes = draw(1, 9, 32), draw(3, 32 if joint_space is None else 16)
    tokens, classes = (2.0**62 * t / t.norm(dim=-1, keepdim=True) for t in (tokens, classes))
    found = tir_kernels.token_relevance(tokens, classes, joint_space=joint_space, backend=backend)
    exact, _ = oracle.exact_relevance(tokens, classes, joint_space or JointSpace(norm_eps=None), 1)
    assert (found.double() - exact).abs().max() <= 16 * EPS


@exact_backends
def test_one_huge_token_leaves_the_others_alone(backend: str) -> None:
    tokens, classes = torch.randn(2, 9, 32), torch.randn(5, 16)
    space = JointSpace(torch.rand(32), torch.randn(32), 1e-5, torch.randn(32, 16))
    call = {"joint_space": space, "backend": backend}
    expected = tir_kernels.token_relevance(tokens, classes, **call)
    tokens[0, 3] *= 1e25
    found = tir_kernels.token_relevance(tokens, classes, **call)
    others = [n for n in range(8) if n != 2]
    assert torch.equal(found[:, :, others], expected[:, :, others])
    torch.testing.assert_close(found[0, :, 2], expected[0, :, 2], rtol=1e-4, atol=1e-5)


@exact_backends
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("space", [None, JointSpace(), JointSpace(norm_eps=None)])
def test_what_is_not_finite_shows(backend: str, space: JointSpace | None, value: float) -> None:
    tokens, classes = torch.randn(1, 5, 8), torch.randn(3, 8)
    expected = tir_kernels.token_relevance(tokens, classes, joint_space=space, backend=backend)
    tokens[0, 2, 1] = value
    found = tir_kernels.token_relevance(tokens, classes, joint_space=space, backend=backend)
    assert found[0, :, 1].isnan().all()
    assert torch.equal(found[..., [0, 2, 3]], expected[..., [0, 2, 3]])
