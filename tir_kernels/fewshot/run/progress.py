"""The display of a run while it goes: bars on a terminal, a line per result anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tir_kernels.fewshot.run.records import Record
from tir_kernels.text import Notice, printable

Shown = TypeVar("Shown", bound="Display")


class Messages:
    """A voice that tells the user things while a run goes on.

    Args:
        console: Console to print to.
        spelled: Gives a line's text, with settings named as the reader knows them.
    """

    def __init__(self, console: Console, spelled: Callable[[str], str] = printable) -> None:
        self.console = console
        self._spelled = spelled

    def tell(self, line: str) -> None:
        """Print a line; a ``Notice`` may name settings, and so may text with marks."""
        text = self._spelled(line if isinstance(line, Notice) else Notice(line))
        self.console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def status(self, what: str) -> AbstractContextManager[object]:
        """Show on a terminal what is being done."""
        return self.console.status(what)


def progress_bars(console: Console, time: ProgressColumn) -> Progress:
    """Bars of things that are counted, where the console is a terminal.

    Args:
        console: Where they are shown, until they stop.
        time: The column of the time that is spent or left.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        time,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Display:
    """A display whose bars are shown inside of its context."""

    _bars: Progress

    def __enter__(self: Shown) -> Shown:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


class RunDisplay(Display):
    """Shows finished results with the running accuracy of each arm, and the steps of a training.

    Args:
        console: Console to print to; without a terminal behind it, finished results are printed
            line by line.
        episodes: Episodes of the run.
        steps: Arm -> training steps of one result.
        finished: Results of an earlier, interrupted part of the run.
    """

    def __init__(
        self,
        console: Console,
        *,
        episodes: int,
        steps: Mapping[str, int],
        finished: Iterable[Record],
    ) -> None:
        self._console = console
        self._accuracies: dict[str, list[float]] = {arm: [] for arm in steps}
        self._total = episodes * len(steps)
        self._done = 0
        for record in finished:
            self._count(record)
        self._bars = progress_bars(console, TimeElapsedColumn())
        self._results = self._bars.add_task(
            self._running(), total=self._total, completed=self._done
        )
        self._total_steps = steps
        self._steps = self._bars.add_task("", total=None)

    def step(self, episode: int, arm: str, step: int, loss: float) -> None:
        """A training step is done."""
        description = printable(f"episode {episode}, {arm}, loss {loss:.3f}")
        total = self._total_steps.get(arm)
        self._bars.update(self._steps, completed=step + 1, total=total, description=description)

    def finished(self, record: Record) -> None:
        """A result is in the journal."""
        self._count(record)
        self._bars.update(self._results, advance=1, description=self._running())
        outcome = record.status if record.accuracy is None else f"{100 * record.accuracy:.1f} %"
        line = (
            f"{self._done}/{self._total}: episode {record.episode}, {record.arm}, {outcome} "
            f"in {record.seconds:.1f} s"
        )
        if not self._console.is_terminal:
            line += f" (so far {self._running()})"
        self._console.print(
            printable(line), soft_wrap=True, highlight=False, markup=False, emoji=False
        )

    def _count(self, record: Record) -> None:
        self._done += 1
        if record.accuracy is not None:
            self._accuracies[record.arm].append(record.accuracy)

    def _running(self) -> str:
        return ", ".join(
            f"{printable(arm)} {100 * sum(values) / len(values):.1f} %"
            if values
            else f"{printable(arm)} -"
            for arm, values in self._accuracies.items()
        )
