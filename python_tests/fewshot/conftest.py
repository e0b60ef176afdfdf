"""Small image folders, a tiny random model, and the command line of a small run."""

import pytest
from command_line import SMALL
from model_fixtures import real_data, tiny_config, tiny_model_folder
from page_fixtures import charts_drawn_once
from small_images import write_images

__all__ = ["charts_drawn_once", "real_data", "tiny_config", "tiny_model_folder"]


@pytest.fixture(autouse=True)
def own_image_cache(tmp_path_factory, monkeypatch):
    """A folder of each test's own where users have their cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_images(tmp_path):
    def make(sizes=None, name="images"):
        return write_images(tmp_path / name, sizes or {f"Class{c}": 8 for c in "ABCDEF"})

    return make


@pytest.fixture
def arguments(make_images, tmp_path):
    root = make_images()
    return [
        "run",
        "--data",
        str(root),
        "--model",
        "fake",
        "--out",
        str(tmp_path / "out"),
        *SMALL.split(),
    ]
