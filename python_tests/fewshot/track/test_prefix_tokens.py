"""Maps of towers with no, one or several tokens in front of the patches."""

from typing import Any

import numpy as np
import pytest
import torch
from analysis.views import make_towers
from oracle import plain_relevance
from torch import Tensor, nn

from tir_kernels.fewshot import Episode
from tir_kernels.fewshot.track.pictures import MapMaker
from tir_kernels.towers import vision_tower


class _Showing:
    """A learner that has nothing but classes."""

    def __init__(self, classes: Tensor) -> None:
        self._classes = classes

    def classes(self) -> Tensor:
        return self._classes

    def show_classes(self, classes: Any) -> Any:
        return classes


class _Method:
    steps = 1


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("open_clip", 1), ("registers", 5), ("registers alone", 4), ("patches alone", 0)],
)
@torch.no_grad()
def test_maps_leave_prefix_tokens_out(name: str, prefix: int) -> None:
    model, width = make_towers()[name]
    tower = vision_tower(model)
    images, classes = torch.randn(3, 3, 32, 32), torch.randn(1, 3, width)
    episode = Episode(["a", "b", "c"], images, torch.arange(3), images, 7)
    maker = MapMaker(model, _Method(), lambda each: np.zeros((len(each), 32, 32, 3), np.uint8))
    maker.start([episode])
    tokens = tower.embed(images)
    assert tower.num_prefix_tokens == prefix
    maker.observe(0, _Showing(classes), tokens[None])
    maps = maker.maps(episode, "arm")
    assert maps is not None
    outputs = entered(tower, tokens)
    expected = plain_relevance(outputs[3], classes, tower.joint_space, prefix)
    assert maps.grid == (4, 4)
    np.testing.assert_allclose(maps.relevance, expected.numpy(), atol=2e-3)
    assert maps.weights.shape == maps.received_after.shape == (3, 16)
    stands = outputs[-1].mean(1) if name in ("registers alone", "patches alone") else outputs[-1]
    stands = stands if stands.dim() == 2 else stands[:, 0]
    np.testing.assert_allclose(maps.tokens_after[-1], stands.numpy(), atol=2e-3)


def entered(tower: Any, tokens: Tensor) -> list[Tensor]:
    """What enters each block, and what leaves the last."""
    outputs = [tokens]
    blocks: list[nn.Module] = list(tower.blocks)
    for block in blocks:
        outputs.append(block(outputs[-1]))
    return outputs
