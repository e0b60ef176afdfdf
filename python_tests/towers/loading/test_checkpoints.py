"""Weights files as people have them, and files that are none."""

import argparse
import io
import os
import pathlib
import shutil
import types
from collections import OrderedDict, defaultdict

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weights_files import CONFIG, assert_loaded, load, prefixed, write_config

from tir_kernels.errors import FewShotError
from tir_kernels.towers.loading.models import load_model

pytestmark = pytest.mark.usefixtures("quick_tokenizer")


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "model_state_dict", "model_state", "module", "net", "ema", "student"],
)
def test_training_checkpoints(folder, model, state, key):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    loaded = load(folder, {"epoch": 3, key: state, "optimizer": optimizer, "best": 0.5})
    assert_loaded(loaded, model)
    assert loaded.notes == (f"{folder / 'weights.pt'}: '{key}' taken as the model's weights",)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "model.",
        "clip.",
        "module.clip_model.",
        "model._orig_mod.backbone.",
        "_fsdp_wrapped_module.net.",
    ],
)
def test_prefixes_of_wrappers(folder, model, state, prefix):
    loaded = load(folder, {"checkpoint": {"state_dict": prefixed(state, prefix)}})
    assert_loaded(loaded, model)
    assert "'checkpoint.state_dict' taken as" in " ".join(loaded.notes)


def test_wrappers_of_single_modules(folder, model, state):
    renamed = {key.replace("visual.", "visual._orig_mod."): value for key, value in state.items()}
    renamed = {key.replace("attn.", "attn.module."): value for key, value in renamed.items()}
    loaded = load(folder, renamed)
    assert_loaded(loaded, model)
    assert loaded.notes == ()


def test_other_modules_beside_the_model_are_told(folder, model, state):
    loaded = load(folder, {**prefixed(state, "clip."), "head.weight": torch.ones(2, 8)})
    assert_loaded(loaded, model)
    assert "'clip.…' taken as the model's weights; 1 other tensor left out" in loaded.notes[0]


class Opaque:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return (print, ("code from a checkpoint was run",))


class SettingsDict(dict):
    """A dictionary of a class that only the writer of a checkpoint has."""


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
        types.SimpleNamespace(a=1),
        np.float64(0.5),
        np.arange(3),
        pathlib.PurePosixPath("a/b"),
        defaultdict(list, a=[1]),
        {1, 2},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_objects_beside_the_tensors(folder, model, state, beside, is_zip):
    content = {"args": beside, "state_dict": state}
    assert_loaded(load(folder, content, _use_new_zipfile_serialization=is_zip), model)


@pytest.mark.parametrize("beside", [Opaque(), SettingsDict(a=1), Opaque, torch.optim.Adam, print])
def test_objects_of_any_class_beside_the_tensors(folder, model, state, beside, capsys):
    assert_loaded(load(folder, {"args": [beside], "state_dict": state}), model)
    # The names in a file of the older format can't be listed beforehand.
    with pytest.raises(FewShotError, match="as tensors only"):
        load(folder, {"args": beside, "net": state}, _use_new_zipfile_serialization=False)
    assert "code from" not in capsys.readouterr().out


def test_a_whole_pickled_model(folder, model):
    loaded = load(folder, {"net": nn.Sequential(OrderedDict(clip=model))})
    assert_loaded(loaded, model)
    assert "'clip.…' in 'net' taken as" in loaded.notes[0]


def test_names_made_to_take_long(folder):
    one = torch.ones(1)
    with pytest.raises(FewShotError, match="are not of"):
        load(folder, {f"{index}.visual.proj": one for index in range(3000)})
    with pytest.raises(FewShotError, match="they hold other tensors"):
        load(folder, {200_000 * "." + "visual.proj": one})


def test_modules_nested_in_themselves(folder):
    own = nn.Linear(2, 2)
    own._modules["again"] = own
    with pytest.raises(FewShotError, match="nested more than 50 deep"):
        load(folder, own)
    wide = nn.Linear(2, 2)
    for _ in range(8):  # 8 ** 8 paths to one module
        wide = nn.ModuleList(8 * [wide])
    with pytest.raises(FewShotError, match="more than 20,000 modules"):
        load(folder, wide)


def test_buffers_of_old_checkpoints(folder, model, state):
    old = {
        "attn_mask": torch.full((12, 12), -torch.inf),
        "text.embeddings.position_ids": torch.ones(3),
    }
    loaded = load(folder, {**state, **old})
    assert_loaded(loaded, model)
    assert "makes anew (attn_mask, text.embeddings.position_ids)" in loaded.notes[0]


def test_custom_text_towers_take_flat_names(folder, model, state):
    write_config(folder, custom_text=True)
    loaded = load(folder, prefixed(state, "module."))
    assert torch.equal(loaded.model.text.token_embedding.weight, model.token_embedding.weight)


def test_a_text_tower_far_deeper_than_the_image_tower(folder):
    """As PE-Core-B's, which has most of the model's tensors."""
    text = {**CONFIG["text_cfg"], "layers": 9}
    write_config(folder, custom_text=True, text_cfg__layers=9)
    model = open_clip.CustomTextCLIP(**{**CONFIG, "text_cfg": text})
    for prefix in ("", "module.", "text."):
        assert_loaded(load(folder, prefixed(model.state_dict(), prefix)), model)


def test_scalars_of_one_dimension_and_a_missing_bias(folder, state):
    write_config(folder, init_logit_bias=-10)
    state["logit_scale"] = state["logit_scale"].reshape(1)
    loaded = load(folder, state)
    assert loaded.model.logit_scale.shape == ()
    assert loaded.model.logit_bias == 0
    assert "no logit_bias: 0 was taken" in loaded.notes[0]


@pytest.mark.parametrize(("one", "other"), [("state_dict", "ema"), ("student", "teacher")])
def test_models_that_fit_alike_are_not_guessed(folder, model, state, one, other):
    changed = {**state, "logit_scale": state["logit_scale"] + 1}
    with pytest.raises(FewShotError, match=f"several models .*'{one}' and '{other}'; save the one"):
        load(folder, {one: state, other: changed})
    with pytest.raises(FewShotError, match=rf"'{one}\.…' and .*'{other}\.…'; save the one"):
        load(folder, {**prefixed(state, f"{one}."), **prefixed(changed, f"{other}.")})
    assert_loaded(load(folder, {one: state, other: dict(state)}), model)  # the same twice


def test_a_smaller_student_beside_its_teacher(folder, model, state):
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 3}}
    teacher = open_clip.CLIP(**config).state_dict()
    loaded = load(folder, {**prefixed(teacher, "teacher."), **prefixed(state, "student.")})
    assert_loaded(loaded, model)
    assert "'student.…' taken as" in loaded.notes[0]


def test_half_precision_is_resized_in_float32(folder, state):
    write_config(folder, vision_cfg__image_size=48, text_cfg__context_length=8)
    halves = {key: value.half() for key, value in state.items()}
    loaded = load(folder, halves)
    start = f"the position embedding of {folder / 'weights.pt'} was resized from "
    assert loaded.notes == (
        f"{start}4 x 4 to 6 x 6 patches",
        f"{start}12 to 8 positions of a text",
    )
    same = load(folder, {key: value.float() for key, value in halves.items()})
    assert torch.equal(
        loaded.model.visual.positional_embedding, same.model.visual.positional_embedding
    )
    assert loaded.model.visual.positional_embedding.dtype == torch.float32
    # A grid that varies by column only stays one that does.
    columns = torch.arange(4.0).repeat(4)[:, None].expand(16, 16)
    halves["visual.positional_embedding"] = torch.cat([torch.zeros(1, 16), columns]).half()
    resized = load(folder, halves).model.visual.positional_embedding[1:].unflatten(0, (6, 6))
    torch.testing.assert_close(resized, resized[:1].expand_as(resized))
    assert (resized.diff(dim=1) > 0).all()


def test_positions_without_a_square_grid_are_refused(folder, state):
    state["visual.positional_embedding"] = torch.zeros(1 + 15, 16)
    with pytest.raises(FewShotError, match=r"positional_embedding is \(16, 16\) instead of \(17, "):
        load(folder, state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
def test_values_that_are_no_weights(folder, state, value):
    state["visual.proj"] = state["visual.proj"].double()
    state["visual.proj"][0, 0] = value
    with pytest.raises(FewShotError, match=r"NaN or infinite values in visual\.proj: .*earlier"):
        load(folder, {"model": state})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to(torch.int8), "torch.int8 instead of torch.float32"),
        pytest.param(
            lambda value: value.to_sparse(),
            "torch.sparse_coo",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        (lambda value: value.to("meta"), "without values"),
        (lambda value: value[:0], r"\(0, 8\) instead of \(16, 8\)"),
        (lambda value: value[:1, :1].expand(10**9, 10**9), "1000000000, 1000000000"),
    ],
)
def test_tensors_of_other_kinds(folder, state, change, words):
    state["visual.proj"] = change(state["visual.proj"])
    with pytest.raises(FewShotError, match=rf"are not of .*visual\.proj is .*{words}"):
        load(folder, state)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"base_model.model.visual.lora_A.weight": torch.ones(2, 2)}, "LoRA factors; merge them"),
        (
            {"vision_model.encoder.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)},
            "Hugging Face's CLIPModel",
        ),
        ({"fc.weight": torch.ones(2)}, r"other tensors \(fc\.weight\); pass the architecture"),
        ({"epoch": 3}, r"holds an object of type dict \(epoch\) and no tensors"),
        ({}, "holds an object of type dict and no tensors"),
        (argparse.Namespace(a=1), r"holds an object of type argparse\.Namespace and no"),
    ],
)
def test_contents_of_other_kinds(folder, content, words):
    with pytest.raises(FewShotError, match=words):
        load(folder, content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"\n<?xml version='1.0'?><Error/>", "it is a web page"),
        (b'{"message": "Not Found"}', "it is JSON text"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 file"),
        (b"\x1f\x8b\x08" + bytes(100), "compressed by gzip"),
        (b"PK\x03\x04 no archive", "it is cut short"),
        (b"\xff" * 8 + b"{" + bytes(100), "no weights file"),
        (b"\x80\x02}q\x00(", "cut short"),
        (b"words", "as tensors only"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_are_no_weights(folder, content, words, name):
    (folder / name).write_bytes(content)
    with pytest.raises(FewShotError, match=rf"can't read the weights .*{name}: .*{words}") as info:
        load_model(str(folder))
    assert "\n" not in str(info.value)


def test_cut_files(folder, state):
    whole = io.BytesIO()
    torch.save(state, whole)
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    save_file(state, folder / "whole")
    size = (folder / "whole").stat().st_size
    for content, words in (
        (whole.getvalue(), "cut short"),
        (old.getvalue(), "cut short"),
        ((folder / "whole").read_bytes(), f"has {size // 2:,} of {size:,} bytes"),
    ):
        (folder / "weights.pt").write_bytes(content[: len(content) // 2])
        with pytest.raises(FewShotError, match=words):
            load_model(str(folder))


def test_the_content_decides_not_the_ending(folder, model, state):
    save_file(state, folder / "weights.bin")
    assert_loaded(load_model(str(folder)), model)
    torch.save(state, folder / "other.safetensors")
    assert_loaded(load_model(str(folder)), model)


def test_archives_of_other_things(folder):
    np.savez(folder / "arrays.npz", a=np.ones(2))
    shutil.move(folder / "arrays.npz", folder / "weights.pt")
    with pytest.raises(FewShotError, match=r"NumPy archive .*it holds a\.npy"):
        load_model(str(folder))


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "weights.pt")
    with pytest.raises(FewShotError, match="not a regular file"):
        load_model(str(folder))
