"""Loading models from folders, files and names."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import plan_episode
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.train.loop import finetune_episode
from tir_kernels.towers.loading import models
from tir_kernels.towers.loading.models import load_model


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.fixture
def tiny_architecture(tiny_config, tmp_path, monkeypatch):
    """The tiny model's architecture under a name of its own."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS)
    )
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(tiny_config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "ViT-tiny-test.json")
    return "ViT-tiny-test"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test of local things reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_folder_with_half_precision_weights(folder):
    loaded = load_model(str(folder))
    state = loaded.model.state_dict()
    for key, value in load_file(folder / "tiny_fp16.safetensors").items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], value.float())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer(["a", "b"]).shape == (2, 16)
    assert loaded.description == str(folder)


def test_the_callers_modes_do_not_matter(folder):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            model = load_model(str(folder)).model
    finally:
        torch.set_default_dtype(before)
    expected = load_model(str(folder)).model
    for name, value in [*expected.named_parameters(), *expected.named_buffers()]:
        own = model.get_parameter(name) if name in model.state_dict() else model.get_buffer(name)
        assert own.dtype == torch.float32
        assert not own.is_inference()
        assert torch.equal(own, value)


def test_preprocessing_follows_the_folder(folder):
    image = Image.fromarray(np.full((50, 90, 3), 255, np.uint8))
    result = load_model(str(folder)).preprocess(image)
    expected = [(1 - mean) / std for mean, std in ((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))]
    assert result.shape == (3, 32, 32)
    torch.testing.assert_close(result, torch.tensor(expected)[:, None, None].expand(3, 32, 32))


def test_fingerprint_follows_weights_and_configuration(folder, tmp_path):
    before = load_model(str(folder)).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_model(str(moved)).fingerprint == before
    config = json.loads((moved / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (moved / "open_clip_config.json").write_text(json.dumps(config))
    changed = load_model(str(moved)).fingerprint
    assert changed != before
    state = load_file(moved / "tiny_fp16.safetensors")
    state["logit_scale"] += 1
    (moved / "tiny_fp16.safetensors").unlink()
    torch.save(state, moved / "tiny.pt")
    assert load_model(str(moved)).fingerprint not in (before, changed)


def test_choice_among_weights_files(folder):
    torch.save(load_file(folder / "tiny_fp16.safetensors"), folder / "other.bin")
    (folder / "optimizer.txt").write_text("no weights")
    (folder / "._tiny_fp16.safetensors").write_text("what macOS leaves on other file systems")
    load_model(str(folder))  # the safetensors file is taken, whatever lies beside it
    shutil.copy(folder / "tiny_fp16.safetensors", folder / "second.safetensors")
    with pytest.raises(FewShotError, match=r"several .*\(second.safetensors, tiny_fp16.*pretrai"):
        load_model(str(folder))
    load_model(str(folder), "second.safetensors")
    load_model(str(folder), str(folder / "other.bin"))
    with pytest.raises(FewShotError, match=r"pretrained: no file third.pt"):
        load_model(str(folder), "third.pt")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (None, "has no open_clip_config.json"),
        ("{", "is not a model configuration"),
        ("{}", "is not a model configuration with 'model_cfg'"),
        ("[]", "is not a model configuration"),
        ('{"model_cfg": {"embed_dim": 4}}', "has no vision_cfg"),
    ],
)
def test_bad_configurations(folder, config, complaint):
    path = folder / "open_clip_config.json"
    path.unlink()
    if config is not None:
        path.write_text(config)
    with pytest.raises(FewShotError, match=complaint):
        load_model(str(folder))


def test_bad_preprocessing(folder, tiny_config):
    tiny_config["preprocess_cfg"]["resize_mode"] = "stretch"
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(FewShotError, match="no usable preprocessing"):
        load_model(str(folder))


def test_missing_and_damaged_weights(folder):
    weights = folder / "tiny_fp16.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        FewShotError, match=r"can't read the weights .*tiny_fp16.safetensors"
    ) as info:
        load_model(str(folder))
    assert "\n" not in str(info.value)
    weights.unlink()
    with pytest.raises(FewShotError, match=r"has no weights; put a \.safetensors"):
        load_model(str(folder))
    (folder / "tiny.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(FewShotError, match=r"can't read the weights .*tiny.pt"):
        load_model(str(folder))


class Harmful:
    def __reduce__(self):
        return (print, ("code from a checkpoint was run",))


@pytest.mark.parametrize("content", [Harmful(), {"state_dict": Harmful()}, [1, 2], 3])
def test_pickles_are_read_as_tensors_only(folder, content, capsys):
    (folder / "tiny_fp16.safetensors").unlink()
    torch.save(content, folder / "tiny.pt")
    with pytest.raises(FewShotError, match=r"can't read the weights .*tiny.pt.*plain state dict"):
        load_model(str(folder))
    assert "code from" not in capsys.readouterr().out


def test_architecture_with_checkpoint_file(folder, tiny_architecture):
    state = load_file(folder / "tiny_fp16.safetensors")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / "t.pt"
    )
    loaded = load_model(tiny_architecture, str(folder / "t.pt"))
    assert torch.equal(loaded.model.logit_scale, state["logit_scale"].float())
    assert loaded.description == f"ViT-tiny-test with {folder / 't.pt'}"


def test_checkpoint_of_another_architecture(folder, tiny_config):
    tiny_config["model_cfg"]["vision_cfg"]["width"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(
        FewShotError, match=r"are not of .*visual\.\w+ is \(\d.* instead of \(\d.* more;"
    ):
        load_model(str(folder))
    tiny_config["model_cfg"]["vision_cfg"]["width"] = 32
    tiny_config["model_cfg"]["vision_cfg"]["layers"] = 6
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(FewShotError, match=r"resblocks\.5\.\S+ is missing"):
        load_model(str(folder))
    tiny_config["model_cfg"]["vision_cfg"]["layers"] = 4
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(FewShotError, match=r"resblocks\.4\.\S+ is not part of it"):
        load_model(str(folder))
    tiny_config["model_cfg"]["text_cfg"]["width"] = 16
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(FewShotError, match="are not of"):
        load_model(str(folder))


def test_unknown_names(tmp_path):
    with pytest.raises(FewShotError, match=r"ViT-B-99 is neither .* nearest are .*ViT-B-"):
        load_model("ViT-B-99", "openai")
    with pytest.raises(FewShotError, match="nearest are ViT-B-16"):
        load_model("vit-b-16", "openai")
    with pytest.raises(FewShotError, match=r"no folder .*some/where"):
        load_model("some/where")
    with pytest.raises(FewShotError, match=r"org/name is not in .* cache; fetch it with"):
        load_model("hf-hub:org/name")
    (tmp_path / "weights.pt").write_text("")
    with pytest.raises(FewShotError, match="is a file; pass its architecture"):
        load_model(str(tmp_path / "weights.pt"))


def test_architecture_needs_weights(tiny_architecture):
    with pytest.raises(FewShotError, match=r"ViT-B-32 needs weights: pass a tag \(.*openai.*\) or"):
        load_model("ViT-B-32")
    with pytest.raises(FewShotError, match="ViT-tiny-test needs weights: pass a checkpoint file"):
        load_model(tiny_architecture)
    with pytest.raises(
        FewShotError, match=r"nowhere.pt is neither a file nor a tag of ViT-B-32 \("
    ):
        load_model("ViT-B-32", "nowhere.pt")
    with pytest.raises(FewShotError, match=r"nor a tag \(ViT-tiny-test has none\)"):
        load_model(tiny_architecture, "nowhere.pt")


@pytest.fixture
def tag(tiny_architecture, monkeypatch):
    """A tag of the tiny architecture, as open_clip lists them."""
    settings = {"url": "http://example.com/x.pt", "mean": (0.1, 0.2, 0.3), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_architecture, {"web": settings})
    return "web"


def test_tag_decides_activation_and_preprocessing(folder, tag, tiny_architecture, monkeypatch):
    weights = str(folder / "tiny_fp16.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda settings: weights)
    loaded = load_model(tiny_architecture, tag)
    activations = [type(m).__name__ for m in loaded.model.modules() if "GELU" in type(m).__name__]
    assert set(activations) == {"QuickGELU"}
    black = Image.new("RGB", (32, 32))
    mean = loaded.preprocess(black).mean((1, 2)) * torch.tensor(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(mean, torch.tensor([-0.1, -0.2, -0.3]))
    assert loaded.fingerprint != load_model(tiny_architecture, weights).fingerprint


def test_failed_download(tag, tiny_architecture, monkeypatch):
    def fail(settings):
        raise OSError("no route to host\nmany\nlines")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(
        FewShotError, match=r"can't download .*web: no route to host; check the net"
    ):
        load_model(tiny_architecture, tag)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x"])
def test_unusable_device(folder, device):
    with pytest.raises(FewShotError, match=f"device={device} can't be used here: "):
        load_model(str(folder), device=device)
    with pytest.raises(FewShotError, match="device=meta holds no values"):
        load_model(str(folder), device="meta")


def test_a_device_without_room(folder, monkeypatch):
    class Large(torch.nn.Module):
        def to(self, device):
            raise torch.OutOfMemoryError(f"{device} out of memory.\nmany\nlines")

    monkeypatch.setattr(models, "_build", lambda source: Large())
    monkeypatch.setattr(models, "load_weights", lambda *args: [])
    with pytest.raises(FewShotError, match=r"device=cpu can't take the model: cpu out of mem"):
        load_model(str(folder))


def test_nothing_is_logged(folder, caplog):
    load_model(str(folder))
    assert caplog.text == ""


@pytest.mark.slow
def test_real_model_knows_everyday_objects(real_data):
    # Weights, preprocessing and class words all have to be right for this.
    loaded = load_model(str(real_data / "model"))
    data = load_data(real_data / "tinyimagenet")
    reader = ImageReader(data, loaded.preprocess)
    plan = plan_episode(0, 0, [len(entry.files) for entry in data.classes], ways=5)
    episode = load_episode(plan, data, reader, shots=1, queries=4)
    runtime = Runtime(backend="reference")
    result = finetune_episode(loaded.model, loaded.tokenizer, episode, ZeroShot(), runtime=runtime)
    correct = result.query_logits.argmax(1) == episode.query_labels
    assert correct.float().mean() >= 0.6  # chance is 0.2
