"""The command line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import torch
from rich.console import Console

import tir_kernels
from tir_kernels.registry import load

from .cases import Case
from .plot import plot
from .records import Record, RecordFile, environment, require_writable
from .report import open_console, print_sections, sections, summary
from .runner import Outcome, Runner
from .settings import BACKENDS_OF_DEVICE, Settings
from .suites import SUITES

INTERRUPTED = 130
OUT_OF_TIME = 75  # sysexits' "try again later": the same command goes on
# Measuring time per implementation and row: (device, quick) -> seconds
_SECONDS = {
    ("cpu", False): 1.0,
    ("cpu", True): 0.2,
    ("cuda", False): 0.1,
    ("cuda", True): 0.03,
}
_BUSY_LOAD = 1.0  # from here on other work slows down what is measured


# These depend on the machine or on other settings, unless they are given.
_FOUND_OUT = ("device", "threads", "seconds")


def _settings_options(command: Callable) -> Callable:
    """An option for each field of ``Settings``."""
    for field in reversed(fields(Settings)):
        default = None if field.name in _FOUND_OUT else field.default
        shown = default is not None and not isinstance(default, bool)
        command = click.option(
            field.metadata.get("name", f"--{field.name.replace('_', '-')}"),
            field.name,
            default=default,
            show_default=shown,
            is_flag=True if default is False else None,
            **{key: value for key, value in field.metadata.items() if key != "name"},
        )(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
@_settings_options
@click.option(
    "--budget",
    type=click.FloatRange(0),
    help="Seconds after which no further shape is begun; the most telling shapes come first.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Results file, written as the run goes; rows it has already are not measured again.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw time against L and against B·H to this PNG file.",
)
def main(
    suites: tuple[str, ...],
    budget: float | None,
    json_path: Path | None,
    plot_path: Path | None,
    **options,
) -> None:
    """Measure tir_kernels beside PyTorch, on the same tensors in the same process.

    SUITES are some of attention, short, relevance, operator, statistics, step, savings, memory and
    episodes; all of them by default. "published" is a plain rendering of the method's published
    program, the baseline. Exit status: 1 if an implementation computes something wrong, 75 if the
    budget ran out (run the same command again), 130 after Ctrl-C.

    "python -m bench model" is a program of its own: how long attention should take on a GPU, from
    counted instructions.
    """
    began = time.monotonic()
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(device, options["backends"])
    options["device"] = device
    if options["seconds"] is None:
        options["seconds"] = _SECONDS[device, options["quick"]]
    options["threads"] = options["threads"] or len(os.sched_getaffinity(0))
    torch.set_num_threads(options["threads"])
    settings = Settings(**options)
    console = open_console(stderr=True)
    if plot_path is not None:
        require_writable(plot_path)
    records = RecordFile(json_path)
    facts = environment(device)
    _warn_of_other_environments(console, records, facts)
    _warn_of_other_work(console, device)

    chosen = list(dict.fromkeys(suites)) or list(SUITES)
    cases = _cases(chosen, settings, console)
    deadline = None if budget is None else began + budget
    outcome = Runner(settings, records, facts, console).run(cases, deadline)

    found = [r for r in records.records if r["suite"] in chosen and r["device"] == device]
    found.sort(key=lambda record: chosen.index(record["suite"]))
    _show(found, device, shows_all_targets=len(chosen) == len(SUITES))
    if plot_path is not None and not plot(found, plot_path):
        console.print("--plot: no record has a time and a bound to draw")
    sys.exit(_conclude(console, outcome, json_path))


def _check(device: str, backends: tuple[str, ...] | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    for name in backends or ():
        if name not in BACKENDS_OF_DEVICE[device]:
            serving = ", ".join(BACKENDS_OF_DEVICE[device])
            raise click.UsageError(f"--backends: {name} is not measured on {device}; {serving} are")
        if reason := tir_kernels.available_backends()[name]:
            raise click.UsageError(f"--backends: {name} does not run here: {reason}")


def _cases(chosen: list[str], settings: Settings, console: Console) -> list[Case]:
    cases: list[Case] = []
    for name in chosen:
        try:
            cases += load(SUITES[name])(settings)
        except ModuleNotFoundError as error:
            if error.name != "open_clip":
                raise
            console.print(f"suite {name} is left out: it needs open_clip, of open_clip_torch")
    return sorted(cases, key=lambda case: case.priority)


def _warn_of_other_environments(
    console: Console, records: RecordFile, facts: dict[str, str]
) -> None:
    differing = {
        f"{name} {there.get(name)} (now {facts.get(name)})"
        for there in (record.get("environment", {}) for record in records.records)
        for name in {*there, *facts}
        if there.get(name) != facts.get(name)
    }
    if differing:
        console.print(
            f"[yellow]{records.path} keeps records of another environment:[/] "
            f"{', '.join(sorted(differing))}. Choose another file to measure anew."
        )


def _warn_of_other_work(console: Console, device: str) -> None:
    load, _, _ = os.getloadavg()
    if device == "cpu" and load > _BUSY_LOAD:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f}):[/] times say little and ratios less: "
            "what waits for threads most often suffers most."
        )


def _show(records: list[Record], device: str, *, shows_all_targets: bool) -> None:
    console = open_console()
    print_sections(console, sections(records))
    targets = summary(records, device, only_measured=not shows_all_targets)
    if targets.blocks:
        print_sections(console, [targets])


def _conclude(console: Console, outcome: Outcome, json_path: Path | None) -> int:
    console.print(f"{outcome.measured} shapes measured, {outcome.kept} kept from before")
    where = f"kept in {json_path}; the same command goes on" if json_path else "not kept: no --json"
    if outcome.wrong:
        console.print(f"[bold red]{outcome.wrong} results were wrong and not timed, see above[/]")
    if outcome.interrupted:
        console.print(f"Interrupted. Records are {where}.")
        return INTERRUPTED
    if outcome.out_of_time and not outcome.wrong:
        left = f"with {outcome.out_of_time} shapes left"
        console.print(f"The budget ran out {left}. Records are {where}.")
        return OUT_OF_TIME
    return 1 if outcome.wrong else 0
