"""Every measure in the registry, on towers of all kinds, with what may be missing or extreme."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from analysis.views import encode, make_towers, real_images
from programs import output_of

from tir_kernels import adapters, analysis
from tir_kernels.analysis.measures import MEASURES
from tir_kernels.towers import vision_tower

TOWERS = ["open_clip", "registers", "registers alone", "patches alone"]


def all_measures():
    return [analysis.measure_class(name)() for name in MEASURES]


def measure_all(model, images, measures=None, **known):
    """The findings of all measures, by name and block; a number or NaN each."""
    found = analysis.measure(model, images, measures or all_measures(), **known)
    by_place = {(each.name, each.block): each for each in found}
    assert len(by_place) == len(found), "names tell findings apart"
    depth = len(vision_tower(model).blocks)
    assert {block for _, block in by_place} == set(range(depth))
    for each in found:
        assert each.values.shape == (len(images),), each.name
        assert each.values.dtype == torch.float32
        assert not each.values.isinf().any(), each.name
        (average,) = each.averages()
        assert average.chance is None or math.isfinite(average.chance), each.name
        assert average.chance is not None or average.value is None, each.name
    return by_place


def is_same(found, expected):
    assert found.keys() == expected.keys()
    return all(found[key].values.equal(expected[key].values) or (
        torch.equal(found[key].values.isnan(), expected[key].values.isnan())
        and torch.equal(found[key].values.nan_to_num(), expected[key].values.nan_to_num())
    ) for key in found)  # fmt: skip


def test_names():
    for name in MEASURES:
        assert analysis.measure_class(name).name == name
    with pytest.raises(ValueError, match="measure must be one of sink-ratio, "):
        analysis.measure_class("sinks")


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("placement", [None, "tokens", "attention"])
def test_on_towers(name, placement):
    model, width = make_towers()[name]
    images, classes = torch.randn(6, 3, 32, 32), torch.randn(3, width)
    known = {"labels": torch.tensor([0, 0, 1, 1, 2, 2]), "class_embeddings": classes}
    handle = adapters.add_reweighting(model, placement=placement) if placement else None
    if handle:
        handle.set_class_embeddings(classes)
    before, state = encode(model, images), torch.get_rng_state()
    measures = all_measures()
    first = measure_all(model, images, measures, **known)
    again = measure_all(model, images, measures, **known)
    assert is_same(again, first), "an unchanged model shows no change"
    assert is_same(measure_all(model, images, **known), first), "nor does it depend on chance"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(encode(model, images), before)
    for block in range(5):
        assert first["CKA with the first pass", block].values.allclose(torch.ones(6))
        assert first["top patch is where it was first", block].values.eq(1).all()
    assert any(own.startswith("sink ratio of registers") for own, _ in first) == (
        name in ("registers", "registers alone")
    )
    assert any("class token" in own for own, _ in first) == (name in ("open_clip", "registers"))


@pytest.mark.parametrize("name", TOWERS)
def test_what_was_seen_first_is_compared_with(name):
    model, width = make_towers()[name]
    images, classes = torch.randn(6, 3, 32, 32), torch.randn(3, width)
    known = {"class_embeddings": classes, "top_ratio": 0.5}
    measures = all_measures()
    first = measure_all(model, images, measures, **known)
    with adapters.add_lora(model, towers=["visual"], rank=4) as lora:
        for parameter in lora.parameters():
            torch.nn.init.normal_(parameter, std=1)
        later = measure_all(model, images, measures, **known)
    assert later["CKA with the first pass", 4].values[0] < 0.999
    for count in range(4):
        fixed, present = (f"norm at {age} count {count}" for age in ("first", "present"))
        assert first[fixed, 4].values.equal(first[present, 4].values) or (
            first[fixed, 4].values.isnan().any()
        )
    assert any(
        not later[f"norm at first count {count}", 4].values.equal(
            later[f"norm at present count {count}", 4].values
        )
        for count in range(4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 100), (5, 1), (4, 100)])
def test_extremes(name, dtype, images, classes):
    """One image, one class, a hundred classes; models of low precision."""
    model, width = make_towers()[name]
    model.to(dtype)
    batch = torch.randn(images, 3, 32, 32).to(dtype)
    known = {
        "labels": torch.arange(images) % classes,
        "class_embeddings": torch.randn(classes, width).to(dtype),
    }
    found = measure_all(model, batch, **known)
    assert len([own for own, block in found if own.startswith("norm at") and block == 0]) == 2 * (
        classes + 1
    )
    attention_alone = measure_all(model, batch)
    assert attention_alone.keys() < found.keys()


@pytest.mark.parametrize("name", TOWERS)
def test_episodes_at_once_are_as_alone(name):
    model, width = make_towers()[name]
    images, classes = torch.randn(8, 3, 32, 32), torch.randn(2, 2, width)
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0])
    at_once = measure_all(model, images, labels=labels, class_embeddings=classes)
    for episode, own in enumerate((slice(0, 4), slice(4, 8))):
        known = {"labels": labels[own], "class_embeddings": classes[episode]}
        alone = measure_all(model, images[own], **known)
        assert alone.keys() == at_once.keys()
        for key, finding in alone.items():
            (expected,) = finding.averages()
            found = at_once[key].averages(2)[episode]
            for one, other in zip(found, expected, strict=True):
                assert (one is None) == (other is None), key
                assert one is None or one == pytest.approx(other, rel=1e-3, abs=1e-4), key


@pytest.mark.slow
def test_registered_measures_import_nothing_heavy():
    script = (
        "import json, sys\n"
        "from tir_kernels import analysis\n"
        "[analysis.measure_class(name)() for name in analysis.MEASURES]\n"
        "print(json.dumps([name for name in ('scipy.stats', 'sklearn', 'ckatorch')"
        " if name in sys.modules]))"
    )
    assert json.loads(output_of(script)) == []


def test_deit_with_registers():
    """A model of timm's own list, of a quarter of its depth."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit3_small_patch16_224", depth=3, pretrained=False).eval()
    registers = timm.create_model("vit_small_patch14_reg4_dinov2", depth=3, img_size=56).eval()
    for module, size, prefix in ((model, 224, 1), (registers, 56, 5)):
        assert vision_tower(module).num_prefix_tokens == prefix
        images = torch.randn(4, 3, size, size)
        found = measure_all(module, images, class_embeddings=torch.randn(2, 384))
        assert found["massive activations", 2].values.eq(0).all(), "random weights have none"


@pytest.mark.slow
def test_on_the_real_model(real_data):
    """Classes that the model knows are told apart, late more than by chance."""
    model, images, labels, classes = real_images(real_data, "tinyimagenet", 4, 3)
    found = measure_all(model, images, labels=labels, class_embeddings=classes)
    last = 11
    ratio, silhouette = (
        found[f"{kind} of class token", last].averages()[0]
        for kind in ("scatter ratio", "silhouette")
    )
    assert ratio.value > 2 * ratio.chance
    assert silhouette.value > silhouette.chance + 0.1
    assert found["CKA with the last block", last].values.allclose(torch.ones(12))
    assert found["CKA with the last block", 0].values[0] < 0.5
    overlap, chance = found["overlap of selected patches", last].averages()[0]
    assert overlap > chance


@pytest.mark.slow
def test_document():
    """Its example runs, and its table names every measure and no other."""
    text = (Path(__file__).parents[2] / "docs" / "measures.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {"print": lambda *_: None}
    exec(compile(example, "measures.md", "exec"), names)
    assert {each.block for each in names["findings"]} == set(range(12))
    rows = re.findall(r"^\| `([a-z-]+)`( ①)? \|", text, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(MEASURES)
    for name, compares in rows:
        assert hasattr(analysis.measure_class(name)(), "_first") == bool(compares)
