"""Settings that belong to no method: the protocol of a run, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods import Method, method_class
from tir_kernels.operators.choose import backend_names, require_backend

PRECISIONS = ("float32", "bfloat16", "float16")
AUTO = "auto"
ALL = "all"
BALANCES = ("none", "loss", "sampling")
CROP, SQUASH, SQUASH_BILINEAR = RESIZES = ("crop", "squash", "squash-bilinear")
_RESIZE_HELP = (
    "How images get the model's size: crop scales the shorter side and cuts off what the longer "
    "one has beyond the middle; squash scales both sides, whatever their ratio; squash-bilinear "
    "does so with bilinear instead of the model's interpolation, as published programs of "
    "cross-domain few-shot learning. Unset: as the model's preprocessing says, for CLIP crop."
)
GROUP_COLUMN_HELP = (
    "Column of a table, or of a data set of Hugging Face, whose values are the subjects that "
    "images show, such as patients or lesions: no subject is on both sides, among images that are "
    "trained on and images that are classified to see how well, and an evaluation's intervals are "
    "over subjects. Known by itself for HAM10000 (lesion_id) and ChestX-ray8 (Patient ID); none "
    "pays no regard to subjects."
)


def _backends() -> tuple[str, ...]:
    return (AUTO, *backend_names())


def _backend(name: str, value: object) -> object:
    require_backend(value)
    return value


@dataclass(frozen=True)
class Protocol(fields.Checked):
    """The episodes of a run: N-way K-shot, the seed that draws them, and their images' form."""

    ways: int | str = fields.whole_or(
        ALL, 5, "Classes of each episode, drawn anew; all: every class of the data.", least=2
    )
    shots: int = fields.whole(
        5,
        "Support images per class, which the methods learn from.",
        least=1,
        most=10**6,
        reason="no class has as many images",
    )
    queries: int | str = fields.whole_or(
        ALL,
        15,
        "Query images per class, which are classified to score the methods; all: every image of "
        "the episode's classes that is not support, and of data with a part for queries that whole "
        "part. Classes may then have unequal numbers; accuracy is over all images.",
        least=1,
    )
    seed: int = fields.seed(
        "Seed of the choice of episodes, and of each method's initialisation and dropout. Each of "
        "a seed's episodes is another draw."
    )
    augment: int | str = fields.added_later(
        fields.views(
            "Train on this many views of each support image beside the image itself; 0 for none. "
            "The cross-domain few-shot benchmark takes 4. A view is a part of the image of 8 to "
            "100 % of its area and a ratio of sides of 3/4 to 4/3, scaled up to the model's size, "
            "flipped half of the time, with brightness, contrast and saturation times a random "
            "number from 0.6 to 1.4. Or five, the views of the program of arXiv 2605.25799: the "
            "image; it rotated by -45 to 45 degrees, with these factors, and flipped half of the "
            "time; it rotated; with factors; flipped half of the time. Views are drawn once per "
            "episode, from the seed and its number alone."
        )
    )
    resize: str | None = fields.added_later(fields.choice(None, RESIZES, _RESIZE_HELP))

    @property
    def queries_per_class(self) -> int | None:
        """Query images per class; ``None`` for all."""
        return self.queries if isinstance(self.queries, int) else None


@dataclass(frozen=True)
class FitSettings(fields.Checked):
    """All that decides a fit besides its data, model, method and types."""

    shots: int | None = fields.whole(
        None,
        "Labelled images per class, drawn by the seed; unset: all.",
        least=1,
        most=10**6,
        reason="no class has as many images",
    )
    seed: int = fields.seed(
        "Seed of the choice of images, and of the method's initialisation and dropout."
    )
    augment: int | str = fields.views(
        "Train on this many random views of each image beside the image itself; 0 for none; or on "
        "five fixed kinds of views, itself included; as in run."
    )
    resize: str | None = fields.added_later(
        fields.choice(None, RESIZES, f"{_RESIZE_HELP} The classifier keeps it.")
    )
    batch_size: int | None = fields.whole(
        None,
        "Images of each training step, every image once before any comes again; unset: all images "
        "at every step, as the methods were published.",
        least=1,
        most=10**6,
        reason="no step takes as many",
    )
    balance: str = fields.choice(
        "none",
        BALANCES,
        "For classes of unequal size: none; loss weights each image by the inverse of its class's "
        "size, so that all classes weigh alike; sampling draws the images of each step from all "
        "classes alike, for which a batch size must be set.",
    )
    folds: int = fields.whole(
        5,
        "Parts of the labelled images that are held out in turn, each in a training without it, "
        "to estimate the accuracy on images that were not trained on; 0 for no estimate.",
        least=0,
        most=1000,
        reason="each is a training of its own",
    )
    group_column: str | None = fields.text(None, GROUP_COLUMN_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds == 1:
            raise ValueError("folds must be 0, or at least 2; got 1")


@dataclass(frozen=True)
class Runtime(fields.Checked):
    """The device and types that methods run in; results are the same up to rounding.

    Raises:
        ValueError, TypeError: A value outside what is allowed.
    """

    device: str = fields.text(
        "cpu",
        "Device of the model and all tensors: cpu, cuda, cuda:1, ...; on the command line also "
        "auto, which is cuda where PyTorch sees a GPU, else cpu.",
    )
    precision: str = fields.choice(
        "float32", PRECISIONS, "Type of products: float32, or that of an autocast region."
    )
    backend: str = fields.checked(
        AUTO,
        "Backend of the operators (tir_kernels.available_backends()); auto serves what it lacks.",
        _backend,
        choices=_backends,
    )
    parallel: int | str | None = fields.whole_or(
        AUTO,
        None,
        "Most episodes trained at once, which a GPU needs to be busy: a number, auto for as many "
        "as fit into memory, or unset for all. Where memory runs out, half as many are; in float16 "
        "each is trained alone. The results are the same up to rounding.",
        least=1,
        most=4096,
        reason="no device's memory holds so many",
    )
    checkpoint: bool = fields.flag(
        "Compute activations again in the backward pass instead of keeping them: a third more "
        "work in a fraction of the memory."
    )


@dataclass(frozen=True)
class Arm:
    """A named method with its options: what journals, tables and ablations speak of.

    Args:
        name: Name, such as "tir" or "tir@attention".
        method: The method.
    """

    name: str
    method: Method

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"name of an arm must be text; got {self.name!r}")

    @classmethod
    def of(cls, name: str, **options: Any) -> Arm:
        """The arm that bears the name of its method."""
        return cls(name, method_class(name)(**options))
