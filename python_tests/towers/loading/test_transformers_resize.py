"""An image processor of transformers with another way to the model's size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tir_kernels.errors import FewShotError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def preprocess(kind):
    from tir_kernels.towers.loading.transformers_preprocess import TransformersPreprocess

    whole = {"height": 32, "width": 32}
    if kind == "clip":
        own = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=whole)
    else:
        own = transformers.SiglipImageProcessor(size=whole)
    return TransformersPreprocess(own, 32, Path("here"))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("is_squashed", "interpolation", "kernel"),
    [(True, None, "BICUBIC"), (True, "bilinear", "BILINEAR"), (False, None, "BICUBIC")],
)
def test_pixels_are_those_of_pillow(kind, is_squashed, interpolation, kernel):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    own = preprocess(kind)
    before = own.to_pixels(image)
    changed = own.with_resize(is_squashed, interpolation)
    resampling = Image.Resampling[kernel]
    if is_squashed:
        expected = image.resize((32, 32), resampling)
    else:
        expected = image.resize((48, 32), resampling).crop((8, 0, 40, 32))
    found = changed.to_pixels(image).permute(1, 2, 0).numpy().astype(int)
    # The library's resizing rounds on its own.
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 2
    if (kind, is_squashed, interpolation) not in (("siglip", True, None), ("clip", False, None)):
        assert changed.version != own.version
    assert torch.equal(own.to_pixels(image), before)
    assert torch.equal(changed.normalise(before), own.normalise(before))


def test_a_processor_that_does_not_heed_it_is_refused():
    from tir_kernels.towers.loading.transformers_preprocess import TransformersPreprocess

    class Stubborn(transformers.SiglipImageProcessor):
        """Knows of no crop, as older ones."""

        def center_crop(self, image, *arguments, **options):
            return image

    own = TransformersPreprocess(Stubborn(size={"height": 32, "width": 32}), 32, Path("here"))
    with pytest.raises(FewShotError, match="image processor of here"):
        own.with_resize(False)
