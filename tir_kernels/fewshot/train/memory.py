"""How much memory a training takes, how much there is, and how one learns that it ran out."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tir_kernels import towers
from tir_kernels.errors import FewShotError, first_line

_MEMORY_INFO = Path("/proc/meminfo")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GROUP_USE = Path("/sys/fs/cgroup/memory.current")

_PACKED_SHARE = 0.125  # of a machine's memory that packed matrices may take

# PyTorch has an error of its own for a GPU only; on a CPU it raises a RuntimeError that says so.
_SAYINGS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "Cannot allocate memory",
    "ALLOC_FAILED",
)


@contextmanager
def with_one_memory_error() -> Iterator[None]:
    """Raise ``torch.OutOfMemoryError`` for lack of memory of any kind, also a CPU's or NumPy's."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error) or type(error).__name__) from error


@contextmanager
def engine_errors_explained(where: str = "") -> Iterator[None]:
    """``with_one_memory_error``, and the engine's own checks as a user's errors.

    Those are a layer that the model does not have, say, or a class name that is too long.

    Args:
        where: What stands in front of their messages.
    """
    try:
        with with_one_memory_error():
            yield
    except (ValueError, TypeError) as error:
        raise FewShotError(where + first_line(error)) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_runtime_error = isinstance(error, RuntimeError)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        is_runtime_error and any(saying in str(error) for saying in _SAYINGS)
    )


class SavedBytes:
    """The bytes that forward passes in a context keep for the backward pass.

    Attributes:
        total: Bytes, each storage counted once.
    """

    total = 0


@contextmanager
def count_saved_bytes(ignored: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Count what autograd keeps.

    Args:
        ignored: Tensors that are there anyway, such as a model's parameters.
    """
    count = SavedBytes()
    seen = {tensor.untyped_storage().data_ptr() for tensor in ignored}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            count.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def available_bytes(device: torch.device) -> int:
    """The bytes that could be allocated on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    found = [_machine_bytes("MemAvailable:"), _group_bytes()]
    return min((number for number in found if number is not None), default=2**30)


def packed_matrices(model: nn.Module, forms: int = 2) -> Sequence[Tensor]:
    """The frozen matrices to be multiplied in packed form: all that gain by it, or none.

    By the memory that there is, not by what is free, so that a run repeats to the bit.

    Args:
        model: A model with towers that can be opened.
        forms: How many each is kept in besides: two where gradients flow, else one.
    """
    matrices = towers.packable(model)
    needed = forms * sum(each.nbytes for each in matrices)
    return matrices if needed <= _PACKED_SHARE * _total_bytes() else ()


def _total_bytes() -> int:
    found = [_machine_bytes("MemTotal:"), _group_limit()]
    return min((number for number in found if number is not None), default=2**30)


def _machine_bytes(name: str) -> int | None:
    try:
        lines = _MEMORY_INFO.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith(name)]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _group_bytes() -> int | None:
    """The bytes left below a container's limit; ``None`` without one."""
    limit = _group_limit()
    try:
        return None if limit is None else limit - int(_GROUP_USE.read_text())
    except (OSError, ValueError):
        return None


def _group_limit() -> int | None:
    try:
        return int(_GROUP_LIMIT.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None
