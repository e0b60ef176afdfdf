"""Weights in several files, TorchScript archives, and what the names of files tell."""

import json
import os
import shutil
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weights_files import CONFIG, assert_loaded, load, write_config

from tir_kernels.errors import FewShotError
from tir_kernels.towers.loading.models import load_model

pytestmark = pytest.mark.usefixtures("quick_tokenizer")


def write_shards(folder, state):
    names = sorted(state)
    half = len(names) // 2
    shards = {"w-1-of-2.safetensors": names[:half], "w-2-of-2.safetensors": names[half:]}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / shard)
    places = {name: shard for shard, part in shards.items() for name in part}
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_weights_in_several_files(folder, model, state):
    write_shards(folder, state)
    loaded = load_model(str(folder))
    assert_loaded(loaded, model)
    shard = folder / "w-2-of-2.safetensors"
    state["logit_scale"] += 1
    write_shards(folder, {**state, "visual.proj": state["visual.proj"] + 1})
    assert load_model(str(folder)).fingerprint != loaded.fingerprint
    shard.unlink()
    with pytest.raises(FewShotError, match=r"part w-2-of-2\.safetensors is missing"):
        load_model(str(folder))


@pytest.mark.parametrize("part", ["../w.safetensors", "/dev/zero", "w.index.json", 3])
def test_indices_name_files_beside_them(folder, part):
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
    with pytest.raises(FewShotError, match=r"which is no file beside it|not an index"):
        load_model(str(folder))


class Node(nn.Module):
    """A module of nothing but parameters and children, for TorchScript."""

    def forward(self):
        return 1.702


def script(state):
    root = Node()
    for key, value in state.items():
        *path, name = key.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        if value.is_floating_point():
            node.register_parameter(name, nn.Parameter(value))
        else:
            node.register_buffer(name, value)
    with pytest.warns((FutureWarning, DeprecationWarning)):
        return torch.jit.script(root)


MARKS = {key: torch.tensor(5) for key in ("input_resolution", "context_length", "vocab_size")}


def compress(path):
    """Compress what is in a PyTorch file, as a small file may hold any amount of zeros."""
    with (
        zipfile.ZipFile(path.rename(path.with_name("whole"))) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def test_compressed_files_are_refused(folder, state):
    load(folder, state)
    compress(folder / "weights.pt")
    with pytest.raises(FewShotError, match="is compressed, which PyTorch never does"):
        load_model(str(folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archives(folder, model, state, monkeypatch):
    script(state).save(str(folder / "weights.pt"))
    monkeypatch.setattr(torch.jit, "load", None)  # which runs code of the archive
    assert_loaded(load_model(str(folder)), model)
    compress(folder / "weights.pt")
    with pytest.raises(FewShotError, match="is compressed, which PyTorch never does"):
        load_model(str(folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openai_archives_need_quick_gelu(folder, model, state):
    script({key: value.half() for key, value in state.items()} | MARKS).save(
        str(folder / "weights.pt")
    )
    with pytest.raises(
        FewShotError, match=r'are OpenAI\'s, .* has GELU: set "quick_gelu": true in'
    ):
        load_model(str(folder))
    write_config(folder, quick_gelu=True)
    loaded = load_model(str(folder))
    assert torch.equal(loaded.model.visual.proj, model.visual.proj.half().float())
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert "QuickGELU" in kinds
    assert "GELU" not in kinds
    write_config(folder)
    with pytest.raises(FewShotError, match="are OpenAI's"):
        load(folder, {**state, **MARKS})  # the archive's state dict, saved as such


@pytest.fixture
def architectures(folder, monkeypatch):
    """A small architecture and its twin with QuickGELU, by name."""
    own = {"ViT-x": CONFIG, "ViT-x-quickgelu": {**CONFIG, "quick_gelu": True}, "ViT-y": CONFIG}
    known = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**known, **own})


def test_weights_do_not_say_their_activation(folder, state, architectures):
    file = str(folder / "weights.pt")
    torch.save(state, file)
    (note,) = load_model("ViT-x", file).notes
    assert note.endswith("for weights of OpenAI, DFN or MetaCLIP pass model=ViT-x-quickgelu")
    assert load_model("ViT-x-quickgelu", file).notes == ()
    assert load_model("ViT-y", file).notes == ()
    named = str(shutil.copy(file, folder / "ViT-y-MetaCLIP.pt"))
    (note,) = load_model("ViT-y", named).notes
    assert "if it is MetaCLIP's, which needs QuickGELU, pass a folder whose" in note
    torch.save({**state, **MARKS}, file)
    with pytest.raises(FewShotError, match="ViT-x has GELU: pass model=ViT-x-quickgelu"):
        load_model("ViT-x", file)
    load_model("ViT-x-quickgelu", file)


def test_odd_forms_of_names(folder, state, architectures):
    torch.save(state, folder / "weights.pt")
    assert load_model("ViT/y", str(folder / "weights.pt")).description.startswith("ViT-y with")
    with pytest.raises(FewShotError, match=r"is a folder; pass one of its files \(weights\.pt\)"):
        load_model("ViT-x", str(folder))
    for name, likely in (
        ("ViT-L/14@336px", "ViT-L-14-336"),
        ("vit_b_32", "ViT-B-32"),
        ("ViT-B-32:openai", "ViT-B-32"),
    ):
        with pytest.raises(FewShotError, match=rf"nearest are .*{likely}\b"):
            load_model(name, "openai")
    for name in ("", " "):
        with pytest.raises(FewShotError, match=r"^model is empty"):
            load_model(name)
        with pytest.raises(FewShotError, match=r"^pretrained is empty"):
            load_model("ViT-B-32", name)
    for name in ("a\0b", "x" * 5000, "~nobody-of-that-name/model"):
        with pytest.raises(FewShotError, match=r"^model"):
            load_model(name, "openai")
    os.mkfifo(folder / "pipe")
    with pytest.raises(FewShotError, match="pipe is not a regular file"):
        load_model("ViT-x", str(folder / "pipe"))
