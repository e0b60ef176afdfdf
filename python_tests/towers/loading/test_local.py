"""Models that lie in caches and folders: found, listed and loaded by their names."""

import json
import os
import shutil

import huggingface_hub
import open_clip
import pytest
from click.testing import CliRunner

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.command import cli
from tir_kernels.towers.loading import hub
from tir_kernels.towers.loading.local import local_models
from tir_kernels.towers.loading.models import load_model


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """Empty caches, and no network."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test of local things reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "hub"


def put_into_cache(cache, repository, folder):
    """A repository as the cache holds it: links into a store, below the name of a commit."""
    root = cache / f"models--{repository.replace('/', '--')}"
    for made in ("refs", "blobs", "snapshots/c0ffee"):
        (root / made).mkdir(parents=True)
    (root / "refs" / "main").write_text("c0ffee")
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, root / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", root / "snapshots" / "c0ffee" / path.name)


@pytest.mark.parametrize("name", ["hf-hub:someone/tiny-clip", "someone/tiny-clip"])
def test_a_cached_repository_is_loaded_by_its_name(caches, tiny_model_folder, name):
    put_into_cache(caches, "someone/tiny-clip", tiny_model_folder)
    loaded = load_model(name)
    assert loaded.fingerprint == load_model(str(tiny_model_folder)).fingerprint
    assert loaded.description == name


def test_a_folder_comes_before_a_repository(caches, tiny_model_folder, tmp_path, monkeypatch):
    put_into_cache(caches, "someone/tiny-clip", tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny-clip").mkdir(parents=True)
    with pytest.raises(FewShotError, match=r"has no open_clip_config\.json"):
        load_model("someone/tiny-clip")


def test_weights_for_other_libraries_may_lie_beside(caches, tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "both")
    (folder / "tiny_fp16.safetensors").rename(folder / "open_clip_model.safetensors")
    (folder / "model.safetensors").write_bytes(b"of another library")
    assert load_model(str(folder)).fingerprint == load_model(str(tiny_model_folder)).fingerprint


def test_what_is_not_in_the_cache(caches, tiny_model_folder):
    with pytest.raises(FewShotError, match="fetch it with hf download someone/other"):
        load_model("hf-hub:someone/other")
    with pytest.raises(FewShotError, match="no folder someone/other, and no such repository in"):
        load_model("someone/other")


def test_models_of_folders_and_caches_are_listed(
    caches, tiny_model_folder, tiny_config, tmp_path, monkeypatch
):
    assert list(local_models()) == []
    put_into_cache(caches, "someone/tiny-clip", tiny_model_folder)
    folders = tmp_path / "models"
    shutil.copytree(tiny_model_folder, folders / "good")
    tiny_config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "someone/words"
    shutil.copytree(tiny_model_folder, folders / "wordless")
    (folders / "wordless" / "open_clip_config.json").write_text(json.dumps(tiny_config))
    (folders / "no_model").mkdir()
    weights = tmp_path / "ViT-B-32.pt"
    weights.write_bytes(bytes(1000))
    tags = [("ViT-B-32", "openai"), ("ViT-B-16", "openai")]
    monkeypatch.setattr(open_clip, "list_pretrained", lambda: tags)
    monkeypatch.setattr(
        hub.open_clip,
        "download_pretrained",
        lambda tag: weights if "patch32" in tag["hf_hub"] else os.stat("missing"),
    )
    found = list(local_models([str(folders)]))
    size = (tiny_model_folder / "tiny_fp16.safetensors").stat().st_size
    assert [(each.model, each.pretrained, each.num_bytes) for each in found] == [
        (str(folders / "good"), "", size),
        (str(folders / "wordless"), "", size),
        ("ViT-B-32", "openai", 1000),
        ("hf-hub:someone/tiny-clip", "", size),
    ]
    assert [each.problem for each in found] == [
        "",
        "its tokenizer, someone/words, is not there",
        "",
        "",
    ]
    load_model(found[0].model)
    load_model(found[3].model)
    result = CliRunner().invoke(cli, ["models", str(folders)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"--model {folders / 'good'}  ({size / 2**20:.0f} MiB)"
    assert lines[1].endswith("can't be used: its tokenizer, someone/words, is not there")
    assert lines[2].startswith("--model ViT-B-32 --pretrained openai")


def test_without_models(caches, tmp_path):
    result = CliRunner().invoke(cli, ["models"])
    assert result.exit_code == 0
    assert "No model is here" in result.output
    with pytest.raises(FewShotError, match=r"can't read .*missing"):
        list(local_models([str(tmp_path / "missing")]))
