"""A new family of towers is one file and one line: all adapters take it."""

import copy
from pathlib import Path

import pytest
import torch
from small_tower import make_small
from tiny_clip import Untouched, make_images
from torch import nn

from tir_kernels import adapters, towers


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(towers.FAMILIES, "small", "small_tower:Small")


@torch.no_grad()
def test_lora_on_separate_projections() -> None:
    model = make_small()
    merged, before, images = copy.deepcopy(model), Untouched(model), make_images()
    with adapters.add_lora(model, rank=3, alpha=5, towers=["visual"]) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.2)
        assert len(lora.owners()) == 9
        assert list(lora.factors())[2:4] == ["visual.0.v", "visual.1.q"]
        for name, (a, b) in lora.factors().items():
            _, layer, projection = name.split(".")
            attention = merged.blocks[int(layer)].attn
            getattr(attention, f"{projection}_proj").weight.add_(b @ a * 5 / 3**0.5)
        torch.testing.assert_close(model(images), merged(images))
        encoder = towers.ImageEncoder(model)
        torch.testing.assert_close(encoder.features(encoder.embed(images)), merged(images))
        lora.seed([1])
        lora.train()
        first = model(images)
        lora.next_step()
        assert not torch.equal(model(images), first)
    before.check()


@pytest.mark.parametrize("placement", ["tokens", "attention", "both", "values"])
@torch.no_grad()
def test_reweighting_of_all_tokens(placement: str) -> None:
    model = make_small()
    before, images = Untouched(model), make_images()
    expected = model(images)
    for rule in ("none", "linear"):
        with adapters.add_reweighting(model, [1], placement, rule) as handle:
            handle.set_class_embeddings(torch.randn(5, 32))
            found = model(images)
            assert handle.last_counts[1].shape == (4, 16)
        assert torch.allclose(found, expected, atol=1e-6) is (rule == "none")
    before.check()


def test_it_is_named_where_others_are_refused() -> None:
    with pytest.raises(TypeError, match="or a SmallTower; its tower is Linear"):
        towers.vision_tower(nn.Linear(2, 2))


def test_peft_format_of_separate_projections(tmp_path: Path) -> None:
    model = make_small()
    with adapters.add_lora(model, rank=2, towers=["visual"]) as lora:
        adapters.save_lora(lora, tmp_path)
        factors = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors().items()}
    for name, pair in adapters.load_lora(model, tmp_path).factors().items():
        assert all(map(torch.equal, pair, factors[name]))
