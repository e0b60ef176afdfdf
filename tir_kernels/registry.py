"""Entries of registries: plain dicts from a name to "module:name", imported when first used."""

from __future__ import annotations

import importlib
from typing import Any


def load(place: str) -> Any:
    """The object at "module:name".

    Raises:
        ImportError, AttributeError: There is none.
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
