"""What runs on which family of towers, found by trying each on a small model.

``PYTHONPATH=python_tests python python_tests/towers/methods_table.py`` prints the table of
docs/towers.md; with ``--write``
it puts it there. Methods are those of the registry, so a new one has its row by itself.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from towers.families import FAMILIES, SIDE, Family, small_timm

from tir_kernels import adapters, analysis
from tir_kernels.adapters.prompt_text import CutNameWarning
from tir_kernels.analysis import MEASURES, measure_class
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot import Episode, Runtime, finetune_episode, finetune_episodes
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.export import export_merged, export_transformers
from tir_kernels.fewshot.methods import METHODS, Method, method_class
from tir_kernels.fewshot.track.pictures import MapMaker
from tir_kernels.rules import PLACEMENTS
from tir_kernels.towers import ImageEncoder, text_tower, vision_tower
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.models import load_model

DOCS = Path(__file__).parents[2] / "docs" / "towers.md"
YES = "yes"
WORDS = ("a red ring", "a blue disc", "a star")
# What a refusal says -> why not, in a few words; a fault has none, and is raised.
_REASONS = {
    "this needs texts": "no text tower",
    "image tower of the timm library alone": "no text tower",
    "PEFT's format is known": "packed projections",
    "CLIPModel can't express": "no `CLIPModel`",
    "gives every image a grid": "a grid for each image",
    "trains the projection that an image tower ends with": "no projection at the end",
    "is not known to end with one": "no projection at the end",
    "does not end in one linear projection": "no projection at the end",
    "need an image tower that pools its class token alone": "no pooled class token",
    "deep prompts need an image tower": "no pooled class token, or positions of patches",
    "takes no registers behind its patches": "places for patches alone",
    "has no class token, whose attention": "no class token",
}


class Refused(Exception):
    """A cell that is not "yes" although nothing was raised: why, in a few words."""


class Tried:
    """A family's model, and small episodes of it."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model, self.tokenizer = family.make()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(6, 3, SIDE, SIDE, generator=generator)
        self.episodes = [self._episode(index, generator) for index in range(2)]

    @staticmethod
    def _episode(index: int, generator: torch.Generator) -> Episode:
        support, query = (torch.randn(6, 3, SIDE, SIDE, generator=generator) for _ in range(2))
        return Episode(list(WORDS), support, torch.arange(3).repeat_interleave(2), query, index)

    @cached_property
    def features(self) -> Tensor:
        """(6, E) of the images."""
        encoder = ImageEncoder(self.model)
        with torch.no_grad():
            return encoder.features(encoder.embed(self.images))

    @cached_property
    def towers(self) -> list[str]:
        """Those that LoRA can be put on."""
        try:
            text_tower(self.model)
        except TypeError:
            return ["visual"]
        return ["visual", "text"]

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model as the command line gets it."""
        with tempfile.TemporaryDirectory() as folder, small_timm():
            self.family.write(Path(folder, "model"))
            return load_model(str(Path(folder, "model")))

    @cached_property
    def classifier(self) -> Classifier:
        """A classifier with LoRA, after a step."""
        loaded, method = self.loaded, _method("lora")
        found = finetune_episode(loaded.model, loaded.tokenizer, self.episodes[0], method)
        base = BaseModel("model", None, loaded.description, loaded.fingerprint)
        about = About(WORDS, WORDS, method, base, 0, 2, 1, "float32", (2, 2, 2))
        return Classifier(about, loaded, found.trained, Runtime())


def _method(name: str, **options: Any) -> Method:
    """A method of one step where steps can be chosen."""
    kind = method_class(name)
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**({"steps": 1} if "steps" in fields else {}), **options)


def _trained(tried: Tried, name: str, **options: Any) -> None:
    """Two episodes at once."""
    results = finetune_episodes(
        tried.model, tried.tokenizer, tried.episodes, _method(name, **options)
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
        assert result.query_logits.shape == (6, 3)
        assert result.query_logits.isfinite().all()


def _reweighting(tried: Tried) -> None:
    classes = torch.randn(3, tried.features.shape[1], generator=torch.Generator().manual_seed(1))
    for placement in PLACEMENTS:
        with adapters.add_reweighting(tried.model, placement=placement) as handle, torch.no_grad():
            handle.set_class_embeddings(classes)
            encoder = ImageEncoder(tried.model)
            changed = encoder.features(encoder.embed(tried.images))
            assert not torch.allclose(changed, tried.features)
            for counts in handle.last_counts.values():
                assert counts.shape == (6, 16)
                assert counts.sum() == 6 * 3 * 4


def _lora(tried: Tried, tower: str) -> None:
    with adapters.add_lora(tried.model, rank=2, towers=[tower]) as lora:
        if tower == "text":
            adapters.PromptContext(tried.model, tried.tokenizer, WORDS)()[0].sum().backward()
        else:
            encoder = ImageEncoder(tried.model)
            encoder.features(encoder.embed(tried.images)).sum().backward()
        assert all(parameter.grad is not None for parameter in lora.parameters())


def _drawn(lora: adapters.LoRA) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _saved_lora(tried: Tried) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with adapters.add_lora(tried.model, rank=2, towers=tried.towers) as lora:
            _drawn(lora)
            before = {key: (a.clone(), b.clone()) for key, (a, b) in lora.factors().items()}
            adapters.save_lora(lora, folder)
        with adapters.load_lora(tried.model, folder) as lora:
            for key, (a, b) in lora.factors().items():
                assert torch.equal(a, before[key][0])
                assert torch.equal(b, before[key][1])


def _merged_lora(tried: Tried) -> None:
    model, _ = tried.family.make()
    lora = adapters.add_lora(model, rank=2, towers=tried.towers)
    lora.train(False)
    _drawn(lora)
    encoder = ImageEncoder(model)
    with torch.no_grad():
        expected = encoder.features(encoder.embed(tried.images))
        lora.merge()
        found = encoder.features(encoder.embed(tried.images))
    assert not torch.allclose(found, tried.features, rtol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _prompts(tried: Tried) -> None:
    context = adapters.PromptContext(tried.model, tried.tokenizer, WORDS)
    context()[0].sum().backward()
    assert context.vectors.grad is not None


def _cut_prompts(tried: Tried) -> None:
    context = adapters.PromptContext(tried.model, tried.tokenizer, WORDS)
    length = tried.tokenizer(list(WORDS)).shape[1]
    if context.embeddings.shape[1] < length:
        return
    is_behind = (context.last_position >= length).all()
    raise Refused("class token at the end" if is_behind else "not causal")


def _last_block(tried: Tried) -> None:
    """Whether the last block's MLP sees fewer than all tokens."""
    seen: list[int] = []
    with adapters.add_lora(tried.model, rank=2, towers=["visual"]), torch.no_grad():
        mlp = vision_tower(tried.model).blocks[-1].module.mlp  # type: ignore[attr-defined]
        hook = mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        encoder = ImageEncoder(tried.model)
        tokens = encoder.embed(tried.images)
        found = encoder.features(tokens)
        hook.remove()
    torch.testing.assert_close(found, tried.features)
    if max(seen) == tokens.shape[1]:
        raise Refused("pool reads all tokens")


def _measures(tried: Tried) -> None:
    classes = torch.randn(3, tried.features.shape[1], generator=torch.Generator().manual_seed(1))
    measures = [measure_class(name)() for name in MEASURES]
    labels = torch.arange(3).repeat_interleave(2)
    findings = analysis.measure(
        tried.model, tried.images, measures, labels=labels, class_embeddings=classes
    )
    assert {finding.block for finding in findings} == set(range(5))


def _pictures(tried: Tried) -> None:
    """Those of the first method that gives any."""
    refusal: Exception | None = None
    for name in METHODS:
        method = _method(name)
        maker = MapMaker(tried.model, method, lambda images: images.movedim(1, 3).byte().numpy())
        try:
            finetune_episode(
                tried.model, tried.tokenizer, tried.episodes[0], method, observers=[maker]
            )
        except (ValueError, TypeError) as error:
            refusal = refusal or error
            continue
        maps = maker.maps(tried.episodes[0], name)
        if maps is not None:
            assert maps.grid == (4, 4)
            return
    assert refusal is not None
    raise refusal


def _at_once(tried: Tried) -> None:
    """The first method that runs gives each episode what it gives alone."""
    name = next(name for name in METHODS if cell(partial(_trained, name=name), tried) == YES)
    method = _method(name)
    together = finetune_episodes(tried.model, tried.tokenizer, tried.episodes, method)
    for episode, result in zip(tried.episodes, together, strict=True):
        alone = finetune_episode(tried.model, tried.tokenizer, episode, method)
        torch.testing.assert_close(
            result.query_logits,
            alone.query_logits,
            rtol=1e-3,
            atol=1e-3,  # type: ignore[union-attr]
        )


def _exported(tried: Tried, write: Callable[[Classifier, Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder, small_timm():
        write(tried.classifier, Path(folder))
        if write is export_merged:
            load_model(folder)


class Row(NamedTuple):
    """A row of the table: what is tried, and how."""

    name: str
    trial: Callable[[Tried], Any]


def method_rows() -> Iterator[Row]:
    """A row for each method in the registry, and each way in which it re-weights."""
    for name in METHODS:
        fields = {field.name: field for field in dataclasses.fields(method_class(name))}
        ways = [("", {})]
        for option in ("placement", "relevance", "classifier"):
            if option in fields:
                choices = fields[option].metadata["choices"]()
                ways += [
                    (f", {option} {choice}", {option: choice})
                    for choice in choices
                    if choice != fields[option].default
                ]
        for words, options in ways:
            yield Row(f"`{name}`{words}", partial(_trained, name=name, **options))


FEATURES = [
    Row("episodes at once", _at_once),
    Row("`add_reweighting`, any placement", _reweighting),
    Row("`add_lora`, image tower", partial(_lora, tower="visual")),
    Row("`add_lora`, text tower", partial(_lora, tower="text")),
    Row("`save_lora`, `load_lora`", _saved_lora),
    Row("LoRA merged", _merged_lora),
    Row("last block for the pooled token alone", _last_block),
    Row("learned prompts", _prompts),
    Row("prompts cut behind their ends", _cut_prompts),
    Row("measures", _measures),
    Row("pictures", _pictures),
    Row("`--model` folder", lambda tried: tried.loaded),
    Row("`export --merged`", partial(_exported, write=export_merged)),
    Row("`export --transformers`", partial(_exported, write=export_transformers)),
]


def cell(trial: Callable[[Tried], Any], tried: Tried) -> str:
    """ "yes", or why not; what is no refusal is raised."""
    try:
        trial(tried)
    except Refused as error:
        return str(error)
    except (FewShotError, ValueError, TypeError) as error:
        for sign, words in _REASONS.items():
            if sign in str(error):
                return words
        raise
    return YES


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever is tried must leave the model to the next one."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    yield
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def table() -> list[str]:
    """Markdown rows: what is tried, and for each family "yes" or why not."""
    torch.manual_seed(0)
    rows = [*method_rows(), *FEATURES]
    cells: list[list[str]] = [[] for _ in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutNameWarning)
        for family in FAMILIES:
            tried = Tried(family)
            for row, own in zip(rows, cells, strict=True):
                with _as_it_was(tried.model):
                    own.append(cell(row.trial, tried))
    head = ["", *(family.name for family in FAMILIES)]
    lines = [head, ["---"] * len(head)]
    lines += [[row.name, *own] for row, own in zip(rows, cells, strict=True)]
    return [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]


def write(lines: list[str]) -> None:
    """Put the table in the place of the one in the docs that has such a head."""
    text = DOCS.read_text().splitlines()
    first = text.index(lines[0])
    last = next(i for i in range(first, len(text)) if not text[i].startswith("|"))
    DOCS.write_text("\n".join([*text[:first], *lines, *text[last:]]) + "\n")


if __name__ == "__main__":
    found = table()
    if "--write" in sys.argv:
        write(found)
    else:
        print("\n".join(found))
