"""Frozen layers in the form that training uses most: the same numbers, and the model as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import timm_models
import torch
from tiny_clip import ATTENTION_POOL, OWN_BLOCKS, Untouched, make_clip, make_images, make_token_ids
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tir_kernels import towers
from tir_kernels.adapters import add_lora
from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.towers import cast_blocks, frozen_mlps
from tir_kernels.towers.mlp import OpenedMlp


def of_transformers(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        small = pytest.importorskip("small_transformers")
        return getattr(small, f"make_{kind}")(**options)

    return make


def make_quick() -> Any:
    return timm_models.make_alone("vit_base_patch16_clip_quickgelu_224")


# Maker of a model, and the numbers of its MLPs with exact GELU, quick GELU and GELU by tanh, which
# are fused.
MODELS: dict[str, tuple[Callable[[], Any], int, int, int]] = {
    "open_clip": (make_clip, 9, 0, 0),
    "open_clip, quick GELU": (partial(make_clip, quick_gelu=True), 0, 9, 0),
    "open_clip, own blocks": (partial(make_clip, OWN_BLOCKS, OWN_BLOCKS), 9, 0, 0),
    "open_clip, attention pool": (partial(make_clip, ATTENTION_POOL, custom_text=True), 9, 0, 0),
    "PE-Core": (timm_models.MODELS["PE-Core"], 4 + 1 + 3, 0, 0),
    "SigLIP": (timm_models.MODELS["SigLIP"], 4 + 1, 0, 3),
    "EVA": (timm_models.MODELS["EVA"], 4 + 3, 0, 0),
    "EVA-02": (timm_models.MODELS["EVA-02"], 3, 0, 0),  # images by SwiGLU
    "EVA-02 E": (timm_models.MODELS["EVA-02 E"], 4 + 3, 0, 0),
    "timm, quick GELU": (make_quick, 0, 4, 0),
    "norm in the MLP": (partial(timm_models.make_eva, scale_mlp=True), 4, 0, 0),
    "SwiGLU in one": (partial(timm_models.make_eva, swiglu_mlp=True), 0, 0, 0),
    "DINOv3": (timm_models.MODELS["DINOv3"], 4, 0, 0),
    "CLIP of transformers": (of_transformers("clip", hidden_act="gelu"), 2, 3, 0),
    "SigLIP of transformers": (of_transformers("siglip"), 0, 0, 6),
    "SigLIP of transformers, GELU": (
        of_transformers("siglip", hidden_act="gelu", text={"hidden_act": "quick_gelu"}),
        3 + 1,
        2,
        0,
    ),
    "SigLIP 2 of transformers": (of_transformers("siglip2"), 0, 0, 6),
}


def make(name: str) -> Any:
    """A frozen model with LoRA that does something."""
    model = MODELS[name][0]().requires_grad_(False)
    has_texts = _text_tower(model) is not None
    where = ("visual", "text") if has_texts else ("visual",)
    lora = add_lora(model, rank=2, towers=where, passes_input_gradient=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def _text_tower(model: Any) -> Any:
    try:
        return towers.text_tower(model)
    except TypeError:
        return None


def results(model: Any) -> list[Tensor]:
    """The features of images and texts by the towers' parts, and LoRA's gradients."""
    norm = next(each for each in model.modules() if isinstance(each, nn.LayerNorm))
    dtype = norm.weight.dtype
    encoder = towers.ImageEncoder(model)
    found = [encoder.features(encoder.embed(make_images(3).to(dtype)))]
    text = _text_tower(model)
    if text is not None:
        ids = make_token_ids()
        key_mask = text.key_mask(ids)
        found.append(text.encode(text.embed(ids), text.last_position(ids), key_mask=key_mask)[0])
    learned = [p for p in model.parameters() if p.requires_grad]
    score = sum(each.double().square().sum() for each in found)
    return [*found, *torch.autograd.grad(score, learned)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of each activation that was fused."""
    kinds: list[str] = []

    def spy(hidden: Tensor, bias: Any, kind: str, **options: Any) -> Tensor:
        kinds.append(kind)
        return bias_activation(hidden, bias, kind, **options)

    monkeypatch.setattr("tir_kernels.towers.mlp.bias_activation", spy)
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_towers_with_fused_mlps_compute_the_same(name: str, fused: list[str]) -> None:
    model = make(name).double()
    before, expected = Untouched(model), results(model)
    with frozen_mlps(model):
        found = results(model)
    kinds = ("gelu", "quick_gelu", "gelu_tanh")
    assert tuple(fused.count(kind) for kind in kinds) == MODELS[name][1:]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * other.abs().max().item())
    before.check()


def in_autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False)


def error(model: nn.Module, names: list[str], inputs: list[Tensor], exact: list[Tensor]) -> float:
    """Root mean square error of some MLPs' outputs and gradients, each by its largest number."""
    pairs = zip(mlp_results(model, names, inputs), exact, strict=True)
    each = [(one.double() - other) / other.abs().max() for one, other in pairs]
    return torch.cat([one.flatten() for one in each]).square().mean().sqrt().item()


def mlp_results(model: nn.Module, names: list[str], inputs: list[Tensor]) -> list[Tensor]:
    found = []
    for name, tokens in zip(names, inputs, strict=True):
        leaf = tokens.clone().requires_grad_()
        output = model.get_submodule(name)(leaf)
        (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
        found += [output.detach(), leaf.grad]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in MODELS if any(MODELS[name][1:])])
def test_fused_mlps_are_as_accurate_as_the_librarys(name: str, dtype: torch.dtype) -> None:
    model = make(name)
    with frozen_mlps(model):
        names = [name for name, each in model.named_modules() if isinstance(each, OpenedMlp)]
        widths = [model.get_submodule(each).in_turn()[0].in_features for each in names]
    generator = torch.Generator().manual_seed(4)
    inputs = [2 * torch.randn(256, width, generator=generator) for width in widths]
    exact = mlp_results(copy.deepcopy(model).double(), names, [each.double() for each in inputs])
    with in_autocast(dtype):
        own = error(model, names, inputs, exact)
        with frozen_mlps(model), cast_blocks(model, dtype):
            found = error(model, names, inputs, exact)
    assert found <= 1.05 * own


def matrix_types(model: Any) -> set[torch.dtype]:
    """The types of all frozen matrices in the blocks and pools of a model's towers."""
    modules = []
    for tower in filter(None, (towers.vision_tower(model), _text_tower(model))):
        modules += [block.module for block in tower.blocks] + list(getattr(tower, "pools", ()))
    return {
        each.dtype
        for module in modules
        for name, each in module.named_parameters()
        if name.endswith("weight") and each.dim() == 2
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_cast_blocks_are_autocast_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = make(name)
    before = Untouched(model)
    with in_autocast(dtype):
        expected = results(model)
        with cast_blocks(model, dtype):
            found = results(model)
            types = matrix_types(model)
    assert types == {dtype}
    assert all(map(torch.equal, found, expected))
    before.check()


class _Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "name",
    ["open_clip", *(pytest.param(each, marks=pytest.mark.slow) for each in list(MODELS)[1:])],
)
def test_an_exception_leaves_the_model_as_it_was(name: str) -> None:
    model = make(name)
    before = Untouched(model)
    with pytest.raises(_Stopped), frozen_mlps(model), cast_blocks(model, torch.bfloat16):
        raise _Stopped
    before.check()


def test_what_cannot_be_put_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_clip().requires_grad_(False)
    before, converted = Untouched(model), []

    def to(tensor: Tensor, *arguments: Any) -> Tensor:
        converted.append(tensor)
        if len(converted) == 3:
            raise torch.OutOfMemoryError
        return tensor.type(*arguments)

    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), cast_blocks(model, torch.bfloat16):
        pass
    monkeypatch.undo()
    before.check()


def mlp_of(model: Any) -> Any:
    """The MLP of the first block of an image tower."""
    return towers.vision_tower(model).blocks[0].module.mlp


def hook(model: Any, called: list[str]) -> None:
    mlp_of(model)[0].register_forward_hook(lambda *_: called.append("hook"))


def pre_hook(model: Any, called: list[str]) -> None:
    mlp_of(model)[1].register_forward_pre_hook(lambda *_: called.append("hook"))


def backward_hook(model: Any, called: list[str]) -> None:
    mlp_of(model)[0].register_full_backward_hook(lambda *_: called.append("hook"))


def other_forward(model: Any, called: list[str]) -> None:
    mlp = mlp_of(model)
    own = mlp.forward
    mlp.forward = lambda tokens: called.append("forward") or own(tokens)


def other_linear(model: Any, called: list[str]) -> None:
    class Quantised(nn.Linear):
        def forward(self, tokens: Tensor) -> Tensor:
            called.append("quantised")
            return super().forward(tokens)

    mlp_of(model)[0].__class__ = Quantised


def parametrised(model: Any, called: list[str]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            called.append("parametrised")
            return 2 * weight

    parametrize.register_parametrization(mlp_of(model)[0], "weight", Doubled())


LEFT_ALONE = [hook, pre_hook, backward_hook, other_forward, other_linear, parametrised]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("change", LEFT_ALONE)
def test_what_is_not_known_is_left_alone(
    change: Callable[[Any, list[str]], None], when: str, fused: list[str]
) -> None:
    plain, model = make("open_clip").double(), make("open_clip").double()
    change(plain, [])
    expected = results(plain)
    called: list[str] = []
    if when == "before":
        change(model, called)
    with frozen_mlps(model):
        if when == "inside":
            change(model, called)
        called.clear()
        found = results(model)
    assert len(called) == 1
    # A forward that came later calls the one that it found.
    assert len(fused) == (9 if change is other_forward and when == "inside" else 8)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_bias_that_learns_gets_its_gradient(fused: list[str]) -> None:
    model = make("open_clip").double()
    bias = mlp_of(model)[0].bias.requires_grad_()
    expected = results(model)
    with frozen_mlps(model):
        found = results(model)
    assert len(fused) == 8
    assert bias.requires_grad
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_dropout_behind_the_activation_still_drops(fused: list[str]) -> None:
    model = timm_models.make_alone("vit_small_patch16_224", proj_drop_rate=0.5).requires_grad_(
        False
    )
    add_lora(model, rank=2, towers=["visual"], passes_input_gradient=False)
    mlp_of(model).train()
    torch.manual_seed(0)
    expected = results(model)
    torch.manual_seed(0)
    with frozen_mlps(model):
        found = results(model)
    assert len(fused) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results(model)[0], found[0])


class Packed(nn.Parameter):
    """Stands in for a quantised weight, which is a class of its own."""


def test_parameters_that_autocast_does_not_convert_stay() -> None:
    model = make_clip().requires_grad_(False)
    block = model.visual.transformer.resblocks[0]
    block.mlp[0].weight.requires_grad_()
    block.mlp[2].weight = Packed(block.mlp[2].weight.data, requires_grad=False)
    block.attn.out_proj.double()
    block.mlp[2].bias.data = block.mlp[2].bias.data.bfloat16()
    with cast_blocks(model, torch.bfloat16):
        assert block.mlp[0].weight.dtype == block.mlp[2].weight.dtype == torch.float32
        assert block.attn.out_proj.weight.dtype == torch.float64
        assert block.mlp[0].bias.dtype == block.attn.in_proj_weight.dtype == torch.bfloat16
        assert block.ln_1.weight.dtype == model.visual.conv1.weight.dtype == torch.float32
    assert block.mlp[2].bias.dtype == torch.bfloat16


def test_shared_parameters_come_back() -> None:
    model = make_clip().requires_grad_(False)
    first, second, *_ = model.visual.transformer.resblocks
    second.mlp[0].weight = first.mlp[0].weight
    second.attn = first.attn
    before = Untouched(model)
    with frozen_mlps(model), cast_blocks(model, torch.bfloat16):
        assert second.mlp[0].weight.dtype == torch.bfloat16
    before.check()


def test_a_tower_of_another_kind_does_not_keep_the_other_from_it(fused: list[str]) -> None:
    model = make_clip().requires_grad_(False)
    model.visual = nn.Linear(2, 2)
    text, ids = towers.text_tower(model), make_token_ids()
    with frozen_mlps(model), cast_blocks(model, torch.bfloat16):
        assert model.transformer.resblocks[0].mlp[0].weight.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            text.encode(text.embed(ids), text.last_position(ids))
        assert model.visual.weight.dtype == torch.float32
    assert len(fused) == 3


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_has_layers_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = make("open_clip").double()
    expected = results(model)
    with frozen_mlps(model):
        again = copied(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    for one, other in zip(results(again), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
