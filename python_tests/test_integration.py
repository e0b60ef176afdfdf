"""The operators inside PyTorch: opcheck, torch.compile, autocast, no_grad, vmap, whole operator."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, ReweightedAttention, WeightRule

OPS = torch.ops.tir_kernels


def inputs(
    length: int = 20, width: int = 64, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    packed = draw(2, length, 3, 2, width)
    q, k, v = (t.detach().requires_grad_() for t in packed.permute(2, 0, 3, 1, 4))
    return {
        "q": q,
        "k": k,
        "v": v,
        "tokens": draw(2, length, 32),
        "class_embeddings": draw(5, 16),
        "joint_space": JointSpace(1 + 0.1 * draw(32), draw(32), 1e-5, draw(32, 16)),
    }


def relevance_arguments(given: dict[str, Any]) -> tuple:
    space = given["joint_space"]
    return (
        given["tokens"],
        given["class_embeddings"][None],
        space.norm_weight,
        space.norm_bias,
        space.norm_eps,
        space.proj,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend: str, device: str, dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype, device=device)
    table = WeightRule().table(5).to(device)
    relevance = relevance_arguments(given)
    q, k, v = (given[name].detach() for name in "qkv")
    weights = torch.rand(2, 20, device=device)
    output, log_sum_exp = OPS.weighted_attention(q, k, v, weights, 0.1, False, backend)
    counts = torch.randint(0, 6, (2, 19), device=device, dtype=torch.int32)
    calls = [
        (OPS.token_relevance, (*relevance, 1, backend)),
        (OPS.token_weights, (*relevance, table, 0.3, 1, backend)),
        (OPS.weighted_attention, (q, k, v, weights, 0.1, False, backend)),
        (OPS.reweighted_attention, (q, k, v, *relevance, table, 0.3, 1, 0.1, backend)),
    ]
    saved = (output, log_sum_exp, 0.1)
    for needs_weights_grad in (True, False):
        rest = (needs_weights_grad, False, backend)
        given = (output, q, k, v, weights, *saved, False, *rest)
        calls += [
            (OPS.weighted_attention_backward, given),
            (OPS.reweighted_attention_backward, (output, q, k, v, counts, table, *saved, *rest)),
        ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_reweighted_is_weights_then_attention(backend: str, device: str) -> None:
    given = inputs(device=device)
    q, k, v = (given[name] for name in "qkv")
    table = torch.rand(6, device=device).requires_grad_()
    options = {"joint_space": given["joint_space"], "table": table, "backend": backend}
    output, (weights, counts) = tir_kernels.reweighted_attention(
        **given, table=table, backend=backend, return_weights=True
    )
    expected_weights, expected_counts = tir_kernels.token_weights(
        given["tokens"], given["class_embeddings"], **options
    )
    expected = tir_kernels.weighted_attention(q, k, v, expected_weights, backend=backend)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(output, expected)
    alone = tir_kernels.reweighted_attention(**given, table=table, backend=backend)
    assert torch.equal(alone, output)
    inputs_with_grad = (q, k, v, table)
    for mine, other in zip(
        torch.autograd.grad(alone.square().sum(), inputs_with_grad),
        torch.autograd.grad(output.square().sum(), inputs_with_grad, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    upstream = torch.randn_like(output)
    # The returned weights may be used, and differentiated, once more.
    ours = torch.autograd.grad(
        (output * upstream).sum() + weights.square().sum(), (q, k, v, table), retain_graph=True
    )
    theirs = torch.autograd.grad(
        (expected * upstream).sum() + expected_weights.square().sum(), (q, k, v, table)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_gradcheck_of_the_whole_reference() -> None:
    given = inputs(length=6, width=3, dtype=torch.float64)
    table = torch.rand(6, dtype=torch.float64).add_(0.1).requires_grad_()
    rest = {name: given[name] for name in ("tokens", "class_embeddings", "joint_space")}

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return tir_kernels.reweighted_attention(q, k, v, **rest, table=table, backend="reference")

    assert torch.autograd.gradcheck(attend, (given["q"], given["k"], given["v"], table))


def test_is_an_autograd_function() -> None:
    assert issubclass(ReweightedAttention, torch.autograd.Function)


@pytest.mark.slow
def test_compile_with_dynamic_length(backend: str, device: str) -> None:
    def step(q, k, v, tokens, class_embeddings, joint_space, table):  # type: ignore[no-untyped-def]
        output, (weights, _) = tir_kernels.reweighted_attention(
            q, k, v, tokens, class_embeddings, joint_space=joint_space, table=table,
            backend=backend, return_weights=True,
        )  # fmt: skip
        output = output + tir_kernels.reweighted_attention(
            q, k, v, tokens, class_embeddings, joint_space=joint_space, table=table,
            backend=backend,
        )  # fmt: skip
        again = tir_kernels.weighted_attention(output, k, v, weights, backend=backend)
        relevance = tir_kernels.token_relevance(
            tokens, class_embeddings, joint_space=joint_space, backend=backend
        )
        return again.square().sum() + relevance.sum()

    torch.compiler.reset()
    graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, example_inputs: list) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    backends = [count_graphs] if backend != "reference" else [count_graphs, "aot_eager"]
    for compiler in backends:
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
        for length in (20, 23, 31):
            given = inputs(length=length, device=device)
            table = torch.rand(6, device=device).requires_grad_()
            leaves = (given["q"], given["k"], given["v"], table)
            expected = torch.autograd.grad(step(**given, table=table), leaves)
            got = torch.autograd.grad(compiled(**given, table=table), leaves)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other)
    assert graphs == 1, "a new length must not compile anew"


@pytest.mark.slow
def test_compile_without_gradients(backend: str, device: str) -> None:
    """Nothing requires one: torch.compile then calls the functions in another way."""

    def step(q, k, v, tokens, class_embeddings):  # type: ignore[no-untyped-def]
        weights, counts = tir_kernels.token_weights(tokens, class_embeddings, backend=backend)
        attended = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
        plain = tir_kernels.weighted_attention(q, k, v, backend=backend)
        reweighted = tir_kernels.reweighted_attention(
            q, k, v, tokens, class_embeddings, backend=backend
        )
        return weights, counts, attended, plain, reweighted

    torch.compiler.reset()
    given = inputs(device=device)
    q, k, v = (given[name].detach() for name in "qkv")
    arguments = (q, k, v, given["tokens"], torch.randn(5, 32, device=device))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(ours, expected)


def test_autocast(backend: str, device: str) -> None:
    given = inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = tir_kernels.reweighted_attention(**given, backend=backend)
        attended = tir_kernels.weighted_attention(
            given["q"], given["k"], given["v"], torch.ones(2, 20, device=device), backend=backend
        )
    assert output.dtype == attended.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(output.float().sum(), given["q"])
    assert grad.dtype == torch.float32
    low = {n: given[n].bfloat16() for n in "qkv"}
    expected = tir_kernels.reweighted_attention(**(given | low), backend=backend)
    assert torch.equal(output, expected)


def test_no_grad(backend: str, device: str) -> None:
    given = inputs(device=device)
    with torch.no_grad():
        output = tir_kernels.reweighted_attention(**given, backend=backend)
    assert not output.requires_grad


def test_vmap_is_refused() -> None:
    q = torch.randn(3, 1, 1, 5, 8)
    weights = torch.ones(1, 5)

    def attend(q: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(q, q, q, weights)

    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.func.vmap(attend)(q)


def test_reweight_tokens_gradients() -> None:
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    weights = torch.randn(2, 5, requires_grad=True)
    upstream = torch.randn(2, 5, 8)
    out = tir_kernels.reweight_tokens(tokens, weights)
    out.backward(upstream)
    torch.testing.assert_close(out, tokens * weights[..., None])
    torch.testing.assert_close(tokens.grad, weights[..., None] * upstream)
    torch.testing.assert_close(weights.grad, (tokens * upstream).sum(-1))
    assert tir_kernels.reweight_tokens(tokens.bfloat16(), weights).dtype == torch.bfloat16
