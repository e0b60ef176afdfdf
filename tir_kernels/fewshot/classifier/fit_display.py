"""The display of a fit while it goes: bars on a terminal, and a line per finished training."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TimeElapsedColumn

from tir_kernels.fewshot.run.progress import Display, progress_bars


class FitDisplay(Display):
    """Shows the trainings of a fit and their steps; an ``expected.FoldListener``.

    Args:
        console: Console to print to; without a terminal behind it, there are lines alone.
        folds: Held-out trainings; the one on all images comes behind them.
        steps: Steps of a training; 0 for a method without.
    """

    def __init__(self, console: Console, folds: int, steps: int) -> None:
        self._console = console
        self._folds = folds
        self._total_steps = steps or None
        self._bars = progress_bars(console, TimeElapsedColumn())
        self._trainings = self._bars.add_task("trainings", total=folds + 1)
        self._steps = self._bars.add_task("", total=None)

    def step(self, fold: int, step: int, loss: float) -> None:
        """A step of a held-out training is done."""
        self._step(self._name(fold), step, loss)

    def step_of_all(self, step: int, loss: float) -> None:
        """A step of the training on all images is done."""
        self._step("all images", step, loss)

    def finished(self, fold: int, correct: int, total: int) -> None:
        """A held-out training is finished."""
        self._bars.update(self._trainings, completed=fold + 1)
        self._print(
            f"{fold + 1}/{self._folds + 1}: {self._name(fold)} held out, {correct} of its {total} "
            "images right"
        )

    def finished_all(self, images: int) -> None:
        """The training on all images is finished."""
        total = self._folds + 1
        self._bars.update(self._trainings, completed=total)
        self._print(f"{total}/{total}: trained on all {images} images")

    def _name(self, fold: int) -> str:
        return f"fold {fold + 1} of {self._folds}"

    def _step(self, name: str, step: int, loss: float) -> None:
        self._bars.update(
            self._steps,
            completed=step + 1,
            total=self._total_steps,
            description=f"{name}, loss {loss:.3f}",
        )

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
