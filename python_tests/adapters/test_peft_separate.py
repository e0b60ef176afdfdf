"""PEFT's files for models whose query, key and value projections are linear maps of their own."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_transformers import MODELS, image_features, make_siglip, text_features
from tiny_clip import Untouched, make_images, make_token_ids
from torch import Tensor, nn

from tir_kernels import adapters

# The equalities of a family in all its kinds take long together.
pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")

TOWERS = {"both": ("visual", "text"), "visual": ("visual",), "text": ("text",)}


@torch.no_grad()
def encode(model: nn.Module) -> tuple[Tensor, Tensor]:
    return image_features(model, make_images()), text_features(model, make_token_ids())


def trained_lora(model: nn.Module, **options: Any) -> adapters.LoRA:
    lora = adapters.add_lora(model, **{"rank": 3, "alpha": 5, "dropout": 0.1, **options})
    lora.train(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lora


def load_with_peft(model: nn.Module, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")  # PEFT only warns of these
        return peft.PeftModel.from_pretrained(model, directory).eval()


def trained_with_peft(model: nn.Module, **options: Any) -> Any:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **options}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("rank", "alpha"), [(16, 8), (3, 0.7)])
def test_peft_computes_the_same(
    tmp_path: Path, kind: str, towers: str, rank: int, alpha: float
) -> None:
    model = MODELS[kind]()
    untouched, unadapted = copy.deepcopy(model), encode(model)
    lora = trained_lora(model, rank=rank, alpha=alpha, towers=TOWERS[towers])
    adapters.save_lora(lora, tmp_path)
    ours = encode(model)
    torch.testing.assert_close(encode(load_with_peft(untouched, tmp_path)), ours)
    for tower, before, after in zip(("visual", "text"), unadapted, ours, strict=True):
        assert torch.allclose(before, after, atol=1e-3) is (tower not in TOWERS[towers])


@pytest.mark.parametrize("towers", TOWERS)
def test_our_own_files_come_back_bit_for_bit(tmp_path: Path, towers: str) -> None:
    model = make_siglip()
    lora = trained_lora(model, rank=7, alpha=100, towers=TOWERS[towers])
    adapters.save_lora(lora, tmp_path)
    factors = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors().items()}
    expected = encode(model)
    lora.remove()
    with adapters.load_lora(model, tmp_path) as loaded:
        assert (loaded.rank, loaded.alpha, loaded.dropout) == (7, 100, 0.1)
        assert loaded.factors().keys() == factors.keys()
        for name, pair in loaded.factors().items():
            assert all(map(torch.equal, pair, factors[name]))
        loaded.train(False)
        assert all(map(torch.equal, encode(model), expected))


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_an_adapter_of_peft(tmp_path: Path, names: list[str], kind: str, use_rslora: bool) -> None:
    adapted = trained_with_peft(MODELS[kind](), target_modules=names, use_rslora=use_rslora)
    adapted.save_pretrained(tmp_path)
    model = MODELS[kind]()
    before, unadapted = Untouched(model), encode(model)
    with adapters.load_lora(model, tmp_path) as lora:
        assert len(lora.factors()) == 3 * (3 + 2)
        for name, (a, b) in lora.factors().items():
            assert b.any().item() is (f"{name[-1]}_proj" in names)
            assert a.any()  # it can learn
        lora.train(False)
        torch.testing.assert_close(encode(model), encode(adapted), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(encode(model)[0], unadapted[0], atol=1e-2)
        adapters.save_lora(lora, tmp_path / "ours")
        expected = encode(model)
    before.check()
    torch.testing.assert_close(encode(load_with_peft(model, tmp_path / "ours")), expected)


def test_an_adapter_of_one_tower(tmp_path: Path) -> None:
    pattern = r"text_model\..*\.[qv]_proj"
    trained_with_peft(make_siglip(), target_modules=pattern).save_pretrained(tmp_path)
    with adapters.load_lora(make_siglip(), tmp_path) as lora:
        assert {name.split(".")[0] for name in lora.factors()} == {"text"}


def test_adapters_of_other_modules_are_refused(tmp_path: Path) -> None:
    trained_with_peft(make_siglip(), target_modules=["q_proj", "fc1"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapts what cannot take LoRA .*fc1.*in PEFT") as caught:
        adapters.load_lora(make_siglip(), tmp_path)
    pattern = str(caught.value).split("target_modules='")[1].split("' in PEFT")[0]
    named = trained_with_peft(make_siglip(), target_modules=pattern.replace("\\\\", "\\"))
    named.save_pretrained(tmp_path)
    assert len(adapters.load_lora(make_siglip(), tmp_path).factors()) == 15


def test_adapters_of_some_blocks_are_refused(tmp_path: Path) -> None:
    adapted = trained_with_peft(
        make_siglip(), target_modules=["q_proj", "v_proj"], layers_to_transform=[1],
        layers_pattern="layers",
    )  # fmt: skip
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks '.*layers\.0.*adapt every block of a tower"):
        adapters.load_lora(make_siglip(), tmp_path)


def test_factors_of_another_rank_are_refused(tmp_path: Path) -> None:
    trained_with_peft(make_siglip(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5}))
    with pytest.raises(ValueError, match=r"of shape \(5, 32\) for this model and r=5"):
        adapters.load_lora(make_siglip(), tmp_path)
