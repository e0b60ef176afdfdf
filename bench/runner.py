"""Runs cases one by one: check, time, record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from tir_kernels.fewshot.train.memory import available_bytes

from .bounds import bound_ms, flops_per_second, known_flops_per_second
from .cases import Case, Implementation, WrongResultError
from .records import RecordFile, case_key, make_record
from .settings import Settings
from .timing import Call, Measurement

_USABLE_SHARE_OF_MEMORY = 0.6
_LONGEST_ERROR = 200


@dataclass
class Outcome:
    """The outcome of a run: numbers of cases, and of wrong results."""

    measured: int = 0
    kept: int = 0
    wrong: int = 0
    out_of_time: int = 0
    interrupted: bool = False


@dataclass
class Runner:
    """Runs cases and records what they give.

    Args:
        settings: Of the run.
        records: Where results go; cases that have them are not run again.
        environment: Facts put into every record.
        console: For messages and progress.
    """

    settings: Settings
    records: RecordFile
    environment: dict[str, str]
    console: Console
    outcome: Outcome = field(default_factory=Outcome)
    _said: set[tuple[str, str, str]] = field(default_factory=set)

    def run(self, cases: Sequence[Case], deadline: float | None = None) -> Outcome:
        """Measure the cases, until ``time.monotonic()`` passes the deadline or Ctrl-C is pressed.

        Raises:
            click.ClickException: The GPU reports an error that only a new process gets rid of.
        """
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            try:
                for index, case in enumerate(cases):
                    if deadline is not None and time.monotonic() > deadline:
                        self.outcome.out_of_time = sum(
                            not self._is_finished(case) for case in cases[index:]
                        )
                        break
                    progress.update(task, description=escape(case.title()), completed=index)
                    self._run_case(case)
            except KeyboardInterrupt:
                self.outcome.interrupted = True
        return self.outcome

    def _is_finished(self, case: Case) -> bool:
        names = {i.name for i in case.implementations if not i.unavailable}
        return names <= self.records.finished(case_key(case.identity()))

    def _run_case(self, case: Case) -> None:
        if self._is_finished(case):
            self.outcome.kept += 1
            return
        if too_much := self._too_much(case):
            self._record(case, self._left_out(case, too_much))
            return
        before = _rate(case)
        try:
            results = self._compete(case)
        except torch.OutOfMemoryError as error:
            results = self._left_out(case, _reason(error, []))
        self._record(case, results, before)
        self.outcome.measured += 1

    def _left_out(self, case: Case, reason: str) -> dict[str, Measurement]:
        self._say(case, "left out", reason)
        return {i.name: {"skipped": reason} for i in case.implementations}

    def _compete(self, case: Case) -> dict[str, Measurement]:
        """Prepare every implementation, then let those that are right take turns."""
        if self.settings.compiles:
            torch._dynamo.reset()  # a compiled peer gets this shape alone, not a general one
        torch.manual_seed(0)
        inputs = case.make_inputs()
        calls: dict[str, Call] = {}
        results: dict[str, Measurement] = {}
        for implementation in case.implementations:
            prepared = self._prepare(case, implementation, inputs)
            if isinstance(prepared, dict):
                results[implementation.name] = prepared
            else:
                calls[implementation.name] = prepared
        measured = case.measure(list(calls.values()), self.settings.seconds)
        results |= zip(calls, measured, strict=True)
        for name, result in results.items():
            if "wrong" in result:
                self.outcome.wrong += 1
                self._say(case, f"[bold red]WRONG: {name}[/]", result["wrong"])
                continue
            # Why one is left out is said once, and in a suite's tables at every shape.
            reason = result.get("unavailable") or result.get("skipped")
            if reason and name not in calls and (case.suite, name, reason) not in self._said:
                self._said.add((case.suite, name, reason))
                self._say(case, f"without {name}", reason)
        return results

    def _too_much(self, case: Case) -> str:
        """The reason that a case is not for this machine; empty if it is."""
        if reason := _lacks_memory(case, case.input_bytes, "needs"):
            return reason
        if case.device == "cpu" and case.cost is not None:
            seconds = case.slowdown * case.cost.flops / known_flops_per_second("cpu", case.dtype)
            if seconds > self.settings.max_call_seconds:
                return f"a call may take {seconds:.0f} s; --max-call-seconds allows more"
        return ""

    def _prepare(
        self, case: Case, implementation: Implementation, inputs: Any
    ) -> Call | Measurement:
        """The call, or what is recorded of an implementation that takes no part."""
        if implementation.unavailable:
            return {"unavailable": implementation.unavailable}
        if reason := _lacks_memory(case, implementation.scratch_bytes, "needs about"):
            return {"skipped": reason}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return implementation.prepare(inputs)
            except WrongResultError as error:
                return {"wrong": str(error)}
            except Exception as error:
                _require_working_device(case.device, implementation.name)
                return {"skipped": _reason(error, caught)}

    def _record(
        self, case: Case, results: dict[str, Measurement], rate_before: float = 0.0
    ) -> None:
        bound = None
        if case.cost is not None and any("ms" in result for result in results.values()):
            bound = bound_ms(case.cost, case.device, rate_before, _rate(case))
        identity = case.identity()
        facts = {"cost": case.cost, "bound": bound, "environment": self.environment}
        records = [
            make_record(identity, i.name, **facts, **results[i.name]) for i in case.implementations
        ]
        self.records.replace_case(case_key(identity), records)

    def _say(self, case: Case, what: str, reason: str) -> None:
        self.console.print(f"{escape(case.title())}: {what}: {escape(reason)}", highlight=False)


def _rate(case: Case) -> float:
    """Operations per second that the machine does beside a case: those of a CPU come and go."""
    if case.cost is None:
        return 0.0
    rate = flops_per_second if case.device == "cpu" else known_flops_per_second
    return rate(case.device, case.dtype)


def _lacks_memory(case: Case, needed: int, needs: str) -> str:
    memory = available_bytes(torch.device(case.device))
    if needed <= _USABLE_SHARE_OF_MEMORY * memory:
        return ""
    return f"{needs} {needed / 2**30:.1f} GiB of {memory / 2**30:.1f} GiB free"


def _reason(error: Exception, caught: list[warnings.WarningMessage]) -> str:
    """The beginning of an error, and the warnings in which PyTorch explains its refusals."""
    words = " ".join(str(error).split())
    parts = [f"{type(error).__name__}: {words[:_LONGEST_ERROR]}"]
    if "kernel" in words:
        parts += dict.fromkeys(str(w.message).split("(Triggered")[0].strip() for w in caught)
    return "; ".join(parts)[: 2 * _LONGEST_ERROR]


def _require_working_device(device: str, name: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise click.ClickException(
            f"the GPU does not recover from what {name} did: {str(error).splitlines()[0]}. Records "
            "so far are kept; the same command goes on with the rest"
        ) from error
