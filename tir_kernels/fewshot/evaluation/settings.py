"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.settings import GROUP_COLUMN_HELP

FIT = "fit"


def _temperature(name: str, value: object) -> float | str:
    if value == FIT:
        return FIT
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be a number above 0, or 'fit'; got {value!r}")
    return number


@dataclass(frozen=True)
class EvaluateSettings(fields.Checked):
    """How a classifier is evaluated, besides the data."""

    temperature: float | str | None = fields.checked(
        None,
        "Divisor of the logits in front of the softmax: a number, or fit: the one of least log "
        "loss on the classifier's own labelled images, held out in turn. Unset: the classifier's.",
        _temperature,
    )
    leave_out_unknown: bool = fields.flag(
        "Leave out images of classes that the classifier does not know."
    )
    exclude_support: bool = fields.flag(
        "Leave out images that the classifier was made from, copies of them, and by a column of "
        "subjects other images of the same subjects."
    )
    group_column: str | None = fields.text(None, GROUP_COLUMN_HELP)
    skip_unreadable: bool = fields.flag("Leave out images that can't be read, and count them.")
    bootstrap: int = fields.whole(
        2000, "Resamples for the 95 % intervals; 0: none.", least=0, most=10**6, reason="plenty"
    )
    seed: int = fields.seed("Seed of the resamples.")
    batch_size: int = fields.whole(
        64, "Images that are classified at once.", least=1, most=10**5, reason="no memory has room"
    )
    max_pixels: int | None = None
    white_value: float | None = None
