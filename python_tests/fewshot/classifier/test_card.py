"""The model card: valid front matter, rounded figures, and names that stay what they are."""

import html
import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tir_kernels.fewshot import methods
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.classifier.card import literal, model_card
from tir_kernels.fewshot.classifier.figures import all_figures, chance, doubts, imbalance_note
from tir_kernels.text import printable

HOSTILE = [
    "<b>bold</b>",
    "<script>alert(1)</script>",
    "a|b",
    "a \\| b",
    "[a link](http://example.org)",
    "![a picture](http://example.org/x.png)",
    "http://example.org",
    "www.example.org",
    "`code`",
    "`",
    "_under_ *star* ~~gone~~",
    "R&D &amp; &#65;",
    "\x1b[2J\n\nnew",
    "for\\xeat",
    "for\udceat",
    "right \u202eto left",
    "quotes \" and ' and $x$",
    "trailing \\",
]
FIGURES = {
    "zero_shot_accuracy": 1 / 3,
    "held_out_accuracy": 2 / 3,
    "held_out_low": 0.354321,
    "held_out_high": 0.87654321,
    "held_out_images": 15,
    "held_out_folds": 5,
    "support_accuracy": 1.0,
    "final_loss": 0.012345678,
}


def card(labels=("cat", "dog"), name="/home/someone/secret/clip", pretrained=None, **changes):
    base = BaseModel(name, pretrained, f"{name} in words", "0123456789abcdef" * 4)
    values = {
        "labels": tuple(labels),
        "words": tuple(labels),
        "method": methods.TIR(),
        "base": base,
        "seed": 0,
        "shots": 5,
        "views": 1,
        "precision": "float32",
        "support": (5,) * len(labels),
        "figures": FIGURES,
        "settings": {"seed": 0, "batch_size": None, "balance": "none"},
    }
    return model_card(SimpleNamespace(about=About(**(values | changes))))


def cells(text):
    """The text of all cells in the tables, as a browser shows it."""
    page = MarkdownIt("commonmark").enable("table").render(text)
    found = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert not any(re.search(r"<\w", cell) for cell in found), found
    return [html.unescape(cell) for cell in found]


def test_front_matter_is_that_of_hugging_face():
    content = card(HOSTILE)
    data = ModelCard(content).data.to_dict()
    assert data == yaml.safe_load(content.split("---")[1])
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == "tir_kernels"
    assert "tir" in data["tags"]


def test_names_are_shown_as_they_are():
    shown = cells(card(HOSTILE))
    rows = [shown[first : first + 3] for first in range(0, len(shown), 3)]
    expected = [" ".join(printable(label).split(" ")).strip() for label in HOSTILE]
    assert [row[:2] for row in rows if row[2] == "5"] == [[each, each] for each in expected]


@pytest.mark.parametrize("label", HOSTILE)
def test_text_stays_text_in_a_line_too(label):
    page = MarkdownIt("commonmark").enable("strikethrough").render(f"word {literal(label)} word")
    assert html.unescape(page) == f"<p>word {printable(label)} word</p>\n"


def test_figures_are_rounded_and_say_what_they_mean():
    shown = cells(card())
    assert shown[:2] == ["accuracy on the images themselves", "100.0 %"]
    assert "optimistic" in shown[2]
    assert shown[3:5] == ["held-out estimate", "66.7 % (95 % interval 35.4 to 87.7 %)"]
    assert "5-fold" in shown[5]
    assert "fewer images" in shown[5]
    assert shown[6:8] == ["zero-shot on the same images", "33.3 %"]
    assert shown[9:11] == ["chance", "50.0 %"]
    assert shown[12:14] == ["loss of the last training step", "0.01235"]


def test_another_figure_has_a_row_too():
    (row,) = [each for each in all_figures({"calibrated_on": 30}, (1, 1))]
    assert row[:2] == ("calibrated on", "30")
    assert "Nothing was measured" in card(figures={})


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [("/home/someone/secret/clip", None), ("ViT-B-16", "/home/someone/secret/clip.pt")],
)
def test_folders_of_the_machine_are_not_named(name, pretrained):
    text = card(name=name, pretrained=pretrained)
    assert "someone" not in text
    assert "secret" not in text
    assert "clip" in text
    assert "ViT-B-16** with the weights **openai**" in card(name="ViT-B-16", pretrained="openai")


def test_doubts():
    assert doubts(FIGURES, (5, 5, 5)) == []
    (chance_doubt,) = doubts(FIGURES, (8, 4, 3))
    assert "below chance, 53.3 %" in chance_doubt
    (worse,) = doubts(FIGURES | {"zero_shot_accuracy": 0.8}, (5, 5, 5))
    assert "the held-out estimate, 66.7 %, is below zero-shot, 80.0 %" in worse
    alone = {"zero_shot_accuracy": 0.8, "support_accuracy": 0.7}
    (worse,) = doubts(alone, (9, 1))
    assert "the accuracy on the images themselves, 70.0 %, is below zero-shot" in worse


def test_chance_and_imbalance():
    assert chance((6, 2, 2)) == 0.6
    assert imbalance_note(["a", "b"], [6, 2], True) is None
    assert "balance" not in imbalance_note(["a", "b"], [7, 2], False)
    note = imbalance_note(["a", "b"], [7, 2], True)
    assert "class 'a' has 7 images and 'b' has 2" in note
    assert "balance=loss" in note
    assert "shots=2" in note
