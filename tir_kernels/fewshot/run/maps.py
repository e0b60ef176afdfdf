"""Arrays for pictures of an (episode, arm): ``maps/EPISODE-ARM.npz``, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.folder import expanded_out, read_run, write_whole
from tir_kernels.fewshot.run.records import Record
from tir_kernels.files import open_regular

FOLDER = "maps"


class Maps(NamedTuple):
    """The support images of an episode, and how an arm's image tower sees them.

    n images of S x S pixels and N patches, C classes, D the model's width. Relevance, counts and
    weights are those of the last block that the arm re-weights, or block ``depth - 2`` of one that
    does not, after training.

    Attributes:
        episode, arm: Which one.
        class_names: C words.
        labels: (n,) int64.
        images: (n, S, S, 3) uint8.
        grid: Rows and columns of the patches; N is their product.
        relevance: (n, C, N) float16, cosine of each patch with each class.
        counts: (n, N), by how many classes each patch is picked.
        weights: (n, N) float16; 1 in an arm that does not re-weight.
        received_before, received_after: (n, N) float16, mean over heads and over all queries of
            the attention that each patch receives in that block, before training and after.
        tokens_before, tokens_after: (blocks, n, D) float16, class token behind each block, or the
            mean of the patches where there is none.
    """

    episode: int
    arm: str
    class_names: list[str]
    labels: np.ndarray
    images: np.ndarray
    grid: tuple[int, int]
    relevance: np.ndarray
    counts: np.ndarray
    weights: np.ndarray
    received_before: np.ndarray
    received_after: np.ndarray
    tokens_before: np.ndarray
    tokens_after: np.ndarray


def write_maps(folder: Path, arm_index: int, maps: Maps) -> None:
    """Write the maps of an (episode, arm) into a run's folder, in place of older ones.

    Raises:
        FewShotError: They can't be written.
    """
    path = folder / FOLDER / f"{maps.episode}-{arm_index}.npz"
    content = io.BytesIO()
    np.savez_compressed(content, **maps._asdict())
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise FewShotError(f"can't write {path.parent}: {first_line(error)}") from error
    write_whole(path, content.getvalue())


class RunMaps(Mapping[tuple[int, str], Maps]):
    """The maps of finished (episode, arm)s, each read from its file when it is asked for.

    Iteration is in the order of the records.

    Args:
        folder: The run's folder.
        records: The run's records.

    Raises:
        FewShotError: A file can't be read or is damaged; also when maps are asked for.
    """

    def __init__(self, folder: str | Path, records: Iterable[Record]) -> None:
        path = expanded_out(folder) / FOLDER
        found = {_key(entry): entry for entry in _paths(path)} if path.exists() else {}
        self._paths = {each.key: found[each.key] for each in records if each.key in found}

    def __getitem__(self, key: tuple[int, str]) -> Maps:
        return _read(self._paths[key])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def read_maps(folder: str | Path) -> Iterator[Maps]:
    """The maps of a run's finished (episode, arm)s, by episode and in the order of its arms.

    One is in memory at a time.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    yield from RunMaps(folder, read_run(folder)).values()


def _paths(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(".npz"))
    except OSError as error:
        raise FewShotError(f"can't read {folder}: {first_line(error)}") from error


def _key(path: Path) -> tuple[int, str]:
    with _opened(path) as arrays:
        return int(arrays["episode"]), str(arrays["arm"])


def _read(path: Path) -> Maps:
    with _opened(path) as arrays:
        values = {name: arrays[name] for name in Maps._fields}
        values["episode"], values["arm"] = int(values["episode"]), str(values["arm"])
        values["class_names"] = [str(name) for name in values["class_names"]]
        rows, columns = values["grid"]
        values["grid"] = int(rows), int(columns)
        return Maps(**values)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of a file, of which only those that are asked for are read."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FewShotError(
            f"{path} is damaged ({first_line(error)}); delete it, and the run has no pictures of it"
        ) from error
