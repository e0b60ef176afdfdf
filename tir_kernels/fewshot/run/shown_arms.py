"""Arms as readers see them: the label of their method's family, and options beside their name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tir_kernels.fewshot.methods import METHODS, method_class
from tir_kernels.fewshot.methods.families import NO_LABEL, label_of


@dataclass(frozen=True)
class ShownArm:
    """An arm of a run.

    Args:
        arm: Its name in the journal.
        method: Name of its method.
        label: Letter of the method's family, see ``families``; ``NO_LABEL`` for an unknown one.
        options: Options that the method wants to be shown beside the name, as text.
        changed: All other options that differ from the method's own defaults, as text.
    """

    arm: str
    method: str
    label: str
    options: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name with options, such as "tip-adapter[alpha=1, beta=5.5]"."""
        return f"{self.arm}[{', '.join(self.options)}]" if self.options else self.arm

    @property
    def labelled(self) -> str:
        """The journal's name and the label, for headings."""
        return f"{self.arm} ({self.label})"


def shown_arms(settings: Mapping[str, Any], arms: Sequence[str]) -> dict[str, ShownArm]:
    """Arm -> how it is shown.

    Args:
        settings: Those of a run, as in its ``settings.json``.
        arms: Names of its arms.
    """
    own = settings.get("arms")
    options = own if isinstance(own, dict) else {}
    return {arm: _shown(arm, options.get(arm, {})) for arm in arms}


def usual_baseline(arms: Mapping[str, ShownArm]) -> str:
    """The arm that others are compared with where nobody has chosen one.

    It is the first of LoRA's arms, else of the linear probe's, else the first of all.
    """
    for method in ("lora", "linear-probe"):
        for arm, shown in arms.items():
            if shown.method == method:
                return arm
    return next(iter(arms))


def _shown(arm: str, options: Mapping[str, Any]) -> ShownArm:
    name = options.get("method", arm)
    if name not in METHODS:
        return ShownArm(arm, name, NO_LABEL)
    method = method_class(name)
    # An option that is not in the settings is newer than the run, and had its default.
    values = {field.name: _plain(field.default) for field in dataclasses.fields(method)}
    defaults = dict(values)
    values |= {key: _plain(value) for key, value in options.items() if key in values}
    changed = [
        key for key in values if values[key] != defaults[key] and key not in method.shown_fields
    ]
    return ShownArm(
        arm,
        name,
        label_of(method),
        tuple(_text(key, values[key]) for key in method.shown_fields),
        tuple(_text(key, values[key]) for key in changed),
    )


def _plain(value: Any) -> Any:
    """A value as a run's settings hold it in their file."""
    return list(value) if isinstance(value, tuple) else value


def _text(option: str, value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"{option}={'unset' if value is None else value}"
