"""Folders of transformers as models: the same pixels, token ids and features as the library's."""

import json
import shutil
import socket
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from small_transformers import (
    image_features,
    inputs_of,
    text_features,
    transformers,
    write_folder,
)

from tir_kernels.adapters import PromptContext
from tir_kernels.adapters.prompt_text import CutNameWarning
from tir_kernels.errors import FewShotError
from tir_kernels.towers import ImageEncoder
from tir_kernels.towers.loading.models import load_model
from tir_kernels.towers.loading.saving import save_model

KINDS = ("clip", "siglip", "siglip2")
TEXTS = ["A photo of a Cat.", "b", "a centred satellite photo of annual crop land " * 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    written = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in written.items():
        write_folder(folder, kind)
    return written


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model's folder, to be changed."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "model"))


@pytest.fixture(params=["clip", "siglip"])
def fixed_size(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """As ``folder``, of a model whose configuration says the size of its images."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "model"))


@pytest.fixture
def siglip2(folders: dict[str, Path], tmp_path: Path) -> Path:
    """As ``folder``, of a model for images of any grid."""
    return Path(shutil.copytree(folders["siglip2"], tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drawn_images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = ((50, 40), (33, 90), (300, 200), (32, 32), (7, 31), (77, 77), (20, 20))
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def given_by_the_library(processor: Any, image: Image.Image) -> Any:
    """What the library's model takes; where grids follow from images, of one that is square."""
    if hasattr(processor, "max_num_patches") and image.width != image.height:
        image = image.resize((32, 32), Image.Resampling.BILINEAR)
    return processor(images=image, return_tensors="pt")


@torch.no_grad()
def test_features_are_those_of_the_library(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert loaded.notes == ()
    assert not any(p.requires_grad for p in loaded.model.parameters())
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for image in drawn_images():
        expected = given_by_the_library(processor, image)
        found = loaded.preprocess(image)[None]
        assert found.dtype == torch.float32
        assert found.shape[1:] == loaded.preprocess.shape == (3, 32, 32)
        taken = inputs_of(theirs, found)["pixel_values"]
        torch.testing.assert_close(taken, expected["pixel_values"], rtol=1e-5, atol=1e-6)
        features = theirs.get_image_features(**expected).pooler_output
        torch.testing.assert_close(image_features(loaded.model, found), features)
        encoder = ImageEncoder(loaded.model)
        torch.testing.assert_close(encoder.features(encoder.embed(found)), features)
        back = loaded.preprocess.to_image(found)[0]
        assert np.array_equal(back, loaded.preprocess.to_pixels(image).permute(1, 2, 0).numpy())


@torch.no_grad()
def test_token_ids_are_those_of_the_library(folder: Path) -> None:
    loaded = load_model(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length = loaded.model.config.text_config.max_position_embeddings
    given = tokenizer(
        TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    found = loaded.tokenizer(TEXTS)
    assert found.shape == (3, length)
    assert torch.equal(found, given["input_ids"])
    assert (found == tokenizer.eos_token_id).any(1).all()  # the cut text too
    assert torch.equal(found[0], loaded.tokenizer([TEXTS[0].lower()])[0])
    longer = loaded.tokenizer(TEXTS, context_length=length + 200)
    assert longer.shape == (3, length + 200)
    assert torch.equal(longer[:2, :length], found[:2])
    assert not torch.equal(longer[2, :length], found[2])


@torch.no_grad()
def test_prompts_are_the_librarys_texts(folder: Path) -> None:
    loaded = load_model(str(folder))
    names = ["cat", "blue dog"]
    expected = text_features(loaded.model, loaded.tokenizer([f"a a a a {n}." for n in names]))
    prompts = PromptContext(loaded.model, loaded.tokenizer, names)
    assert prompts.first == int(loaded.model.config.model_type == "clip")
    words = loaded.tokenizer(["a a a a"])[:, prompts.first : prompts.first + 4]
    prompts.vectors.copy_(prompts.tower.embed(words)[0])
    # The published program keeps the words of its prompts in float16.
    torch.testing.assert_close(prompts()[0], expected, rtol=0, atol=5e-3)
    whole = PromptContext(loaded.model, loaded.tokenizer, names, num_vectors=0)
    expected = text_features(loaded.model, loaded.tokenizer([f"a photo of a {n}." for n in names]))
    torch.testing.assert_close(whole()[0], expected, rtol=0, atol=5e-3)
    with pytest.warns(CutNameWarning, match="1 class name too long"):
        PromptContext(loaded.model, loaded.tokenizer, ["cat" * 30, "b"])


def test_real_images(real_data: Path, folders: dict[str, Path]) -> None:
    domains = [path for path in sorted(real_data.iterdir()) if path.is_dir()]
    paths = [path for domain in domains for path in islice(domain.glob("*/*"), 2)]
    paths = [path for path in paths if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    assert paths
    for folder in folders.values():
        loaded = load_model(str(folder))
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        for path in paths:
            image = Image.open(path).convert("RGB")
            expected = given_by_the_library(processor, image)["pixel_values"]
            found = inputs_of(loaded.model, loaded.preprocess(image)[None])["pixel_values"]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_saved_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(folder))
    files = save_model(loaded, tmp_path / "copy")
    assert {path.name for path in files} == {path.name for path in (tmp_path / "copy").iterdir()}
    again = load_model(str(tmp_path / "copy"))
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert torch.equal(again.tokenizer(TEXTS), loaded.tokenizer(TEXTS))
    image = drawn_images()[0]
    assert torch.equal(again.preprocess(image), loaded.preprocess(image))
    transformers.AutoModel.from_pretrained(tmp_path / "copy")


def test_half_precision_and_several_files(folder: Path) -> None:
    expected = load_model(str(folder)).model.state_dict()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        safetensors.torch.save_file({name: state[name].half() for name in own}, folder / part)
    index = {"weight_map": {name: part for part, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_model(str(folder)).model.state_dict()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.half().float())


def test_pickled_weights_run_nothing(folder: Path) -> None:
    expected = load_model(str(folder)).model.state_dict()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save({**state, **old}, folder / "pytorch_model.bin")
    loaded = load_model(str(folder))
    assert all(torch.equal(loaded.model.state_dict()[name], expected[name]) for name in expected)
    assert "position_ids" in loaded.notes[0]


def test_the_fingerprint_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = load_model(str(folder)).fingerprint
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert load_model(str(other)).fingerprint == first
    seen = {first}

    def changed() -> str:
        return load_model(str(other)).fingerprint

    edit(other / "preprocessor_config.json", lambda c: c.update(image_mean=[0.1, 0.2, 0.3]))
    seen.add(changed())
    edit(other / "config.json", lambda c: c["vision_config"].update(layer_norm_eps=0.1))
    seen.add(changed())
    edit(other / "tokenizer_config.json", lambda c: c.update(unused=1))
    seen.add(changed())
    state = safetensors.torch.load_file(other / "model.safetensors")
    state["logit_scale"] += 1
    safetensors.torch.save_file(state, other / "model.safetensors")
    seen.add(changed())
    assert len(seen) == 5


def test_the_attention_of_a_folder_is_not_taken(folder: Path) -> None:
    def name_kernels(config: dict[str, Any]) -> None:
        for section in (config, config["vision_config"], config["text_config"]):
            section |= {"_attn_implementation": "someone/kernel", "attn_implementation": "x/y"}
        config["auto_map"] = {"AutoModel": "own.Model", "AutoConfig": "own.Config"}

    edit(folder / "config.json", name_kernels)
    (folder / "own.py").write_text("raise AssertionError('code was run')")
    model = load_model(str(folder)).model
    for config in (model.config, model.config.vision_config, model.config.text_config):
        assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"model_type": "bert"}, "model_type 'bert': .*'clip' or 'siglip'"),
        ("config.json", {"quantization_config": {"bits": 4}}, "holds quantised weights"),
        ("config.json", {"vision_config": 3}, "vision_config must be an object"),
        ("preprocessor_config.json", {"rescale_factor": 1}, "must rescale pixels by 1/255"),
    ],
)
def test_unsuitable_settings_are_refused(
    folder: Path, file: str, change: dict[str, Any], words: str
) -> None:
    edit(folder / file, lambda content: content.update(change))
    with pytest.raises(FewShotError, match=words):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("vision_config", "num_hidden_layers", 10**7, r"num_hidden_layers is 10,000,000"),
        ("vision_config", "hidden_size", 2**20, "parameters, but the weights are"),
        ("vision_config", "hidden_size", 64, "not of .*instead of"),
        ("text_config", "num_hidden_layers", 3, "layers.2.* is missing"),
        ("text_config", "num_hidden_layers", "3", "transformers can't build|whole number"),
        ("text_config", "max_position_embeddings", 2**20, "8,192 is the most"),
        ("text_config", "hidden_act", "nonsense", "transformers can't build"),
    ],
)
def test_configurations_of_other_weights_are_refused(
    folder: Path, section: str, name: str, value: Any, words: str
) -> None:
    edit(folder / "config.json", lambda content: content[section].update({name: value}))
    with pytest.raises(FewShotError, match=words):
        load_model(str(folder))


def test_images_of_another_size_are_refused(fixed_size: Path) -> None:
    change = {"size": {"shortest_edge": 40}, "do_center_crop": False}
    edit(fixed_size / "preprocessor_config.json", lambda content: content.update(change))
    with pytest.raises(FewShotError, match=r"gives images of .* the model takes \(3, 32, 32\)"):
        load_model(str(fixed_size))
    edit(fixed_size / "config.json", lambda c: c["vision_config"].update(image_size=10**6))
    with pytest.raises(FewShotError, match=r"more than 65,536 patches.*vision_config\.image_size"):
        load_model(str(fixed_size))


@pytest.mark.parametrize(
    "change", [{"patch_size": 16}, {"max_num_patches": 0}, {"max_num_patches": 10**6}]
)
def test_patches_of_another_size_are_refused(siglip2: Path, change: dict[str, Any]) -> None:
    edit(siglip2 / "preprocessor_config.json", lambda content: content.update(change))
    with pytest.raises(FewShotError, match=r"into patches of 8 pixels, at most 65,536; it has"):
        load_model(str(siglip2))


def test_more_positions_than_attention_takes_are_refused(siglip2: Path) -> None:
    edit(siglip2 / "config.json", lambda c: c["vision_config"].update(num_patches=2**20))
    with pytest.raises(FewShotError, match=r"more than 65,536 patches.*vision_config\.num_patches"):
        load_model(str(siglip2))


@torch.no_grad()
@pytest.mark.parametrize(("most", "side"), [(16, 32), (30, 40), (4, 16), (100, 80)])
def test_the_grid_is_the_largest_square(siglip2: Path, most: int, side: int) -> None:
    edit(siglip2 / "preprocessor_config.json", lambda c: c.update(max_num_patches=most))
    loaded = load_model(str(siglip2))
    assert loaded.preprocess.shape == (3, side, side)
    processor = transformers.AutoImageProcessor.from_pretrained(siglip2)
    image = drawn_images()[5]
    expected = loaded.model.get_image_features(**processor(images=image, return_tensors="pt"))
    found = image_features(loaded.model, loaded.preprocess(image)[None])
    torch.testing.assert_close(found, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_siglip2s_processor_with_another_resizing(siglip2: Path) -> None:
    own, image = load_model(str(siglip2)).preprocess, drawn_images()[2]
    changed = own.with_resize(True, "bicubic")
    assert changed.version != own.version
    expected = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC)))
    assert torch.equal(changed.to_pixels(image), expected.permute(2, 0, 1))
    assert torch.equal(own.with_resize(True).to_pixels(image), own.to_pixels(image))
    with pytest.raises(FewShotError, match="can only squash images"):
        own.with_resize(False)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model.safetensors", "has no weights"),
        ("preprocessor_config.json", "no usable image processor"),
        ("tokenizer.json", "has no tokenizer; put tokenizer.json"),
    ],
)
def test_missing_parts_are_named(folder: Path, missing: str, words: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FewShotError, match=words):
        load_model(str(folder))


def test_tokenizers_of_other_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    clip = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    edit(clip / "config.json", lambda content: content["text_config"].update(eos_token_id=5))
    with pytest.raises(FewShotError, match="eos_token_id is 5, the tokenizer's is 189"):
        load_model(str(clip))
    edit(clip / "config.json", lambda content: content["text_config"].update(eos_token_id=2))
    load_model(str(clip))  # as old configurations say, which take the highest id
    siglip = Path(shutil.copytree(folders["siglip"], tmp_path / "siglip"))
    state = safetensors.torch.load_file(siglip / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    state[name] = state[name][:50].clone()
    safetensors.torch.save_file(state, siglip / "model.safetensors")
    edit(siglip / "config.json", lambda content: content["text_config"].update(vocab_size=50))
    with pytest.raises(FewShotError, match="has ids up to 190, but the model knows 50 tokens"):
        load_model(str(siglip))


def test_open_clips_weights_are_refused(folder: Path) -> None:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        state = {f"visual.{name}": file.get_tensor(name) for name in list(file.keys())[:3]}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(FewShotError, match=r"are not of .*model"):
        load_model(str(folder))


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tir_kernels.towers.loading import models

    monkeypatch.setattr(models, "has_transformers", lambda: False)
    with pytest.raises(FewShotError, match="needs the transformers library: pip install"):
        load_model(str(folder))
