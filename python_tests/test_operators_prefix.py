"""No, one or five tokens in front of the patches, in each operator that is told their number."""

import pytest
import torch
from oracle import plain_relevance
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, WeightRule

BATCH, HEADS, PATCHES, WIDTH, CLASSES = 2, 2, 16, 32, 3
PREFIXES = pytest.mark.parametrize("prefix", [0, 1, 5])


def inputs(prefix: int, device: str, seed: int = 0) -> tuple[Tensor, dict]:
    """Query, key and value (3, B, H, L, d), and the arguments that say the weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    space = JointSpace(random(WIDTH), random(WIDTH), proj=random(WIDTH, 24))
    length = prefix + PATCHES
    tokens, classes = random(BATCH, length, WIDTH), random(CLASSES, 24)
    heads = random(3, BATCH, HEADS, length, 16)
    given = {"tokens": tokens, "class_embeddings": classes, "joint_space": space}
    return heads, given | {"num_prefix_tokens": prefix}


@PREFIXES
def test_relevance_and_counts_are_of_the_patches(prefix: int, backend: str, device: str) -> None:
    _, given = inputs(prefix, device)
    relevance = tir_kernels.token_relevance(**given, backend=backend)
    expected = plain_relevance(
        given["tokens"], given["class_embeddings"], given["joint_space"], prefix
    )
    torch.testing.assert_close(relevance, expected, rtol=1e-4, atol=1e-5)
    weights, counts = tir_kernels.token_weights(**given, backend=backend)
    assert counts.shape == (BATCH, PATCHES)
    assert weights.shape == (BATCH, prefix + PATCHES)
    chosen = relevance.topk(int(PATCHES * 0.3), dim=2).indices
    assert torch.equal(
        counts.long(),
        torch.zeros_like(relevance, dtype=torch.long).scatter(2, chosen, 1).sum(1),
    )
    table = WeightRule().table(CLASSES).to(weights)
    assert (weights[:, :prefix] == 1).all()
    assert torch.equal(weights[:, prefix:], table[counts.long()])
    changed = given["tokens"].clone()
    changed[:, :prefix] *= -50
    for one, other in zip(
        (relevance, weights, counts),
        (
            tir_kernels.token_relevance(**{**given, "tokens": changed}, backend=backend),
            *tir_kernels.token_weights(**{**given, "tokens": changed}, backend=backend),
        ),
        strict=True,
    ):
        assert torch.equal(one, other), "a prefix token has a say"


@PREFIXES
def test_attention_takes_the_weights_of_the_same_tokens(
    prefix: int, backend: str, device: str
) -> None:
    heads, given = inputs(prefix, device)
    table = torch.linspace(2.0, 0.5, CLASSES + 1, device=device)
    weights, counts = tir_kernels.token_weights(**given, table=table, backend=backend)
    found: list[list[Tensor]] = []
    for derives in (True, False):
        leaves = [each.clone().requires_grad_() for each in heads]
        if derives:
            output, (own, own_counts) = tir_kernels.reweighted_attention(
                *leaves, **given, table=table, backend=backend, return_weights=True
            )
            assert torch.equal(own, weights)
            assert torch.equal(own_counts, counts)
        else:
            output = tir_kernels.weighted_attention(*leaves, weights, backend=backend)
        output.square().sum().backward()
        found.append([output.detach(), *(each.grad for each in leaves if each.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    query, key, value = heads.double()
    scores = query @ key.mT * 16**-0.5 + weights.double().log()[:, None, None]
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(found[0][0].double(), expected, rtol=1e-4, atol=1e-5)


@PREFIXES
def test_statistics_part_the_queries_behind_the_prefix(
    prefix: int, backend: str, device: str
) -> None:
    (query, key, _), _ = inputs(prefix, device)
    found = tir_kernels.attention_statistics(query, key, num_prefix_tokens=prefix, backend=backend)
    matrix = (query.double() @ key.double().mT * 16**-0.5).softmax(-1)
    patches = matrix[:, :, prefix:].mean(2)
    torch.testing.assert_close(found.received_from_patches.double(), patches, rtol=0, atol=1e-5)
    first = matrix[:, :, :prefix].sum(2) / max(prefix, 1)
    torch.testing.assert_close(found.received_from_prefix.double(), first, rtol=0, atol=1e-5)
