"""Factors that are converted at once for a pass, instead of layer by layer."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_clip import make_clip, make_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tir_kernels import adapters
from tir_kernels.towers import ImageEncoder


class Conversions(TorchDispatchMode):
    """Counts conversions of single tensors, and of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(name="lora")
def _lora():
    model = make_clip().requires_grad_(False)
    added = adapters.add_lora(
        model, 4, dropout=0.3, passes_input_gradient=False, num_episodes=2, towers=["visual"]
    )
    with added as lora:
        lora.seed([3, 4])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        lora.train()
        yield model, lora


def results(model, lora, at_once: bool, checkpoint: bool = False) -> tuple[Tensor, ...]:
    encoder = ImageEncoder(model, checkpoint=checkpoint)
    with torch.autocast("cpu", torch.bfloat16):
        with lora.one_pass() if at_once else nullcontext():
            features = encoder.features(encoder.embed(make_images()))
        loss = features.float().square().sum()
    return features.detach(), *torch.autograd.grad(loss, list(lora.parameters()))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_results_are_the_same_to_the_bit(lora, checkpoint: bool) -> None:
    for one, other in zip(
        results(*lora, True, checkpoint), results(*lora, False, checkpoint), strict=True
    ):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_conversions_do_not_grow_with_layers(lora) -> None:
    counts = []
    for at_once in (False, True):
        with Conversions() as seen:
            results(*lora, at_once)
        counts.append(seen.found)
    projections = 6 + 1  # the last block's query is that of the class token alone
    # A, B and their gradients.
    assert counts[0]["_to_copy"] - counts[1]["_to_copy"] == 4 * projections
    assert counts[1]["_foreach_copy_"] == 2


def test_what_follows_a_pass_sees_changed_factors(lora) -> None:
    model, handle = lora
    before = results(model, handle, True)[0]
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(2)
    after = results(model, handle, True)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, results(model, handle, False)[0])


def test_a_step_in_the_pass_does_not_change_its_dropout(lora) -> None:
    """As without it, dropout is that of the step in which the forward pass began."""
    model, handle = lora
    expected = results(model, handle, False)
    encoder = ImageEncoder(model)
    with torch.autocast("cpu", torch.bfloat16):
        with handle.one_pass():
            features = encoder.features(encoder.embed(make_images()))
        handle.next_step()
        loss = features.float().square().sum()
    grads = torch.autograd.grad(loss, list(handle.parameters()))
    for one, other in zip((features, *grads), expected, strict=True):
        assert torch.equal(one, other)


def test_without_autocast_nothing_is_converted(lora) -> None:
    _, handle = lora
    with Conversions() as seen, handle.one_pass():
        pass
    assert not seen.found


def test_a_second_derivative_is_refused(lora) -> None:
    model, handle = lora
    encoder, parameters = ImageEncoder(model), list(handle.parameters())
    with torch.autocast("cpu", torch.bfloat16), handle.one_pass():
        features = encoder.features(encoder.embed(make_images())).float()
    grads = torch.autograd.grad(features.sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative here"):
        sum(grad.square().sum() for grad in grads).backward()
