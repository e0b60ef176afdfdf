"""Exported forms compute what the classifier computes."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from fewshot.command_line import assert_refused
from torch import Tensor
from transformers_clip import as_clip_model

from tir_kernels import adapters, fewshot
from tir_kernels.demo import model_directory
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.export import export_merged, export_transformers
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.train.batch import Job
from tir_kernels.towers import as_transformers_clip
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.models import load_model

METHODS = {
    "tokens": fewshot.methods.TIR(layers=(1, 2)),
    "attention": fewshot.methods.TIR(placement="attention", rule="suppress"),
    "both by centroids": fewshot.methods.TIR(placement="both", relevance="centroids"),
    "lora": fewshot.methods.LoRA(logit_scale=7.0),
}
WORDS = ("a red ring", "a blue disc", "a green star")


def drawn(loaded: LoadedModel, name: str, pretrained: str | None, method) -> Classifier:
    """A classifier with numbers as of after a long training."""
    about = About(
        ("=ring", "<b>disc", "star"), WORDS, method, BaseModel(
            name, pretrained, loaded.description, loaded.fingerprint
        ), 0, 2, 1, "float32", (2, 2, 2), temperature=1.3,
    )  # fmt: skip
    shape = loaded.preprocess.shape
    none = torch.empty(0, *shape)
    episode = Episode(list(WORDS), none, torch.empty(0, dtype=torch.int64), none, shots=2)
    job = Job(loaded.model, loaded.tokenizer, method, 0, fewshot.Runtime())
    generator = torch.Generator().manual_seed(2)

    def draw(shape: torch.Size, size: float) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    with job.learner([episode]) as learner:
        learned = {name: each[0].shape for name, each in learner.trained().items()}
        if getattr(method, "relevance", "") == "centroids":
            learned["centroids"] = torch.Size([3, loaded.config["embed_dim"]])
    return Classifier(
        about, loaded, {key: draw(size, 0.1) for key, size in learned.items()}, fewshot.Runtime()
    )


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(model_directory()))


def logits_of(classifier: Classifier, images: Tensor) -> Tensor:
    with classifier.open() as scorer:
        return scorer.logits(images)


@pytest.mark.parametrize("name", METHODS)
def test_the_code_of_a_merged_folder_gives_the_classifiers_logits(
    name, loaded, tmp_path, monkeypatch
):
    classifier = drawn(loaded, str(model_directory()), None, METHODS[name])
    images = torch.randn(5, *loaded.preprocess.shape)
    expected = logits_of(classifier, images) / 1.3
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    export_merged(classifier, tmp_path / "out")
    after = loaded.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    monkeypatch.chdir(tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    found = names["logits"](images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert names["classes"]["labels"] == ["=ring", "<b>disc", "star"]
    plain = drawn(loaded, "", None, METHODS[name])
    plain.learned = {key: 0 * value for key, value in plain.learned.items()}
    assert (found - logits_of(plain, images) / 1.3).abs().max() > 1e-3, "LoRA must matter"
    # It is a model like any other, too.
    again = load_model(str(tmp_path / "out"))
    assert again.fingerprint != loaded.fingerprint


def test_merging_is_for_good_and_of_one_episode(loaded):
    model = copy.deepcopy(loaded.model)
    images = torch.randn(2, *loaded.preprocess.shape)
    lora = adapters.add_lora(model, 3, dropout=0.0)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = model.encode_image(images)
    lora.merge()
    assert not adapters.loras_of(model)
    torch.testing.assert_close(model.encode_image(images), adapted, atol=1e-5, rtol=1e-4)
    with (
        adapters.add_lora(model, 3, num_episodes=2) as several,
        pytest.raises(ValueError, match="num_episodes can't be merged"),
    ):
        several.merge()


@pytest.mark.slow
@pytest.mark.parametrize("is_custom", [False, True])
def test_transformers_and_peft_compute_the_adapted_towers(tmp_path, is_custom):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16,
                       "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 2},
    }  # fmt: skip
    kind = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    model = kind(**config).eval().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    preprocess = load_model(str(model_directory())).preprocess
    base = LoadedModel(model, preprocess, tokenizer, "drawn", "drawn", config=config)
    classifier = drawn(base, "drawn", None, fewshot.methods.LoRA(lora_rank=4))
    export_transformers(classifier, tmp_path / "out")
    theirs = as_clip_model(transformers, model, config)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    factors = {
        letter: {
            key.removeprefix("lora.").removesuffix(f".{letter}"): each
            for key, each in classifier.learned.items()
            if key.startswith("lora.") and key.endswith(f".{letter}")
        }
        for letter in "AB"
    }
    images, texts = torch.randn(3, 3, 32, 32), tokenizer(["a cat", "two dogs run"])
    with adapters.add_lora(model, 4, 8, 0.0) as lora, torch.no_grad():
        lora.set_factors(factors["A"], factors["B"])
        expected = model.encode_image(images), model.encode_text(texts)
        found = (
            theirs.get_image_features(pixel_values=images),
            theirs.get_text_features(input_ids=texts),
        )
    for one, other in zip(found, expected, strict=True):
        one = one if isinstance(one, Tensor) else one.pooler_output
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_command(loaded, tmp_path, capsys):
    classifier = drawn(loaded, str(model_directory()), None, METHODS["tokens"])
    classifier.save(tmp_path / "it")
    out = [str(tmp_path / name) for name in ("merged", "based")]
    arguments = ["export", str(tmp_path / "it"), "--merged", out[0], "--with-base", out[1]]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "merged" / "classes.json").read_text())["temperature"] == 1.3
    images = torch.randn(2, *loaded.preprocess.shape)
    about = json.loads((tmp_path / "based" / "classifier.json").read_text())
    about["base"]["name"] = "nowhere"
    (tmp_path / "based" / "classifier.json").write_text(json.dumps(about))
    alone = fewshot.load_classifier(out[1])
    assert torch.equal(logits_of(alone, images), logits_of(classifier, images))
    capsys.readouterr()
    assert_refused(capsys, arguments, "--merged", "holds other things")
    assert_refused(capsys, arguments[:2], "nothing to write")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_ln_pre": True}, "no LayerNorm in front"),
        ({"pool_type": "avg"}, "pools otherwise"),
        ({"ls_init_value": 0.1}, "layer scales"),
    ],
)
def test_towers_that_transformers_lacks_are_refused(changes, words):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, {**vision, **changes}, text)
    with pytest.raises(TypeError, match=f"CLIPModel can't express this model: .*{words}"):
        as_transformers_clip(model)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (fewshot.methods.TIR(selection="random"), "control"),
        (fewshot.methods.LinearProbe(), "linear-probe has no LoRA"),
    ],
)
def test_what_has_no_merged_form_is_refused(method, words, loaded, tmp_path):
    lora = drawn(loaded, str(model_directory()), None, fewshot.methods.LoRA())
    learned = lora.learned if method.name == "tir" else {"weights": torch.zeros(3, 4)}
    about = replace(lora.about, method=method)
    with pytest.raises(FewShotError, match=words):
        export_merged(Classifier(about, loaded, learned, fewshot.Runtime()), tmp_path / "out")
