"""A small model, and weights files of it."""

import json

import torch

from tir_kernels.towers.loading.models import load_model

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2},
}


def write_config(folder, **changes):
    config = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            config[section][key] = value
        else:
            config[section] = value
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def load(folder, content, **options):
    torch.save(content, folder / "weights.pt", **options)
    return load_model(str(folder))


def assert_loaded(loaded, model):
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}
