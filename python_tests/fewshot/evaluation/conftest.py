"""A classifier of drawn images, what it was made from, and others to evaluate it on."""

import shutil
from types import SimpleNamespace

import pytest

from tir_kernels import fewshot
from tir_kernels.demo import model_directory, write_image_folder

CLASSES = 4


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Four classes of three images to learn from, and six to evaluate, of which one is both."""
    folder = tmp_path_factory.mktemp("drawn")
    write_image_folder(folder / "all")
    parts = {"support": slice(0, 3), "test": slice(2, 8)}
    classes = sorted(path for path in (folder / "all").iterdir() if path.is_dir())[:CLASSES]
    for each in classes:
        files = sorted(each.iterdir())
        for part, place in parts.items():
            (folder / part / each.name).mkdir(parents=True)
            for path in files[place]:
                shutil.copy(path, folder / part / each.name)
    made = fewshot.fit(
        folder / "support",
        str(model_directory()),
        method=fewshot.methods.LinearProbe(),
        settings=fewshot.FitSettings(folds=0),
    )
    made.save(folder / "classifier")
    return SimpleNamespace(
        support=folder / "support",
        test=folder / "test",
        folder=folder / "classifier",
        classifier=made,
    )


@pytest.fixture
def test_copy(drawn, tmp_path):
    """A copy of the images to evaluate, to be changed."""
    shutil.copytree(drawn.test, tmp_path / "copy")
    return tmp_path / "copy"
