"""Models of open_clip and Hugging Face from caches, folders and the network."""

import json
import os
import pwd
import shutil
from pathlib import Path

import huggingface_hub
import open_clip
import pytest

from tir_kernels.errors import FewShotError
from tir_kernels.towers.loading import hub
from tir_kernels.towers.loading.models import load_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test of local things reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def folder(tiny_model_folder, tiny_config, tmp_path):
    """A local model whose tokenizer is one of the transformers library."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    tiny_config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "someone/words"
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    return folder


def test_tokenizers_of_a_folder(folder, monkeypatch):
    with pytest.raises(
        FewShotError, match=r"no tokenizer; put tokenizer.json .* of 'someone/words'"
    ):
        load_model(str(folder))
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    loaded = load_model(str(folder))
    assert loaded.tokenizer(["b"])[0].tolist() == [2] + 15 * [0]
    words = tokenizers.models.WordLevel({"[PAD]": 0, "a": 2, "b": 1}, unk_token="[PAD]")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    assert load_model(str(folder)).fingerprint != loaded.fingerprint
    before = load_model(str(folder)).fingerprint
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, "padding_side": "left"}))
    assert load_model(str(folder)).fingerprint != before
    # Code that a folder brings along is never run, whatever its configuration asks for.
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    kind = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "own.py").write_text("raise SystemExit('code of a folder was run')")
    with pytest.raises(FewShotError, match="no usable preprocessing or tokenizer"):
        load_model(str(folder))


def test_vocabularies_elsewhere_are_not_read(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": "/dev/zero"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(FewShotError, match="tokenizer_kwargs must be an object without bpe_path"):
        load_model(str(folder))


def test_offline_is_for_its_scope_only(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub.offline():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.fixture
def downloads(monkeypatch):
    """How each download went about: whether offline, or asking whether the hub is there."""
    tried = []

    class Downloads:
        is_cached = is_reachable = False

        def get(self, *args, **kwargs):
            tried.append("offline" if huggingface_hub.constants.HF_HUB_OFFLINE else "online")
            if not self.is_cached:
                raise OSError("no such file")
            return "weights.pt"

        def head(self, url, *, timeout):
            assert timeout <= 60
            tried.append("asked")
            if not self.is_reachable:
                raise OSError("no route to host")

    own = Downloads()
    own.tried = tried
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: own)
    monkeypatch.setattr(open_clip, "download_pretrained", own.get)
    monkeypatch.setattr(open_clip, "get_tokenizer", own.get)
    monkeypatch.setattr(hub, "has_transformers", lambda: True)
    return own


def weights():
    return hub.download_weights({"hf_hub": "a/b/"}, "ViT-x web")


def tokenizer():
    return hub.load_tokenizer("ViT-x", {"hf_tokenizer_name": "a/b"}, None)


def test_caches_come_before_the_network(downloads):
    downloads.is_cached = True
    assert weights() == Path("weights.pt")
    assert tokenizer() == "weights.pt"
    assert downloads.tried == ["offline", "offline"]


@pytest.mark.parametrize("load", [weights, tokenizer])
def test_a_start_without_network_does_not_wait(downloads, load, monkeypatch):
    with pytest.raises(FewShotError, match=r"not in the cache, and http.* \(no route to host\)"):
        load()
    assert downloads.tried == ["offline", "asked"]
    downloads.tried.clear()
    downloads.is_reachable = True
    with pytest.raises(FewShotError, match=r"can't (be )?download.*no such file"):
        load()
    assert downloads.tried == ["offline", "asked", "online"]
    downloads.tried.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FewShotError, match="not in the cache; unset HF_HUB_OFFLINE, or pass a"):
        load()
    assert downloads.tried == ["offline"]


def test_tokenizers_of_a_library_that_is_not_installed(downloads, monkeypatch):
    monkeypatch.setattr(hub, "has_transformers", lambda: False)
    with pytest.raises(FewShotError, match=r"'a/b' of ViT-x needs .*: pip install transformers"):
        tokenizer()
    assert downloads.tried == []


@pytest.fixture
def no_home(monkeypatch):
    """A process of a user whom the machine does not know, as in many containers."""

    def unknown(*args):
        raise KeyError("unknown user")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    with pytest.raises(RuntimeError):
        Path("~").expanduser()


def test_a_local_model_needs_no_home(tiny_model_folder, no_home):
    loaded = load_model(str(tiny_model_folder))
    assert loaded.tokenizer(["a"]).shape == (1, 16)
    with pytest.raises(FewShotError, match="model: can't read ~/model: no home folder is known"):
        load_model("~/model")
    with pytest.raises(FewShotError, match=r"can't read ~/weights.pt: no home folder is known"):
        load_model("ViT-B-32", "~/weights.pt")


def test_downloads_without_a_home_say_what_to_set(no_home, monkeypatch):
    def never(*args, **kwargs):
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.setattr(open_clip, "download_pretrained", never)
    with pytest.raises(
        FewShotError, match=r"no home directory .* set HOME or HF_HOME, or pass local"
    ):
        load_model("ViT-B-32", "openai")
    with pytest.raises(FewShotError, match="no home directory to keep x in; set HOME, or"):
        hub.download_weights({"url": "http://example.com/x.pt"}, "x")
    assert not os.path.exists("~")
