"""A cache of decoded images."""

import pytest
from cached_images import Setting


@pytest.fixture
def setting(make_images, tmp_path):
    return Setting(make_images({"a": 5, "b": 4}), tmp_path / "cache" / "deep")
