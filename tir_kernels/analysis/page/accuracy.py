"""Accuracy of the arms of one run: as a table, as a chart, and in words."""

from __future__ import annotations

from collections.abc import Mapping

from tir_kernels.analysis.figures import Chart, Dots
from tir_kernels.analysis.page.comparison import ACCURACY, NOT_APPLICABLE, separation
from tir_kernels.analysis.page.runs import ReportedRun
from tir_kernels.analysis.page.tables import Cell, Table, Value
from tir_kernels.fewshot.run.summary import Estimate

UNEVEN = (
    "Arms have different episodes, so that means and curves do not compare them; differences do, "
    "which are over the episodes that both have."
)
_FEW = 4  # arms that a sentence names one by one


def accuracy_table(run: ReportedRun) -> Table:
    """Accuracy of each arm, and its bad episodes."""
    columns = ["arm", "label", "episodes", "accuracy, %"]
    if run.zero_shot is not None:
        columns.append(f"episodes below {run.zero_shot}")
    notes = ["Mean ± 95 % interval of Student's t over episodes."]
    if run.zero_shot is None:
        notes.append("Episodes below zero-shot: none found, since no arm is zero-shot.")
    if run.is_uneven:
        notes.append(UNEVEN)
    if run.summary.failures:
        notes.append(f"Without a result, and left out: {run.summary.failures}.")
    if run.summary.skipped_images:
        notes.append(f"{len(run.summary.skipped_images)} unreadable images were replaced.")
    notes.append(run.legend)
    return Table(
        "Accuracy of each arm",
        tuple(columns),
        tuple(_row(run, arm) for arm in run.arms),
        tuple(notes),
    )


def _row(run: ReportedRun, arm: str) -> tuple[Cell, ...]:
    own = run.accuracies[arm]
    shown = run.shown[arm]
    row: list[Cell] = [shown.name, shown.label, len(own), _percent(run.accuracy(arm))]
    if run.zero_shot is not None:
        floor = run.accuracies[run.zero_shot]
        common = own.keys() & floor.keys()
        below = sum(own[episode] < floor[episode] for episode in common)
        is_compared = arm != run.zero_shot and common
        row.append(f"{below} of {len(common)}" if is_compared else NOT_APPLICABLE)
    return tuple(row)


def accuracy_chart(run: ReportedRun, styles: Mapping[str, int], name: str) -> Chart:
    """Accuracy of each episode and arm, with means and intervals."""
    rows = tuple(
        (arm, styles[arm], tuple(100 * each for each in own.values()), _hundredfold(own))
        for arm, own in run.accuracies.items()
    )
    ways = run.settings.get("ways")
    chance = 100 / ways if ways else None
    panel = Dots("Accuracy over episodes", "accuracy, %", rows, chance)
    return Chart(name, "Accuracy over episodes", (panel,))


def _hundredfold(own: Mapping[int, float]) -> Estimate:
    return Estimate.of([100 * value for value in own.values()])


def verdict(run: ReportedRun) -> str:
    """The findings of a run in a few sentences."""
    if not any(run.accuracies.values()):
        return "No episode of this run has a result yet."
    sentences = [_means(run)]
    if run.is_uneven:
        sentences.append(UNEVEN)
    if run.settings.get("queries") == "all":
        sentences.append(
            "Accuracy is over all query images of an episode, so a class with more of them weighs "
            "more."
        )
    if len(run.arms) > 1:
        ablation = run.ablation
        sentences.append(separation(ablation.accuracy, ablation.references, ACCURACY))
    return " ".join(sentence for sentence in sentences if sentence)


def _means(run: ReportedRun) -> str:
    """The accuracy of each arm, or of many the baseline's and the ends."""
    own = {arm: run.accuracy(arm) for arm in run.arms if run.accuracies[arm]}
    chosen = dict.fromkeys(own, "")
    if len(own) > _FEW:
        low, *_, high = sorted(own, key=lambda arm: own[arm].mean or 0.0)
        chosen = {run.baseline: "", low: "lowest ", high: "highest "}
    words = [f"{rank}{arm} {_percent(own[arm])} %" for arm, rank in chosen.items() if arm in own]
    count = episodes_of(run)
    episodes = "one episode" if count == "1" else f"{count} episodes"
    return f"Mean accuracy over {episodes}: {', '.join(words)}."


def episodes_of(run: ReportedRun) -> str:
    """The number of an arm's episodes with a result; of two arms with unlike ones, both ends."""
    counts = [len(own) for own in run.accuracies.values()]
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"


def settings_table(run: ReportedRun) -> Table:
    """The settings of a run, those of its arms beside each other."""
    arms = run.settings.get("arms")
    arms = arms if isinstance(arms, dict) else {}
    names = dict.fromkeys(name for options in arms.values() for name in options)
    shared = {**run.about, **run.settings}
    rows = [
        (name, *(_setting(value) for _ in run.arms))
        for name, value in shared.items()
        if name not in ("arms", "method")
    ]
    rows += [
        (name, *(_setting(arms.get(arm, {}).get(name, "–")) for arm in run.arms)) for name in names
    ]
    headings = (shown.labelled for shown in run.shown.values())
    return Table("Settings", ("setting", *headings), tuple(rows), (run.legend,))


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "unset" if value is None else str(value)


def _percent(estimate: Estimate) -> Value:
    return Value(estimate, scale=100, digits=1)
