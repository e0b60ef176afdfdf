"""The tensors of a TorchScript archive, read without running any of its code.

``torch.jit.load`` runs what an archive defines for its own unpacking, and PyTorch refuses archives
where only tensors are to be read. Such an archive is a ZIP file with a pickle of the module, whose
tensors are stored beside it as they are in memory; both are read here as data.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tir_kernels.towers.loading.stand_ins import StandIn, stand_in

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a ZIP file is a TorchScript archive."""
    return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile) -> StandIn:
    """The module of an archive, as a stand-in that holds its tensors.

    Raises:
        ValueError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError: It is damaged, or of
            another kind.
    """
    pickles = [name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("a TorchScript archive without its module")
    folder = PurePosixPath(pickles[0]).parent
    module = _Unpickler(io.BytesIO(_stored(archive, pickles[0])), archive, folder).load()
    if not isinstance(module, StandIn):
        raise ValueError("a TorchScript archive that holds no module")
    return module


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    # PyTorch compresses no tensors; what is compressed could be of any size once it is unpacked.
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which PyTorch never does")
    return archive.read(entry)


class _Unpickler(pickle.Unpickler):
    """Builds tensors, containers and stand-ins, and calls nothing else."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, folder: PurePosixPath) -> None:
        super().__init__(file)
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return stand_in(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor of an unknown kind")
        if key not in self._storages:
            content = bytearray(_stored(self._archive, f"{self._folder / 'data' / key}"))
            if len(content) < length * dtype.itemsize:
                raise pickle.UnpicklingError(f"tensor {key} is cut short")
            self._storages[key] = (
                torch.frombuffer(content, dtype=dtype, count=length)
                if length
                else torch.empty(0, dtype=dtype, device="cpu")
            )
        return self._storages[key]


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)
