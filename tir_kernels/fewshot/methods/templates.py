"""Templates of prompts, an option of every method that reads the classes' names."""

from __future__ import annotations

from typing import Any

from tir_kernels.fewshot import fields

# In place of a template: that of the known data set whose classes are classified.
KNOWN = "known"


def templates(help: str) -> Any:
    """The field of one or more templates; unset: "a photo of a {}."."""
    return fields.added_later(fields.text_list(None, help, _template))


def single_template(given: tuple[str, ...] | None) -> str | None:
    """The template of a method that takes one.

    Raises:
        ValueError: There are several.
    """
    if given is not None and len(given) > 1:
        raise ValueError(f"template must be one where prompts are trained; got {len(given)}")
    return None if given is None else given[0]


def _template(name: str, text: str) -> str:
    if text == KNOWN:
        return text
    if text.count("{}") != 1 or text.count("{") + text.count("}") != 2:
        raise ValueError(f"{name} must hold one {{}} for the class's name; got {text!r}")
    if not text.isprintable():
        raise ValueError(f"{name} must be one line of text; got {text!r}")
    return text.strip()
