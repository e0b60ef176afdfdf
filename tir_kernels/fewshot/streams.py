"""Outputs that never fail: a training must not end because nobody can be written to."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class ForgivingStream:
    """A text stream whose writing fails in silence, and keeps the reason.

    What the stream's encoding lacks is written as Python would escape it.

    Args:
        stream: Stream to write to; ``None``, as Python has it for a closed standard output: none.

    Attributes:
        failure: Why something could not be written, or empty.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.failure = "" if stream is not None else "it is closed"
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self.failure = str(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered; after the first failure, drop it and all that comes."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.failure = str(error)
            # What is buffered would be tried again whenever somebody writes, and by Python itself
            # when the program ends.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving_output() -> Iterator[ForgivingStream]:
    """Put forgiving streams in place of standard output, which is given, and standard error."""
    before = sys.stdout, sys.stderr
    output, errors = ForgivingStream(before[0]), ForgivingStream(before[1])
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
