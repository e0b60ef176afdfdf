"""The model card of a classifier: its folder's README.md, with Hugging Face's front matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from tir_kernels.text import printable

if TYPE_CHECKING:
    from tir_kernels.fewshot.classifier.classifier import Classifier


def model_card(classifier: Classifier) -> str:
    """The card, in Markdown."""
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
    environment.filters["cell"] = lambda text: printable(str(text)).replace("|", "\\|")
    base = Path(about.base.name).name if Path(about.base.name).is_absolute() else about.base.name
    template = environment.get_template("model_card.md.jinja")
    return template.render(front_matter=data.to_yaml(), about=about, base_name=base)
