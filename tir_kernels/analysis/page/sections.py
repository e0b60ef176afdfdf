"""Sections of a report, in the order they are read, without a thought of HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tir_kernels.analysis.figures import Chart, Line, Lines
from tir_kernels.analysis.page import topics
from tir_kernels.analysis.page.accuracy import (
    accuracy_chart,
    accuracy_table,
    settings_table,
)
from tir_kernels.analysis.page.columns import Block
from tir_kernels.analysis.page.comparison import accuracy_comparison, sink_comparisons
from tir_kernels.analysis.page.curves import (
    BEFORE,
    Quantity,
    by_block,
    by_step,
    change_table,
    points_in_blocks,
)
from tir_kernels.analysis.page.field import field_tables, quoted_beside
from tir_kernels.analysis.page.gallery import Gallery, gallery
from tir_kernels.analysis.page.ranks import can_be_ranked, ranking, why_not_drawn
from tir_kernels.analysis.page.runs import ReportedRun
from tir_kernels.analysis.page.similarity import similarity_panels
from tir_kernels.analysis.page.tables import Table


class Section(NamedTuple):
    """A part of a page that can be folded.

    Attributes:
        title: Heading.
        caption: Sentence on what one sees.
        refuted: Sentence on what would refute the claim.
        tables, charts: Its content.
        gallery: Pictures, if these are what it shows.
        missing: Sentence that stands in place of content that the run does not have.
        is_open: Whether it is unfolded at first.
    """

    title: str
    caption: str = ""
    refuted: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    gallery: Gallery | None = None
    missing: str = ""
    is_open: bool = True


BY_BLOCK = "-by-block"  # at the end of the names of charts that a page may do without

NOT_TRACKED = (
    "None found: this run was not tracked. Run it with tracking (tir-finetune run --track every=10 "
    "…, in a new folder) to see sink measures through training and the pictures."
)


def run_sections(
    run: ReportedRun, styles: Mapping[str, int], prefix: str, pictures: int
) -> list[Section]:
    """The sections of one run.

    Args:
        run: The run.
        styles: Arm -> style of its lines.
        prefix: Of the names of its charts.
        pictures: Images in its gallery, at most.
    """
    own = {arm: styles[arm] for arm in run.arms}
    found = run.found
    words = _words(run)
    sections = [
        Section(
            "Accuracy",
            refuted=topics.ACCURACY_REFUTED.format(**words),
            tables=(accuracy_table(run), *quoted_beside(run)),
            charts=(accuracy_chart(run, own, f"{prefix}accuracy"),),
        )
    ]
    sections += _comparison_sections(run, words)
    if not found:
        sections.append(Section("Inside the image tower", missing=NOT_TRACKED))
    changes = change_table(found, run.shown, run.baseline)
    if changes is not None:
        title = "What training changes"
        caption = "Each measure after training minus before, and the arms' differences in it."
        refuted = "A difference counts where its interval leaves out 0 after the number of rows."
        sections.append(Section(title, caption, refuted, tables=(changes,), is_open=False))
    similar = _similarity_chart(run, own, prefix)
    curves = [
        section
        for topic in topics.TOPICS
        for section in _topic_section(
            topic, found, own, prefix, words, similar if topic.key == topics.SIMILARITY else []
        )
    ]
    sections += [section for section in curves if section.is_open]
    sections += _norms_section(found, run, prefix, words)
    shown = gallery(run.maps, run.arms, pictures)
    if shown is not None:
        sections.append(
            Section(
                f"Pictures of episode {shown.episode}",
                topics.GALLERY_CAPTION,
                topics.GALLERY_REFUTED.format(**words),
                gallery=shown,
            )
        )
    elif found:
        missing = "None found: the run's folder holds no maps of a finished episode."
        sections.append(Section("Pictures", missing=missing))
    sections += [section for section in curves if not section.is_open]
    sections.append(Section("Settings", tables=(settings_table(run),), is_open=False))
    return sections


def _comparison_sections(run: ReportedRun, words: Mapping[str, str]) -> list[Section]:
    """Arms compared in accuracy and in sinks; none of a single arm."""
    if len(run.arms) < 2:
        return []
    caption = topics.COMPARISON_CAPTION.format(**words)
    refuted = topics.COMPARISON_REFUTED.format(**words)
    table = accuracy_comparison(run.ablation)
    sections = [Section(table.title, caption, refuted, tables=(table,))]
    sinks = tuple(sink_comparisons(run.ablation))
    if sinks:
        caption = topics.SINK_CHANGES_CAPTION.format(**words)
        refuted = topics.SINK_CHANGES_REFUTED.format(**words)
        title = "Arms compared in sinks"
        sections.append(Section(title, caption, refuted, tables=sinks, is_open=False))
    return sections


def field_sections(blocks: Sequence[Block], styles: Mapping[str, int]) -> list[Section]:
    """Several runs side by side, and the arms' ranks where there are data sets enough."""
    sections = []
    for block in blocks:
        title = f"All data sets, {block.title}"
        caption = topics.FIELD_CAPTION.format(baseline=block.baseline)
        sections.append(Section(title, caption, tables=tuple(field_tables(block))))
        if can_be_ranked(block):
            title = f"Ranks over data sets, {block.title}"
            if missing := why_not_drawn():
                sections.append(Section(title, missing=missing))
                continue
            panel, caption = ranking(block, styles)
            shots = "any" if block.shots is None else block.shots
            chart = Chart(f"ranks-{shots}-shots", "Critical differences", (panel,))
            sections.append(Section(title, caption, topics.RANKS_REFUTED, charts=(chart,)))
    return sections


def _words(run: ReportedRun) -> dict[str, str]:
    """The arms that captions speak of."""
    others = [arm for arm in run.arms if arm not in (run.baseline, run.zero_shot)]
    return {"baseline": run.baseline, "arm": others[0] if others else "another arm"}


def _topic_section(
    topic: topics.Topic,
    found: Sequence[Quantity],
    styles: Mapping[str, int],
    prefix: str,
    words: Mapping[str, str],
    more: Sequence[Chart],
) -> list[Section]:
    """The section of a topic, with more charts at its end; none if it has none."""
    taken = {name for each in topics.TOPICS for name in each.measures} | {topics.NORMS_BY_COUNT}
    own = [
        each
        for each in found
        if (each.measure in topic.measures if topic.measures else each.measure not in taken)
    ]
    charts = []
    if own:
        steps = tuple(by_step(each, styles) for each in own)
        name = f"{prefix}{topic.key}-by-step"
        charts.append(Chart(name, "Through training", steps, tuple(styles.items())))
    blocks = tuple(by_block(each, styles) for each in own if len(each.blocks) > 1)
    if blocks:
        lines = {(line.label, line.style): None for panel in blocks for line in panel.lines}
        name = f"{prefix}{topic.key}{BY_BLOCK}"
        charts.append(Chart(name, "From block to block, after training", blocks, tuple(lines)))
    charts += more
    if not charts:
        return []
    refuted = topic.refuted.format(**words)
    return [
        Section(topic.title, topic.caption, refuted, charts=tuple(charts), is_open=topic.is_open)
    ]


def _norms_section(
    found: Sequence[Quantity], run: ReportedRun, prefix: str, words: Mapping[str, str]
) -> list[Section]:
    """Lines are counts here, and panels are arms."""
    kinds: dict[str, dict[int, Quantity]] = {}
    for each in found:
        # "norm at first count 3" is count 3 of the kind "norm at first count".
        match = re.search(r" (\d+)$", each.name)
        if each.measure == topics.NORMS_BY_COUNT and match:
            kind = each.name.removesuffix(match[0])
            kinds.setdefault(kind, {})[int(match[1])] = each
    charts = []
    for number, (kind, counts) in enumerate(kinds.items()):
        panels = [_count_panel(BEFORE, counts, run.arms, at_end=False)]
        panels += [
            _count_panel(f"{arm}, after training", counts, [arm], at_end=True)
            for arm in run.arms
            if any(each.is_trained(arm) for each in counts.values())
        ]
        legend = tuple((f"picked by {count}", count) for count in sorted(counts))
        name = f"{prefix}norms-by-count-{number}"
        charts.append(Chart(name, kind, tuple(panels), legend, is_ordered=True))
    if not charts:
        return []
    refuted = topics.NORMS_REFUTED.format(**words)
    title = "Norms of tokens by the number of classes that pick them"
    return [Section(title, topics.NORMS_CAPTION, refuted, charts=tuple(charts))]


def _count_panel(
    title: str, counts: Mapping[int, Quantity], arms: Sequence[str], *, at_end: bool
) -> Lines:
    lines = []
    for count, quantity in sorted(counts.items()):
        points = points_in_blocks(quantity, arms, at_end=at_end)
        lines.append(Line(f"picked by {count}", count, points))
    return Lines(title, "block", tuple(lines))


def _similarity_chart(run: ReportedRun, styles: Mapping[str, int], prefix: str) -> list[Chart]:
    """Of the tokens that the maps hold, which measures can't compare: those of two arms."""
    panels = similarity_panels(run.maps, styles, run.baseline)
    name = f"{prefix}similarity-of-arms"
    title = "Linear CKA of the maps' tokens"
    return [Chart(name, title, panels, tuple(styles.items()))] if panels else []
