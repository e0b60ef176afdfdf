"""Towers that pool by attention: a token meets the classes as the pool leaves it alone."""

import copy
from typing import Any

import pytest
import torch
from oracle import pick_counts, plain_relevance
from tiny_clip import (
    ATTENTION_POOL,
    Untouched,
    each_alone,
    make_class_embeddings,
    make_clip,
    make_images,
)
from torch import Tensor, nn

from tir_kernels import JointSpace, adapters, analysis
from tir_kernels.analysis.measures import BlockView, Finding
from tir_kernels.towers import vision_tower

SAME_WIDTH = {"width": 16, "head_width": 8}  # that of the joint space, so projections are packed
POOLS: dict[str, dict[str, Any]] = {
    "coca": {},
    "one width": SAME_WIDTH,
    "average of queries": {"pool_type": "avg"},
    "parallel": {"attentional_pool": "parallel", **SAME_WIDTH},
    "cascade": {"attentional_pool": "cascade", **SAME_WIDTH},
}


def make_pooled(pool: str) -> nn.Module:
    return make_clip({**ATTENTION_POOL, **POOLS[pool]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_a_compared_token_is_the_pool_of_that_token_alone(pool: str, dtype: torch.dtype) -> None:
    """As exactly as the tower's own pool, run on sequences of one token."""
    module = make_pooled(pool).visual.to(dtype)
    tower = vision_tower(module)
    hidden = torch.randn(2, 5, module.transformer.width, dtype=dtype)
    own = each_alone(module, hidden)[:, 1:]
    exact = each_alone(copy.deepcopy(module).double(), hidden.double())[:, 1:]
    found = tower.patch_features(hidden)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (own - exact).abs().max() + rounding
    assert torch.equal(tower.compared_tokens(hidden)[:, 1:], tower.compared_tokens(hidden[:, 1:]))


@pytest.mark.parametrize("pool", POOLS)
def test_features_are_the_models(pool: str) -> None:
    model = make_pooled(pool)
    tower, hidden = vision_tower(model), []
    assert tower.reads is None
    hook = model.visual.transformer.register_forward_hook(lambda *call: hidden.append(call[2]))
    features = model.encode_image(make_images())
    hook.remove()
    found = tower.pool(hidden[0])
    assert found.shape == (4, 16)
    assert torch.equal(found, features.reshape(4, 16))


@pytest.mark.parametrize("placement", ["tokens", "attention", "both"])
@pytest.mark.parametrize("pool", ["coca", "cascade"])
def test_counts_are_those_of_pooled_tokens(pool: str, placement: str) -> None:
    model, classes = make_pooled(pool), make_class_embeddings()
    before = Untouched(model)
    entered: list[Tensor] = []
    block = model.visual.transformer.resblocks[3]
    hook = block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with adapters.add_reweighting(model, [3], placement, "none") as handle:
        handle.set_class_embeddings(classes)
        found = model.encode_image(make_images())
    hook.remove()
    in_space = each_alone(model.visual, entered[0]).detach()
    relevance = plain_relevance(in_space, classes, JointSpace(norm_eps=None), 1)
    assert torch.equal(handle.last_counts[3], pick_counts(relevance, int(16 * 0.3)).int())
    torch.testing.assert_close(found, model.encode_image(make_images()))
    before.check()


def test_weights_act_and_the_pool_gets_no_gradient_from_them() -> None:
    model, images = make_pooled("coca"), make_images()
    table = torch.linspace(0.4, 1.6, 6).requires_grad_()
    plain = model.encode_image(images)
    with adapters.add_reweighting(model, table=table) as handle:
        handle.set_class_embeddings(make_class_embeddings())
        found = model.encode_image(images)
        tokens = torch.randn(4, 17, 32, requires_grad=True)
        weights, _ = handle.weights(tokens, 4)
    assert not torch.allclose(found, plain)
    found.square().sum().backward()
    assert table.grad is not None
    assert (table.grad[:5] != 0).all()  # no patch has count 5
    weights.sum().backward()
    assert tokens.grad is None


class _Relevance:
    name = "relevance"

    def of_block(self, view: BlockView) -> list[Finding]:
        self.relevance, self.hidden = view.relevance, view.hidden
        return []


@torch.no_grad()
def test_measures_compare_pooled_tokens() -> None:
    model, classes, seen = make_pooled("coca"), make_class_embeddings(), _Relevance()
    analysis.measure(model, make_images(), [seen], class_embeddings=classes)
    in_space = each_alone(model.visual, seen.hidden)
    expected = plain_relevance(in_space, classes, JointSpace(norm_eps=None), 1)
    torch.testing.assert_close(seen.relevance, expected.float())


def test_another_kind_of_pool_is_refused() -> None:
    model = make_pooled("coca")
    model.visual.attn_pool = nn.Identity()
    with pytest.raises(ValueError, match="pools its image tokens by a Identity; what"):
        vision_tower(model)
