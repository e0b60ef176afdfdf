"""The opened attention: hooks, attention weights, key weights and what a modifier sees."""

from typing import Any

import pytest
import torch
from tiny_clip import make_class_embeddings, make_clip, make_images, swap_token_order
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tir_kernels import adapters
from tir_kernels.towers import vision_tower
from tir_kernels.towers.attention import attend, attention_matrix
from tir_kernels.towers.open_clip.blocks import OpenClipBlock
from tir_kernels.towers.opening import put_on, take_off
from tir_kernels.towers.protocol import AttentionCall, Modifier


def opened(batch_first: bool = True) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2, batch_first=batch_first).eval()
    put_on(attention, object(), OpenClipBlock.opened)
    return attention


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("masking", ["none", "one", "each head's"])
@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_weights_are_those_of_the_plain_module(
    batch_first: bool, masking: str, averaged: bool
) -> None:
    attention = opened(batch_first)
    plain = nn.MultiheadAttention(32, 2, batch_first=batch_first).eval()
    plain.load_state_dict(attention.state_dict())
    tokens = torch.randn(4, 6, 32)
    batch, length = (4, 6) if batch_first else (6, 4)
    mask = {
        "none": None,
        "one": torch.randn(length, length),
        "each head's": torch.randn(2 * batch, length, length),
    }[masking]
    options: dict[str, Any] = {"attn_mask": mask, "average_attn_weights": averaged}
    for found, expected in zip(
        attention(tokens, tokens, tokens, **options),
        plain(tokens, tokens, tokens, **options),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    output, weights = attention(tokens, tokens, tokens, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(output, plain(tokens, tokens, tokens, **options)[0])
    assert weights is None


def test_what_it_does_not_do_is_refused() -> None:
    attention, tokens = opened(), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="attn_mask must be added to the scores"):
        attention(tokens, tokens, tokens, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="key_padding_mask"):
        attention(tokens, tokens, tokens, key_padding_mask=torch.zeros(2, 5))
    call = AttentionCall(*torch.randn(3, 1, 2, 5, 8).unbind(0), mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="cannot be combined with an attention mask"):
        attend(call._replace(key_weights=torch.ones(1, 5)))


@pytest.mark.parametrize("placement", ["tokens", "attention", "both"])
@pytest.mark.parametrize("length_first", [True, False])
@torch.no_grad()
def test_hooks_fire(placement: str, length_first: bool) -> None:
    model = make_clip()
    if length_first:
        swap_token_order(model)
    block = model.visual.transformer.resblocks[2]
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: calls.append(name)

    hooks = [block.register_forward_hook(note("block"))]
    hooks += [block.attn.register_forward_hook(note("attention, before"))]
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(make_class_embeddings())
        hooks += [block.attn.register_forward_hook(note("attention, after"))]
        hooks += [block.ln_1.register_forward_pre_hook(note("norm"))]
        expected = ["norm", "attention, before", "attention, after", "block"]
        for _ in range(2):
            model.encode_image(make_images())
            assert calls == expected
            calls.clear()
    model.encode_image(make_images())
    assert calls == expected
    for hook in hooks:
        hook.remove()
    assert not block._forward_hooks
    assert not block.attn._forward_hooks


class OperatorNames(TorchDispatchMode):
    """Names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ):
        if function.namespace == "tir_kernels":
            self.names.append(function._opname)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("tokens", ["token_weights"]),
        ("attention", ["reweighted_attention"]),
        ("both", ["token_weights", "weighted_attention"]),
        ("values", ["token_weights", "weighted_attention"]),
    ],
)
@torch.no_grad()
def test_operators_of_a_placement(placement: str, expected: list[str]) -> None:
    model = make_clip()
    with adapters.add_reweighting(model, [2], placement) as handle, OperatorNames() as calls:
        handle.set_class_embeddings(make_class_embeddings())
        model.encode_image(make_images())
    assert calls.names == expected


class Reader:
    """Reads the attention at the place where modifiers are, and changes nothing."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []
        self.entered: list[Tensor] = []

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        return hidden, self._read

    def _read(self, call: AttentionCall, hidden: Tensor) -> AttentionCall:
        self.matrices.append(attention_matrix(call))
        self.entered.append(hidden)
        torch.testing.assert_close(self.matrices[-1] @ call.value, attend(call))
        return call


@pytest.mark.parametrize("placement", ["tokens", "attention", "both", "values"])
@torch.no_grad()
def test_a_reader_sees_the_attention_as_weighted(placement: str) -> None:
    model, reader, images = make_clip(), Reader(), make_images()
    block = vision_tower(model).blocks[2]
    with adapters.add_reweighting(model, [2], placement) as handle:
        handle.set_class_embeddings(make_class_embeddings())
        expected = model.encode_image(images)
        block.put(reader, changes_attention=True)
        torch.testing.assert_close(model.encode_image(images), expected)
    assert block.adapters == (reader,)
    model.encode_image(images)
    block.take(reader)
    assert block.adapters == ()
    weighted, plain = reader.matrices
    torch.testing.assert_close(weighted.sum(-1), torch.ones(4, 2, 17))
    if placement == "values":
        assert torch.equal(weighted, plain)
    elif placement != "tokens":  # whose weights vanish in the norm in front of the attention
        assert (weighted - plain).abs().max() > 1e-2
    if placement in ("attention", "values"):
        assert torch.equal(*reader.entered)


class Sharper:
    """A temperature: it scales the scores."""

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        return hidden, lambda call, _: call._replace(scale=2 * call.query.shape[-1] ** -0.5)


@torch.no_grad()
def test_a_modifier_changes_the_scale() -> None:
    model, images = make_clip(), make_images()
    (block, *_), tower = vision_tower(model).blocks, model.visual
    block.put(Sharper(), changes_attention=True)
    found = model.encode_image(images)
    take_off(block.module, block.adapters[0])
    rows = tower.transformer.resblocks[0].attn
    width = rows.embed_dim
    rows.in_proj_weight[:width] *= 2
    rows.in_proj_bias[:width] *= 2
    torch.testing.assert_close(found, model.encode_image(images))


def test_a_replaced_forward_takes_placement_tokens_only() -> None:
    model = make_clip()
    block = model.visual.transformer.resblocks[2]
    block.forward = block.forward
    with pytest.raises(TypeError, match="another tool has replaced the forward of a Residual"):
        adapters.add_reweighting(model, placement="both")
    adapters.add_reweighting(model, placement="tokens").remove()
    del block.forward
    block.attn.forward = block.attn.forward
    for add in (adapters.add_lora, lambda m: adapters.add_reweighting(m, placement="both")):
        with pytest.raises(TypeError, match="another tool has replaced the forward of a Multihead"):
            add(model)
    assert "tir_adapters" not in vars(block)
