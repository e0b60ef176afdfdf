"""Published numbers beside those that were run here: from papers, in a table of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from tir_kernels.analysis.page.columns import Column
from tir_kernels.analysis.page.tables import Cell, Table
from tir_kernels.fewshot.methods.families import legend

_FILE = Path(__file__).with_name("quoted.json")


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """The content of ``quoted.json``.

    "data" has the names, in small letters and digits alone, by which each data set is known,
    "rows" what was published of a method with a model and a number of shots: its "paper", the paper
    whose "table" has the numbers, and what "differs" from a run here.
    """
    content: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content


def known_as(data: str) -> str | None:
    """The key in ``published`` of a data set's name, if it is there."""
    plain = "".join(char for char in data.partition(":")[0].lower() if char.isalnum())
    sets = published()["data"]
    return next((key for key, own in sets.items() if plain in own["names"]), None)


def quoted_table(columns: Sequence[Column], shots: int | None, title: str) -> Table | None:
    """What was published for the data sets of a table; ``None`` if nothing was.

    Args:
        columns: The columns of that table; those with another number of classes than the papers'
            have no numbers.
        shots: Its number of shots.
        title: The number of shots in words.
    """
    content = published()
    fitting = [column for column in columns if column.ways == content["ways"]]
    keys = [key for key in dict.fromkeys(known_as(column.data) for column in fitting) if key]
    found = [
        row
        for row in content["rows"]
        if row["shots"] == shots and any(key in row["accuracy"] for key in keys)
    ]
    if not found:
        return None
    titles = [content["data"][key]["title"] for key in keys]
    mean = ["mean"] if len(keys) > 1 else []
    return Table(
        f"Quoted from papers: accuracy in %, {title}",
        ("method", "label", "model", *titles, *mean, "source"),
        tuple(_row(row, keys) for row in found),
        (
            content["note"],
            *_differences(found),
            legend((row["label"] for row in found), are_published=True),
        ),
        is_quoted=True,
    )


def _row(row: dict[str, Any], keys: Sequence[str]) -> tuple[Cell, ...]:
    content = published()
    values = [row["accuracy"].get(key) for key in keys]
    known = [value for value in values if value is not None]
    cells: list[Cell] = ["–" if value is None else f"{value:.2f}" for value in values]
    if len(keys) > 1:
        cells.append(f"{fmean(known):.2f}" if len(known) == len(keys) else "–")
    source = content["papers"][row["paper"]]
    if row["table"] != row["paper"]:
        source = f"{source}, as in {content['papers'][row['table']]}"
    return (row["method"], row["label"], content["models"][row["model"]], *cells, source)


def _differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What differs from a run here, each once behind the methods that it holds for."""
    methods: dict[str, dict[str, None]] = {}
    for row in rows:
        methods.setdefault(row["differs"], {})[row["method"]] = None
    return [f"{', '.join(own)}: {published()['differences'][key]}." for key, own in methods.items()]
