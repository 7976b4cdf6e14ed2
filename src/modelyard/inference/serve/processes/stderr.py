"""A stderr that never fails. Where the disk under it is full, or its reader has gone, what would be said is lost and serving
goes on: a server must not stop answering, or replacing workers, because it cannot say that it does.
"""

import io
import sys
from typing import Any, TextIO

_STDERR = 2


class _Lossy(io.FileIO):
    """A file whose writes always succeed."""

    def write(self, data: Any) -> int:
        try:
            n_written = super().write(data)
        except OSError:  # full, too large, no reader
            n_written = None
        return len(data) if n_written is None else n_written


def unfailing_stderr() -> TextIO:
    """Return a stream for `sys.stderr`, to be set before the workers are forked."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    buffered = io.BufferedWriter(_Lossy(_STDERR, "w", closefd=False))
    return io.TextIOWrapper(buffered, encoding, errors="backslashreplace", line_buffering=True)
