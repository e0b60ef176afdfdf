"""PEFT's files for models with one linear map for queries, keys and values, as timm has them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm_models import MODELS, encode, images_for
from tiny_clip import Untouched, make_clip
from torch import Tensor, nn

from tir_kernels import adapters

peft = pytest.importorskip("peft")

ALONE = ["DINOv2 with registers", "DINOv3", "gate"]
IN_CLIP = ["PE-Core", "SigLIP", "pre-norm ViT"]  # texts by nn.MultiheadAttention
SEPARATE = ["EVA-02"]  # so are its texts, and images by separate projections


def encode_texts(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return model.encode_text(torch.randint(1, 50, (3, 12), generator=generator))


@torch.no_grad()
def outputs(model: nn.Module, family: str) -> list[Tensor]:
    images = images_for(MODELS[family]())
    if family in ALONE:
        return [model(images)]
    return [model.encode_image(images), encode_texts(model)]


def towers_of(family: str) -> tuple[str, ...]:
    return ("visual",) if family in ALONE else ("visual", "text")


def fill(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained_lora(model: nn.Module, **options: Any) -> adapters.LoRA:
    lora = adapters.add_lora(model, **{"rank": 3, "alpha": 5, "dropout": 0.1, **options})
    lora.train(False)
    fill(lora.parameters())
    return lora


def load_with_peft(model: nn.Module, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")  # PEFT only warns of these
        return peft.PeftModel.from_pretrained(model, directory).eval()


def trained_with_peft(model: nn.Module, **options: Any) -> Any:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"lora_alpha": 7, **options}))
    named = sorted((n, p) for n, p in adapted.named_parameters() if "lora_" in n)
    fill(p for n, p in named if "out_proj" not in n)
    return adapted.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "alpha"), [(16, 8), (3, 0.7)])
@pytest.mark.parametrize("family", ALONE + IN_CLIP + SEPARATE)
def test_peft_computes_the_same(tmp_path: Path, family: str, rank: int, alpha: float) -> None:
    model = MODELS[family]()
    untouched, unadapted = copy.deepcopy(model), outputs(model, family)
    lora = trained_lora(model, rank=rank, alpha=alpha, towers=towers_of(family))
    adapters.save_lora(lora, tmp_path)
    ours = outputs(model, family)
    theirs = outputs(load_with_peft(untouched, tmp_path), family)
    for own, other, before in zip(ours, theirs, unadapted, strict=True):
        assert not torch.allclose(own, before, atol=1e-3)
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_peft_computes_one_tower(tmp_path: Path, tower: str) -> None:
    model = MODELS["SigLIP"]()
    untouched, unadapted = copy.deepcopy(model), outputs(model, "SigLIP")
    adapters.save_lora(trained_lora(model, towers=[tower]), tmp_path)
    ours = outputs(model, "SigLIP")
    theirs = outputs(load_with_peft(untouched, tmp_path), "SigLIP")
    for name, own, other, before in zip(("visual", "text"), ours, theirs, unadapted, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-5)
        assert torch.equal(own, before) is (name != tower)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", [ALONE[0], IN_CLIP[0], *SEPARATE])
def test_our_own_files_come_back_bit_for_bit(tmp_path: Path, family: str, trained: bool) -> None:
    model, options = MODELS[family](), {"rank": 7, "alpha": 100, "towers": towers_of(family)}
    lora = trained_lora(model, **options) if trained else adapters.add_lora(model, **options)
    adapters.save_lora(lora, tmp_path)
    factors = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors().items()}
    lora.remove()
    with adapters.load_lora(model, tmp_path) as loaded:
        assert (loaded.rank, loaded.alpha, loaded.dropout) == (7, 100, lora.dropout)
        assert loaded.factors().keys() == factors.keys()
        for name, pair in loaded.factors().items():
            assert all(map(torch.equal, pair, factors[name]))


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("rank", [4, 6])  # 6 can be a third for each of three, and is not
@pytest.mark.parametrize("family", [ALONE[0], *IN_CLIP])
def test_an_adapter_of_peft(tmp_path: Path, family: str, rank: int, use_rslora: bool) -> None:
    adapted = trained_with_peft(
        MODELS[family](), r=rank, use_rslora=use_rslora, target_modules=["qkv"]
    )
    adapted.save_pretrained(tmp_path)
    model = MODELS[family]()
    before, unadapted = Untouched(model), outputs(model, family)
    with adapters.load_lora(model, tmp_path) as lora:
        assert lora.rank == rank
        assert {name.split(".")[0] for name in lora.factors()} == {"visual"}
        lora.train(False)
        found, expected = outputs(model, family), outputs(adapted, family)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[0], unadapted[0], atol=1e-2)
        adapters.save_lora(lora, tmp_path / "ours")
    before.check()
    theirs = outputs(load_with_peft(model, tmp_path / "ours"), family)
    for own, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 6])
@pytest.mark.parametrize(
    ("family", "images"), [("PE-Core", "qkv"), ("EVA-02", "[qkv]_proj"), ("EVA-02", "[qv]_proj")]
)
def test_an_adapter_of_peft_for_towers_of_two_kinds(
    tmp_path: Path, family: str, images: str, rank: int
) -> None:
    pattern = rf".*\.{images}|text\.transformer\.resblocks\.\d+\.attn"
    adapted = trained_with_peft(MODELS[family](), r=rank, target_modules=pattern)
    adapted.save_pretrained(tmp_path)
    model = MODELS[family]()
    with adapters.load_lora(model, tmp_path) as lora:
        assert lora.rank == rank
        assert len(lora.factors()) == 3 * (4 + 3)
        lora.train(False)
        for own, other in zip(outputs(model, family), outputs(adapted, family), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [IN_CLIP[0], *SEPARATE])
def test_peft_trains_our_adapter_on(tmp_path: Path, family: str) -> None:
    """Filling with zeros stays zero by itself, beside packed pairs that become shared."""
    model = MODELS[family]()
    adapters.save_lora(trained_lora(model), tmp_path)
    adapted = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    images = images_for(MODELS[family]())
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted.encode_image(images).square().sum() + encode_texts(adapted).square().sum()
        loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "trained")
    if family in SEPARATE:
        tensors = safetensors.torch.load_file(tmp_path / "trained" / "adapter_model.safetensors")
        separate = [key for key in tensors if "q_proj.lora_A" in key]
        assert len(separate) == 4
        assert not any(tensors[key][3:].any() for key in separate)
    model = MODELS[family]()
    with adapters.load_lora(model, tmp_path / "trained") as lora:
        assert lora.rank == 9
        lora.train(False)
        for own, other in zip(outputs(model, family), outputs(adapted, family), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["EVA", "register alone"])
def test_a_packed_map_that_the_library_does_not_call_is_refused(
    tmp_path: Path, family: str
) -> None:
    """Eva's forward reads its weight where biases are apart, so PEFT's change does nothing."""
    model, images = MODELS[family](), images_for(MODELS[family]())
    with torch.no_grad():
        expected = encode(model, images)
        adapted = trained_with_peft(copy.deepcopy(model), r=2, target_modules=["qkv"])
        assert torch.equal(encode(adapted.base_model.model, images), expected)
    with trained_lora(model, towers=["visual"]) as lora:
        assert not torch.allclose(encode(model, images), expected, atol=1e-2)
        with pytest.raises(TypeError, match=r"that it calls; keep lora\.factors\(\)"):
            adapters.save_lora(lora, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    adapted.save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"that it calls|cannot take LoRA .*\.qkv"):
        adapters.load_lora(model, tmp_path)


def test_one_linear_map_whose_bias_is_added_apart_is_called(tmp_path: Path) -> None:
    model = MODELS["EVA"]()
    for block in model.visual.trunk.blocks:
        block.attn.qkv_bias_separate = True
    untouched, images = copy.deepcopy(model), images_for(model)
    adapters.save_lora(trained_lora(model), tmp_path)
    with torch.no_grad():
        theirs = load_with_peft(untouched, tmp_path).encode_image(images)
        torch.testing.assert_close(theirs, encode(model, images), rtol=1e-4, atol=1e-5)


def test_factors_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = MODELS[ALONE[0]]()
    with trained_lora(model, towers=["visual"]) as lora:
        adapters.save_lora(lora, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    key = "base_model.model.blocks.2.attn.qkv.lora_B.weight"
    tensors[key] = tensors[key][:32].clone()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"'{key}' must be .* shape \(96, 9\).* \(32, 9\)"):
        adapters.load_lora(model, tmp_path)


def test_lora_of_several_episodes_is_refused(tmp_path: Path) -> None:
    for model in (make_clip(), MODELS["EVA-02"]()):
        with (
            adapters.add_lora(model, num_episodes=2) as lora,
            pytest.raises(ValueError, match="has several adapters in one"),
        ):
            adapters.save_lora(lora, tmp_path)
    assert list(tmp_path.iterdir()) == []
