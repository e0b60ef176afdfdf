"""Attention pools in the open: the libraries' own numbers by this package's attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import small_transformers
import timm_models
import torch
from timm.layers import AttentionPoolLatent
from tiny_clip import ATTENTION_POOL, Untouched, make_clip
from torch import Tensor, nn

from tir_kernels import towers, weighted_attention
from tir_kernels.towers import attention, opened_attention

pytestmark = pytest.mark.slow


def make_timm(**options: Any) -> Any:
    """timm's transformer with a pool of the given kind."""
    model: Any = timm_models.make_alone("vit_base_patch16_siglip_224", global_pool="map")
    torch.manual_seed(5)
    model.attn_pool = AttentionPoolLatent(32, num_heads=2, **options).eval()
    for parameter in model.attn_pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def make_coca(**options: Any) -> Any:
    return make_clip({**ATTENTION_POOL, **options})


SAME_WIDTH = {"width": 16, "head_width": 8}  # that of the joint space, so projections are packed

# Maker, and the pools that a pass goes through.
POOLS: dict[str, tuple[Any, int]] = {
    "open_clip": (make_coca, 1),
    "open_clip, one width": (partial(make_coca, **SAME_WIDTH), 1),
    "open_clip, parallel": (partial(make_coca, attentional_pool="parallel", **SAME_WIDTH), 2),
    "open_clip, cascade": (partial(make_coca, attentional_pool="cascade", **SAME_WIDTH), 2),
    "SigLIP": (timm_models.MODELS["SigLIP"], 1),
    "PE-Core": (timm_models.MODELS["PE-Core"], 1),
    "timm, norms": (partial(make_timm, qk_norm=True, norm_layer=nn.LayerNorm), 1),
    "timm, four queries": (partial(make_timm, latent_len=4, pool_type="avg"), 1),
    "timm, no projections": (partial(make_timm, q_proj=False, out_features=0), 1),
    "timm, no biases": (partial(make_timm, qkv_bias=False), 1),
    "SigLIP of transformers": (small_transformers.make_siglip, 1),
    "SigLIP 2 of transformers": (small_transformers.make_siglip2, 1),
}


def results(model: Any, batch: int = 3, seed: int = 6) -> list[Tensor]:
    """The pooled features of tokens, and the gradients of these and of all that pools them."""
    tower: Any = towers.vision_tower(model)
    parameters = [p for pool in tower.pools for p in pool.parameters()]
    generator = torch.Generator().manual_seed(seed)
    trunk = getattr(getattr(model, "visual", None), "transformer", None)
    width = 32 if trunk is None else trunk.width
    hidden = torch.randn(batch, 16, width, generator=generator)
    hidden = hidden.to(parameters[0].dtype).requires_grad_()
    pooled = tower.pool(hidden)
    score = (pooled * torch.linspace(-1, 1, pooled.shape[-1], dtype=pooled.dtype)).sum()
    grads = torch.autograd.grad(score, [hidden, *parameters], allow_unused=True)
    return [pooled.detach(), *(each for each in grads if each is not None)]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the queries in each call of this package's attention."""
    shapes: list[tuple[int, ...]] = []

    def spy(q: Tensor, *rest: Any, **options: Any) -> Any:
        shapes.append(tuple(q.shape))
        return weighted_attention(q, *rest, **options)

    monkeypatch.setattr(attention, "weighted_attention", spy)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POOLS)
def test_an_opened_pool_is_the_librarys(
    name: str, dtype: torch.dtype, own: list[tuple[int, ...]]
) -> None:
    make, number = POOLS[name]
    model = make().to(dtype)
    before, expected = Untouched(model), results(model)
    assert own == []
    with opened_attention(model):
        found = results(model)
    assert len(own) == (number if dtype == torch.float32 else 0)
    assert all(shape[0] == 3 and shape[2] < 16 for shape in own)
    assert len(found) == len(expected)
    accuracy = (1e-4, 1e-5) if dtype == torch.float32 else (1e-12, 1e-14)
    # A bias of all keys changes no softmax, so that its gradient is rounding alone.
    largest = max(each.abs().max().item() for each in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=accuracy[0], atol=accuracy[1] * largest)
    before.check()


@pytest.mark.parametrize("name", POOLS)
def test_pools_in_16_bits_are_as_accurate_as_the_librarys(name: str) -> None:
    model, exact = POOLS[name][0]().bfloat16(), POOLS[name][0]().bfloat16().double()

    def error_of(found: Tensor, wanted: Tensor) -> Tensor:
        return (found.double() - wanted).abs().mean() / wanted.abs().max()

    # Some gradients are a few numbers of which most cancels: one draw tells of its luck.
    errors = []
    for seed in range(12):
        wanted, plain = results(exact, seed=seed), results(model, seed=seed)
        with opened_attention(model):
            found = results(model, seed=seed)
        errors.append(
            [
                (error_of(one, exactly), error_of(other, exactly))
                for one, other, exactly in zip(found, plain, wanted, strict=True)
            ]
        )
    ours, theirs = torch.tensor(errors).mean(0).unbind(-1)
    assert (ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps).all()


@pytest.mark.parametrize("name", ["open_clip", "SigLIP of transformers"])
def test_a_pool_whose_attention_is_hooked_is_left_alone(
    name: str, own: list[tuple[int, ...]]
) -> None:
    model = POOLS[name][0]()
    expected, called = results(model), []
    (pool,) = towers.vision_tower(model).pools  # type: ignore[attr-defined]
    inner = pool.attn if name == "open_clip" else pool.attention
    inner.register_forward_hook(lambda *_: called.append(1))
    with opened_attention(model):
        found = results(model)
    assert called == [1]
    assert own == []
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_masks_and_dropout_of_pools_stay_the_librarys(own: list[tuple[int, ...]]) -> None:
    model, tokens = make_timm(), torch.randn(2, 16, 32)
    mask = torch.rand(2, 1, 1, 16) < 0.7
    expected = model.attn_pool(tokens, attn_mask=mask)
    with opened_attention(model):
        assert torch.equal(model.attn_pool(tokens, attn_mask=mask), expected)
    siglip = small_transformers.make_siglip2()
    head, kept = siglip.vision_model.head, (torch.arange(16) < 9).expand(2, 16).long()
    expected = head(tokens, kept)
    with opened_attention(siglip):
        assert torch.equal(head(tokens, kept), expected)
    coca = make_coca()
    coca.visual.attn_pool.attn.dropout = 0.5
    coca.train()
    with opened_attention(coca):
        coca.visual.attn_pool(tokens)
    assert own == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pool_whose_tokens_carry_weights(dtype: torch.dtype) -> None:
    """A token of weight n counts as n tokens, one of weight 0 as none."""
    model = make_timm(latent_len=2).to(dtype)
    pool, tokens = model.attn_pool, torch.randn(1, 7, 32, dtype=dtype)
    weights = torch.tensor([[1, 0, 3, 1, 2, 0, 1]])
    repeated = tokens.repeat_interleave(weights[0], 1)
    pool.proj, pool.mlp, pool.pool = nn.Identity(), None, ""
    expected = pool(repeated)
    query = pool.q(pool.latent).unflatten(-1, (2, 16)).transpose(1, 2)
    key, value = pool.kv(tokens).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
    found = weighted_attention(query, key, value, weights.to(dtype))
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), expected)
