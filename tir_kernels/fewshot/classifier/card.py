"""The model card of a classifier: its folder's README.md, with Hugging Face's front matter."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tir_kernels.fewshot.classifier.figures import all_figures
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.text import printable

if TYPE_CHECKING:
    from tir_kernels.fewshot.classifier.about import BaseModel
    from tir_kernels.fewshot.classifier.classifier import Classifier

# What Markdown takes for marks within a line, or for an address to link to.
_MARKS = re.compile(r"[\\`*_\[\]|~$]|(?<=www)\.|:(?=//)", re.IGNORECASE)


def model_card(classifier: Classifier) -> str:
    """The card, in Markdown. It names no folder of the machine that it was made on."""
    about = classifier.about
    data = ModelCardData(
        library_name="tir_kernels",
        pipeline_tag="image-classification",
        tags=["few-shot", "clip", about.method.name],
    )
    environment = Environment(
        loader=PackageLoader("tir_kernels.fewshot.classifier"),
        autoescape=True,  # class names are what users write
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["literal"] = literal
    template = environment.get_template("model_card.md.jinja")
    return template.render(
        front_matter=data.to_yaml(),
        about=about,
        base=base_names(about.base),
        figures=all_figures(about.figures, about.support),
        settings={
            name.replace("_", " "): value
            for name, value in {**about.settings, **as_settings(about.method)}.items()
            if value is not None
        },
    )


def literal(text: object) -> Markup:
    """Text that Markdown and HTML show as it is, in a table too."""
    shown = html.escape(printable(str(text)), quote=False)
    return Markup(_MARKS.sub(r"\\\g<0>", shown))


def base_names(base: BaseModel) -> list[str]:
    """The names of a base model and its weights, of folders and files the last part alone."""
    given = [base.name, *([] if base.pretrained is None else [base.pretrained])]
    return [Path(name).name if Path(name).is_absolute() else name for name in given]
