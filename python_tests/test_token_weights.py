"""token_relevance and token_weights on every backend that runs here; counts compared exactly."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import quick
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, WeightRule

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    tokens: Tensor, classes: Tensor, space: JointSpace, prefix: int, ratio: float, backend: str
) -> None:
    relevance = tir_kernels.token_relevance(
        tokens, classes, joint_space=space, num_prefix_tokens=prefix, backend=backend
    )
    assert relevance.dtype == torch.float32
    exact, magnitude = oracle.exact_relevance(tokens, classes, space, prefix)
    plain = oracle.plain_relevance(tokens, classes, space, prefix)
    oracle.assert_as_accurate("relevance", relevance, plain, exact, magnitude)
    weights, counts = tir_kernels.token_weights(
        tokens,
        classes,
        joint_space=space,
        rule=WeightRule(top_ratio=ratio),
        num_prefix_tokens=prefix,
        backend=backend,
    )
    top_k = int(relevance.shape[2] * ratio)
    expected = oracle.pick_counts(relevance.cpu(), top_k)
    assert counts.dtype == torch.int32
    assert torch.equal(counts.cpu(), expected)
    table = WeightRule(top_ratio=ratio).table(classes.shape[-2])
    assert weights.dtype == torch.float32
    assert (weights[:, :prefix] == 1).all()
    assert torch.equal(weights[:, prefix:].cpu(), table[expected.long()])


def draw_space(kind: str, width: int, joint: int, generator: torch.Generator) -> JointSpace:
    weight = 1 + 0.1 * torch.randn(width, generator=generator)
    bias = 0.1 * torch.randn(width, generator=generator)
    proj = torch.randn(width, joint, generator=generator) * width**-0.5
    return {
        "whole": JointSpace(weight, bias, 1e-5, proj),
        "no affine": JointSpace(None, None, 1e-6, proj),
        "no projection": JointSpace(weight, None, 1e-5, None),
        "projection alone": JointSpace(norm_eps=None, proj=proj),
        "none": JointSpace(norm_eps=None),
    }[kind]


def on(device: str, space: JointSpace) -> JointSpace:
    parts = (space.norm_weight, space.norm_bias, space.proj)
    weight, bias, proj = (None if p is None else p.to(device) for p in parts)
    return JointSpace(weight, bias, space.norm_eps, proj)


def test_random_inputs(backend: str, device: str, is_slow: bool) -> None:
    @settings(quick, max_examples=12 if is_slow else 50)
    @given(
        groups=st.integers(1, 3),
        images=st.integers(1, 2),
        patches=st.integers(1, 40 if is_slow else 300) | st.sampled_from([49, 64]),
        prefix=st.integers(0, 5),
        width=st.integers(2, 70) | st.sampled_from([64, 96]),
        joint=st.integers(2, 70) | st.sampled_from([64]),
        num_classes=st.integers(1, 22),
        dtype=st.sampled_from(DTYPES),
        kind=st.sampled_from(["whole", "no affine", "no projection", "projection alone", "none"]),
        ratio=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
        transposed=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def run(
        groups, images, patches, prefix, width, joint, num_classes, dtype, kind, ratio, transposed,
        seed,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        batch, length = groups * images, patches + prefix
        tokens = torch.randn(length, batch, width, generator=generator).transpose(0, 1)
        if not transposed:
            tokens = tokens.contiguous()
        space = draw_space(kind, width, joint, generator)
        class_width = width if space.proj is None else joint
        classes = torch.randn(groups, num_classes, class_width, generator=generator)
        if groups == 1 and seed % 2:
            classes = classes[0]
        check(
            tokens.to(device, dtype),
            classes.to(device, dtype),
            on(device, space),
            prefix,
            ratio,
            backend,
        )

    run()


@pytest.mark.parametrize("kind", ["whole", "no affine", "none"])
def test_tokens_of_one_value(backend: str, device: str, kind: str) -> None:
    """LayerNorm leaves nothing of them but rounding, or its bias, and of zeros nothing is left."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 20, 2, generator=generator)
    tokens[0, 3:9] = torch.tensor([0.5, 0.5])
    tokens[1, ::2] = 0.0
    classes = torch.randn(3, 2, generator=generator)
    space = on(device, draw_space(kind, 2, 2, generator))
    for dtype in DTYPES:
        check(tokens.to(device, dtype), classes.to(device, dtype), space, 1, 0.3, backend)


@pytest.mark.parametrize("length", [50, 197, 257, 577])
def test_lengths_that_matter(backend: str, device: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    space = on(device, draw_space("whole", 48, 32, generator))
    tokens = torch.randn(2, length, 48, generator=generator).to(device)
    classes = torch.randn(5, 32, generator=generator).to(device)
    check(tokens, classes, space, 1, 0.3, backend)


def select(relevance: Tensor, ratio: float, backend: str, device: str) -> Tensor:
    """Counts of given relevances, up to rounding that keeps their order: tokens on a circle.

    With classes along the axes of E = C, the relevance of a token is its own normalised component.
    """
    tokens = relevance.transpose(1, 2).contiguous().to(device)
    classes = torch.eye(relevance.shape[1], device=device)
    rule = WeightRule(top_ratio=ratio)
    return tir_kernels.token_weights(
        tokens, classes, rule=rule, num_prefix_tokens=0, backend=backend
    ).counts.cpu()


def test_ties_go_to_the_lower_index(backend: str, device: str) -> None:
    ties = torch.ones(1, 1, 10)
    ties[0, 0, 4] = -1.0
    assert select(ties, 0.5, backend, device).tolist() == [[1, 1, 1, 1, 0, 1, 0, 0, 0, 0]]
    # Two classes see the same few values again and again.
    generator = torch.Generator().manual_seed(0)
    angles = torch.randint(0, 4, (3, 150), generator=generator) * 0.3
    relevance = torch.stack([angles.cos(), angles.sin()], 1)
    for ratio in (0.1, 0.33, 0.5, 0.9):
        expected = oracle.pick_counts(relevance, int(150 * ratio))
        assert torch.equal(select(relevance, ratio, backend, device), expected)


def test_signed_zeros_are_equal(backend: str, device: str) -> None:
    relevance = torch.zeros(1, 2, 6)
    relevance[0, 1] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    relevance[0, 0] = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0, 0.0])
    assert select(relevance, 0.5, backend, device).tolist() == [[2, 2, 2, 0, 0, 0]]


def test_nan_ranks_below_every_number(backend: str, device: str) -> None:
    relevance = -torch.ones(1, 1, 8)
    relevance[0, 0, [0, 3]] = math.nan
    assert select(relevance, 0.5, backend, device).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert select(relevance, 0.875, backend, device).tolist() == [[1, 1, 1, 0, 1, 1, 1, 1]]


def test_group_sees_its_own_classes(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(6, 20, 16, generator=generator).to(device)
    classes = torch.randn(3, 5, 16, generator=generator).to(device)
    together = tir_kernels.token_weights(tokens, classes, backend=backend)
    for group in range(3):
        images = slice(2 * group, 2 * group + 2)
        alone = tir_kernels.token_weights(tokens[images], classes[group], backend=backend)
        assert torch.equal(together.counts[images], alone.counts)
        assert torch.equal(together.weights[images], alone.weights)


def test_many_classes_and_tokens(backend: str, device: str, is_slow: bool) -> None:
    num_patches = 300 if is_slow else 4095
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(1, num_patches + 1, 16, generator=generator).to(device)
    classes = torch.randn(100, 16, generator=generator).to(device)
    check(tokens, classes, JointSpace(norm_eps=None), 1, 0.3, backend)


def test_same_bits_twice(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    space = on(device, draw_space("whole", 40, 24, generator))
    tokens = torch.randn(3, 50, 40, generator=generator).to(device)
    classes = torch.randn(7, 24, generator=generator).to(device)
    runs = [
        tir_kernels.token_relevance(tokens, classes, joint_space=space, backend=backend)
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_empty(backend: str, device: str) -> None:
    classes = torch.randn(5, 8, device=device)
    for shape, prefix in (((0, 10, 8), 1), ((2, 3, 8), 3)):
        tokens = torch.randn(shape, device=device)
        relevance = tir_kernels.token_relevance(
            tokens, classes, num_prefix_tokens=prefix, backend=backend
        )
        assert relevance.shape == (shape[0], 5, shape[1] - prefix)
        weights, counts = tir_kernels.token_weights(
            tokens, classes, num_prefix_tokens=prefix, backend=backend
        )
        assert counts.shape == (shape[0], shape[1] - prefix)
        assert (weights == 1).all()
        assert weights.shape == shape[:2]


def test_table_gradient_is_the_sum_by_count(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(2, 30, 16, generator=generator).to(device)
    classes = torch.randn(5, 16, generator=generator).to(device)
    table = torch.randn(6, generator=generator).to(device).requires_grad_()
    weights, counts = tir_kernels.token_weights(tokens, classes, table=table, backend=backend)
    upstream = torch.randn(2, 30, generator=generator).to(device)
    (grad,) = torch.autograd.grad(weights, table, upstream)
    expected = torch.stack([upstream[:, 1:][counts == s].sum() for s in range(6)])
    torch.testing.assert_close(grad, expected)


def test_no_gradient_through_the_selection(backend: str, device: str) -> None:
    tokens = torch.randn(1, 10, 16, device=device, requires_grad=True)
    classes = torch.randn(5, 16, device=device, requires_grad=True)
    proj = torch.randn(16, 16, device=device, requires_grad=True)
    space = JointSpace(proj=proj)
    relevance = tir_kernels.token_relevance(tokens, classes, joint_space=space, backend=backend)
    weights, _ = tir_kernels.token_weights(tokens, classes, joint_space=space, backend=backend)
    assert not relevance.requires_grad
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("rule", "num_classes", "expected"),
    [
        (WeightRule(), 5, [1.0, 2.0, 1.5, 1.0, 0.5, 0.0]),
        (WeightRule("linear", 0.1, 2.0), 2, [1.0, 1.1, 1.0]),
        (WeightRule("extremes", 0.1), 10, [1.0, 1.45] + [1.0] * 8 + [0.55]),
        (WeightRule("suppress"), 5, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        (WeightRule("amplify", 0.2), 5, [1.0, 1.4, 1.0, 1.0, 1.0, 1.0]),
        (WeightRule("none"), 3, [1.0, 1.0, 1.0, 1.0]),
        (WeightRule("linear"), 1, [1.0, 1.0]),
        (WeightRule("suppress"), 1, [1.0, 0.0]),
    ],
    ids=lambda value: value.kind if isinstance(value, WeightRule) else None,
)
def test_rule_tables(rule: WeightRule, num_classes: int, expected: list[float]) -> None:
    table = rule.table(num_classes)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.tensor(expected))
