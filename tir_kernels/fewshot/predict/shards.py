"""Images in tar files, as WebDataset writes them; read in their order, nothing unpacked.

The library ``webdataset`` reads members from a file that is opened here, so that it neither runs
commands that stand in the names of shards nor decodes anything. It passes over links, reads members
of any size, and takes a damaged header for the end. So Python's ``tarfile`` goes through the
headers beside it, and decides what is read and what is told.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.formats import is_image_name
from tir_kernels.fewshot.data.walk import is_left_by_tools
from tir_kernels.fewshot.predict.items import Image
from tir_kernels.files import MIB, open_regular
from tir_kernels.text import setting

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
# A member is held in memory; no image that is meant to be trained or tested on is as large.
_MOST_BYTES = 1024 * MIB
# Labels and captions are smaller.
_SMALL_BYTES = MIB // 4
_PROBLEMS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is taken for a shard."""
    return name.lower().endswith(ENDINGS)


def require_reader() -> Callable[..., Iterator[dict[str, Any]]]:
    """WebDataset's iterator over a tar file.

    Raises:
        FewShotError: The library is not installed.
    """
    try:
        from webdataset.tariterators import tar_file_iterator
    except ImportError as error:
        raise FewShotError(
            f"{setting('images')}: shards ({', '.join(ENDINGS)}) need the package webdataset: "
            'pip install "tir_kernels[webdataset]", or unpack them and name the folder'
        ) from error
    return cast("Callable[..., Iterator[dict[str, Any]]]", tar_file_iterator)


def images_of(name: str, path: Path) -> Iterator[Image]:
    """The images of a shard; where it is damaged, the shard with the reason comes last.

    Args:
        name: Name of the shard, in front of its members'.
        path: Its file.

    Raises:
        FewShotError: The library ``webdataset`` is not installed.
    """
    reader = require_reader()
    told: list[Image] = []
    content: BinaryIO | None = None
    try:
        with (
            open_regular(path) as file,
            open_regular(path) as again,
            tarfile.open(fileobj=file) as tar,
            tarfile.open(fileobj=again) as headers,
        ):
            content = _unpacked(tar)
            content.seek(0)
            check = _Check(name, headers, told)
            for found in reader(content, skip_meta=None, select_files=check.select):
                yield from _taken(told)
                if check.is_wanted:
                    yield Image(f"{name}/{found['fname']}", found["data"])
            check.finish()
        yield from _taken(told)
    except _PROBLEMS as error:
        yield from _taken(told)
        reason = first_line(error).removesuffix(f" @ {content}")  # added by the library
        yield Image(name, ValueError(f"the shard is damaged: {reason}"))


class _Check:
    """Goes through a shard's headers at the library's pace, and tells what it is not to read.

    Args:
        name: Name of the shard.
        headers: The shard, opened a second time.
        told: Takes the images that can't be read.

    Attributes:
        is_wanted: Whether the member that was asked for last is an image.
    """

    def __init__(self, name: str, headers: tarfile.TarFile, told: list[Image]) -> None:
        self.is_wanted = False
        self._name = name
        self._headers = headers
        self._files = self._regular()
        self._told = told

    def select(self, name: str) -> bool:
        """Whether the library is to read the next regular member of this name.

        Raises:
            tarfile.ReadError: There is none.
        """
        member = self._passed_over_until(name)
        if member is None:
            raise tarfile.ReadError("it was changed while it was read")
        self.is_wanted = _is_image(name)
        if not self.is_wanted:
            # The library forgets the headers before a member when it gives that, and only then.
            return member.size <= _SMALL_BYTES
        if member.size > _MOST_BYTES:
            self._tell(name, f"it has {member.size} bytes, of at most {_MOST_BYTES}")
            return False
        return True

    def finish(self) -> None:
        """Look at what the library has left.

        Raises:
            tarfile.ReadError: It took for the end what is none.
        """
        self._passed_over_until(None)
        content, end = _unpacked(self._headers), self._headers.offset
        content.seek(end)
        if not (mark := content.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"it has no end after byte {end}, and may be cut off there")
        if mark.strip(b"\0"):
            raise tarfile.ReadError(f"no member begins at byte {end}")
        while rest := content.read(MIB):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(
                    f"it goes on behind its end at byte {end}; tar files can't be joined by "
                    "appending one to another"
                )

    def _regular(self) -> Iterator[tarfile.TarInfo]:
        known: list[object] = vars(self._headers)["members"]  # else all that were read are held
        while (member := self._headers.next()) is not None:
            known.clear()
            if member.isreg():
                yield member
            elif not member.isdir() and _is_image(member.name):
                self._tell(member.name, "it is a link or a device in the shard")

    def _passed_over_until(self, name: str | None) -> tarfile.TarInfo | None:
        """The next regular member of a name. The library need not ask for each in front of it."""
        for member in self._files:
            if member.name == name:
                return member
            if _is_image(member.name):
                self._tell(member.name, "the library webdataset passes over such a name")
        return None

    def _tell(self, name: str, reason: str) -> None:
        self._told.append(Image(f"{self._name}/{name}", ValueError(reason)))


def _is_image(name: str) -> bool:
    parts = [part for part in name.split("/") if part != "."]
    return is_image_name(name) and not any(map(is_left_by_tools, parts))


def _unpacked(tar: tarfile.TarFile) -> BinaryIO:
    """The bytes of a tar file, whatever it is compressed with.

    By ``tarfile``, since the library itself reads the first part alone of a file that was
    compressed in several.
    """
    assert tar.fileobj is not None
    return cast(BinaryIO, tar.fileobj)


def _taken(told: list[Image]) -> Iterator[Image]:
    """What was told, which is then forgotten."""
    while told:
        yield told.pop(0)
