"""Controls for the choice of tokens: the same weights, for the most attended or for random ones."""

import copy
import math

import pytest
import torch
from reweighted_tower import PLACEMENTS, VARIANTS, classes_for, linear_table, plain_block
from torch import Tensor, nn

from tir_kernels import WeightRule, adapters, token_weights
from tir_kernels.adapters.selection import hand_out
from tir_kernels.towers import vision_tower

LAYERS = (1, 3)


def received(block: nn.Module, tokens: Tensor) -> Tensor:
    """(B, N): each patch's attention, from all heads and queries, by the textbook."""
    attention = block.attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    projected = block.ln_1(tokens) @ weight.T + bias
    q, k, _ = (part.unflatten(-1, (attention.num_heads, -1)) for part in projected.chunk(3, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return scores.softmax(-1).mean((1, 2))[:, 1:]


def plain(model: nn.Module, images: Tensor, classes: Tensor, placement: str, orders) -> Tensor:
    """The tower with weights handed out in the order of ``orders(layer, block, tokens)``."""
    tower = model.visual
    tokens = tower._embeds(images)
    for layer, block in enumerate(tower.transformer.resblocks):
        weights = torch.ones(tokens.shape[:2])
        if layer in LAYERS:
            space = vision_tower(tower).joint_space
            counts = token_weights(tokens, classes, joint_space=space).counts
            for image, order in enumerate(orders(layer, block, tokens)):
                falling = sorted(counts[image].tolist(), reverse=True)
                for patch, count in zip(order.tolist(), falling, strict=True):
                    weights[image, 1 + patch] = linear_table()[count]
        tokens = plain_block(block, tokens, weights, placement)
    pooled, _ = tower._pool(tokens)
    return pooled if tower.proj is None else pooled @ tower.proj


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["clip", "length first", "no first norm, layer scale"])
@torch.no_grad()
def test_most_attended_patches_get_the_highest_counts(name: str, placement: str) -> None:
    model = VARIANTS[name]()
    images, classes = torch.randn(3, 3, 32, 32), classes_for(model)
    orders = []

    def by_attention(layer, block, tokens):
        orders.append(received(block, tokens))
        return orders[-1].argsort(dim=1, descending=True)

    reference = copy.deepcopy(model)
    reference.visual.transformer.batch_first = True
    for block in reference.visual.transformer.resblocks:
        block.attn.batch_first = True
    expected = plain(reference, images, classes, placement, by_attention)
    with adapters.add_reweighting(
        model, LAYERS, placement, order=adapters.MostAttended()
    ) as handle:
        handle.set_class_embeddings(classes)
        torch.testing.assert_close(model.visual(images), expected, atol=1e-4, rtol=1e-4)
        most = orders[-1].argmax(1)
        highest = handle.last_counts[3].gather(1, most[:, None])[:, 0]
        assert torch.equal(highest, handle.last_counts[3].amax(1))


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_random_patches_come_from_the_seeds_alone(placement: str) -> None:
    model = VARIANTS["clip"]()
    images, classes = torch.randn(4, 3, 32, 32), classes_for(model, 2)
    seeds = (5, 2**31 - 1)
    draw = adapters.RandomOrder.draw

    def drawn(layer, block, tokens):
        return [draw(seed, layer, 16) for seed in seeds for _ in range(2)]

    expected = plain(model, images, classes, placement, drawn)
    order = adapters.RandomOrder(seeds)
    with adapters.add_reweighting(model, LAYERS, placement, order=order) as handle:
        handle.set_class_embeddings(classes)
        together = model.visual(images)
        torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
        torch.manual_seed(1)
        assert torch.equal(model.visual(images), together)
    assert not torch.equal(draw(5, 1, 16), draw(5, 3, 16))
    assert not torch.equal(draw(5, 1, 16), draw(6, 1, 16))


@pytest.mark.parametrize(
    "order", [adapters.MostAttended(), adapters.RandomOrder([3])], ids=["attention", "random"]
)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_the_neutral_rule_changes_nothing(order, placement: str) -> None:
    model = VARIANTS["clip"]()
    images, classes = torch.randn(2, 3, 32, 32), classes_for(model)
    plainly = model.visual(images)
    for rule in ("none", WeightRule(strength=0)):
        with adapters.add_reweighting(model, LAYERS, placement, rule, order=order) as handle:
            handle.set_class_embeddings(classes)
            torch.testing.assert_close(model.visual(images), plainly, atol=2e-6, rtol=2e-6)


def test_number_and_weights_stay_those_of_relevance() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 6, (3, 16), generator=generator)
    weights = torch.randn(3, 16, generator=generator, requires_grad=True)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(3)])
    given = hand_out(counts, counts, order)
    assert torch.equal(given.sort(1).values, counts.sort(1).values)
    falling = given.gather(1, order)
    assert bool((falling[:, 1:] <= falling[:, :-1]).all())
    hand_out(weights, counts, order).sum().backward()
    assert torch.equal(weights.grad, torch.ones(3, 16))


def test_copies_have_the_order_too() -> None:
    model = VARIANTS["clip"]()
    images, classes = torch.randn(2, 3, 32, 32), classes_for(model)
    with adapters.add_reweighting(model, LAYERS, order=adapters.MostAttended()) as handle:
        handle.set_class_embeddings(classes)
        copied = copy.deepcopy(model)
        assert torch.equal(copied.visual(images), model.visual(images))


def test_suspended_is_without_it() -> None:
    model = VARIANTS["clip"]()
    images, classes = torch.randn(2, 3, 32, 32), classes_for(model)
    plainly = model.visual(images)
    with adapters.add_reweighting(model, LAYERS) as handle:
        with handle.suspended():
            assert torch.equal(model.visual(images), plainly)
        handle.set_class_embeddings(classes)
        assert not torch.equal(model.visual(images), plainly)
    assert torch.equal(model.visual(images), plainly)
