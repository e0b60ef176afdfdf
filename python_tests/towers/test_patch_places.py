"""Each family's patches stand row by row behind its prefix tokens, so that maps are not shifted."""

import numpy as np
import pytest
import torch
from torch import Tensor
from towers.families import FAMILIES, SIDE, Family

from tir_kernels.fewshot import Episode
from tir_kernels.fewshot.track.pictures import MapMaker
from tir_kernels.towers import vision_tower

pytestmark = pytest.mark.slow  # as all equalities of whole families
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def images_with_a_patch(row: int, column: int) -> Tensor:
    """(1, 3, 32, 32), of one grey but for a patch of 8 x 8 pixels."""
    images = torch.full((1, 3, SIDE, SIDE), 0.1)
    images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 2.0
    return images


@FAMILY
@torch.no_grad()
def test_a_patch_of_the_image_is_a_token_of_its_place(family: Family) -> None:
    tower = vision_tower(family.make()[0])
    plain = tower.embed(torch.full((1, 3, SIDE, SIDE), 0.1))
    assert tower.num_prefix_tokens == family.prefix
    assert plain.shape[1] == family.prefix + 16
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        changed = (tower.embed(images_with_a_patch(row, column)) - plain).abs().sum(2)[0]
        assert changed.nonzero().flatten().tolist() == [family.prefix + 4 * row + column]


class _Showing:
    """A learner that has nothing but classes."""

    def __init__(self, classes: Tensor) -> None:
        self.classes = lambda: classes

    def show_classes(self, classes: Tensor) -> Tensor:
        return classes


class _Method:
    steps = 1


@FAMILY
@torch.no_grad()
def test_a_map_has_its_peak_where_the_patch_is(family: Family) -> None:
    """Each class is what the tower itself makes of one patch; its blocks leave tokens be."""
    model, _ = family.make()
    tower = vision_tower(model)
    for block in tower.blocks:
        for parameter in block.module.parameters():  # type: ignore[attr-defined]
            parameter.zero_()
    row, column = 2, 1
    images = images_with_a_patch(row, column)
    place = 4 * row + column
    tokens = tower.embed(images)
    features = tower.patch_features(tokens)
    classes = features[:, [place, 15]]
    episode = Episode(["here", "elsewhere"], images, torch.zeros(1, dtype=torch.long), images, 7)
    maker = MapMaker(model, _Method(), lambda each: np.zeros((1, SIDE, SIDE, 3), np.uint8))
    maker.start([episode])
    maker.observe(0, _Showing(classes), tokens[None])
    maps = maker.maps(episode, "arm")
    assert maps is not None
    assert maps.grid == (4, 4)
    for relevance, own in zip(
        maps.relevance[0].reshape(2, 4, 4), ((row, column), (3, 3)), strict=True
    ):
        assert np.unravel_index(relevance.argmax(), maps.grid) == own
        assert relevance[own] == pytest.approx(1, abs=1e-3)
