"""Models as fixtures."""

import open_clip
import pytest
import torch
from model_fixtures import real_data, tiny_config, tiny_model_folder
from weights_files import CONFIG, write_config

from tir_kernels.towers.loading import models

__all__ = ["real_data", "tiny_config", "tiny_model_folder"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG)


@pytest.fixture
def state(model):
    """A state dict that a test may change."""
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def quick_tokenizer(monkeypatch):
    """The tokenizer has tests of its own, and takes longer than all the rest."""
    monkeypatch.setattr(models, "load_tokenizer", lambda *args: None)


@pytest.fixture
def folder(tmp_path):
    """A model's folder that still lacks weights."""
    write_config(tmp_path)
    return tmp_path
