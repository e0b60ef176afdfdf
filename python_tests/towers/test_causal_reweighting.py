"""Re-weighted blocks of timm and transformers, run causally, against PyTorch's attention alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import small_transformers
import timm_models
import torch
from torch import Tensor, nn

from tir_kernels import adapters, towers
from tir_kernels.adapters.informed_tokens import Informed
from tir_kernels.towers.attention import attend, attention_matrix
from tir_kernels.towers.protocol import AttentionCall

MODELS: dict[str, Any] = {
    "timm": partial(timm_models.make_alone, "vit_base_patch16_224"),
    "Eva": partial(timm_models.make_eva, qkv_fused=False),
    "transformers": small_transformers.make_clip,
    "transformers, eager": partial(small_transformers.make_clip, "eager"),
}
WIDTHS = {"timm": 32, "Eva": 32, "transformers": 16, "transformers, eager": 16}


def made(name: str) -> nn.Module:
    return MODELS[name]().requires_grad_(False).double()


def masked(name: str, mask: Tensor) -> dict[str, Tensor]:
    return {"attention_mask" if "transformers" in name else "attn_mask": mask}


def run(block: Any, hidden: Tensor, **options: Any) -> list[Tensor]:
    """What a library's block makes of tokens, and their gradient."""
    leaf = hidden.clone().requires_grad_()
    output = block(leaf, **options)
    (gradient,) = torch.autograd.grad((output * torch.linspace(-1, 1, 32)).sum(), leaf)
    return [output.detach(), gradient]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("placement", ["attention", "both", "values"])
@pytest.mark.parametrize("name", MODELS)
def test_a_causal_pass_is_reweighted(name: str, placement: str, backend: str) -> None:
    # The library's eager attention takes its softmax in float32.
    plain, model = made(name.removesuffix(", eager")), made(name)
    hidden = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1)).double()
    classes = torch.randn(5, WIDTHS[name], generator=torch.Generator().manual_seed(2)).double()
    with adapters.add_reweighting(model, [1], placement, backend=backend) as handle:
        handle.set_class_embeddings(classes)
        block = towers.vision_tower(model).blocks[1].module
        found = run(block, hidden, is_causal=True)
        counts = handle.last_counts[1]
        weights = handle.weights(hidden, 1)
    assert torch.equal(counts, weights.counts)
    assert weights.weights.unique().numel() > 2
    bias = torch.full((17, 17), -torch.inf).triu(1).double()
    if placement != "values":
        bias = bias + weights.weights.double().log()[:, None, None]
    own = towers.vision_tower(plain).blocks[1].module
    if placement == "values":
        scale_values(own, weights.weights.double())

    def expected_of(tokens: Tensor, **options: Any) -> Tensor:
        scaled = tokens * weights.weights.double()[..., None] if placement == "both" else tokens
        return own(scaled, **options)

    mask = bias.expand(3, 1, 17, 17)
    for one, other in zip(found, run(expected_of, hidden, **masked(name, mask)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def scale_values(block: Any, weights: Tensor) -> None:
    """Let a library's block weight the values of its tokens."""
    attention = getattr(block, "attn", None) or block.self_attn
    packed = getattr(attention, "qkv", None)
    if packed is None:
        attention.v_proj.register_forward_hook(lambda _, inputs, out: out * weights[..., None])
        return

    def scaled(module: Any, inputs: Any, projected: Tensor) -> Tensor:
        query, key, value = projected.chunk(3, -1)
        return torch.cat([query, key, value * weights[..., None]], -1)

    packed.register_forward_hook(scaled)


@pytest.mark.parametrize("rule", ["sinks", "class token"])
def test_rules_of_attention_are_causal_too(rule: str) -> None:
    query, key, value = torch.randn(3, 2, 2, 6, 4, generator=torch.Generator().manual_seed(3))
    before = AttentionCall(query, key, value, is_causal=True)
    if rule == "sinks":
        is_sink = torch.zeros(2, 6, dtype=torch.bool)
        is_sink[:, [0, 3]] = True
        changed: Any = adapters.attention_changes.Redistributed(is_sink, 0.5, 0.9, before)
    else:
        changed = Informed(torch.full((2, 6), 0.7), before)
    call = before._replace(key_weights=changed)
    matrix = attention_matrix(call)
    assert (matrix.triu(1) == 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 6))
    torch.testing.assert_close(attend(call), matrix @ value)
