"""Attention without weights of blocks with LoRA: this package's where it is faster."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import small_transformers
import timm_models
import torch
from tiny_clip import OWN_BLOCKS, make_clip, make_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from tir_kernels import towers
from tir_kernels.adapters import add_lora
from tir_kernels.towers import attention

pytestmark = pytest.mark.slow

MODELS: dict[str, Any] = {
    **{name: timm_models.MODELS[name] for name in ("PE-Core", "SigLIP", "EVA", "shared keys")},
    **{f"{name} of transformers": make for name, make in small_transformers.MODELS.items()},
}


class OperatorNames(TorchDispatchMode):
    """Names of the attentions, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function._opname
        if function.namespace == "tir_kernels" or "scaled_dot_product" in name:
            self.names.append("own" if function.namespace == "tir_kernels" else "PyTorch's")
        return function(*arguments, **(options or {}))


def through_blocks(model: Any, tokens: Tensor) -> list[Tensor]:
    """What the image tower's blocks make of tokens, and the gradient of these."""
    tokens = tokens.clone().requires_grad_()
    hidden = tokens
    for block in towers.vision_tower(model).blocks:
        hidden = block(hidden)
    hidden.square().sum().backward()
    assert tokens.grad is not None
    return [hidden.detach(), tokens.grad]


def tokens_of(model: Any) -> Tensor:
    with torch.no_grad():
        return towers.vision_tower(model).embed(make_images(2))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_same_attention(name: str) -> None:
    model = MODELS[name]().requires_grad_(False)
    tokens, depth = tokens_of(model), len(towers.vision_tower(model).blocks)
    with OperatorNames() as plain:
        expected = through_blocks(model, tokens)
    with add_lora(model, rank=2, towers=["visual"]), OperatorNames() as with_lora:
        found = through_blocks(model, tokens)  # LoRA's B is zero: it changes nothing
    assert plain.names == ["PyTorch's"] * 2 * depth  # forward and backward
    assert with_lora.names == ["own"] * 2 * depth
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("name", ["PE-Core", "siglip of transformers"])
@pytest.mark.parametrize("why", ["float64", "no kernels", "named"])
def test_elsewhere_it_is_pytorchs(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]().requires_grad_(False)
    tokens, depth = tokens_of(model), len(towers.vision_tower(model).blocks)
    if why == "float64":
        model, tokens = model.double(), tokens.double()
    if why == "no kernels":
        monkeypatch.setattr(attention, "_has_cpu_kernels", lambda: False)
    backend = "reference" if why == "named" else "auto"
    with add_lora(model, rank=2, towers=["visual"], backend=backend), OperatorNames() as calls:
        through_blocks(model, tokens)
    # A backend that LoRA names serves the attention, too.
    assert calls.names == (["own"] if why == "named" else ["PyTorch's"]) * 2 * depth


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["exported", "traced"])
@pytest.mark.parametrize("name", ["PE-Core", "siglip of transformers"])
def test_what_is_exported_needs_pytorch_alone(name: str, way: str) -> None:
    model = MODELS[name]().requires_grad_(False)
    with add_lora(model, rank=2, towers=["visual"]), torch.no_grad():
        tower = model.visual if hasattr(model, "visual") else model.vision_model
        if way == "exported":
            graph = str(torch.export.export(tower, (make_images(2),)).graph)
        else:
            traced = torch.jit.trace(tower, make_images(2), strict=False, check_trace=False)
            graph = str(traced.inlined_graph)
    assert "scaled_dot_product_attention" in graph
    assert ("ops.tir_kernels" if way == "exported" else "tir_kernels::") not in graph


@pytest.mark.parametrize("replaced", ["sdpa", "eager"])
def test_a_users_function_is_kept(replaced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def own(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        calls.append(module)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    model = small_transformers.make_siglip(replaced).requires_grad_(False)
    if replaced == "sdpa":
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    with add_lora(model, rank=2, towers=["visual"]), OperatorNames() as names:
        through_blocks(model, tokens_of(model))
    assert len(calls) == (3 if replaced == "sdpa" else 0)
    assert "own" not in names.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_causal_text_tower_of_transformers(implementation: str, dtype: torch.dtype) -> None:
    model = small_transformers.make_clip(implementation).to(dtype)
    ids = torch.tensor([[48, 3, 4, 5, small_transformers.END_OF_TEXT, *[0] * 7]])
    text = towers.text_tower(model)
    expected = model.text_model(ids).last_hidden_state
    with add_lora(model, rank=2, towers=["text"]), OperatorNames() as names:
        found = model.text_model(ids).last_hidden_state
        encoded, _ = text.encode(text.embed(ids), text.last_position(ids))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(encoded, model.text_projection(expected[:, 4]))
    own = "own" if dtype == torch.float32 else "PyTorch's"
    assert names.names == ([own] * 4 if implementation == "sdpa" else [])


@torch.no_grad()
def test_padding_of_a_causal_text_tower_of_transformers() -> None:
    """The library's own mask, of padding too, stays PyTorch's."""
    model = small_transformers.make_clip()
    ids = torch.tensor([[0, 0, 48, 3, 4, 5, small_transformers.END_OF_TEXT, *[0] * 5]])
    options = {"attention_mask": (torch.arange(12) > 1)[None].long()}
    expected = model.text_model(ids, **options).last_hidden_state
    with add_lora(model, rank=2, towers=["text"]):
        found = model.text_model(ids, **options).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(model.text_model(ids).last_hidden_state, expected, atol=1e-3)


FIRST_TOKENS: dict[str, tuple[Any, int]] = {
    "open_clip": (make_clip, 1),
    "open_clip, own blocks": (partial(make_clip, OWN_BLOCKS), 1),
    "EVA-02": (timm_models.MODELS["EVA-02"], 1),
    "distilled": (timm_models.MODELS["distilled"], 2),
    "gate": (timm_models.MODELS["gate"], 1),
    "CLIP of transformers": (small_transformers.make_clip, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FIRST_TOKENS)
def test_the_last_block_of_the_pooled_tokens_alone(name: str, dtype: torch.dtype) -> None:
    make, count = FIRST_TOKENS[name]
    model = make().requires_grad_(False).to(dtype)
    tower = towers.vision_tower(model)
    tokens = torch.randn(3, 16 + tower.num_prefix_tokens, 32, dtype=dtype, requires_grad=True)
    last = tower.blocks[-1]
    expected = last(tokens)[:, :count]
    weights = torch.randn(expected.shape, dtype=dtype)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), tokens)
    with towers.opened_attention(model), OperatorNames() as names:
        first = last.first_tokens(tokens, count)
        assert first is not None
        (grad,) = torch.autograd.grad((first * weights).sum(), tokens)
    assert names.names == ["own" if dtype == torch.float32 else "PyTorch's"] * 2
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(first, expected, **tolerance)
    torch.testing.assert_close(grad, expected_grad, **tolerance)
