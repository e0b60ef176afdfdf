"""Relevance, selection and weights of the CPU backend, on every instruction set of the machine."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tir_kernels import JointSpace
from tir_kernels.backends import cpu, reference
from tir_kernels.backends.inputs import RelevanceInputs
from tir_kernels.operators.choose import load_backend

CPU = load_backend("cpu")

pytestmark = [
    pytest.mark.skipif(CPU.unavailable() != "", reason=CPU.unavailable() or "runs here"),
    pytest.mark.usefixtures("keep_thread_count"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relevance_inputs(
    batch: int, length: int, width: int, joint_width: int, groups: int, classes: int,
    dtype: torch.dtype, params: torch.dtype, parts: str,
) -> RelevanceInputs:  # fmt: skip
    """Inputs of relevance: parts "full", "transposed", "norm" (no projection) or "raw"."""
    has_norm, has_proj = parts != "raw", parts in ("full", "transposed")
    joint_width = joint_width if has_proj else width
    proj = torch.randn(joint_width, width).mT * width**-0.5
    return RelevanceInputs(
        (torch.randn(batch, length, width) * 3 + 5).to(dtype),
        torch.randn(groups, classes, joint_width).to(params),
        (torch.rand(width) + 0.5).to(params) if has_norm else None,
        (torch.randn(width) * 0.1).to(params) if has_norm else None,
        1e-5 if has_norm else None,
        None if not has_proj else (proj if parts == "transposed" else proj.contiguous()).to(params),
        1,
    )


RELEVANCE_SHAPES = [
    (4, 50, 768, 512, 1, 5),
    (4, 9, 37, 19, 2, 1),
    (3, 30, 96, 64, 3, 40),
    (1, 2, 16, 48, 1, 3),
    (2, 130, 64, 33, 1, 7),
    (2, 21, 48, 40, 2, 8),
    (1, 12, 20, 16, 1, 9),
]


@pytest.mark.parametrize("parts", ["full", "transposed", "norm", "raw"])
@pytest.mark.parametrize("shape", RELEVANCE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relevance_error_is_bounded_by_plain_pytorch(
    architecture: str, dtype: torch.dtype, shape: tuple[int, ...], parts: str
) -> None:
    for params in {torch.float32, dtype}:
        arguments = relevance_inputs(*shape, dtype, params, parts)
        tokens, classes, *space, prefix = arguments
        plain_arguments = (tokens, classes, JointSpace(*space), prefix)
        ours = CPU.relevance(arguments)
        assert ours.dtype == torch.float32
        plain = oracle.plain_relevance(*plain_arguments)
        exact, magnitude = oracle.exact_relevance(*plain_arguments)
        oracle.assert_as_accurate(f"relevance, {params}", ours, plain, exact, magnitude)


@pytest.mark.parametrize("types", itertools.product((*DTYPES, None), repeat=2), ids=str)
def test_norms_of_any_types(
    architecture: str, types: tuple[torch.dtype | None, torch.dtype | None]
) -> None:
    """And class embeddings of another; what is narrower than float32 is widened exactly."""
    inputs = relevance_inputs(2, 20, 37, 19, 2, 3, torch.float32, torch.float32, "full")
    for of_classes in (*DTYPES, torch.float64):
        given = [inputs.class_embeddings.to(of_classes)]
        for each, dtype in zip((inputs.norm_weight, inputs.norm_bias), types, strict=True):
            given.append(None if dtype is None else each.to(dtype))
        wide = [None if each is None else each.float() for each in given]
        found, expected = (
            CPU.relevance(
                inputs._replace(class_embeddings=classes, norm_weight=gain, norm_bias=offset)
            )
            for classes, gain, offset in (given, wide)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_weights_follow_from_the_very_same_relevance(
    architecture: str, dtype: torch.dtype
) -> None:
    arguments = relevance_inputs(6, 101, 96, 64, 3, 5, dtype, dtype, "full")
    table = torch.randn(6)
    expected: tuple[Tensor, ...] = ()
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        relevance = CPU.relevance(arguments)
        weights, counts = CPU.token_weights(arguments, table, 30)
        assert torch.equal(counts, reference.count_selections(relevance, 30))
        assert torch.equal(weights, reference.look_up_weights(counts, table, 1))
        results = (relevance, weights, counts)
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_relevance_writes_every_element_and_takes_any_strides(architecture: str) -> None:
    arguments = relevance_inputs(4, 23, 48, 32, 2, 5, torch.float32, torch.float32, "full")
    expected = CPU.relevance(arguments)
    tokens, classes, gain, offset, _, proj, _ = arguments
    output = torch.full_like(expected, torch.nan)
    cpu._kernels().relevance(
        ((4, 23, 1, 48, 32, 2, 5), "float32", (tokens.data_ptr(), 23 * 48, 0, 48), "float32",
         classes.data_ptr(), True, "float32", gain.data_ptr(), offset.data_ptr(), 1e-5, "float32",
         proj.data_ptr(), 32, 1), output.data_ptr(), 1,
    )  # fmt: skip
    assert torch.equal(output, expected)
    arguments = arguments._replace(tokens=tokens.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(CPU.relevance(arguments), expected)
    arguments = arguments._replace(
        tokens=tokens.mT.contiguous().mT, proj=torch.stack([proj, proj], -1)[..., 0]
    )
    assert torch.equal(CPU.relevance(arguments), expected)


def select(relevance: Tensor, table: Tensor, top_k: int, prefix: int) -> tuple[Tensor, Tensor]:
    batch, classes, patches = relevance.shape
    counts = torch.full((batch, patches), -7, dtype=torch.int32)
    weights = torch.full((batch, prefix + patches), torch.nan)
    cpu._kernels().select_tokens(
        (batch, classes, patches, prefix), top_k, relevance.data_ptr(), table.data_ptr(),
        counts.data_ptr(), weights.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weights, counts


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 6),
    patches=st.integers(1, 300),
    prefix=st.integers(0, 3),
    ratio=st.floats(0, 1),
    levels=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_selection_is_exact_with_ties_and_nan(
    batch: int, classes: int, patches: int, prefix: int, ratio: float, levels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    relevance = (torch.randn(batch, classes, patches) * levels).round() / levels
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    is_special = torch.rand(relevance.shape) < 0.1
    chosen = special[torch.randint(len(special), relevance.shape)]
    relevance = torch.where(is_special, chosen, relevance)
    table, top_k = torch.randn(classes + 1), int(patches * ratio)
    weights, counts = select(relevance, table, top_k, prefix)
    assert torch.equal(counts, reference.count_selections(relevance, top_k))
    assert torch.equal(weights, reference.look_up_weights(counts, table, prefix))


def test_selection_of_many_values_on_several_threads() -> None:
    relevance = (torch.randn(2, 40, 1000) * 8).round()
    torch.set_num_threads(3)
    _, counts = select(relevance, torch.zeros(41), 300, 1)
    assert torch.equal(counts, reference.count_selections(relevance, 300))
