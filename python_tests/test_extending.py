"""docs/extending.md as it stands: each kind of addition is a file and a line, and works."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fewshot.training_cases import EPISODES, make_model, make_tokenizer
from PIL import Image

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
KINDS = (
    "A weighting rule",
    "A method",
    "A tower",
    "A backend",
    "A data source",
    "A known data set",
    "A measure",
)


def sections() -> dict[str, list[str]]:
    """Title -> the Python blocks below it."""
    _, *parts = re.split(r"^## (.*)\n", DOCUMENT.read_text(), flags=re.MULTILINE)
    return {
        title: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Write a section's file, run its line, and run what follows; gives the names it made."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(title: str) -> dict:
        file, register, *use = sections()[title]
        name = re.match(r"# (\w+)\.py\n", file)[1]
        (tmp_path / f"{name}.py").write_text(file)
        assert register.startswith("# register\n")
        names: dict = {}
        for block in (register, *use):
            exec(compile(block, str(DOCUMENT), "exec"), names)
        modules.append(name)
        registries.extend(each for each in names.values() if isinstance(each, dict))
        return names

    modules: list[str] = []
    registries: list[dict] = []
    before = {id(each): dict(each) for each in all_registries()}
    yield run
    for each in all_registries():
        each.clear()
        each.update(before[id(each)])
    for module in modules:
        sys.modules.pop(module, None)


def all_registries() -> list[dict]:
    from tir_kernels.analysis.measures import MEASURES
    from tir_kernels.fewshot.data.known import KNOWN_SETS
    from tir_kernels.fewshot.data.sources import SOURCES
    from tir_kernels.fewshot.methods import METHODS
    from tir_kernels.operators import choose
    from tir_kernels.rules import RULES
    from tir_kernels.towers.find import FAMILIES

    return [RULES, METHODS, FAMILIES, choose._registered, SOURCES, KNOWN_SETS, MEASURES]


def test_every_kind_is_there():
    assert tuple(sections()) == KINDS
    table = DOCUMENT.read_text().partition("\n## ")[0]
    assert len(re.findall(r"^\| (?!kind|-)", table, flags=re.MULTILINE)) == len(KINDS)
    for title, blocks in sections().items():
        register = [line for line in blocks[1].splitlines() if line and line[0] not in "#f"]
        assert len(register) == 1, f"{title}: one registry line"


def test_a_rule(add, run_command):
    names = add("A weighting rule")
    assert names["table"].tolist() == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    run_command("--rule", "halving", "--method", "tir")


def test_a_method(add, run_command):
    add("A method")
    from nearest_centroid import NearestCentroid

    from tir_kernels.fewshot import finetune_episode, finetune_episodes

    results = finetune_episodes(make_model(), make_tokenizer(), EPISODES, NearestCentroid())
    for episode, result in zip(EPISODES, results, strict=True):
        alone = finetune_episode(make_model(), make_tokenizer(), episode, NearestCentroid())
        torch.testing.assert_close(result.query_logits, alone.query_logits)
    records = run_command("--method", "prototypes", "--arm", "sharp=prototypes,logit_scale=50")
    assert {record.arm for record in records} == {"prototypes", "sharp"}
    assert {record.correct for record in records if record.arm == "sharp"} == {
        record.correct for record in records if record.arm == "prototypes"
    }


def test_a_tower(add):
    names = add("A tower")
    assert names["features"].shape == (2, 16)
    assert names["counts"].shape == (2, 16)
    from tir_kernels import adapters, analysis

    model, images = names["model"], names["images"]
    before = model(images)
    with adapters.add_lora(model, towers=["visual"]) as lora:
        assert len(lora.factors()) == 6
        torch.testing.assert_close(model(images), before)
    sinks = analysis.measure_class("sink-ratio")()
    assert len(analysis.measure(model, images, [sinks])) == 4


def test_a_backend(add):
    names = add("A backend")
    from counting import CountingBackend

    assert CountingBackend.calls == 1
    assert names["out"].shape == (1, 2, 9, 8)


def test_a_data_source(add, tmp_path, run_command):
    add("A data source")
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog"):
        for number in range(3):
            pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}_{number}.png")
    records = run_command("--method", "zero-shot", data=f"prefixed:{tmp_path / 'photos'}")
    assert sorted(records[0].classes) == ["cat", "dog"]


def test_a_known_data_set(add, tmp_path):
    add("A known data set")
    from tir_kernels.fewshot.data.dataset import load_data

    for name in ("Bean_Rust", "healthy"):
        (tmp_path / "leaves" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "leaves" / name / "1.png")
    words = {each.folder: each.words for each in load_data(tmp_path / "leaves").classes}
    assert words == {"Bean_Rust": "bean leaf with rust", "healthy": "healthy bean leaf"}


def test_a_measure(add):
    findings = add("A measure")["findings"]
    entropies = [each for each in findings if each.name == "entropy of rows"]
    assert [each.block for each in entropies] == list(range(12))
    assert all(0 < each.values.item() <= 1 for each in entropies)


@pytest.fixture
def run_command(tmp_path, monkeypatch):
    """``tir-finetune run`` of one episode on the embedded model; gives the records."""
    from tir_kernels.demo import model_directory, write_image_folder
    from tir_kernels.fewshot import read_run
    from tir_kernels.fewshot.command import main

    def run(*options: str, data: str | None = None) -> list:
        out = tmp_path / "run"
        if data is None:
            data = str(tmp_path / "drawings")
            write_image_folder(data, images_per_class=3)
        words = ["run", "--data", data, "--model", str(model_directory()), "--out", str(out)]
        sizes = ["--ways", "2", "--shots", "1", "--queries", "2", "--episodes", "1", "--no-cache"]
        steps = ["--steps", "2"] if "tir" in options else []
        assert main([*words, *sizes, *steps, "--device", "cpu", *options]) == 0
        return read_run(out)

    return run
