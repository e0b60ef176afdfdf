"""Inert objects in the place of what a checkpoint holds beside its tensors.

A pickled checkpoint names classes and functions. None of them is ever imported or run: an object
of such a class becomes a stand-in that keeps the state it was saved with and can do nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# A file made to hurt can nest a module in itself. The largest CLIP models have some 2,000 modules.
_MAX_MODULES = 20_000
_MAX_DEPTH = 50


class StandIn:
    """An object whose class is only known by name."""

    full_name = ""
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DictStandIn:
    """A dictionary of a class that is only known by name; PyTorch fills none but its own kinds."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def stand_in(full_name: str) -> type:
    """The class to be used for a class or function that a checkpoint names."""
    base = _DictStandIn if full_name.lower().endswith(("dict", "cfgnode")) else StandIn
    return type("StandInFor", (base,), {"full_name": full_name})


def module_tensors(module: StandIn) -> dict[str, Tensor] | None:
    """The state dict of a whole module that was pickled or compiled by TorchScript, if it is one.

    Raises:
        ValueError: It has more submodules than any model.
    """
    if not isinstance(module.state, dict):
        return None
    tensors: dict[str, Tensor] = {}
    waiting = [("", 0, module)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return tensors or None
        prefix, depth, current = waiting.pop()
        for name, value in _members(current.state):
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, StandIn) and isinstance(value.state, dict):
                if depth == _MAX_DEPTH:
                    raise ValueError(f"its modules are nested more than {_MAX_DEPTH} deep")
                waiting.append((f"{prefix}{name}.", depth + 1, value))
    raise ValueError(f"it has more than {_MAX_MODULES:,} modules")


def _members(state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """A module's own tensors and its submodules."""
    if "_parameters" not in state:  # TorchScript keeps them as plain attributes
        yield from state.items()
        return
    for kind in ("_parameters", "_buffers", "_modules"):
        members = state.get(kind)
        unsaved = state.get("_non_persistent_buffers_set") or () if kind == "_buffers" else ()
        if isinstance(members, dict):
            yield from ((name, value) for name, value in members.items() if name not in unsaved)
