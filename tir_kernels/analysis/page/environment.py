"""What the templates of all pages can rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from tir_kernels.text import printable


def environment(**known: Any) -> jinja2.Environment:
    """Templates that escape what they are given.

    Args:
        known: What they may call by name.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalised,
    )
    templates.globals.update(known)
    return templates


def _finalised(value: object) -> object:
    """A value as it is shown: names come from files, and nothing in them may hide."""
    return printable(value) if type(value) is str else value
