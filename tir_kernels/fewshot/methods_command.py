"""The command ``methods``."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.methods import METHODS, Method, method_class
from tir_kernels.fewshot.methods.families import FAMILIES, label_of, legend
from tir_kernels.fewshot.options import option_name

_LEAST_WIDTH = 30  # where a terminal claims to have less, lines are broken by it


@click.command()
@click.argument("names", nargs=-1, metavar="[METHOD]...")
@click.option(
    "--options", is_flag=True, help="List the options of all methods with their defaults."
)
def methods(names: tuple[str, ...], options: bool) -> None:
    """List the methods that --method takes, or show each METHOD with all its options.

    A letter tells what a method is given. Piped, each method is one line, as is each option.
    """
    for name in names:
        if name not in METHODS:
            raise FewShotError(f"METHOD must be one of {', '.join(METHODS)}; got {name!r}")
    if names:
        for name in dict.fromkeys(names):
            _show(name)
        return
    widest = max(map(len, METHODS))
    for name in METHODS:
        method = method_class(name)
        line = f"{name:{widest}}  {label_of(method)}  {_summary(method)} ({method.source})"
        defaults = ", ".join(f"{own.name}={_default(own)}" for own in _options(method))
        if options and defaults:
            # In a terminal they begin a line.
            line += f"\n{defaults}" if sys.stdout.isatty() else f"  {defaults}"
        _say(line, indent=widest + 5)
    click.echo()
    _say(legend(label_of(method_class(name)) for name in METHODS))


def _show(name: str) -> None:
    method = method_class(name)
    _say(f"{name}: {_summary(method)}.")
    for paragraph in _rest(method):
        _say(paragraph)
    _say(f"{label_of(method)}: {FAMILIES[method.family].meaning}. Source: {method.source}.")
    for own in _options(method):
        choices = own.metadata.get("choices")
        words = f" ({'|'.join(choices())})" if choices else ""
        text = f"  {option_name(own.name)} {_default(own)}{words}  {own.metadata['help']}"
        _say(text, indent=6)
    click.echo()


def _options(method: type[Method]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(method)


def _summary(method: type[Method]) -> str:
    """The first line of the method's own docstring, without a full stop."""
    return _documented(method).partition("\n")[0].removesuffix(".")


def _rest(method: type[Method]) -> Iterator[str]:
    """The other paragraphs of the docstring, each as one line."""
    for paragraph in _documented(method).partition("\n")[2].split("\n\n"):
        if paragraph.strip():
            yield " ".join(paragraph.split())


def _documented(method: type[Method]) -> str:
    return (inspect.getdoc(method) or "").replace("``", "")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return "unset" if value is None else str(value)


def _say(line: str, indent: int = 0) -> None:
    """Print a line, broken where a terminal ends and as it is where it goes elsewhere.

    Args:
        line: The line.
        indent: Of its further lines.
    """
    if sys.stdout.isatty():
        width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns)
        indent = min(indent, width // 3)
        first, *others = line.split("\n")
        wrapped = [(first, ""), *((other, " " * indent) for other in others)]
        line = "\n".join(
            textwrap.fill(
                part,
                width,
                initial_indent=start,
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            for part, start in wrapped
        )
    click.echo(line)
