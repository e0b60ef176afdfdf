"""Every measure on towers with no, one, four or five tokens in front of the patches."""

import re
from dataclasses import replace

import pytest
import torch
from analysis.views import found, make_towers, make_view

from tir_kernels import analysis
from tir_kernels.analysis.measures import MEASURES, measure_class
from tir_kernels.towers.protocol import AttentionCall

# By what they say of themselves, they count class token and registers too.
OF_ALL_TOKENS = ("massive-activations",)


@pytest.mark.parametrize("name", MEASURES)
def test_registers_are_no_patches(name):
    """Registers that are huge, and near to a class, leave what is said of patches as it was."""
    view = make_view(5, batch=6)
    before = found(measure_class(name)(), view)
    hidden, output = view.hidden.clone(), view.output.clone()
    hidden[:, 1:5] = 40 * view.class_embeddings[1]
    output[:, 1:5] = -300.0
    after = found(measure_class(name)(), replace(view, hidden=hidden, output=output))
    assert before.keys() == after.keys()
    is_same = all(
        torch.equal(own.values.nan_to_num(-1), after[each].values.nan_to_num(-1))
        for each, own in before.items()
    )
    assert is_same == (name not in OF_ALL_TOKENS)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("tower", ["patches alone", "open_clip", "registers alone", "registers"])
def test_quantities_are_those_of_tokens_that_are_there(name, tower):
    model, width = make_towers()[tower]
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    classes = torch.randn(3, width, generator=generator)
    labels = torch.arange(3).repeat_interleave(2)
    findings = analysis.measure(
        model, images, [measure_class(name)()], labels=labels, class_embeddings=classes
    )
    assert {finding.block for finding in findings} == set(range(5))
    quantities = {finding.name for finding in findings}
    if tower in ("patches alone", "registers alone"):
        assert not any("class token" in each for each in quantities)
    if tower in ("patches alone", "open_clip"):
        assert not any("register" in each for each in quantities)
    for finding in findings:
        is_of_some = re.search("count|simple|hard", finding.name)
        assert is_of_some or not finding.values.isnan().any(), finding.name


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_top_patch_lies_where_its_key_does(prefix):
    """In the middle of a 4 x 4 image: one place further on either side, it were on the border."""
    length = prefix + 16
    for place, is_border in ((5, 0.0), (7, 1.0), (4, 1.0), (10, 0.0)):
        key = torch.zeros(2, 1, length, 4)
        key[:, :, prefix + place] = 3.0
        key[:, :, :prefix] = 9.0  # prefix tokens get more, and are none
        call = AttentionCall(torch.ones(2, 1, length, 4), key, torch.zeros(2, 1, length, 4))
        top = found(measure_class("top-patch")(), make_view(prefix, batch=2, call=call))
        assert top["top patch is on the border"].values.tolist() == [is_border] * 2


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_histogram_is_of_the_patches(prefix):
    """Patches that all classes pick, planted at a place; prefix tokens that look the same."""
    view = make_view(prefix, classes=3, class_embeddings=torch.eye(3, 12))
    hidden = view.hidden.clone()
    hidden[:, :, :3] = 0.0  # near to no class
    hidden[:, : prefix + 4] = view.class_embeddings.sum(0)
    shares = found(measure_class("count-histogram")(), replace(view, hidden=hidden))
    assert shares["share of patches with count 3"].values.tolist() == [4 / 16] * 4
