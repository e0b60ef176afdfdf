"""Configurations of local models that are wrong, or made to fill the memory."""

import json
import os
import time

import open_clip
import pytest
import torch

from tir_kernels.errors import FewShotError
from tir_kernels.towers import vision_tower
from tir_kernels.towers.loading.models import load_model
from tir_kernels.towers.loading.new_models import write_model


@pytest.fixture
def folder(tiny_model_folder, tiny_config, tmp_path):
    """A folder with the tiny model's weights, and a way to write its configuration."""
    (tmp_path / "tiny.safetensors").symlink_to(tiny_model_folder / "tiny_fp16.safetensors")
    return tmp_path


def refuse(folder, config, words):
    """Check that a configuration is refused quickly, in one line, before anything is built."""
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "open_clip_config.json").write_text(text)
    start = time.monotonic()
    with pytest.raises(FewShotError, match=words) as info:
        load_model(str(folder))
    assert time.monotonic() - start < 40  # building or a network would take minutes
    assert "\n" not in str(info.value)


@pytest.fixture
def unbuilt(monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("was built")

    monkeypatch.setattr(open_clip, "create_model", build)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("vision_cfg", "layers", 10_000_000, r"layers is 10,000,000, but 1,024 is the most"),
        ("text_cfg", "layers", 10_000_000, r"text_cfg\.layers is 10,000,000, but"),
        ("vision_cfg", "width", 10**9, r"vision_cfg\.width is 1,000,000,000, but 65,536 is the"),
        (
            "vision_cfg",
            "width",
            60_000,
            r"describes a model of 2.*e\+11 parameters, but the weights",
        ),
        ("vision_cfg", "mlp_ratio", 60_000, r"describes a model of 6.*e\+08 parameters"),
        ("vision_cfg", "mlp_ratio", 1e300, r"mlp_ratio is 1e\+300, but"),
        (
            "vision_cfg",
            "image_size",
            60_000,
            r"60,000 x 60,000 pixels have more than 65,536 patches",
        ),
        (
            "vision_cfg",
            "image_size",
            [32, 10**9],
            "image_size is 1,000,000,000, but 65,536 is the most",
        ),
        ("vision_cfg", "image_size", int("9" * 4000), "image_size is 9"),
        ("vision_cfg", "attn_pooler_queries", 10**9, "attn_pooler_queries is 1,000,000,000"),
        ("text_cfg", "vocab_size", 10**10, "vocab_size is 10,000,000,000"),
        ("text_cfg", "heads", 10**7, "heads is 10,000,000"),
        ("text_cfg", "context_length", 10**6, "context_length is 1,000,000, but 8,192 is the most"),
        ("model_cfg", "embed_dim", 10**9, "embed_dim is 1,000,000,000"),
        ("vision_cfg", "layers", "5", "layers must be a whole number of at least 1; it is '5'"),
        ("vision_cfg", "layers", True, "must be a whole number"),
        ("vision_cfg", "width", 32.0, r"must be a whole number of at least 1; it is 32\.0"),
        ("vision_cfg", "patch_size", 0, "patch_size must be a whole number"),
        ("vision_cfg", "patch_size", [8, 8, 8], "patch_size must be a whole number"),
        ("text_cfg", "width", None, "width must be a whole number"),
        ("model_cfg", "embed_dim", {}, "embed_dim must be a whole number"),
        ("model_cfg", "quick_gelu", "false", "quick_gelu must be true or false; it is 'false'"),
        ("vision_cfg", "no_ln_pre", 1, "no_ln_pre must be true or false; it is 1"),
        ("text_cfg", "layers", float("nan"), "must be a whole number"),
        ("model_cfg", "vision_cfg", [], "has no vision_cfg"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_sizes_and_types(folder, tiny_config, unbuilt, section, key, value, words):
    model = tiny_config["model_cfg"]
    (model if section == "model_cfg" else model[section])[key] = value
    refuse(folder, tiny_config, words)


def test_weights_that_seem_larger_than_they_are(folder, tiny_config, unbuilt):
    (folder / "tiny.safetensors").unlink()
    one = torch.ones(1).expand(10**6, 10**6)
    torch.save({f"{name}.visual.proj": one for name in range(1000)}, folder / "tiny.pt")
    tiny_config["model_cfg"]["vision_cfg"] |= {"layers": 1000, "width": 10**6}
    refuse(
        folder, tiny_config, r"describes a model of 1.*e\+16 parameters, but the weights are 4 b"
    )


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text tower is 'roberta-base' of the tr"),
        (
            "vision_cfg",
            {"timm_model_name": "hf-hub:a/b"},
            r"image tower is 'hf-hub:a/b' of the timm library, whose version .* has no model of",
        ),
        (
            "vision_cfg",
            {"timm_model_name": "test_convnext"},
            "image tower is 'test_convnext' of the timm library, which is no plain vision",
        ),
        ("vision_cfg", {"timm_model_name": 3}, "image tower is 3 of the timm library"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "image tower is a ResNet"),
    ],
)
def test_towers_of_other_libraries(folder, tiny_config, unbuilt, section, settings, words):
    tiny_config["model_cfg"][section] |= settings
    refuse(folder, tiny_config, words + ".*only open_clip's own")


def test_architectures_with_other_towers(unbuilt):
    for name in ("roberta-ViT-B-32", "convnext_base", "RN50", "coca_roberta-ViT-B-32"):
        with pytest.raises(FewShotError, match=f"model: {name} can't be used: its "):
            load_model(name, "weights.pt")


def test_a_tower_of_timm_that_is_larger_than_its_weights(folder, tiny_config, unbuilt):
    tiny_config["model_cfg"]["vision_cfg"] |= {"timm_model_name": "vit_giant_patch14_224"}
    refuse(folder, tiny_config, r"describes a model of 1e\+09 parameters, but the weights are")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pool", "proj"),
    [("test_vit", "token", "linear"), ("vit_pe_core_tiny_patch16_384", "map", None)],
)
def test_a_model_with_a_tower_of_timm_loads(tmp_path, tiny_config, name, pool, proj):
    config = tiny_config["model_cfg"]
    config["vision_cfg"] = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    config["vision_cfg"]["image_size"] = 384 if proj is None else 160
    config["custom_text"] = True
    parts = {key: value for key, value in config.items() if key != "custom_text"}
    model = open_clip.CustomTextCLIP(**parts).eval()
    write_model(model, tiny_config, tmp_path)
    found = load_model(str(tmp_path))
    for key, value in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value.half().float())
    side = config["vision_cfg"]["image_size"]
    assert found.preprocess.shape == (3, side, side)
    assert vision_tower(found.model).module is found.model.visual.trunk


def test_a_text_tower_that_no_method_can_use(folder, tiny_config):
    tiny_config["model_cfg"]["text_cfg"]["scaled_cosine_attn"] = True
    refuse(folder, tiny_config, r"scaled cosine attention \(scaled_cosine_attn\)")


def as_coca(config):
    """The tiny model's configuration, as of a CoCa."""
    model = config["model_cfg"]
    model["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    model["multimodal_cfg"] = dict(model["text_cfg"])
    model["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    model["custom_text"] = True
    return config


def test_a_coca_loads(tmp_path, tiny_config):
    config = as_coca(tiny_config)
    parts = {key: value for key, value in config["model_cfg"].items() if key != "custom_text"}
    model = open_clip.CoCa(**parts)
    torch.nn.init.normal_(model.text_decoder.text_projection)
    write_model(model, config, tmp_path)
    found = load_model(str(tmp_path)).model
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value.half().float())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layers", 10**7, r"multimodal_cfg\.layers is 10,000,000, but 1,024 is the most"),
        ("width", 60_000, r"describes a model of 1.*e\+11 parameters, but the weights"),
        ("n_queries", 10**9, r"multimodal_cfg\.n_queries is 1,000,000,000, but"),
    ],
)
def test_sizes_of_a_decoder(folder, tiny_config, unbuilt, key, value, words):
    config = as_coca(tiny_config)
    config["model_cfg"]["multimodal_cfg"][key] = value
    refuse(folder, config, words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("std", [0, 1, 1], r"std must be three numbers above 0; it is \[0, 1, 1\]"),
        ("mean", [0.5, 0.5], "mean must be three numbers; it is"),
        ("mean", 0.5, "mean must be three numbers"),
        ("mean", [float("nan")] * 3, "mean must be three numbers"),
        ("std", ["1", "1", "1"], "std must be three numbers above 0"),
    ],
)
def test_normalisation(folder, tiny_config, unbuilt, name, value, words):
    tiny_config["preprocess_cfg"][name] = value
    refuse(folder, tiny_config, words)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"model_cfg": ' * 50_000, "9" * 5000, '{"model_cfg": 3}', "\0", "é" * 9],
)
def test_texts_that_are_no_configuration(folder, text):
    refuse(folder, text, "is not a model configuration")


def test_configurations_are_regular_files_of_their_size(folder):
    path = folder / "open_clip_config.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(FewShotError, match="not a regular file"):
        load_model(str(folder))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FewShotError, match="not a regular file"):
        load_model(str(folder))
    path.unlink()
    refuse(folder, " " * 2**20 + "{}", "larger than 1 MiB")
