"""Decoded images on the disk: a file per image, in a folder that only its user can write."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.rgb import Conversion
from tir_kernels.files import expand_user
from tir_kernels.text import Notice, printable, setting

_CACHE = setting("cache")

# A file is this and, unless the image is unreadable, its pixels: a mark, the image's key, whether
# there are pixels, what the image lost when it was converted, and the checksum of all the rest.
_HEAD = struct.Struct("<8s64sHHI")
_MARK = b"tir_img2"
_SUFFIX, _PARTIAL = ".image", ".partial"

# The disk is not filled beyond this: others need it too.
_ROOM_BYTES = 64 * 2**20
# A file that was not finished after this time belongs to a process that was killed.
_PARTIAL_SECONDS = 3600


class KeptImage(NamedTuple):
    """An image in the cache.

    Args:
        pixels: (3, H, W) uint8, or ``None`` for an image that is known to be unreadable.
        conversions: Losses on its way to them.
    """

    pixels: Tensor | None
    conversions: Conversion = Conversion(0)


class _DamagedError(Exception):
    """A file of the cache is not as it was written."""


class _UntrustedError(Exception):
    """Somebody else may have written this."""


def default_cache_folder() -> Path | None:
    """``tir_kernels/images`` in the user's folder for caches; ``None`` where there is no home."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # The standard behind the variable says that relative paths are to be ignored.
    if not os.path.isabs(caches):
        try:
            caches = str(expand_user("~/.cache"))
        except OSError:
            return None
    return Path(caches) / "tir_kernels" / "images"


def open_cache(
    folder: str | Path | None, shape: tuple[int, int, int], *, notify: Callable[[str], None]
) -> ImageCache | None:
    """The cache in a folder, or in the default one; ``None``, and a note, where there is none.

    Args:
        folder: The folder, or ``None``.
        shape: (3, H, W) of its images.
        notify: Called with a line on what is wrong with the cache.

    Raises:
        FewShotError: The folder's name starts with ``~``, and no home folder is known.
    """
    chosen = folder or default_cache_folder()
    if chosen is None:
        notify(
            Notice(
                f"{_CACHE}: no home folder is known to keep images in; going on without, so they "
                "are decoded again in each run; "
                f"pass {setting('cache', 'DIR')}, or {setting('no_cache')}"
            )
        )
        return None
    return ImageCache(chosen, shape, notify=notify)


class ImageCache:
    """Keeps decoded images in a folder that any number of processes of a user may share.

    An image's file appears under its name, its key, only when it is complete, and is checked
    whenever it is read. Files may be deleted at any time. Several threads may use one cache.

    A checksum does not tell who wrote a file. Therefore the images are in a sub-folder of the
    user's own, ``user-`` and the user's number, and that folder and its files are used only if they
    belong to this user or to root and nobody else may write them. Links are not followed, and files
    of others are neither used nor replaced.

    Where the folder can't be used, the user is told once, and images are not kept from there on.

    Args:
        folder: The folder; it is created when something is to be kept.
        shape: (3, H, W) of its images.
        notify: Called with a line on what is wrong with the cache.

    Raises:
        FewShotError: The folder's name starts with ``~``, and no home folder is known.
    """

    def __init__(
        self, folder: str | Path, shape: tuple[int, int, int], *, notify: Callable[[str], None]
    ) -> None:
        try:
            root = expand_user(folder)
        except OSError as error:
            raise FewShotError(f"{_CACHE}: {first_line(error)}; pass a whole path") from error
        self.folder = root / f"user-{os.geteuid()}"
        self._shape = shape
        self._notify = notify
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._is_readable = self._is_writable = True
        self._is_tidy = False
        self._damaged: set[str] = set()
        self._foreign: set[str] = set()

    def read(self, key: str) -> KeptImage | None:
        """The image of a key, or ``None`` where the cache does not have it.

        Args:
            key: 64 hexadecimal digits that differ wherever the pixels may differ.
        """
        if not self._is_readable:
            return None
        path = printable(str(self.folder / (key + _SUFFIX)))
        try:
            with self._opened_folder() as folder:
                return self._read(folder, key)
        except FileNotFoundError:
            return None
        except _UntrustedError as error:
            self._foreign.add(key)
            self._tell_once(
                "foreign",
                f"{_CACHE}: {path} {error}, so it is not used, nor any other such file; their "
                "images are decoded again, and not kept",
            )
        except _DamagedError:
            self._tell_once(
                "damaged",
                f"{_CACHE}: {path} is damaged; its image is decoded again, and so are those of "
                "other damaged files",
            )
            if key in self._damaged:
                self._give_up(OSError(errno.EIO, "what was just written is damaged"))
            self._damaged.add(key)
        except OSError as error:
            self._give_up(error)
        return None

    def store(self, key: str, image: KeptImage) -> bool:
        """Keep an image; returns whether it was possible.

        Args:
            key: As in ``read``.
            image: Its pixels, or that it has none.
        """
        if not self._is_writable or key in self._foreign:
            return False
        try:
            with contextlib.suppress(FileExistsError):
                self.folder.parent.mkdir(parents=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            with self._opened_folder() as folder:
                self._tidy(folder)
                self._write(folder, key, image)
        except OSError as error:
            self._give_up(error)
        return self._is_writable

    @contextlib.contextmanager
    def _opened_folder(self) -> Iterator[int]:
        """The folder's descriptor, through which alone its files are reached."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            folder = os.open(self.folder, flags)
        except FileNotFoundError:
            raise
        except OSError as error:
            why = "the folder is a link" if os.path.islink(self.folder) else error.strerror
            raise OSError(error.errno, why, str(self.folder)) from error
        except ValueError as error:  # a NUL byte in the name
            raise OSError(errno.EINVAL, str(error), str(self.folder)) from error
        try:
            try:
                _require_own(os.fstat(folder))
            except _UntrustedError as error:
                self._is_readable = False
                raise OSError(
                    errno.EPERM,
                    f"the folder {error}, so delete it or pass another",
                    str(self.folder),
                ) from None
            yield folder
        finally:
            os.close(folder)

    def _read(self, folder: int, key: str) -> KeptImage:
        # A pipe would otherwise be waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(key + _SUFFIX, flags, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _UntrustedError("is a link") from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _UntrustedError("is not a regular file")
            _require_own(status)
            # Read whole, and never mapped: a file cut short meanwhile would end the process.
            content = bytearray(_HEAD.size + math.prod(self._shape))
            with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
                size = _read_into(file, content)
                if size < _HEAD.size or file.read(1):
                    raise _DamagedError
        finally:
            os.close(descriptor)
        return self._parsed(key, content[:size])

    def _parsed(self, key: str, content: bytearray) -> KeptImage:
        _, _, has_pixels, lost, _ = _HEAD.unpack_from(content)
        pixels = np.frombuffer(content, np.uint8, offset=_HEAD.size)
        size = math.prod(self._shape) if has_pixels else 0
        expected = _head(key, has_pixels, lost, pixels.data)
        if content[: _HEAD.size] != expected or len(pixels) != size:
            raise _DamagedError
        try:
            conversions = Conversion(lost)
        except ValueError as error:
            raise _DamagedError from error
        if not has_pixels:
            return KeptImage(None, conversions)
        return KeptImage(torch.from_numpy(pixels.reshape(self._shape)), conversions)

    def _write(self, folder: int, key: str, image: KeptImage) -> None:
        pixels = b"" if image.pixels is None else image.pixels.numpy().tobytes()
        content = _head(key, image.pixels is not None, image.conversions.value, pixels) + pixels
        room = os.fstatvfs(folder)
        # Some file systems answer with nothing but zeros.
        if room.f_blocks and room.f_bavail * room.f_frsize < len(content) + _ROOM_BYTES:
            # Found out now, and not by filling the disk for everyone.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial = f"{key}.{secrets.token_hex(8)}{_PARTIAL}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o600, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.rename(partial, key + _SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise

    def _tidy(self, folder: int) -> None:
        """Delete, once, what processes left that were killed while they wrote."""
        with self._lock:
            if self._is_tidy:
                return
            self._is_tidy = True
        oldest = time.time() - _PARTIAL_SECONDS
        for name in os.listdir(folder):
            if name.endswith(_PARTIAL):
                with contextlib.suppress(OSError):
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    if status.st_uid == os.geteuid() and status.st_mtime < oldest:
                        os.unlink(name, dir_fd=folder)

    def _give_up(self, error: OSError) -> None:
        self._is_writable = False
        self._tell_once(
            "gave up",
            f"{_CACHE}: can't keep images in {printable(str(self.folder))}: {first_line(error)}; "
            "going on without, so they are decoded again in each run",
        )

    def _tell_once(self, kind: str, text: str) -> None:
        with self._lock:
            is_new = kind not in self._told
            self._told.add(kind)
        if is_new:
            self._notify(Notice(text))


def _require_own(status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise _UntrustedError("belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UntrustedError("can be written by other users")


def _read_into(file: RawIOBase, content: bytearray) -> int:
    """Fill the content from a file, and return how many bytes there were."""
    size, view = 0, memoryview(content)
    while count := file.readinto(view[size:]):
        size += count
    return size


def _head(key: str, has_pixels: bool, lost: int, pixels: bytes | memoryview) -> bytes:
    fields = _HEAD.pack(_MARK, key.encode(), has_pixels, lost, 0)
    return _HEAD.pack(_MARK, key.encode(), has_pixels, lost, zlib.crc32(pixels, zlib.crc32(fields)))
