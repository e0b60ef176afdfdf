"""Attention of open_clip's text towers: causal and padded without a mask where it is this one's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_clip import make_clip, make_coca, make_token_ids, swap_token_order
from torch import Tensor, nn

from tir_kernels import towers, weighted_attention
from tir_kernels.towers import attention, opened_attention

# Maker, and whether its texts are causal and have masked keys.
TEXTS: dict[str, Any] = {
    "causal": (make_clip, True, False),
    "causal, length first": (lambda: swap_token_order(make_clip()), True, False),
    "all see all": (lambda: with_text(no_causal_mask=True), False, False),
    "padding masked": (lambda: with_text(no_causal_mask=True, use_pad_mask=True), False, True),
    "causal, padding masked": (lambda: with_text(use_pad_mask=True), True, True),
    "class token": (lambda: with_text(embed_cls=True, correct_cls_mask=True), True, True),
    "CoCa": (make_coca, True, True),
}


def with_text(**options: Any) -> nn.Module:
    model = make_clip(custom_text=True)
    for name, value in options.items():
        if name == "no_causal_mask":
            model.text.attn_mask = None
        elif name == "embed_cls":
            model.text.cls_emb = nn.Parameter(torch.randn(model.text.width))
            model.text.num_pos += 1
            longer = torch.randn(model.text.num_pos, model.text.width)
            model.text.positional_embedding = nn.Parameter(longer)
            model.text.register_buffer("attn_mask", model.text.build_causal_mask(), False)
        else:
            setattr(model.text, name, value)
    return model


def encoded(model: nn.Module) -> list[Tensor]:
    """Class embeddings, and the gradient of the token embeddings."""
    tower, ids = towers.text_tower(model), make_token_ids()
    embeddings = tower.embed(ids).detach().requires_grad_()
    last, key_mask = tower.last_position(ids), tower.key_mask(ids)
    found, _ = tower.encode(embeddings, last, key_mask=key_mask)
    found.double().square().sum().backward()
    assert embeddings.grad is not None
    return [found.detach().double(), embeddings.grad.double()]


class Calls:
    """What went to this package's attention and to PyTorch's: kind, causal or not, and keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own: list[tuple[bool, bool]] = []
        self.pytorchs: list[tuple[bool, bool]] = []
        plain = attention.F.scaled_dot_product_attention

        def own(q: Tensor, k: Tensor, v: Tensor, weights: Any, **options: Any) -> Any:
            self.own.append((options["is_causal"], weights is not None))
            return weighted_attention(q, k, v, weights, **options)

        def pytorchs(*rows: Tensor, **options: Any) -> Tensor:
            self.pytorchs.append((options["is_causal"], options["attn_mask"] is not None))
            return plain(*rows, **options)

        monkeypatch.setattr(attention, "weighted_attention", own)
        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", pytorchs)


@pytest.mark.parametrize("name", TEXTS)
def test_opened_texts_go_without_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, is_causal, has_keys = TEXTS[name]
    model = make().requires_grad_(False)
    expected = encoded(model)
    with opened_attention(model):
        calls = Calls(monkeypatch)
        found = encoded(model)
    assert calls.own == [(is_causal, has_keys)] * 3
    assert calls.pytorchs == []
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("name", TEXTS)
def test_elsewhere_pytorchs_is_told_what_is_causal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the option where it says all, else the mask."""
    make, is_causal, has_keys = TEXTS[name]
    model = make().double().requires_grad_(False)
    expected = encoded(model)
    with opened_attention(model):
        calls = Calls(monkeypatch)
        found = encoded(model)
    assert calls.own == []
    assert calls.pytorchs == [(is_causal and not has_keys, has_keys)] * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_16_bits_are_as_accurate_as_pytorchs(name: str) -> None:
    model = TEXTS[name][0]().requires_grad_(False).bfloat16()
    exact = encoded(TEXTS[name][0]().requires_grad_(False).bfloat16().double())
    plain = encoded(model)
    with opened_attention(model):
        found = encoded(model)
    for one, other, wanted in zip(found, plain, exact, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (one - wanted).abs().mean() <= 2 * (other - wanted).abs().mean() + rounding


@torch.no_grad()
def test_a_block_that_cannot_take_words_gets_the_mask() -> None:
    """One with another tool's forward, or whose attention is not open."""
    model, ids = make_clip(), make_token_ids()
    expected = model.encode_text(ids)
    first, second, _ = model.transformer.resblocks
    own, masks = first.forward, []

    def forward(tokens: Tensor, attn_mask: Any = None) -> Tensor:
        masks.append(attn_mask)
        return own(tokens, attn_mask=attn_mask)

    first.forward = forward
    second.attn.register_forward_pre_hook(lambda *_: None)
    tower = towers.text_tower(model)
    with opened_attention(model):
        found, _ = tower.encode(tower.embed(ids), tower.last_position(ids))
    torch.testing.assert_close(found, expected)
    assert torch.equal(masks[0], model.attn_mask)


class Reader:
    """An adapter that sees the attention's matrix."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []

    def enter(self, hidden: Tensor) -> Any:
        return hidden, self.see

    def see(self, call: Any, hidden: Tensor) -> Any:
        self.matrices.append(attention.attention_matrix(call))
        torch.testing.assert_close(self.matrices[-1] @ call.value, attention.attend(call))
        return call


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_adapters_see_what_is_hidden(name: str) -> None:
    make, is_causal, has_keys = TEXTS[name]
    model, reader = make(), Reader()
    tower, ids = towers.text_tower(model), make_token_ids()
    options = {"key_mask": tower.key_mask(ids)}
    expected, _ = tower.encode(tower.embed(ids), tower.last_position(ids), **options)
    tower.blocks[1].put(reader, changes_attention=True)
    found, _ = tower.encode(tower.embed(ids), tower.last_position(ids), **options)
    torch.testing.assert_close(found, expected)
    (matrix,) = reader.matrices
    assert (matrix.triu(1) == 0).all() == is_causal
    hidden = (matrix == 0).all(2).all(1)  # keys that no head and query attends to
    assert hidden.any() == has_keys


class Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tower = towers.text_tower(model)

    def forward(self, embeddings: Tensor, last: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.tower.encode(embeddings, last, key_mask=key_mask)[0]


@pytest.mark.slow
@pytest.mark.parametrize("is_opened", [False, True])
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_texts_compile_whole_and_are_exported_for_pytorch_alone(name: str, is_opened: bool) -> None:
    model = TEXTS[name][0]()
    tower, ids, encoder = towers.text_tower(model), make_token_ids(), Encoder(model)
    inputs = (tower.embed(ids), tower.last_position(ids), tower.key_mask(ids))
    expected = encoder(*inputs)
    with opened_attention(model) if is_opened else nullcontext():
        torch.compiler.reset()  # of the other towers
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected)
        exported = torch.export.export(encoder, inputs)
    torch.testing.assert_close(exported.module()(*inputs), expected)
    assert "tir_kernels" not in str(exported.graph)
