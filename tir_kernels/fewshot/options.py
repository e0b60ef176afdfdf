"""The options that several commands share."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

import click

from tir_kernels.analysis.measures import MEASURES
from tir_kernels.fewshot.arms import fields_of
from tir_kernels.fewshot.data.known import KNOWN_SETS
from tir_kernels.fewshot.fields import kinds_of
from tir_kernels.fewshot.methods import DEFAULT_METHODS, METHODS, method_class
from tir_kernels.fewshot.option_kinds import NAME, Choice, Count, NumberOr, WholeNumbers
from tir_kernels.fewshot.presets import PRESETS, preset_named
from tir_kernels.fewshot.settings import AUTO, GROUP_COLUMN_HELP, FitSettings, Protocol, Runtime
from tir_kernels.text import Notice, printable

# Options that are not called like their settings.
_OPTIONS = {"parallel": "--parallel-episodes"}


def option_name(name: str) -> str:
    """The option of a setting: ``--class-names`` of ``class_names``."""
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def with_options(text: str) -> str:
    """A line for the user, with options where it names settings."""
    if isinstance(text, Notice):
        return text.spelled(option_name, " ")
    return printable(text)


def settings_options(**defaults: Any) -> Callable[[Callable], Callable]:
    """An option for each field of ``Protocol`` and ``Runtime``, so that none is forgotten.

    Args:
        defaults: Defaults that differ from the fields' own.
    """
    return _adding(_options_of(Protocol, Runtime, parallel=1, **defaults))


def fit_settings_options() -> Callable[[Callable], Callable]:
    """An option for each field of ``FitSettings`` and ``Runtime``; there is one training a time."""
    return _adding(_options_of(FitSettings, Runtime, without=("parallel",)))


def _options_of(*kinds: type, without: Sequence[str] = (), **defaults: Any) -> list[Callable]:
    # A library's caller says where the model is; a command takes the GPU that is there.
    defaults = {"device": AUTO, **defaults}
    return [
        _field_option(field, hint, default=defaults.get(field.name, field.default))
        for kind in kinds
        for field, hint in _fields(kind)
        if field.name not in without
    ]


def method_options() -> Callable[[Callable], Callable]:
    """An option for each field of any method; a value is for all arms that have the field."""

    def defaults(name: str) -> str:
        owners = [(method, fields_of(method_class(method)).get(name)) for method in METHODS]
        return "; ".join(
            f"{method}: {'unset' if field.default is None else field.default}"
            for method, field in owners
            if field is not None
        )

    return _adding(
        [_field_option(*each, note=f"  [{defaults(each[0].name)}]") for each in method_fields()]
    )


def method_fields() -> list[tuple[dataclasses.Field, Any]]:
    """The fields of all methods in the registry with their types, each name once."""
    found: dict[str, tuple[dataclasses.Field, Any]] = {}
    for name in METHODS:
        for field, hint in _fields(method_class(name)):
            found.setdefault(field.name, (field, hint))
    return list(found.values())


def arm_options() -> Callable[[Callable], Callable]:
    """The options that say which arms a run compares."""
    return _adding(
        [
            click.option(
                "--method",
                "methods",
                type=Choice(lambda: METHODS),
                multiple=True,
                help="Method; give it several times to compare methods on the same episodes. "
                f"Without it and --arm: {', '.join(DEFAULT_METHODS)}.",
            ),
            click.option(
                "--arm",
                "arms",
                multiple=True,
                metavar="NAME=METHOD,FIELD=VALUE,...",
                help="A method with settings of its own, under a name of its own, beside the "
                "others; a list goes on with commas, as in late=tir,layers=8,10.",
            ),
        ]
    )


def _name_option(name: str, metavar: str, help: str) -> Callable[[Callable], Callable]:
    """An option that takes the name of a file, a folder or the like."""
    return click.option(name, type=NAME, metavar=metavar, help=help)


_SOURCE_OPTIONS = [
    _name_option(
        "--images",
        "DIR",
        "Folder of the images that a list names, also deep in it; by default the list's own.",
    ),
    click.option(
        "--model",
        type=NAME,
        required=True,
        metavar="ARCH_OR_DIR",
        help="An open_clip architecture, a folder with open_clip_config.json and weights, a folder "
        "of transformers with a CLIP or SigLIP, or a repository of such a folder in Hugging Face's "
        "cache, as hf-hub:OWNER/NAME; the command models lists those that are here.",
    ),
    _name_option(
        "--pretrained",
        "TAG_OR_FILE",
        "Weights of the architecture: a tag of open_clip, or a checkpoint file.",
    ),
]
_DECODING_OPTIONS = [
    click.option(
        "--max-pixels",
        type=Count(1, 2**40, "no machine decodes such an image"),
        help="Largest image that is decoded, in pixels; by default Pillow's limit against "
        "decompression bombs, about 179 million.",
    ),
    click.option(
        "--white-value",
        type=float,
        help="The value that is white in grey images of more than 8 bits, such as 4095 for 12 "
        "bits in files of 16; 0 is black. By default the type's largest, and 1 for "
        "floating-point values.",
    ),
]
_READING_OPTIONS = [
    _name_option(
        "--class-names",
        "FILE_OR_SET",
        "JSON or CSV file: class -> words, or the names of a data set: "
        f"{', '.join(KNOWN_SETS)}; or raw: the names of folders or labels as they are, with spaces "
        "for underscores. Without it, the words are those of such a set if it has all classes, or "
        "else come from the names, made lower case and parted into words.",
    ),
    _name_option(
        "--cache",
        "DIR",
        "Folder in which images are kept, decoded and resized, once they were needed; by "
        "default tir_kernels/images in $XDG_CACHE_HOME or ~/.cache. Each user has a sub-folder "
        "of their own in it, which any number of runs may share, and which may be deleted at any "
        "time. Without room in it, the run goes on without.",
    ),
    click.option("--no-cache", is_flag=True, help="Decode images in each run, and keep none."),
    *_DECODING_OPTIONS,
    click.option(
        "--skip-unreadable",
        is_flag=True,
        help="Replace images that can't be read by others of their class, if there are any, and "
        "list them at the end.",
    ),
]


_DRAWING_OPTIONS = [
    _name_option(
        "--train",
        "SOURCE",
        "In place of --data, with --test: data, of any kind, that support comes from.",
    ),
    _name_option(
        "--test",
        "SOURCE",
        "Data with the same classes that queries come from, in which no image of --train is.",
    ),
]


def drawing_options() -> Callable[[Callable], Callable]:
    """The options of how episodes are drawn from the data."""
    return _adding([*_DRAWING_OPTIONS, group_option()])


def base_options() -> Callable[[Callable], Callable]:
    """The options of a classifier's base model, for commands that use a classifier."""
    return _adding(
        [
            _name_option(
                "--model",
                "ARCH_OR_DIR",
                "The classifier's base model, where it has moved.",
            ),
            _name_option(
                "--pretrained",
                "TAG_OR_FILE",
                "Weights of that model.",
            ),
        ]
    )


def group_option() -> Callable[[Callable], Callable]:
    """The option of the subjects that images show."""
    return click.option(
        "--group-column",
        metavar="COLUMN",
        help=GROUP_COLUMN_HELP,
    )


def source_options(
    metavar: str = "RUN_DIR",
    out: str = "Folder of the run. The same command continues a run that was stopped.",
    *,
    data_required: bool = True,
) -> Callable[[Callable], Callable]:
    """The options of data, model and folder.

    Args:
        metavar: What the folder is called.
        out: Help on it.
        data_required: Whether nothing else may name the data.
    """
    data = click.option(
        "--data",
        type=NAME,
        required=data_required,
        metavar="SOURCE",
        help="Folder with a sub-folder of images per class, or with parts such as train and test "
        "that have them, of which support comes from one and queries from the other; a list of "
        "images: JSON with image_names, image_labels and label_names, or a split of CoOp, or CSV "
        "or TSV with columns for file and label, or with a column of 0 and 1 per class; or "
        "hf:NAME[:SPLIT] from Hugging Face, or a folder of its save_to_disk.",
    )
    folder = click.option("--out", type=NAME, required=True, metavar=metavar, help=out)
    return _adding([data, *_SOURCE_OPTIONS, folder])


def preset_option() -> Callable[[Callable], Callable]:
    """The option of settings that go together; what is set beside it goes first."""

    def apply(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
        if name is not None:
            own = {parameter.name for parameter in context.command.params}
            settings = preset_named(name).command
            context.default_map = {key: settings[key] for key in own & settings.keys()}
        return name

    return click.option(
        "--preset",
        type=Choice(lambda: PRESETS),
        is_eager=True,  # the other options' defaults follow from it
        callback=apply,
        help="Settings that go together, for all that is not set otherwise: "
        + "; ".join(f"{name}, {each.source}" for name, each in PRESETS.items())
        + ".",
    )


def one_method_option() -> Callable[[Callable], Callable]:
    """The option of a single method."""
    return click.option(
        "--method", type=Choice(lambda: METHODS), default=DEFAULT_METHODS[0], help="Method."
    )


def decoding_options() -> Callable[[Callable], Callable]:
    """The options of decoding images."""
    return _adding(_DECODING_OPTIONS)


def reading_options() -> Callable[[Callable], Callable]:
    """The options of the classes' words, and of reading images."""
    return _adding(_READING_OPTIONS)


def _fields(settings: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(settings)
    return [(field, hints[field.name]) for field in dataclasses.fields(settings)]


def _field_option(
    field: dataclasses.Field, hint: Any, default: Any = None, note: str = ""
) -> Callable[[Callable], Callable]:
    help_text = field.metadata["help"] + note
    if hint is bool:
        return click.option(option_name(field.name), field.name, is_flag=True, help=help_text)
    if field.metadata.get("is_text_list"):
        # Without it, unset; click would give an empty list.
        return click.option(
            option_name(field.name),
            field.name,
            multiple=True,
            callback=lambda context, option, value: value or None,
            help=help_text,
        )
    return click.option(
        option_name(field.name),
        field.name,
        type=_option_type(field, hint),
        default=default,
        show_default=default is not None,
        help=help_text,
    )


def _option_type(field: dataclasses.Field, hint: Any) -> Any:
    if "choices" in field.metadata:
        return Choice(field.metadata["choices"])
    if "word" in field.metadata:
        return NumberOr(field.metadata["word"])
    kind = kinds_of(hint)[0]
    return WholeNumbers() if kind is tuple else kind


def track_option(default: str | None = None) -> Callable[[Callable], Callable]:
    """The option of what is read of each training."""
    return click.option(
        "--track",
        default=default,
        show_default=default is not None,
        metavar="every=N[,measures=NAME+NAME][,maps=N]",
        help="Read measures of attention and tokens on the support images every N steps, and keep "
        "maps for pictures of the first episodes (2 unless set), beside the results; no result "
        f"depends on it. Measures, all unless set: {', '.join(MEASURES)}.",
    )


def episodes_option(default: int) -> Callable[[Callable], Callable]:
    """The option of the number of episodes."""
    return click.option(
        "--episodes",
        type=Count(1, 10**6, "the interval of a mean does not get narrower in any sense"),
        default=default,
        help="Episodes: draws of classes and images by the seed, on each of which every method is "
        "trained anew. Where other programs repeat a training with seeds 1, 2 and 3, that is 3 "
        "episodes. A run may be continued with more.",
    )


def _adding(options: Sequence[Callable]) -> Callable[[Callable], Callable]:
    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add
