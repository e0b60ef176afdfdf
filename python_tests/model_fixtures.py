"""Small random models, and the folder of real images and a real model, as fixtures."""

import json
import os
from pathlib import Path

import pytest

TINY_CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 5,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 3,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


@pytest.fixture
def tiny_config():
    return json.loads(json.dumps(TINY_CONFIG))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A random model of five vision blocks, as a folder with float16 safetensors."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CONFIG["model_cfg"])
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "tiny_fp16.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


@pytest.fixture(scope="session")
def real_data():
    """A folder with DOMAIN/CLASS/images and ``model``, if there is one."""
    default = Path(__file__).parents[2] / "shared" / "real"
    root = Path(os.environ.get("TIR_REAL_DATA", default))
    if not (root / "model").is_dir():
        pytest.skip("no real images and model: set TIR_REAL_DATA to a folder that has them")
    return root
