"""Peak extra memory of one call, outputs included."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tir_kernels.files import MIB

from .timing import Call


def added_on_gpu(call: Call) -> float:
    """MiB that a call adds to the memory that tensors occupy on the GPU."""
    call()  # libraries take their workspaces now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    added = torch.cuda.max_memory_allocated() - before
    del result
    return added / MIB


def added_in_new_process(prepare: Callable[[bool], Call], threads: int) -> float:
    """MiB that a call adds to the resident memory of a process of its own.

    Args:
        prepare: A picklable function that allocates the inputs and returns the call; its argument
            says whether they are to be small, for a first call after which everything is loaded
            that is loaded once.
        threads: For the process.

    Raises:
        RuntimeError: The process failed; the message says how.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_added, prepare, threads).result()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _added(prepare: Callable[[bool], Call], threads: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    prepare(True)()
    call = prepare(False)
    # The peak starts again from what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kibibytes("VmRSS")
    result = call()
    added = _kibibytes("VmHWM") - before
    del result
    return added / 1024


def _kibibytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])
