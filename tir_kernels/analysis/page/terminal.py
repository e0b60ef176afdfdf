"""Tables of a report in a terminal, or piped into another program."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from tir_kernels.analysis.page.tables import Table, place_of, shown
from tir_kernels.text import printable

_WIDE = 10_000  # columns of what is no terminal: lines are not broken there
_STYLES = ("", "bold", "underline")
_MARKS = ("", " ¹", " ²")  # for those who see no styles
MARKS = "¹ highest, ² second highest mean of a column."


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Print tables, and below each what the reader needs that was not said before."""
    said: set[str] = set()
    for table in tables:
        style = "dim" if table.is_quoted else ""
        grid = Grid(title=Text(printable(table.title)), style=style)
        for number, name in enumerate(table.columns):
            grid.add_column(
                Text(printable(name)), overflow="fold", justify="left" if number == 0 else "right"
            )
        places = {place_of(cell) for row in table.rows for cell in row}
        for row in table.rows:
            grid.add_row(*(_cell(shown(cell), place_of(cell), style) for cell in row))
        console.print(grid)
        notes = (*([MARKS] if places - {0} else []), *table.notes)
        for note in notes:
            if note not in said:
                console.print(Text(printable(note), style=style))
        said |= set(notes)


def _cell(text: str, place: int, style: str) -> Text:
    return Text(text + _MARKS[place], style=style or _STYLES[place])


def terminal_text(tables: Sequence[Table]) -> str:
    """Tables as a terminal shows them, of its width and with its styles; piped, in full width."""
    seen = Console()
    file = io.StringIO()
    width = seen.width if seen.is_terminal else _WIDE
    console = Console(
        file=file, width=width, force_terminal=seen.is_terminal, no_color=seen.no_color
    )
    print_tables(tables, console)
    return file.getvalue()
