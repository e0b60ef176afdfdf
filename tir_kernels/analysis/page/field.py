"""The field's table: methods against data sets, one for each number of shots."""

from __future__ import annotations

from collections.abc import Sequence

from tir_kernels.analysis.page.columns import Block, Column, Row, blocks_of
from tir_kernels.analysis.page.comparison import NOT_APPLICABLE
from tir_kernels.analysis.page.quoted import quoted_table
from tir_kernels.analysis.page.runs import ReportedRun
from tir_kernels.analysis.page.tables import Cell, Table, Value
from tir_kernels.fewshot.methods.families import legend
from tir_kernels.fewshot.run.statistics import mean_of_means
from tir_kernels.fewshot.run.summary import Estimate

_DIGITS = 1
INTERVALS = "Mean ± half of the 95 % interval of Student's t over episodes."
MEANS = (
    "The mean of the data sets is for arms that have all of them; its interval, after Welch and "
    "Satterthwaite, tells what the episodes leave open, not what other data sets would give."
)
MARKS = (
    "The highest mean of a column is bold, the second highest underlined. What is compared are the "
    "means as they are shown: equal ones share a mark, and intervals play no part."
)
UNEVEN = "Where n stands beside a mean, the arm has not all episodes of the column, and no mark."
UNCORRECTED = (
    "Mean ± half of the 95 % interval, over the episodes that both arms have; not corrected for "
    "the number of rows: of twenty intervals, one leaves out 0 by chance."
)


def field_tables(block: Block) -> list[Table]:
    """For a number of shots: accuracies, and differences and published numbers if there are any."""
    quoted = quoted_table(block.columns, block.shots, block.title)
    tables = [accuracy_table(block), difference_table(block), quoted]
    return [table for table in tables if table is not None]


def quoted_beside(run: ReportedRun) -> list[Table]:
    """What was published for the data of one run."""
    (block,) = blocks_of([run])
    table = quoted_table(block.columns, block.shots, block.title)
    return [] if table is None else [table]


def accuracy_table(block: Block) -> Table:
    """Accuracy of each arm in each data set, and its mean over them."""
    rows = block.rows
    estimates = [
        [column.accuracy(row) if row in column.accuracies else None for row in rows]
        for column in block.columns
    ]
    are_whole = [[column.is_whole(row) for row in rows] for column in block.columns]
    cells = [[_value(each) for each in own] for own in estimates]
    if len(block.columns) > 1:
        cells.append([_mean(own) for own in zip(*estimates, strict=True)])
        are_whole.append([all(own) for own in zip(*are_whole, strict=True)])
    cells = [_marked(own, whole) for own, whole in zip(cells, are_whole, strict=True)]
    values = [cell for own in cells for cell in own if isinstance(cell, Value)]
    notes = (
        INTERVALS,
        MEANS if len(block.columns) > 1 else "",
        MARKS if any(value.place for value in values) else "",
        UNEVEN if any(value.tells_episodes for value in values) else "",
        _facts(block.columns),
        _changed(block.columns, rows),
        legend(row.label for row in rows),
    )
    return Table(
        f"Accuracy in %, {block.title}",
        _headings(block),
        tuple(
            (block.name_of(row), row.label, *own) for row, *own in zip(rows, *cells, strict=True)
        ),
        tuple(note for note in notes if note),
    )


def difference_table(block: Block) -> Table | None:
    """Each arm minus the baseline on the same episodes; ``None`` without a baseline or others."""
    if not any(column.row_of(block.baseline) for column in block.columns):
        return None
    lines: list[tuple[Cell, ...]] = []
    for row in block.rows:
        if row.arm == block.baseline:
            continue
        estimates = [
            column.difference(row, block.baseline)
            if row in column.accuracies and column.row_of(block.baseline)
            else None
            for column in block.columns
        ]
        fewer = [
            own is not None and own.episodes < len(column.episodes)
            for own, column in zip(estimates, block.columns, strict=True)
        ]
        cells = [_value(own, is_signed=True) for own in estimates]
        if len(block.columns) > 1:
            cells.append(_mean(estimates, is_signed=True))
            fewer.append(any(fewer))
        told = map(_with_episodes, cells, fewer)
        lines.append((block.name_of(row), row.label, *told))
    if not lines:
        return None
    labels = [row.label for row in block.rows if row.arm != block.baseline]
    return Table(
        f"Difference to {block.baseline} in points, {block.title}",
        _headings(block),
        tuple(lines),
        (UNCORRECTED, legend(labels)),
    )


def _headings(block: Block) -> tuple[str, ...]:
    mean = ["mean"] if len(block.columns) > 1 else []
    return ("arm", "label", *(column.name for column in block.columns), *mean)


def _value(estimate: Estimate | None, *, is_signed: bool = False) -> Cell:
    if estimate is None:
        return NOT_APPLICABLE
    return Value(estimate, scale=100, digits=_DIGITS, is_signed=is_signed)


def _mean(estimates: Sequence[Estimate | None], *, is_signed: bool = False) -> Cell:
    """Over all data sets, for an arm that has them all."""
    own = [each for each in estimates if each is not None and each.mean is not None]
    if len(own) < len(estimates):
        return NOT_APPLICABLE
    return _value(mean_of_means(own), is_signed=is_signed)


def _with_episodes(cell: Cell, is_told: bool) -> Cell:
    if is_told and isinstance(cell, Value) and cell.estimate.mean is not None:
        return cell._replace(tells_episodes=True)
    return cell


def _marked(cells: Sequence[Cell], are_whole: Sequence[bool]) -> list[Cell]:
    """A column in which cells over all episodes have their places, and others tell episodes."""
    heights = sorted(
        {
            float(cell.numbers[0])
            for cell, is_whole in zip(cells, are_whole, strict=True)
            if is_whole and isinstance(cell, Value) and cell.numbers[0]
        },
        reverse=True,
    )
    found: list[Cell] = []
    for cell, is_whole in zip(cells, are_whole, strict=True):
        if isinstance(cell, Value) and cell.numbers[0]:
            if not is_whole:
                cell = cell._replace(tells_episodes=True)
            elif len(heights) > 1:  # where all are alike, none is best
                place = heights.index(float(cell.numbers[0]))
                cell = cell._replace(place=place + 1 if place < 2 else 0)
        found.append(cell)
    return found


def _facts(columns: Sequence[Column]) -> str:
    """What the numbers stand on: once what all columns share, then what each has of its own."""
    facts = [column.facts for column in columns]
    shared = {
        name: text for name, text in facts[0].items() if all(own.get(name) == text for own in facts)
    }
    sentences = [", ".join(shared.values())] if shared else []
    for column, own in zip(columns, facts, strict=True):
        rest = [text for name, text in own.items() if name not in shared]
        if rest:
            sentences.append(f"{column.name}: {', '.join(rest)}")
    return f"{'; '.join(sentences)}."


def _changed(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Options that differ from the methods' own, as ``NAME=METHOD,option=value``; may be empty."""
    told = []
    for row in rows:
        where: dict[str, list[str]] = {}
        for column in columns:
            if row in column.changed:
                where.setdefault(",".join(column.changed[row]), []).append(column.name)
        for options, names in where.items():
            if options or row.method != row.arm:
                text = ",".join(part for part in (f"{row.arm}={row.method}", options) if part)
                told.append(text if len(where) == 1 else f"{text} ({', '.join(names)})")
    return f"Options that differ from the methods' own: {'; '.join(told)}." if told else ""
