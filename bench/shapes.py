"""The shapes that are measured, and how filters narrow or widen them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product

from .settings import DTYPES, Settings

LENGTHS = (50, 197, 257, 577, 1024)
SHORT_LENGTHS = (16, 32, 50, 64, 77, 128, 197, 256)  # at which fused attention may tie or lose
CLASSES = (5, 20, 100)

JOINT_DIM = 512  # E of ViT-B/16
MODEL_HEADS = 12  # of ViT-B/16
PREFIX_TOKENS = 1


@dataclass(frozen=True)
class Point:
    """One shape of a grid, and the type of its tensors.

    Of attention alone, ``queries`` may be another number than ``length``, that of the keys, and
    ``is_causal`` says whether a query sees the keys up to its own place.
    """

    length: int
    head_dim: int
    images: int
    heads: int
    num_classes: int
    dtype: str
    joint_dim: int = JOINT_DIM
    queries: int | None = None
    is_causal: bool = False

    @property
    def model_dim(self) -> int:
        """D: tokens are as wide as all heads together."""
        return self.heads * self.head_dim

    @property
    def num_queries(self) -> int:
        return self.length if self.queries is None else self.queries

    @property
    def rows(self) -> int:
        """Rows of queries of all heads."""
        return self.images * self.heads * self.num_queries

    @property
    def key_rows(self) -> int:
        """Rows of keys of all heads."""
        return self.images * self.heads * self.length

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of all heads."""
        if not self.is_causal:
            return self.rows * self.length
        seen = sum(min(place + 1, self.length) for place in range(self.num_queries))
        return self.images * self.heads * seen

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
        unusual = {} if self.queries is None else {"Lq": self.queries}
        if self.is_causal:
            unusual["causal"] = 1
        return {name: found[name] for name in names} | unusual


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
    **{
        ("short", device, quick): (Grid(SHORT_LENGTHS, (64,), (300, 60), dtypes=dtypes),)
        for device, dtypes in (("cuda", ("bfloat16",)), ("cpu", _CPU_DTYPES))
        for quick in (False, True)
    },
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
    "short": ("lengths", "widths", "heads", "dtypes"),
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


def unusual_points(settings: Settings) -> list[Point]:
    """Single queries, as of a last block or a pool, and causal texts, that no filter leaves out.

    Texts have the 77 places of CLIP or the 32 of PE-Core, 8 heads, and one or a hundred per class.
    """
    dtypes = _CPU_DTYPES if settings.device == "cpu" else ("bfloat16",)
    found: list[Point] = []
    for dtype in settings.dtypes or dtypes:
        for images, length in product((25, 5), (197, 257)):
            found.append(Point(length, 64, images, MODEL_HEADS, 5, dtype, queries=1))
        for texts, length in product((5, 100), (77, 32)):
            found.append(Point(length, 64, texts, 8, 5, dtype, is_causal=True))

    def is_wanted(point: Point) -> bool:
        sizes = (point.length, settings.lengths), (point.head_dim, settings.widths)
        all_sizes = *sizes, (point.images * point.heads, settings.heads)
        return all(wanted is None or size in wanted for size, wanted in all_sizes)

    return list(filter(is_wanted, found))


def split_heads(heads: int) -> tuple[int, int]:
    """B·H -> (B, H): 12 heads as in ViT-B/16 where they divide it, else the most that do."""
    per_image = next(h for h in (MODEL_HEADS, *range(16, 0, -1)) if heads % h == 0)
    return heads // per_image, per_image
