"""Arms from text: ``NAME=METHOD,field=value,…``, and what is set for all arms that have a field."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from tir_kernels.fewshot.fields import kinds_of
from tir_kernels.fewshot.methods import Method, method_class
from tir_kernels.fewshot.presets import settings_of
from tir_kernels.fewshot.settings import Arm

PRESET = "preset"  # in the place of a field


def make_arms(
    methods: Sequence[str],
    arms: Sequence[str],
    shared: Mapping[str, Any],
    preset: str | None = None,
) -> tuple[Arm, ...]:
    """The arms of a run.

    Args:
        methods: Names of methods, each an arm of its own name.
        arms: Texts ``NAME=METHOD,field=value,…``; a list's numbers are joined by commas, as in
            ``tir@late=tir,layers=8,10``, and texts by ``|``. The field ``preset`` names a preset,
            for what the arm does not set itself.
        shared: Field -> value, for each arm that has the field and does not set it itself.
        preset: Preset of the arms that name none, for what neither they nor ``shared`` set.

    Raises:
        ValueError, TypeError: An unknown method, field or preset, a value it does not take, two
            arms of one name, or a shared field that no arm has.
    """
    # A method named twice is still one method.
    chosen: list[tuple[str, type[Method], dict[str, Any]]] = [
        (name, method_class(name), {}) for name in dict.fromkeys(methods)
    ]
    chosen += [_parse(text) for text in arms]
    names = [name for name, _, _ in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"arms must have names of their own; {name!r} is there twice")
    for field, value in shared.items():
        owners = [own for _, method, own in chosen if field in fields_of(method)]
        if not owners:
            raise ValueError(f"{field} is no setting of {', '.join(names)}; leave it out")
        for own in owners:
            own.setdefault(field, value)
    for _, method, own in chosen:
        name = own.pop(PRESET, preset)
        if name is not None:
            for field, value in settings_of(name, method).items():
                own.setdefault(field, value)
    return tuple(_arm(*each) for each in chosen)


def fields_of(method: type[Method]) -> dict[str, dataclasses.Field]:
    """A method's options by their names."""
    return {field.name: field for field in dataclasses.fields(method)}


def value_type(method: type[Method], field: str) -> type:
    """``int``, ``float``, ``str``, or ``tuple`` for several numbers or texts, of an option."""
    (kind,) = kinds_of(typing.get_type_hints(method)[field])
    return kind


def _arm(name: str, method: type[Method], options: Mapping[str, Any]) -> Arm:
    try:
        return Arm(name, method(**options))
    except ValueError as error:
        if name == method.name:
            raise
        raise ValueError(f"arm {name!r}: {error}") from error


def _parse(text: str) -> tuple[str, type[Method], dict[str, Any]]:
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ValueError(f"arm must look like NAME=METHOD,field=value; got {text!r}")
    method_name, *settings = rest.split(",")
    try:
        method = method_class(method_name.strip())
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {error}") from error
    given: dict[str, str] = {}
    field = ""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if equals:
            field = key.strip().replace("-", "_")
            if field != PRESET and field not in fields_of(method):
                known = ", ".join(fields_of(method)) or "none"
                raise ValueError(f"arm {name!r}: {method.name} has no {field!r}; it has {known}")
            given[field] = value.strip()
        elif field:  # a list goes on
            given[field] += f",{setting}"
        else:
            raise ValueError(f"arm {name!r}: {setting.strip()!r} is no field=value")
    options = {
        field: value if field == PRESET else _value(name, method, field, value)
        for field, value in given.items()
    }
    if PRESET in options and not settings_of(options[PRESET], method):
        raise ValueError(f"arm {name!r}: preset {options[PRESET]} says nothing of {method.name}")
    return name, method, options


def _value(arm: str, method: type[Method], field: str, text: str) -> Any:
    kind = value_type(method, field)
    try:
        if kind is tuple:
            if fields_of(method)[field].metadata.get("is_text_list"):
                return tuple(text.split("|"))
            return tuple(int(part) for part in text.split(","))
        return kind(text)
    except ValueError as error:
        raise ValueError(f"arm {arm!r}: {field} can't be {text!r}") from error
