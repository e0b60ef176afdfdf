"""PyTorch's own sample inputs of scaled_dot_product_attention, run through weighted attention."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tir_kernels import weighted_attention

common = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason="needs the package expecttest"
)


def samples(device: str) -> list[Any]:
    name = "nn.functional.scaled_dot_product_attention"
    (operator,) = (each for each in common.op_db if each.name == name)
    torch.manual_seed(0)
    return list(operator.sample_inputs(device, torch.float32, requires_grad=True))


def options_of(sample: Any) -> dict[str, Any]:
    # All of them have as many heads of keys as of queries.
    return {name: value for name, value in sample.kwargs.items() if name != "enable_gqa"}


def is_refused(sample: Any) -> bool:
    return "attn_mask" in sample.kwargs or sample.kwargs["dropout_p"] > 0


def in_four_dimensions(rows: list[Tensor]) -> list[Tensor]:
    """(B, H, L, d) each, as PyTorch broadcasts them: a rank of 3 lacks heads, or the batch."""
    if max(each.dim() for each in rows) == 3:
        return [each.unsqueeze(1) for each in rows]
    batch = max(each.shape[0] for each in rows if each.dim() == 4)
    return [each.expand(batch, -1, -1, -1) for each in rows]


def test_each_is_taken_or_refused() -> None:
    refused = [is_refused(each) for each in samples("cpu")]
    assert (len(refused), sum(refused)) == (25, 13)
    for sample in samples("cpu"):
        query, key, value = sample.input, *sample.args
        if query.dim() == key.dim() == 4:
            assert query.shape[1] == key.shape[1] == value.shape[1]


def test_masks_and_dropout_are_refused_with_the_way_out(backend: str, device: str) -> None:
    messages = []
    for sample in filter(is_refused, samples(device)):
        rows = in_four_dimensions([sample.input, *sample.args])
        is_masked = "attn_mask" in sample.kwargs
        words = "attn_mask must.*padding is weight 0.*is_causal=True" if is_masked else "dropout_p"
        with pytest.raises(ValueError, match=f"^{words}") as caught:
            weighted_attention(*rows, **options_of(sample), backend=backend)
        messages.append(str(caught.value))
    assert len(messages) == 13
    assert all("torch.nn.functional.scaled_dot_product_attention" in each for each in messages)


def test_all_others_are_pytorchs(backend: str, device: str) -> None:
    taken = [each for each in samples(device) if not is_refused(each)]
    for sample in taken:
        given, options = [sample.input, *sample.args], options_of(sample)
        rows = [each.detach().requires_grad_() for each in in_four_dimensions(given)]
        output = weighted_attention(*rows, **options, backend=backend)
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(output.shape, generator=generator).to(device)
        ours = output, *torch.autograd.grad(output, rows, grad_output)
        own = F.scaled_dot_product_attention(*rows, **options)
        plain = own, *torch.autograd.grad(own, rows, grad_output)
        detached = [each.detach() for each in rows]
        weights = torch.ones(rows[1].shape[0], rows[1].shape[2], device=device)
        exact, magnitudes = oracle.exact_attention(
            *detached, weights, 8**-0.5, grad_output, options["is_causal"]
        )
        as_given = F.scaled_dot_product_attention(*(each.double() for each in given), **options)
        torch.testing.assert_close(exact[0], as_given.reshape(output.shape))
        compared = zip(("output", "q", "k", "v"), ours, plain, exact, magnitudes, strict=False)
        for name, *results in compared:
            oracle.assert_as_accurate(name, *results)
    assert len(taken) == 12
