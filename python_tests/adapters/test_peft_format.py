import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import low_rank_parts
import pytest
import safetensors.torch
import torch
from tiny_clip import Untouched, make_clip, make_images, make_token_ids
from torch import Tensor, nn

from tir_kernels import adapters
from tir_kernels.adapters import lora_file as peft_format

peft = pytest.importorskip("peft")

MODELS = {"clip": make_clip, "custom text": lambda: make_clip(custom_text=True)}
encode = torch.no_grad()(low_rank_parts.encode)
TOWERS = {"both": ("visual", "text"), "visual": ("visual",), "text": ("text",)}


def trained_lora(model: nn.Module, **options: Any) -> adapters.LoRA:
    """LoRA with factors as of after some training."""
    lora = adapters.add_lora(model, **{"rank": 3, "alpha": 5, "dropout": 0.1, **options})
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lora


def load_with_peft(model: nn.Module, directory: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing tensors
        return peft.PeftModel.from_pretrained(model, directory, **options).eval()


def assert_same_lora(loaded: adapters.LoRA, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    found = loaded.factors()
    assert list(found) == list(factors)
    for name, pair in factors.items():
        for ours, saved in zip(found[name], pair, strict=True):
            assert ours.dtype == saved.dtype
            assert torch.equal(ours, saved), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = make_clip()
    peft_format.save_lora(trained_lora(model), tmp_path)
    return tmp_path


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / peft_format.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, change: Any) -> None:
    path = directory / peft_format.WEIGHTS_FILE
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.slow
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("rank", "alpha"), [(16, 8), (3, 5), (2, 0.7)])
def test_peft_computes_the_same(
    tmp_path: Path, kind: str, towers: str, rank: int, alpha: float
) -> None:
    model = MODELS[kind]()
    untouched = copy.deepcopy(model)
    unadapted = encode(model)
    lora = trained_lora(model, rank=rank, alpha=alpha, towers=TOWERS[towers])
    adapters.save_lora(lora, tmp_path / "new" / "folder")
    ours, theirs = encode(model), encode(load_with_peft(untouched, tmp_path / "new" / "folder"))
    torch.testing.assert_close(theirs, ours)
    for tower, before, after in zip(("visual", "text"), unadapted, ours, strict=True):
        assert torch.allclose(before, after) is (tower not in TOWERS[towers])


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("rank", "alpha"), [(16, 8), (3, 5), (2, 0.7), (7, 100)])
def test_our_own_files_come_back_bit_for_bit(
    tmp_path: Path, kind: str, towers: str, rank: int, alpha: float
) -> None:
    model = MODELS[kind]()
    lora = trained_lora(model, rank=rank, alpha=alpha, towers=TOWERS[towers])
    adapters.save_lora(lora, tmp_path)
    factors = {n: (a.clone(), b.clone()) for n, (a, b) in lora.factors().items()}
    expected = encode(model)
    lora.remove()
    with adapters.load_lora(model, tmp_path) as loaded:
        assert (loaded.rank, loaded.alpha, loaded.dropout) == (rank, alpha, 0.1)
        assert_same_lora(loaded, factors)
        assert all(map(torch.equal, encode(model), expected))


def test_untrained_lora_comes_back_with_its_rank(tmp_path: Path) -> None:
    model = make_clip()
    lora = adapters.add_lora(model, rank=4)
    adapters.save_lora(lora, tmp_path)
    factors = {n: (a.clone(), b.clone()) for n, (a, b) in lora.factors().items()}
    lora.remove()
    assert_same_lora(adapters.load_lora(model, tmp_path), factors)


def test_peft_saves_again_what_it_loaded(saved: Path, tmp_path: Path) -> None:
    model = make_clip()
    lora = adapters.load_lora(model, saved)
    load_with_peft(make_clip(), saved).save_pretrained(tmp_path / "again")
    again = adapters.load_lora(make_clip(), tmp_path / "again")
    assert (again.rank, again.alpha, again.dropout) == (lora.rank, lora.alpha, lora.dropout)
    assert_same_lora(again, lora.factors())


def train_with_peft(adapted: Any) -> None:
    """Some steps, with the output projections left as they are."""
    for name, parameter in adapted.named_parameters():
        if "out_proj" in name:
            parameter.requires_grad_(False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = adapted.encode_image(make_images()), adapted.encode_text(make_token_ids())
        sum(output.square().sum() for output in outputs).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "use_rslora"), [(4, True), (4, False), (6, True), (6, False)])
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_trained_by_peft(tmp_path: Path, kind: str, rank: int, use_rslora: bool) -> None:
    config = peft.LoraConfig(
        r=rank, lora_alpha=7, use_rslora=use_rslora, lora_dropout=0.2, target_modules=["attn"]
    )
    adapted = peft.get_peft_model(MODELS[kind](), config)
    train_with_peft(adapted)
    adapted.eval().save_pretrained(tmp_path)
    model = MODELS[kind]()
    unadapted = encode(model)
    with adapters.load_lora(model, tmp_path) as lora:
        assert (lora.rank, lora.dropout) == (rank, 0.2)
        scaling = 7 / (rank**0.5 if use_rslora else rank)
        assert lora.alpha / lora.rank**0.5 == pytest.approx(scaling, rel=1e-15)
        torch.testing.assert_close(encode(model), encode(adapted), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(encode(model)[0], unadapted[0], atol=1e-3)
        adapters.save_lora(lora, tmp_path / "ours")
        expected = encode(model)
    torch.testing.assert_close(encode(load_with_peft(model, tmp_path / "ours")), expected)


def test_peft_trains_our_adapter_on(saved: Path, tmp_path: Path) -> None:
    """Without freezing anything: a zero output projection stays zero by itself."""
    adapted = load_with_peft(make_clip(), saved, is_trainable=True)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        adapted.encode_image(make_images()).square().sum().backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "trained")
    model = make_clip()
    with adapters.load_lora(model, tmp_path / "trained") as lora:
        assert lora.rank == 9  # queries, keys and values share the stacked A from now on
        torch.testing.assert_close(encode(model), encode(adapted), rtol=1e-4, atol=1e-5)


def test_half_precision_files_load(saved: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].half()

    edit_tensors(saved, halve)
    with adapters.load_lora(make_clip(), saved) as lora:
        for a, b in lora.factors().values():
            assert a.dtype == b.dtype == torch.float32
            assert torch.equal(a, a.half().float())


def test_options_of_loading(saved: Path) -> None:
    model = make_clip()
    with adapters.load_lora(model, str(saved), dropout=0.4, passes_input_gradient=False) as lora:
        assert lora.dropout == 0.4
        low_rank = model.visual.transformer.resblocks[0].attn.low_rank
        assert (low_rank.dropout, low_rank.passes_input_gradient) == (0.4, False)
    with pytest.raises(ValueError, match="dropout must lie in"):
        adapters.load_lora(model, saved, dropout=1.5)


def test_bare_image_tower(tmp_path: Path) -> None:
    tower = make_clip().visual
    lora = trained_lora(tower, towers=["visual"])
    adapters.save_lora(lora, tmp_path)
    with torch.no_grad():
        expected = tower(make_images())
        lora.remove()
        with adapters.load_lora(tower, tmp_path):
            assert torch.equal(tower(make_images()), expected)
        adapted = load_with_peft(tower, tmp_path)
        torch.testing.assert_close(adapted(make_images()), expected)


def test_an_adapter_of_one_tower_ignores_the_kind_of_the_other(tmp_path: Path) -> None:
    adapters.save_lora(trained_lora(make_clip(), towers=["visual"]), tmp_path)
    model = make_clip(text={"embed_cls": True}, custom_text=True)
    with adapters.load_lora(model, tmp_path) as lora:
        assert len(lora.factors()) == 3 * 6


def test_saving_replaces_an_adapter(saved: Path) -> None:
    model = make_clip()
    lora = trained_lora(model, rank=5, towers=["text"])
    adapters.save_lora(lora, saved)
    lora.remove()
    assert adapters.load_lora(model, saved).rank == 5
    assert {p.name for p in saved.iterdir()} == {
        peft_format.CONFIG_FILE,
        peft_format.WEIGHTS_FILE,
    }


@pytest.mark.parametrize("file", ["CONFIG_FILE", "WEIGHTS_FILE"])
def test_interrupted_saving_leaves_nothing_that_loads(
    saved: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    name = getattr(peft_format, file)
    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        if name in path.name:
            write(path, content[:100])
            raise OSError("disk full")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        adapters.save_lora(trained_lora(make_clip(), rank=5), saved)
    with pytest.raises(FileNotFoundError, match="holds no PEFT adapter"):
        adapters.load_lora(make_clip(), saved)
    assert {p.name for p in saved.iterdir()} == {peft_format.WEIGHTS_FILE}


def test_removed_lora_cannot_be_saved(tmp_path: Path) -> None:
    lora = adapters.add_lora(make_clip())
    lora.remove()
    with pytest.raises(RuntimeError, match=r"save it before remove\(\)"):
        adapters.save_lora(lora, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_lora_is_refused(saved: Path) -> None:
    model = make_clip()
    with adapters.add_lora(model), pytest.raises(RuntimeError, match="LoRA already"):
        adapters.load_lora(model, saved)


def refuse(directory: Path, message: str, model: nn.Module | None = None) -> None:
    model = make_clip() if model is None else model
    before = Untouched(model)
    with pytest.raises(ValueError, match=message) as refusal:
        adapters.load_lora(model, directory)
    assert "\n" not in str(refusal.value)
    before.check()


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"rank_pattern": {"resblocks.0.attn": 4}},
        {"alpha_pattern": {"resblocks.0.attn": 4}},
        {"modules_to_save": ["ln_final"]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"fan_in_fan_out": True},
        {"setting_of_the_future": 1},
    ],
)
def test_settings_beyond_plain_lora_are_refused(saved: Path, setting: dict[str, Any]) -> None:
    edit_config(saved, **setting)
    (name,) = setting
    refuse(saved, f"plain LoRA cannot express {name}=.*default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'LORA'; it says 'IA3'"),
        ({"r": 0}, "r must be a whole number of at least 1; it is 0"),
        ({"r": "9"}, "r must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number; it is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number; it is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_dropout": float("inf")}, "lora_dropout must be a finite number; it is inf"),
        ({"r": 10**9}, r"shape \(1000000000, 32\) for this model"),
        ({"r": 12}, r"shape \(12, 32\) for this model and r=12; it is torch.float32 of \(9, 32\)"),
    ],
)
def test_wrong_configurations_are_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(saved, **changes)
    refuse(saved, message)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", "[" * 100_000])
def test_damaged_configuration_is_refused(saved: Path, content: str) -> None:
    (saved / peft_format.CONFIG_FILE).write_text(content)
    refuse(saved, "adapter_config.json (is not readable as JSON|must describe an adapter)")


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / peft_format.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    refuse(saved, "adapter_model.safetensors is damaged")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    refuse(saved, "is a Git LFS pointer, .* run 'git lfs pull'")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
        adapters.load_lora(make_clip(), saved)
    os.mkfifo(path)  # not waited for
    with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
        adapters.load_lora(make_clip(), saved)


def test_values_that_are_no_weights_are_refused(saved: Path) -> None:
    key = "base_model.model.visual.transformer.resblocks.4.attn.lora_B.weight"
    edit_tensors(saved, lambda tensors: tensors[key].view(-1)[3:4].fill_(torch.nan))
    refuse(saved, f"'{key}' holds NaN or infinite values")


def test_adapters_of_compiled_models_load(saved: Path) -> None:
    """PEFT saves the names that torch.compile and data parallelism give to modules."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.model.", "model.model._orig_mod.module.")] = tensors.pop(key)

    with adapters.load_lora(make_clip(), saved) as lora:
        factors = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors().items()}
    edit_tensors(saved, rename)
    with adapters.load_lora(make_clip(), saved) as lora:
        assert_same_lora(lora, factors)


def test_large_configurations_are_refused(saved: Path) -> None:
    with (saved / peft_format.CONFIG_FILE).open("r+b") as file:
        file.truncate(2**30)  # takes no space on the disk
    refuse(saved, "too large for a configuration")


def test_an_adapted_output_projection_is_refused(saved: Path) -> None:
    def adapt(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if "resblocks.2.attn.base_layer.out_proj" in key:
                tensors[key][0, 0] = 1.0

    edit_tensors(saved, adapt)
    refuse(saved, "adapts the output projection too .*resblocks.2.*freeze the parameters")


def test_other_target_modules_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["attn", "c_fc"])
    peft.get_peft_model(make_clip(), config).save_pretrained(tmp_path)
    refuse(tmp_path, r"cannot take LoRA in this model \('.*mlp.c_fc.*target_modules='\(visual")


def test_missing_and_unknown_tensors_are_refused(saved: Path) -> None:
    key = "base_model.model.visual.transformer.resblocks.4.attn.lora_B.weight"
    edit_tensors(saved, lambda tensors: tensors.pop(key))
    refuse(saved, f"lacks '{key}'")
    edit_tensors(saved, lambda tensors: tensors.clear())
    refuse(saved, "holds no tensors")
    edit_tensors(saved, lambda tensors: tensors.update(more=torch.zeros(1)))
    refuse(saved, r"cannot take LoRA in this model \('more'\)")


def test_adapters_of_other_models_are_refused(saved: Path) -> None:
    refuse(saved, r"shape \(9, 48\) for this model", make_clip({"width": 48}))
    refuse(saved, "cannot take LoRA in this model .*resblocks.4", make_clip({"layers": 4}))
    refuse(saved, "lacks .*same depth", make_clip({"layers": 7}))
    refuse(saved, "cannot take LoRA in this model", make_clip(custom_text=True))
    refuse(saved, "cannot take LoRA in this model", make_clip().visual)
    with pytest.raises(TypeError, match="its tower is Linear"):
        adapters.load_lora(nn.Linear(2, 2), saved)


def test_integer_tensors_are_refused(saved: Path) -> None:
    key = "base_model.model.transformer.resblocks.0.attn.lora_A.weight"
    edit_tensors(saved, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    refuse(saved, f"'{key}' must be floating point")
