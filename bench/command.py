"""The command line."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click
import torch
from rich.console import Console

import tir_kernels

from .cases import Case, SuiteUnavailableError
from .environment import environment
from .findings import summary
from .plot import plot
from .records import Record, RecordFile, require_writable
from .runner import Outcome, Runner
from .settings import BACKENDS_OF_DEVICE, DIRECTIONS, DTYPES, Settings
from .suites import SUITES
from .tables import print_sections, sections

INTERRUPTED = 130
OUT_OF_TIME = 75  # sysexits' "try again later": the same command goes on
# Measuring time per implementation and row: (device, quick) -> seconds
_SECONDS = {
    ("cpu", False): 1.0,
    ("cpu", True): 0.2,
    ("cuda", False): 0.1,
    ("cuda", True): 0.03,
}
_NARROWEST_LOG = 140
_BUSY_LOAD = 1.0  # from here on other work slows down what is measured


class CommaSeparated(click.ParamType):
    """A list such as 50,197: whole numbers of at least 1, or some of the choices."""

    name = "list"

    def __init__(self, choices: tuple[str, ...] | None = None) -> None:
        self.choices = choices

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "A,B,..."

    def convert(self, value, param, ctx) -> tuple:
        if isinstance(value, tuple):
            return value
        return tuple(self._item(item.strip(), param, ctx) for item in value.split(","))

    def _item(self, item: str, param, ctx) -> int | str:
        if self.choices is not None:
            if item not in self.choices:
                self.fail(f"{item!r} is none of {', '.join(self.choices)}", param, ctx)
            return item
        if not item.isdigit() or int(item) < 1:
            self.fail(f"{item!r} is no whole number of at least 1", param, ctx)
        return int(item)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
@click.option("--quick", is_flag=True, help="Few shapes and little time: a minute per suite.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all cores.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    help="Measuring time per row, that is per implementation at one shape.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0),
    help="Seconds after which no further shape is begun; the most telling shapes come first.",
)
@click.option("--lengths", type=CommaSeparated(), help="Token counts L.")
@click.option("--widths", type=CommaSeparated(), help="Head widths d.")
@click.option("--heads", type=CommaSeparated(), help="Products B·H; 60 is 5 images of 12 heads.")
@click.option("--classes", type=CommaSeparated(), help="Class counts C.")
@click.option("--dtypes", type=CommaSeparated(tuple(DTYPES)), help=", ".join(DTYPES))
@click.option("--directions", type=CommaSeparated(DIRECTIONS), help=", ".join(DIRECTIONS))
@click.option(
    "--backends",
    type=CommaSeparated(("cpu", "cuda", "triton", "reference")),
    help="Ours to measure. Default: all that serve the device.",
)
@click.option(
    "--compile/--no-compile",
    "compiles",
    default=True,
    help="Whether peers take part that need torch.compile.",
)
@click.option(
    "--max-call-seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Leave out shapes of which one call is estimated to take longer (cpu).",
)
@click.option(
    "--model",
    metavar="ARCH_OR_DIR",
    help="Of step, savings, memory and episodes: an open_clip architecture or a JSON file with a "
    "model_cfg, either of which gets random weights, or a folder with open_clip_config.json and "
    "weights. Default: ViT-B-16, but in episodes the demonstration's model.",
)
@click.option(
    "--data",
    metavar="DIR",
    help="Of episodes: a folder with a folder of images per class, and class_names.json if the "
    "folders' names are no words. Default: drawings.",
)
@click.option("--ways", default=5, show_default=True, type=click.IntRange(2), help="Classes.")
@click.option("--shots", type=CommaSeparated(), help="Support images per class.")
@click.option(
    "--queries",
    default=15,
    show_default=True,
    type=click.IntRange(1),
    help="Query images per class.",
)
@click.option("--episodes", type=click.IntRange(1), help="Episodes of a whole run.")
@click.option(
    "--published-episodes",
    type=click.IntRange(1),
    help="How many of them the published program runs. Default: all, on cuda at most 2.",
)
@click.option("--steps", type=click.IntRange(1), help="Training steps of an episode.")
@click.option(
    "--parallel-episodes",
    type=CommaSeparated(),
    help="Episodes trained at once. Default: 1,2,4 in step; in episodes 1, and on cuda 8 too.",
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
    device: str | None,
    threads: int | None,
    seconds: float | None,
    budget: float | None,
    json_path: Path | None,
    plot_path: Path | None,
    **options,
) -> None:
    """Measure tir_kernels beside PyTorch, on the same tensors in the same process.

    SUITES are some of attention, relevance, operator, step, savings, memory and episodes; all of
    them by default. "published" is a plain rendering of the method's published program, the
    baseline. Exit status: 1 if an implementation computes something wrong, 75 if the budget ran out
    (run the same command again), 130 after Ctrl-C.
    """
    began = time.monotonic()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(device, options["backends"])
    if seconds is None:
        seconds = _SECONDS[device, options["quick"]]
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    settings = Settings(device=device, threads=threads, seconds=seconds, **options)
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_NARROWEST_LOG)
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
        console.print("--plot: no record has a time and a bound to draw", highlight=False)
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
            cases += SUITES[name](settings)
        except SuiteUnavailableError as error:
            console.print(f"suite {name} is left out: {error}", highlight=False)
    return sorted(cases, key=lambda case: case.priority)


def _warn_of_other_environments(
    console: Console, records: RecordFile, facts: dict[str, str]
) -> None:
    differing = sorted(
        {
            f"{name} {there.get(name)} (now {facts.get(name)})"
            for there in (record.get("environment", {}) for record in records.records)
            for name in {*there, *facts}
            if there.get(name) != facts.get(name)
        }
    )
    if differing:
        console.print(
            f"[yellow]{records.path} keeps records of another environment:[/] "
            f"{', '.join(differing)}. Choose another file to measure anew.",
            highlight=False,
        )


def _warn_of_other_work(console: Console, device: str) -> None:
    load, _, _ = os.getloadavg()
    if device == "cpu" and load > _BUSY_LOAD:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f}):[/] times say little and ratios less: "
            "what waits for threads most often suffers most.",
            highlight=False,
        )


def _show(records: list[Record], device: str, *, shows_all_targets: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NARROWEST_LOG)
    print_sections(console, sections(records))
    targets = summary(records, device, only_measured=not shows_all_targets)
    if targets.blocks:
        print_sections(console, [targets])


def _conclude(console: Console, outcome: Outcome, json_path: Path | None) -> int:
    console.print(
        f"{outcome.measured} shapes measured, {outcome.kept} kept from before", highlight=False
    )
    where = f"kept in {json_path}; the same command goes on" if json_path else "not kept: no --json"
    if outcome.wrong:
        console.print(
            f"[bold red]{outcome.wrong} results were wrong and not timed, see above[/]",
            highlight=False,
        )
    if outcome.interrupted:
        console.print(f"Interrupted. Records are {where}.", highlight=False)
        return INTERRUPTED
    if outcome.wrong:
        return 1
    if outcome.out_of_time:
        console.print(
            f"The budget ran out with {outcome.out_of_time} shapes left. Records are {where}.",
            highlight=False,
        )
        return OUT_OF_TIME
    return 0
