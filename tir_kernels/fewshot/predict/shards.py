"""Images in tar files, as WebDataset writes them; read in their order, nothing unpacked.

Python's own reader does all that is needed. The library ``webdataset`` would decode other members
too, pickles among them, and run commands that stand in the names of shards.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tir_kernels.errors import first_line
from tir_kernels.fewshot.data.formats import is_image_name
from tir_kernels.fewshot.data.walk import is_left_by_tools
from tir_kernels.fewshot.predict.items import Image
from tir_kernels.files import MIB, open_regular

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
# A member is held in memory; no image that is meant to be trained or tested on is as large.
_MOST_BYTES = 1024 * MIB
_PROBLEMS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is taken for a shard."""
    return name.lower().endswith(ENDINGS)


def images_of(name: str, path: Path) -> Iterator[Image]:
    """The images of a shard; where it is damaged, the shard with the reason comes last.

    Args:
        name: Name of the shard, in front of its members'.
        path: Its file.
    """
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            known: list[object] = vars(tar)["members"]  # else all that were read are held
            while (member := tar.next()) is not None:
                known.clear()
                parts = [part for part in member.name.split("/") if part != "."]
                if not is_image_name(member.name) or any(map(is_left_by_tools, parts)):
                    continue
                whole = f"{name}/{member.name}"
                if member.size > _MOST_BYTES:
                    yield Image(whole, ValueError(f"it has {member.size // MIB} MiB"))
                elif member.isreg():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield Image(whole, content.read())
                else:
                    yield Image(whole, ValueError("it is a link or a device in the shard"))
            _require_end(tar)
    except _PROBLEMS as error:
        yield Image(name, ValueError(f"the shard is damaged: {first_line(error)}"))


def _require_end(tar: tarfile.TarFile) -> None:
    """Refuse a file that goes on where its members end: the reader takes damage for the end.

    Raises:
        tarfile.ReadError: It goes on.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no member begins at byte {tar.offset}")
