"""Every architecture of open_clip is opened or refused by name; docs/towers.md says which."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import Architecture, every, table
from tiny_clip import Untouched, make_class_embeddings, make_images, make_token_ids
from torch import Tensor, nn

from tir_kernels import adapters

DOCS = Path(__file__).parents[2] / "docs" / "towers.md"


def of_each_kind(which: str) -> list[Architecture]:
    """One architecture for each kind of open_clip's own image or text towers."""
    found: dict[str, Architecture] = {}
    for each in every():
        if which == "visual" and each.has_vit:
            found.setdefault(each.image_kind, each)
        elif which == "text" and each.has_transformer:
            found.setdefault(each.text_kind, each)
    return list(found.values())


@pytest.mark.slow
def test_every_name_is_opened_or_refused_by_name() -> None:
    for each in every():
        images, texts = each.outcome("visual"), each.outcome("text")
        print(each.name, each.image_kind, images, each.text_kind, texts, sep=" | ")
        kind = each.image_kind
        if each.has_vit or kind in ("timm VisionTransformer", "timm Eva"):
            assert images == "opened", each.name
        elif kind == "ResNet":
            assert "its tower is ModifiedResNet. Choose an architecture" in images, each.name
        else:
            assert f"image tower is timm's {kind.removeprefix('timm ')} (" in images, each.name
        if each.has_transformer:
            assert texts == "opened", each.name
        else:
            assert "with text tower HFTextEncoder" in texts, each.name


@pytest.mark.slow
def test_the_documentation_has_the_tables() -> None:
    text = DOCS.read_text()
    for which in ("visual", "text"):
        assert "\n".join(table(which)) in text, "run python_tests/towers/architectures.py"


@pytest.mark.parametrize("heading", ["Hugging Face transformers", "Tokens and classes"])
def test_the_examples_of_the_documentation(heading: str) -> None:
    if "transformers" in heading:
        pytest.importorskip("transformers")
    (section,) = (s for s in DOCS.read_text().split("\n## ") if s.startswith(heading))
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(compile(example, DOCS.name, "exec"), {})


def gradients(model: nn.Module, encode: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    """Features, and the gradients of a sum of them to inputs and the model's own parameters."""
    features = encode()
    mixed = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
    own = [p for name, p in model.named_parameters() if "low_rank" not in name]
    found = torch.autograd.grad((features * mixed).sum(), [*inputs, *own], allow_unused=True)
    return [features.detach(), *(torch.zeros(()) if grad is None else grad for grad in found)]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("architecture", of_each_kind("visual"), ids=lambda each: each.name)
def test_weights_of_one_change_nothing(architecture: Architecture) -> None:
    """Forward and backward, in float32, at each placement."""
    model = architecture.small(native=True)
    images, before = make_images().requires_grad_(), Untouched(model)

    def found() -> list[Tensor]:
        return gradients(model, lambda: model.encode_image(images), images)

    expected = found()
    for placement in ("tokens", "attention", "both", "values"):
        ones = torch.ones(6)
        with adapters.add_reweighting(model, [0, 1], placement, table=ones) as handle:
            handle.set_class_embeddings(make_class_embeddings())
            assert_alike(found(), expected)
            assert all(counts.sum() == 4 * 5 * 4 for counts in handle.last_counts.values())
        with adapters.add_reweighting(model, [0, 1], placement) as handle:
            handle.set_class_embeddings(make_class_embeddings())
            assert not torch.allclose(found()[0], expected[0], rtol=1e-3)
    before.check()


@pytest.mark.parametrize(
    ("which", "architecture"),
    [(which, each) for which in ("visual", "text") for each in of_each_kind(which)],
    ids=lambda each: getattr(each, "name", each),
)
def test_lora_changes_nothing_until_it_learns(which: str, architecture: Architecture) -> None:
    """Forward and backward, in float32."""
    model, token_ids = architecture.small(native=True), make_token_ids()
    images, before = make_images().requires_grad_(), Untouched(model)

    def found() -> list[Tensor]:
        if which == "visual":
            return gradients(model, lambda: model.encode_image(images), images)
        return gradients(model, lambda: model.encode_text(token_ids))

    expected = found()
    with adapters.add_lora(model, rank=2, towers=[which]) as lora:
        assert_alike(found(), expected)
        with torch.no_grad():
            for _, b in lora.factors().values():
                b.normal_()
        assert not torch.allclose(found()[0], expected[0], rtol=1e-3)
    before.check()
