"""Handling of Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

PROGRAM = "tir-finetune"
INTERRUPTED = 130


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """End the process at Ctrl-C, while nothing is under way that could be lost.

    An exception would come out of the midst of some library's import as any other exception, or
    leave the library half imported.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # A spinner may have hidden the cursor.
            show_cursor = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""
            text = f"{PROGRAM}: interrupted before anything was done\n" if is_first else ""
            sys.stderr.write(show_cursor + text)
            sys.stderr.flush()
        os._exit(INTERRUPTED)

    with _handled(signal.SIGINT, leave), _handled(signal.SIGTERM, leave):
        yield


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handled(signal.SIGTERM, interrupt):
        yield


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Callable[[int, FrameType | None], Any]) -> Iterator:
    before = signal.getsignal(number)
    # A shell's background jobs ignore Ctrl-C; and only the main thread may choose a handler.
    is_ours = threading.current_thread() is threading.main_thread() and before not in (
        signal.SIG_IGN,
        None,
    )
    if is_ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(number, before)
