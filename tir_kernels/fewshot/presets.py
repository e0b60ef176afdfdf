"""Presets: settings that go together, as published, under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tir_kernels.text import Notice, setting

if TYPE_CHECKING:
    from tir_kernels.fewshot.methods import Method
    from tir_kernels.fewshot.settings import Arm


@dataclass(frozen=True)
class Preset:
    """What a preset is, and what it sets beside methods, whose own classes say the rest.

    Args:
        source: Where the settings are published, in words for the help text.
        command: Settings of views and images.
    """

    source: str
    command: Mapping[str, Any] = field(default_factory=dict)


PRESETS = {
    "paper": Preset(
        "as arXiv 2605.25799 describes it: LoRA on the vision tower alone, logit scale 100, five "
        "views, images squashed",
        {"augment": "five", "resize": "squash-bilinear"},
    ),
    "program": Preset(
        "as its authors' program trains: LoRA on both towers, a learned context, logit scale 4 "
        "(2 at one shot)"
    ),
    "clip-lora": Preset(
        "as the program of CLIP-LoRA (arXiv 2405.18541) trains at one shot: rank 2 on both towers, "
        "logit scale 100, 500 steps, which are as many for each further shot"
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def settings_of(name: str, method: type[Method]) -> Mapping[str, Any]:
    """What a preset sets of a method; nothing where its class, apart from its bases, has none.

    Raises:
        ValueError: There is no such preset.
    """
    preset_named(name)
    presets: Mapping[str, Mapping[str, Any]] = vars(method).get("presets", {})
    return presets.get(name, {})


def tell_preset(name: str | None, arms: Sequence[Arm], tell: Callable[[str], None]) -> None:
    """Say what a preset, if one is chosen, sets of arms, and beside them."""
    if name is None:
        return
    parts = []
    for arm in arms:
        if own := settings_of(name, type(arm.method)):
            values = ", ".join(f"{key}={getattr(arm.method, key)}" for key in own)
            parts.append(f"{arm.name} has {values}")
    if command := preset_named(name).command:
        parts.append(", ".join(setting(key, value) for key, value in command.items()))
    tell(Notice(f"{setting('preset', name)}: " + "; ".join(parts)))
