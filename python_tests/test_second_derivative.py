"""A second derivative is exact or an error: a penalty on a gradient is never silently nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tir_kernels
from tir_kernels.operators.bias_activation import bias_activation

K, V = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
WEIGHTS = torch.rand(1, 6)
TOKENS, CLASSES = torch.randn(1, 6, 8), torch.randn(4, 8)

FUNCTIONS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "weighted_attention": lambda q, backend: tir_kernels.weighted_attention(
        q, K, V, WEIGHTS, backend=backend
    ),
    "reweighted_attention": lambda q, backend: tir_kernels.reweighted_attention(
        q, K, V, TOKENS, CLASSES, backend=backend
    ),
    "with weights": lambda q, backend: tir_kernels.reweighted_attention(
        q, K, V, TOKENS, CLASSES, backend=backend, return_weights=True
    )[0],
    "gelu": lambda hidden, backend: bias_activation(hidden, None),
    "quick_gelu": lambda hidden, backend: bias_activation(hidden, None, "quick_gelu"),
}
REFUSAL = "tir_kernels computes no second derivative here: .*backward: [a-z]"


@pytest.fixture(params=["reference", "cpu", "triton"])
def host_backend(request: pytest.FixtureRequest) -> str:
    if torch.cuda.is_available() and request.param == "triton":
        pytest.skip("Triton kernels are not interpreted where there is a GPU")
    if reason := tir_kernels.available_backends()[request.param]:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_penalty_on_a_gradient_is_refused(function: str, host_backend: str) -> None:
    q = torch.randn(1, 2, 6, 8, requires_grad=True)

    def apply(q: Tensor) -> Tensor:
        return FUNCTIONS[function](q, host_backend)

    (plain,) = torch.autograd.grad(apply(q).sum(), q)
    for output in (apply(q).sum(), apply(q).square().sum()):
        loss = apply(q).square().sum()  # has a gradient of its own, which must not hide the error
        (grad,) = torch.autograd.grad(output, q, create_graph=True)
        penalty = grad.square().sum()
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.grad(loss + penalty, q, retain_graph=True)
        with pytest.raises(RuntimeError, match=REFUSAL):
            (loss + penalty).backward()
    assert torch.equal(torch.autograd.grad(apply(q).sum(), q, create_graph=True)[0], plain)


@pytest.mark.parametrize("function", ["weighted_attention", "reweighted_attention", "with weights"])
def test_under_function_transforms(function: str) -> None:
    q = torch.randn(1, 2, 6, 8)

    def loss(q: Tensor) -> Tensor:
        return FUNCTIONS[function](q, "auto").sum()

    def penalty(q: Tensor) -> Tensor:
        return torch.func.grad(loss)(q).square().sum()

    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0], rtol=0, atol=0
    )
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.grad(penalty)(q)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_a_checkpoint(use_reentrant: bool) -> None:
    q = torch.randn(1, 2, 6, 8, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(q, K, V, WEIGHTS)

    expected = torch.autograd.grad(attend(q).sum(), q)[0]
    checkpoint(attend, q, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(q.grad, expected)
    if not use_reentrant:
        output = checkpoint(attend, q, use_reentrant=False).sum()
        (grad,) = torch.autograd.grad(output, q, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.grad(grad.square().sum(), q)


def test_with_respect_to_weights_and_tables() -> None:
    weights = WEIGHTS.clone().requires_grad_()
    q = torch.randn(1, 2, 6, 8)
    output = tir_kernels.weighted_attention(q, K, V, weights)
    (grad,) = torch.autograd.grad(output.sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.autograd.grad(grad.sum(), weights)
    table = torch.rand(5, requires_grad=True)
    output = tir_kernels.reweighted_attention(q, K, V, TOKENS, CLASSES, table=table)
    (grad,) = torch.autograd.grad(output.sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.autograd.grad(grad.sum(), table)


def test_a_table_is_differentiable_as_often_as_one_likes() -> None:
    tokens, classes = TOKENS.double(), CLASSES.double()
    table = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def reweight(table: Tensor) -> Tensor:
        weights = tir_kernels.token_weights(tokens, classes, table=table).weights
        return tir_kernels.reweight_tokens(tokens, weights.square())

    assert torch.autograd.gradcheck(reweight, (table,))
    assert torch.autograd.gradgradcheck(reweight, (table,))


@pytest.mark.slow
def test_compiled_functions_refuse_too() -> None:
    def attend(q: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(q, K, V, WEIGHTS)

    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(q).sum(), q, create_graph=True)
    loss = grad.square().sum() + attend(q).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, q)
