"""A folder of drawn images, and a classifier of three of their classes."""

import shutil

import pytest

from tir_kernels import fewshot
from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.fewshot import methods


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Three classes of five images, nothing else."""
    folder = tmp_path_factory.mktemp("drawn")
    write_image_folder(folder / "all")
    names = sorted(path.name for path in (folder / "all").iterdir() if path.is_dir())[:3]
    for name in names:
        (folder / "some" / name).mkdir(parents=True)
        for path in sorted((folder / "all" / name).iterdir())[:5]:
            shutil.copy(path, folder / "some" / name)
    return folder / "some"


def fitted(data, method, **settings):
    settings = {"shots": 2, "folds": 0, **settings}
    return fewshot.fit(
        data, str(model_directory()), method=method, settings=fewshot.FitSettings(**settings)
    )


@pytest.fixture(scope="session")
def classifier(drawn, tmp_path_factory):
    """The folder of a re-weighted classifier."""
    folder = tmp_path_factory.mktemp("classifier") / "saved"
    fitted(drawn, methods.TIR(steps=2, lora_lr=1e-3)).save(folder)
    return folder


@pytest.fixture
def images(drawn, tmp_path):
    """A copy of the drawn images that a test may change."""
    return shutil.copytree(drawn, tmp_path / "images")
