"""Results depend on the arguments alone: not on default dtype or device, grad mode, or autocast."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, WeightRule
from tir_kernels.operators import checks as validation
from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.operators.dropout import philox_dropout


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def draw() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tokens": (2, 20, 32),
        "classes": (5, 16),
        "proj": (32, 16),
        "q": (2, 3, 20, 24),
        "weights": (2, 20),
        "rows": (2, 3, 4, 8),
        "bias": (8,),
    }
    drawn = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return drawn | {"seeds": torch.tensor([3, 5]), "step": torch.tensor([7])}


def call_everything(given: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The results of every public function, tables made anew."""
    validation._tables.clear()
    space = JointSpace(proj=given["proj"])
    relevant = {"joint_space": space, "backend": backend}
    tokens, classes, q = given["tokens"], given["classes"], given["q"]
    weights, counts = tir_kernels.token_weights(tokens, classes, **relevant)
    return [
        weights,
        counts,
        WeightRule("extremes").table(7),
        tir_kernels.token_relevance(tokens, classes, **relevant),
        tir_kernels.reweight_tokens(tokens, weights),
        tir_kernels.weighted_attention(q, q, q, given["weights"], backend=backend),
        tir_kernels.reweighted_attention(q, q, q, tokens, classes, **relevant),
        philox_dropout(given["rows"], given["seeds"], given["step"], num_branches=2),
        bias_activation(given["rows"], given["bias"]),
        bias_activation(given["rows"], given["bias"], "quick_gelu"),
    ]


def gradients(given: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    leaves = [given[name].requires_grad_() for name in ("q", "weights", "rows")]
    q, weights, rows = leaves
    table = torch.tensor([0.5, 1.0, 0.0, -1.0, 2.0, 0.25], dtype=q.dtype, device="cpu")
    table.requires_grad_()
    attended = tir_kernels.weighted_attention(q, q, q, weights, backend=backend)
    reweighted = tir_kernels.reweighted_attention(
        q, q, q, given["tokens"], given["classes"], joint_space=JointSpace(proj=given["proj"]),
        table=table, backend=backend,
    )  # fmt: skip
    activated = bias_activation(rows, given["bias"])
    total = attended.square().sum() + reweighted.square().sum() + activated.square().sum()
    return torch.autograd.grad(total, (*leaves, table))


@pytest.mark.parametrize("setting", SETTINGS)
def test_process_settings_change_nothing(backend: str, device: str, setting: str) -> None:
    if device != "cpu":
        pytest.skip("the settings concern what is made on the host")
    expected = call_everything(draw(), backend)
    given = draw()
    with SETTINGS[setting]():
        results = call_everything(given, backend)
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    # What was kept in the meantime serves afterwards too.
    kept = tir_kernels.token_weights(
        given["tokens"], given["classes"], joint_space=JointSpace(proj=given["proj"]),
        backend=backend,
    )  # fmt: skip
    assert torch.equal(kept.weights, expected[0])


@pytest.mark.parametrize("setting", ["float16", "float64", "default device", "device context"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_process_settings_change_no_gradient(backend: str, setting: str) -> None:
    if reason := tir_kernels.available_backends()[backend]:
        pytest.skip(f"backend {backend}: {reason}")
    expected = gradients(draw(), backend)
    given = draw()
    with SETTINGS[setting]():
        results = gradients(given, backend)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_changes_what_it_should_alone(backend: str) -> None:
    """Attention is cast as PyTorch's own; relevance, tables and sums keep float32."""
    if reason := tir_kernels.available_backends()[backend]:
        pytest.skip(f"backend {backend}: {reason}")
    expected = call_everything(draw(), backend)
    given = draw()
    with torch.autocast("cpu", torch.bfloat16):
        results = call_everything(given, backend)
    for place, (one, other) in enumerate(zip(results, expected, strict=True)):
        if place in (5, 6):
            assert one.dtype == torch.bfloat16
            torch.testing.assert_close(one.float(), other, atol=0.05, rtol=0.05)
        else:
            assert torch.equal(one, other)


def test_a_backward_pass_inside_autocast_is_the_same() -> None:
    expected = gradients(draw(), "auto")
    given = draw()
    leaves = [given["q"].requires_grad_(), given["rows"].requires_grad_()]
    q, rows = leaves
    attended = tir_kernels.weighted_attention(q, q, q, given["weights"]).square().sum()
    activated = bias_activation(rows, given["bias"]).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        attention_grad, activation_grad = torch.autograd.grad(attended + activated, leaves)
    alone = tir_kernels.weighted_attention(q, q, q, given["weights"]).square().sum()
    assert torch.equal(attention_grad, torch.autograd.grad(alone, q)[0])
    assert torch.equal(activation_grad, expected[2])


def relevance_call() -> Callable[[], tir_kernels.TokenWeights]:
    tokens, classes = torch.randn(2, 6, 8), torch.randn(4, 8)
    return lambda: tir_kernels.token_weights(tokens, classes)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_table_is_made_once(mode: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = WeightRule.table
    monkeypatch.setattr(validation, "_tables", {})
    monkeypatch.setattr(WeightRule, "table", lambda *a: made.append(a) or make(*a))
    call = relevance_call()
    with mode():
        for _ in range(5):
            call()
    assert len(made) == 1
    (table,) = validation._tables.values()
    assert not table.is_inference()
    assert not table.requires_grad
    call()
    assert len(made) == 1


def test_a_table_made_under_inference_mode_serves_a_backward_pass() -> None:
    validation._tables.clear()
    given = draw()
    call = {"joint_space": JointSpace(proj=given["proj"])}
    with torch.inference_mode():
        tir_kernels.token_weights(given["tokens"], given["classes"], **call)
    q = given["q"].requires_grad_()
    tir_kernels.reweighted_attention(q, q, q, given["tokens"], given["classes"], **call).sum()
    output = tir_kernels.reweighted_attention(q, q, q, given["tokens"], given["classes"], **call)
    output.sum().backward()
    assert q.grad.isfinite().all()


def test_a_table_made_under_a_transform_or_mode_is_not_kept() -> None:
    from torch._subclasses import FakeTensorMode

    validation._tables.clear()
    call = relevance_call()
    expected = call()
    with FakeTensorMode():
        assert relevance_call()().weights.shape == (2, 6)  # nor is a kept one taken here
    validation._tables.clear()
    with FakeTensorMode():
        relevance_call()()
    tokens, classes = torch.randn(2, 6, 8), torch.randn(4, 8)

    def loss(tokens: Tensor) -> Tensor:
        weights = tir_kernels.token_weights(tokens, classes).weights
        return tir_kernels.reweight_tokens(tokens, weights).sum()

    torch.func.grad(loss)(tokens)
    assert validation._tables == {}
    assert torch.equal(call().weights, expected.weights)
