"""Decoded images on the disk: a file per class, written once and mapped into memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tir_kernels.fewshot.data import ImageClass, ImageSource
from tir_kernels.fewshot.decoding import DECODE_ERRORS, decode
from tir_kernels.fewshot.errors import first_line
from tir_kernels.fewshot.preprocess import Preprocess

# A file is the pixels of all images, (N, 3, H, W); a JSON object about them; and this: the length
# and the checksum of the JSON, and a mark that the file is complete.
_TAIL = struct.Struct("<QI8s")
_MARK = b"tir_img1"


class _DamagedError(Exception):
    """A file of the cache is not as it was written."""


def default_cache_folder() -> Path:
    """``tir_kernels/images`` in the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "tir_kernels" / "images"


class ImageCache:
    """Keeps the pixels of whole classes in a folder that any number of processes may share.

    A class is decoded when one of its images is first asked for. Its file appears under its name
    only when it is complete; other processes that want it meanwhile wait for it, and one of them
    takes over if the first is killed. The name depends on the preprocessing and on the names, sizes
    and times of the images, so a file never goes out of date, and every image has a checksum that
    is checked whenever it is read. Files may be deleted at any time.

    Where the folder can't be used, the user is told once, and images are not kept from there on.

    Args:
        folder: The folder; it is created when something is to be kept.
        source: The images.
        preprocess: Makes pixels of them.
        notify: Told, in a line, of what is wrong with the cache.
        on_decode: Called with a text, the images done and all images while a class is decoded.
    """

    def __init__(
        self,
        folder: str | Path,
        source: ImageSource,
        preprocess: Preprocess,
        *,
        notify: Callable[[str], None],
        on_decode: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._source = source
        self._preprocess = preprocess
        self._notify = notify
        self._on_decode = on_decode or (lambda text, done, total: None)
        self._is_usable = True
        self._classes: dict[str, _StoredClass | None] = {}

    def read(self, entry: ImageClass, position: int) -> Tensor | None:
        """An image of a class, (3, H, W) uint8, or ``None`` where the cache does not have it."""
        for _ in range(2):
            stored = self._stored(entry)
            if stored is None:
                return None
            try:
                return stored.read(position)
            except _DamagedError:
                self._remove_damaged(self._path(entry))
                del self._classes[entry.folder]
        self._give_up(OSError(errno.EIO, "what was just written is damaged"))
        self._classes[entry.folder] = None
        return None

    def is_unreadable(self, entry: ImageClass, position: int) -> bool:
        """Whether the image was found to be damaged or none when its class was decoded."""
        stored = self._stored(entry)
        return stored is not None and position in stored.unreadable

    def _stored(self, entry: ImageClass) -> _StoredClass | None:
        if entry.folder not in self._classes:
            self._classes[entry.folder] = self._open_or_build(entry)
        return self._classes[entry.folder]

    def _open_or_build(self, entry: ImageClass) -> _StoredClass | None:
        path = self._path(entry)
        try:
            found = self._open(path, entry)
            if found is None and self._is_usable:
                self.folder.mkdir(parents=True, exist_ok=True)
                found = self._build(path, entry)
            return found
        except OSError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: OSError) -> None:
        if self._is_usable:
            self._notify(
                f"--cache: can't keep images in {self.folder}: {first_line(error)}; going on "
                "without, so they are decoded again in each run"
            )
        self._is_usable = False

    def _path(self, entry: ImageClass) -> Path:
        content = [
            self._preprocess.version,
            self._source.identity,
            list(zip(entry.files, entry.stamps, strict=True)),
        ]
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.images"

    def _shape(self, entry: ImageClass) -> tuple[int, ...]:
        return (len(entry.files), *self._preprocess.shape)

    def _open(self, path: Path, entry: ImageClass) -> _StoredClass | None:
        try:
            return _StoredClass.open(path, self._shape(entry))
        except FileNotFoundError:
            return None
        except _DamagedError:
            self._remove_damaged(path)
            return None

    def _remove_damaged(self, path: Path) -> None:
        self._notify(f"--cache: {path} is damaged; its images are decoded again")
        with contextlib.suppress(OSError):
            path.unlink()

    def _build(self, path: Path, entry: ImageClass) -> _StoredClass:
        partial = path.with_suffix(".partial")
        with self._alone_with(partial, entry) as descriptor:
            found = self._open(path, entry)  # by the process that was waited for
            try:
                if found is None:
                    self._write(descriptor, entry)
                    os.replace(partial, path)
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink()
        found = found or self._open(path, entry)
        if found is None:
            raise OSError(errno.EIO, "what was just written is damaged")
        return found

    @contextlib.contextmanager
    def _alone_with(self, path: Path, entry: ImageClass) -> Iterator[int]:
        """A file open for writing, once no other process has it open here."""
        waiting = f"decoding {entry.folder} in another process"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._on_decode(waiting, 0, len(entry.files))
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    self._on_decode(waiting, len(entry.files), len(entry.files))
                # Whoever had it may have given it its final name, or deleted it.
                if _is_named(descriptor, path):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    def _write(self, descriptor: int, entry: ImageClass) -> None:
        shape = self._shape(entry)
        image_bytes = math.prod(self._preprocess.shape)
        if shutil.disk_usage(self.folder).free < math.prod(shape):
            # Found out now, and not after an hour, nor by filling the disk for everyone.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, 0)  # what a process left that was killed
        checksums: list[int | None] = [None] * shape[0]
        unreadable: list[int] = []

        def store(position: int) -> None:
            name = entry.files[position]
            try:
                image = decode(self._source.file(name))
                pixels = self._preprocess.to_pixels(image).numpy().tobytes()
                if self._source.stamp(name) != entry.stamps[position]:
                    return  # another image by now: it must not be kept under the old one's name
            except DECODE_ERRORS as error:
                # An image that is missing or locked today may be there tomorrow.
                if getattr(error, "errno", None) is None:
                    unreadable.append(position)
                return
            _write_at(descriptor, pixels, position * image_bytes)
            checksums[position] = zlib.crc32(pixels)

        text = f"decoding {entry.folder}"
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            # Leaving the loop early, as an interrupt does, cancels what has not begun.
            for done, _ in enumerate(pool.map(store, range(shape[0])), start=1):
                self._on_decode(text, done, shape[0])
        about = json.dumps({"checksums": checksums, "unreadable": sorted(unreadable)}).encode()
        tail = _TAIL.pack(len(about), zlib.crc32(about), _MARK)
        _write_at(descriptor, about + tail, math.prod(shape))
        os.fsync(descriptor)


@dataclass(frozen=True)
class _StoredClass:
    """A file of the cache.

    Args:
        pixels: (N, 3, H, W) uint8, mapped into memory.
        checksums: Of each image; ``None`` where it is not there.
        unreadable: Images that can't be decoded.
    """

    pixels: np.ndarray
    checksums: list[int | None]
    unreadable: frozenset[int]

    @classmethod
    def open(cls, path: Path, shape: tuple[int, ...]) -> _StoredClass:
        """Map a file; raises OSError where it can't be read and _DamagedError if it is damaged."""
        start = math.prod(shape)
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < start + _TAIL.size:
                raise _DamagedError
            file.seek(start)
            about = file.read(size - start - _TAIL.size)
            length, checksum, mark = _TAIL.unpack(file.read(_TAIL.size))
            if (length, checksum, mark) != (len(about), zlib.crc32(about), _MARK):
                raise _DamagedError
            content = json.loads(about)
            pixels = np.memmap(file, np.uint8, "r", shape=shape)
        return cls(pixels, content["checksums"], frozenset(content["unreadable"]))

    def read(self, position: int) -> Tensor | None:
        """An image, (3, H, W) uint8, or ``None`` where it is not there.

        Raises:
            _DamagedError: It is not what was written.
        """
        checksum = self.checksums[position]
        if checksum is None:
            return None
        pixels = np.array(self.pixels[position])
        if zlib.crc32(pixels.data) != checksum:
            raise _DamagedError
        return torch.from_numpy(pixels)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
