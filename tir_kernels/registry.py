"""Entries of registries: plain dicts from a name to "module:name", imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load(place: str) -> Any:
    """The object at "module:name".

    Raises:
        ImportError, AttributeError: There is none.
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def chosen(registry: Mapping[str, str], kind: str, name: str) -> Any:
    """The object behind a name in a registry.

    Args:
        registry: Name -> "module:name".
        kind: What the registry holds, for the message.
        name: The name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in registry:
        raise ValueError(f"{kind} must be one of {', '.join(registry)}; got {name!r}")
    return load(registry[name])
