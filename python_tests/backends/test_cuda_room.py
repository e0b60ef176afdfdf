"""Shared memory of the forward attention kernel that finds weights itself: enough for any shape."""

from __future__ import annotations

import itertools

import cuda_emulation
import oracle
import pytest
import torch

from tir_kernels.backends.inputs import AttentionInputs, RelevanceInputs

MOST_PATCHES, MOST_CLASSES = 800, 16  # of which an attention kernel finds the weights itself
COMPILED_WIDTHS = (64, 80, 96, 112, 128)
SHARED_MEMORY = (99, 163, 227)  # KiB a block: capability 8.6, 8.0, 9.0
# Beside four multiprocessors, blocks of one, two, three and four warps, as the rows allow.
HEADS = (1, 2, 3, 64)

pytestmark = [
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "runs"),
    pytest.mark.slow,
]


def test_the_limits_are_those_of_the_launcher(kernels) -> None:
    assert kernels.can_select(MOST_PATCHES, MOST_CLASSES)
    assert not kernels.can_select(MOST_PATCHES + 1, 1)
    assert not kernels.can_select(1, MOST_CLASSES + 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_plan_has_room_for_values_and_for_finding_counts(kernels, dtype: str) -> None:
    seen: set[tuple[int, bool]] = set()
    for kib in SHARED_MEMORY:
        kernels.set_device(4, kib * 1024)
        for width, heads, prefix in itertools.product(COMPILED_WIDTHS, HEADS, (0, 1, 5)):
            for patches in range(1, MOST_PATCHES + 1):
                length = prefix + patches
                plan = kernels.forward_plan((1, heads, length, width), dtype, prefix)
                case = (kib, width, heads, prefix, patches, plan)
                # The image's counts, and each warp's keys: 4 bytes a patch.
                assert plan["value_bytes"] >= (plan["warps"] + 1) * patches * 4, case
                rows = (length + 15) // 16 * 16 if plan["resident"] else 2 * plan["chunk"]
                assert plan["value_bytes"] >= rows * plan["row_bytes"], case
                assert plan["value_bytes"] + rows * plan["row_bytes"] < plan["shared_bytes"], case
                assert plan["shared_bytes"] <= kib * 1024, case
                seen.add((plan["warps"], plan["resident"]))
    assert {warps for warps, _ in seen} == {1, 2, 3, 4}
    assert {resident for _, resident in seen} == {True, False}


# Chunks of keys and values pass by, and counts need more room than two chunks have: once for each
# compiled width, where stray accesses are seen.
LONG_ROWS = [(577, 80), (670, 96), (771, 112)] if cuda_emulation.is_sanitized() else [(577, 80)]


@pytest.mark.parametrize(("length", "width"), LONG_ROWS)
def test_long_rows_of_wide_heads(kernels, length: int, width: int) -> None:
    backend = cuda_emulation.register()
    kernels.set_device(1, 227 * 1024)
    plan = kernels.forward_plan((1, 1, length, width), "bfloat16", 1)
    assert plan["warps"] == 4
    assert not plan["resident"]
    assert plan["value_bytes"] > 2 * plan["chunk"] * plan["row_bytes"]

    generator = torch.Generator().manual_seed(12)
    q, k, v = torch.randn(3, 1, 1, length, width, generator=generator).bfloat16()
    tokens = torch.randn(1, length, 16, generator=generator)
    classes = torch.randn(1, 5, 16, generator=generator)
    relevance = RelevanceInputs(tokens, classes, None, None, None, None, 1)
    table, top_k, scale = torch.linspace(2.0, 0.0, 6), length // 2, width**-0.5
    output, log_sum_exp, counts = backend.reweighted_forward(
        AttentionInputs(q, k, v, None, scale), relevance, table, top_k
    )
    weights, expected_counts = backend.token_weights(relevance, table, top_k)
    assert torch.equal(counts, expected_counts)
    doubles = AttentionInputs(*(t.double() for t in (q, k, v, weights)), scale)
    exact, exact_log_sum_exp = oracle.REFERENCE.attention_forward(doubles)
    plain = oracle.plain_attention(q, k, v, weights, scale)
    oracle.assert_as_accurate("output", output, plain, exact)
    torch.testing.assert_close(log_sum_exp.double(), exact_log_sum_exp, atol=1e-5, rtol=1e-5)
