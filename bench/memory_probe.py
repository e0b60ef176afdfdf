"""Peak extra memory of one call, outputs included."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .timing import Call

MIB = 2**20


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
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, prepare, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "the process that measures memory died"
    process.join()
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def _report(sender: Connection, prepare: Callable[[bool], Call], threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    try:
        prepare(True)()
        call = prepare(False)
        # The peak starts again from what is held now.
        Path("/proc/self/clear_refs").write_text("5")
        before = _kibibytes("VmRSS")
        result = call()
        sender.send((_kibibytes("VmHWM") - before) / 1024)
        del result
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _kibibytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])
