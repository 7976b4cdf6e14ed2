"""The access log: one JSON line per request, written by a thread so that a slow disk or reader never holds up the event loop.

    event loop → `AccessLog.record` (a value onto a list) → thread (JSON lines) → file or stderr

What cannot be written is dropped and counted: lines that find no room on the disk, lines a slow reader leaves behind, all
lines once the reader has gone. Serving goes on.
"""

import contextlib
import os
import select
import stat
import time
from pathlib import Path

import msgspec

from modelyard.errors import ConfigError
from modelyard.inference.serve.metrics.backlog import Backlog
from modelyard.inference.serve.metrics.observe import Timeline

STDERR = 2

_LINES_PER_TURN = 32  # about 100 us of work
_TRY_AGAIN_S = 0.2
_FILE_CHUNK_BYTES = 64 * 1024
_PIPE_CHUNK_BYTES = select.PIPE_BUF  # up to here lines of several workers do not mix in a pipe


class AccessLine(msgspec.Struct, frozen=True):
    """One line. A step that was never reached is null."""

    time_s: float
    """When it was answered, seconds since 1970."""
    request_id: str
    protocol: str
    method: str
    path: str
    status: int
    cause: str
    model: str
    version: str
    tenant: str
    rows: int
    batch_rows: int
    queue_s: float | None
    compute_s: float | None
    duration_s: float
    request_bytes: int
    response_bytes: int


def access_line(timeline: Timeline, epoch_s: float) -> AccessLine:
    """Return the line for a request; `epoch_s` is the time since 1970 at the zero of the timeline's clock."""
    started_s, computed_s = timeline.started_s, timeline.computed_s
    return AccessLine(
        time_s=round(epoch_s + timeline.finished_s, 6),
        request_id=timeline.request_id.decode("latin-1"),
        protocol=timeline.protocol,
        method=timeline.method,
        path=timeline.path,
        status=timeline.status,
        cause=timeline.cause,
        model=timeline.model,
        version=timeline.version,
        tenant=timeline.tenant,
        rows=timeline.n_rows,
        batch_rows=timeline.batch_rows,
        queue_s=round(started_s - timeline.admitted_s, 6) if started_s else None,
        compute_s=round(computed_s - started_s, 6) if computed_s else None,
        duration_s=round(timeline.finished_s - timeline.arrived_s, 6),
        request_bytes=timeline.request_bytes,
        response_bytes=timeline.response_bytes,
    )


class AccessLog:
    """Writes requests down. `record` belongs to the event loop, the other methods may be called from any thread."""

    def __init__(self, path: Path | None = None, *, sample: float = 1.0, max_pending: int = 20_000) -> None:
        """
        Args:
            path: a file to append to; None for stderr.
            sample: the share of requests to write, in [0, 1]. Requests with a status of 400 or more are always written.
            max_pending: lines that may wait for the disk; later ones are dropped.

        Raises:
            ConfigError: the share is out of range.
        """
        if not 0 <= sample <= 1:
            raise ConfigError(
                f"--access-log-sample must be in [0, 1], got {sample:g}; 0.01 writes one request in a hundred"
            )
        self._path = path
        self._sample = sample
        self._due = 0.0
        self._backlog: Backlog[Timeline] = Backlog(
            "access-log", self._write_pending, max_pending=max_pending, gather_s=0.2, hurry_at=512
        )
        self.record = self._backlog.put
        """Takes a request's `Timeline`; on the event loop."""
        self._n_lost = 0
        self._reopen = False
        self._fd = STDERR
        self._chunk_bytes = _FILE_CHUNK_BYTES
        self._torn = False  # the last thing on disk is half a line

    @property
    def n_dropped(self) -> int:
        """Lines lost so far."""
        return self._backlog.n_dropped + self._n_lost

    def start(self) -> None:
        """Open the file and start the thread; after the fork, since threads do not survive one. Raises ConfigError."""
        self._open()
        self._backlog.start()

    def wanted(self, status: int) -> bool:
        """Say whether the next request is one to write; asked once per request, before its `Timeline` is made."""
        if status >= 400:
            return True
        self._due += self._sample
        if self._due < 1.0:
            return False
        self._due -= 1.0
        return True

    def reopen(self) -> None:
        """Open the file anew, after somebody has moved it away."""
        self._reopen = True
        self._backlog.wake()

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is pending, for as long as `timeout_s`; a reader that hangs is left behind."""
        if self._backlog.close(timeout_s):
            self._close_file()

    # On the thread.

    def _write_pending(self, backlog: Backlog[Timeline]) -> None:
        if self._reopen:
            self._reopen = False
            self._close_file()
            with contextlib.suppress(ConfigError):  # lines are counted as lost until the path is mended
                self._open()
        epoch_s = time.time() - time.perf_counter()
        chunk: list[bytes] = []
        n_bytes = 0
        for timeline in backlog.take(_LINES_PER_TURN):
            line = msgspec.json.encode(access_line(timeline, epoch_s)) + b"\n"
            if n_bytes + len(line) > self._chunk_bytes:
                self._write(chunk)
                chunk, n_bytes = [], 0
            chunk.append(line)
            n_bytes += len(line)
        self._write(chunk)

    def _write(self, lines: list[bytes]) -> None:
        """Write whole lines; count those that cannot be written."""
        left = memoryview(b"".join(lines))
        try:
            if self._torn:
                self._write_some(memoryview(b"\n"))
                self._torn = False
            while left:
                n_written = self._write_some(left)
                self._torn = left[n_written - 1] != ord("\n")
                left = left[n_written:]
        except OSError:  # full, gone, or hung when we have to end
            self._n_lost += bytes(left).count(b"\n")

    def _write_some(self, data: memoryview) -> int:
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # somebody has made the pipe or terminal that we share non-blocking
                if self._backlog.closing:
                    raise
                select.select([], [self._fd], [], _TRY_AGAIN_S)

    def _open(self) -> None:
        if self._path is not None:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as exc:
                raise ConfigError(
                    f"--access-log-file {self._path}: cannot be opened ({exc.strerror}); give a file in a directory that is there"
                ) from exc
        try:
            shared = not stat.S_ISREG(os.fstat(self._fd).st_mode)
        except OSError:
            shared = True  # no stderr: what is written is counted as lost
        self._chunk_bytes = _PIPE_CHUNK_BYTES if shared else _FILE_CHUNK_BYTES

    def _close_file(self) -> None:
        if self._fd > STDERR:
            os.close(self._fd)
            self._fd = -1
