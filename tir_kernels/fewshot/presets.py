"""Presets: settings that go together, as published, under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tir_kernels.text import Notice, setting

if TYPE_CHECKING:
    from tir_kernels.fewshot.settings import Arm


@dataclass(frozen=True)
class Preset:
    """Settings of methods, and of a command beside them.

    Args:
        source: Where they are published, in words for the help text.
        methods: Name of a method -> its settings; methods that are not named keep their defaults.
        command: Settings of views and images.
    """

    source: str
    methods: Mapping[str, Mapping[str, Any]]
    command: Mapping[str, Any] = field(default_factory=dict)


_VISION_ONLY = {
    "lora_towers": "vision",
    "context_tokens": 0,
    "logit_scale": 100.0,
    "lora_schedule": "cosine/8",
}
_BOTH_WITH_CONTEXT = {
    "steps": 100,
    "lora_towers": "both",
    "context_tokens": 4,
    "logit_scale": None,
    "lora_schedule": "constant",
}
_REWEIGHTING = {
    "top_ratio": 0.3,
    "strength": 0.5,
    "rule": "linear",
    "layers": None,
    "placement": "tokens",
    "relevance": "text",
    "selection": "relevance",
}

PRESETS = {
    "paper": Preset(
        "as arXiv 2605.25799 describes it: LoRA on the vision tower alone, logit scale 100",
        {
            "lora": {"steps": 250, **_VISION_ONLY},
            "tir": {"steps": 100, **_VISION_ONLY, **_REWEIGHTING},
        },
    ),
    "program": Preset(
        "as its authors' program trains: LoRA on both towers, a learned context, logit scale 4 "
        "(2 at one shot)",
        {
            "lora": _BOTH_WITH_CONTEXT,
            "tir": {**_BOTH_WITH_CONTEXT, **_REWEIGHTING},
        },
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


def tell_preset(name: str | None, arms: Sequence[Arm], tell: Callable[[str], None]) -> None:
    """Say what a preset, if one is chosen, sets of arms, and beside them."""
    if name is None:
        return
    chosen = preset_named(name)
    parts = [
        f"{arm.name} has "
        + ", ".join(f"{key}={getattr(arm.method, key)}" for key in chosen.methods[arm.method.name])
        for arm in arms
        if arm.method.name in chosen.methods
    ]
    if chosen.command:
        parts.append(", ".join(setting(key, value) for key, value in chosen.command.items()))
    tell(Notice(f"{setting('preset', name)}: " + "; ".join(parts)))
