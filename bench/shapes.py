"""The shapes that are measured, and how filters narrow or widen them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product

from .settings import DTYPES, Settings

LENGTHS = (50, 197, 257, 577, 1024)
CLASSES = (5, 20, 100)

JOINT_DIM = 512  # E of ViT-B/16
MODEL_HEADS = 12  # of ViT-B/16
PREFIX_TOKENS = 1


@dataclass(frozen=True)
class Point:
    """One shape of a grid, and the type of its tensors."""

    length: int
    head_dim: int
    images: int
    heads: int
    num_classes: int
    dtype: str
    joint_dim: int = JOINT_DIM

    @property
    def model_dim(self) -> int:
        """D: tokens are as wide as all heads together."""
        return self.heads * self.head_dim

    @property
    def rows(self) -> int:
        """Rows of queries of all heads."""
        return self.images * self.heads * self.length

    @property
    def patches(self) -> int:
        return self.length - PREFIX_TOKENS

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Some of its sizes, by their names in the records."""
        found = {
            "B": self.images,
            "H": self.heads,
            "L": self.length,
            "d": self.head_dim,
            "D": self.model_dim,
            "E": self.joint_dim,
            "C": self.num_classes,
        }
        return {name: found[name] for name in names}


@dataclass(frozen=True)
class Grid:
    """The product of some sizes; ``heads`` are products B·H."""

    lengths: tuple[int, ...] = (197,)
    widths: tuple[int, ...] = (64,)
    heads: tuple[int, ...] = (300,)
    classes: tuple[int, ...] = (5,)
    dtypes: tuple[str, ...] = ("bfloat16",)

    def points(self) -> Iterator[Point]:
        for dtype, width, heads, length, classes in product(
            self.dtypes, self.widths, self.heads, self.lengths, self.classes
        ):
            images, per_image = split_heads(heads)
            yield Point(length, width, images, per_image, classes, dtype)


_CPU_DTYPES = ("float32", "bfloat16")

# (suite, device, quick) -> the grids whose union is measured, the most telling first. The full
# product of all sizes would take hours: off the main grid, one size varies at a time.
_GRIDS: dict[tuple[str, str, bool], tuple[Grid, ...]] = {
    ("attention", "cuda", False): (
        Grid(LENGTHS, (64,), (768, 300, 3072, 60)),
        Grid((197, 577), (80, 128), (768,)),
        Grid((197, 577), (64,), (768,), dtypes=("float16", "float32")),
    ),
    ("attention", "cuda", True): (Grid((197, 577), (64,), (300, 768)),),
    ("attention", "cpu", False): (
        Grid(LENGTHS, (64,), (60, 12), dtypes=_CPU_DTYPES),
        Grid((197, 577), (80, 128), (60,), dtypes=_CPU_DTYPES),
        Grid((197,), (64,), (300,), dtypes=_CPU_DTYPES),
    ),
    ("attention", "cpu", True): (Grid((50, 197), (64,), (60,), dtypes=_CPU_DTYPES),),
    ("relevance", "cuda", False): (
        Grid((197,), heads=(300, 768, 60), classes=CLASSES),
        Grid((50, 577), heads=(300,)),
        Grid((197,), heads=(300,), dtypes=("float16", "float32")),
    ),
    ("relevance", "cuda", True): (Grid((197,), heads=(300,), classes=CLASSES),),
    ("relevance", "cpu", False): (
        Grid((197,), heads=(60, 300), classes=CLASSES, dtypes=_CPU_DTYPES),
        Grid((50, 577), heads=(60,), dtypes=_CPU_DTYPES),
    ),
    ("relevance", "cpu", True): (Grid((197,), heads=(60,), classes=(5,), dtypes=_CPU_DTYPES),),
    ("operator", "cuda", False): (
        Grid((197,), heads=(300, 768, 60)),
        Grid((50, 577), heads=(300,)),
        Grid((197,), heads=(300,), classes=(20, 100)),
        Grid((729,), (72,), heads=(400,)),  # so/400M at 384 pixels
        Grid((197,), heads=(300,), dtypes=("float16", "float32")),
    ),
    ("operator", "cuda", True): (Grid((197,), heads=(300,)),),
    ("operator", "cpu", False): (
        Grid((197,), heads=(60, 300), dtypes=_CPU_DTYPES),
        Grid((50, 577), heads=(60,), dtypes=_CPU_DTYPES),
        Grid((729,), (72,), heads=(80,), dtypes=_CPU_DTYPES),  # so/400M at 384 pixels
    ),
    ("operator", "cpu", True): (Grid((197,), heads=(60,), dtypes=_CPU_DTYPES),),
    ("step", "cuda", False): (Grid(heads=(60, 300), dtypes=("bfloat16", "float32")),),
    ("step", "cuda", True): (Grid(heads=(60,)),),
    ("step", "cpu", False): (Grid(heads=(60, 300), dtypes=_CPU_DTYPES),),
    ("step", "cpu", True): (Grid(heads=(24,), dtypes=("float32",)),),
    ("memory", "cuda", False): (Grid((197, 577), heads=(768,)),),
    ("memory", "cuda", True): (Grid((577,), heads=(300,)),),
    ("memory", "cpu", False): (Grid((1024,), heads=(96,), dtypes=_CPU_DTYPES),),
    ("memory", "cpu", True): (Grid((577,), heads=(60,), dtypes=("float32",)),),
}


# Filters of other sizes mean nothing to a suite.
_FILTERS = {
    "attention": ("lengths", "widths", "heads", "dtypes"),
    "relevance": ("lengths", "heads", "classes", "dtypes"),
    "operator": ("lengths", "widths", "heads", "classes", "dtypes"),
    "step": ("heads", "dtypes"),
    "memory": ("lengths", "widths", "heads", "classes", "dtypes"),
}


def points(suite: str, settings: Settings) -> list[Point]:
    """The shapes of a suite, each once; a filter replaces the suite's own choice of that size."""
    given = {name: getattr(settings, name) for name in _FILTERS[suite]}
    found = [
        replace(grid, **{name: sizes for name, sizes in given.items() if sizes}).points()
        for grid in _GRIDS[suite, settings.device, settings.quick]
    ]
    return list(dict.fromkeys(chain.from_iterable(found)))


def split_heads(heads: int) -> tuple[int, int]:
    """B·H -> (B, H): 12 heads as in ViT-B/16 where they divide it, else the most that do."""
    per_image = next(h for h in (MODEL_HEADS, *range(16, 0, -1)) if heads % h == 0)
    return heads // per_image, per_image
