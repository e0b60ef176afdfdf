"""Weights files of every kind, read as tensors only: no code that a file holds or names is run."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import MIB, open_regular, read_text
from tir_kernels.towers.loading.stand_ins import stand_in
from tir_kernels.towers.loading.torchscript import is_torchscript, read_torchscript

INDEX_ENDING = ".index.json"

_MAX_INDEX_BYTES = 64 * MIB
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own bound
_HEAD_BYTES = 512
# A file of PyTorch's format before 1.6 cannot be searched for the names in it.
_USUAL_NAMES = (
    *("argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict"),
    *("builtins.int", "builtins.list", "builtins.dict", "builtins.slice", "builtins.object"),
    *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray._reconstruct", "datetime.datetime", "datetime.timedelta"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "torch.torch_version.TorchVersion"),
)
_DAMAGED = (
    "it is damaged, or holds what can't be read as tensors only: pass a safetensors file or a "
    "plain state dict"
)
_CUT_SHORT = "it is cut short: download or copy it again"


def read_checkpoint(path: Path) -> Any:
    """The content of a weights file, whatever it is called.

    Args:
        path: A safetensors file, a file of ``torch.save``, a TorchScript archive, or the index of a
            checkpoint in several files (``….index.json``).

    Returns:
        What was saved: a state dict, containers of them at any depth, or a stand-in for a module.

    Raises:
        FewShotError: The file can't be read, with the reason in words of the file.
    """
    try:
        if path.name.endswith(INDEX_ENDING):
            return _read_shards(path)
        with open_regular(path) as file:
            return _read(file, path)
    except FewShotError:
        raise
    except OSError as error:
        raise _unreadable(path, f"{error.strerror or first_line(error)}; check the file") from error
    except Exception as error:  # a damaged file leads PyTorch into errors of any type
        raise _unreadable(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "there is not enough memory to hold it"
    if isinstance(error, EOFError) or any(
        words in text for words in ("EOF", "truncated", "central directory")
    ):
        return _CUT_SHORT
    return f"{first_line(error)}; {_DAMAGED}"


def checkpoint_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's content: itself, or its index and all parts."""
    if not path.name.endswith(INDEX_ENDING):
        return [path]
    try:
        index = json.loads(read_text(path, at_most=_MAX_INDEX_BYTES))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(
            path, f"it is not an index of weights files ({first_line(error)}); download it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(INDEX_ENDING):
            raise _unreadable(path, f"it names {name!r}, which is no file beside it")
        if not (path.parent / name).is_file():
            raise _unreadable(path, f"its part {name} is missing; put all parts beside it")
    return [path, *(path.parent / name for name in names)]


def _read_shards(path: Path) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in checkpoint_files(path)[1:]:
        content = read_checkpoint(part)
        if not isinstance(content, dict):
            raise _unreadable(part, _DAMAGED)
        whole.update(content)
    return whole


def _read(file: BinaryIO, path: Path) -> Any:
    head = file.read(_HEAD_BYTES)
    size = os.fstat(file.fileno()).st_size
    if foreign := _foreign_kind(head, size):
        raise _unreadable(path, foreign)
    if len(head) > 8 and head[8:9] == b"{":
        _check_safetensors_size(file, size, path)
        return load_file(path)
    if head.startswith(b"PK"):
        return _read_zip(file, path)
    file.seek(0)
    return _torch_load(file, list(_USUAL_NAMES))


def _read_zip(file: BinaryIO, path: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise _unreadable(path, _CUT_SHORT)
    with closing(zipfile.ZipFile(file)) as archive:
        names = [PurePosixPath(name).name for name in archive.namelist()]
        if is_torchscript(archive):
            return read_torchscript(archive)
        if "data.pkl" not in names:
            kind = "NumPy" if any(name.endswith(".npy") for name in names) else "ZIP"
            raise _unreadable(
                path,
                f"it is a {kind} archive without PyTorch's weights (it holds {', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}); pass a safetensors or PyTorch file",
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            # Of any size once it is unpacked.
            raise _unreadable(path, f"it is compressed, which PyTorch never does; {_DAMAGED}")
    file.seek(0)
    unknown = get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    return _torch_load(file, unknown)


def _torch_load(file: BinaryIO, unknown: list[str]) -> Any:
    # PyTorch's reader of tensors knows few classes; it is told stand-ins for all others.
    with safe_globals([(stand_in(name), name) for name in unknown]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_safetensors_size(file: BinaryIO, size: int, path: Path) -> None:
    """Say that a safetensors file is cut short, which the library calls an invalid header."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER_BYTES:
        raise _unreadable(path, f"it is no weights file that is known here; {_DAMAGED}")
    header = file.read(length)
    if len(header) < length:
        raise _unreadable(path, _CUT_SHORT)
    entries = json.loads(header)
    ends = [
        entry["data_offsets"][1]
        for entry in entries.values()
        if isinstance(entry, dict) and "data_offsets" in entry
    ]
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise _unreadable(path, f"it has {size:,} of {whole:,} bytes; download or copy it again")


def _foreign_kind(head: bytes, size: int) -> str:
    """The kind of a file that is no weights file, and what to do; empty if it may be one."""
    if size == 0:
        return "it is empty; download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder"
    return next((words for words in _foreign_kinds(head)), "")


def _foreign_kinds(head: bytes) -> Iterator[str]:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error", b"<head")):
        yield (
            "it is a web page, as a server sends it where a download fails; download the weights "
            "again, logged in if they need it"
        )
    if text.startswith((b"{", b"[")):
        yield f"it is JSON text, not weights; pass the weights, or an index named …{INDEX_ENDING}"
    for mark, kind in (
        (b"\x89HDF", "an HDF5 file, as Keras writes it"),
        (b"GGUF", "a GGUF file"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"\x1f\x8b", "compressed by gzip"),
        (b"\x28\xb5\x2f\xfd", "compressed by Zstandard"),
        (b"\xfd7zXZ", "compressed by xz"),
        (b"7z\xbc\xaf", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
    ):
        if head.startswith(mark):
            yield f"it is {kind}; unpack or convert it to a safetensors or PyTorch file"


def _unreadable(path: Path, reason: str) -> FewShotError:
    return FewShotError(f"can't read the weights {path}: {reason}")
