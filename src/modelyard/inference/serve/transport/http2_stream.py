"""One exchange over HTTP/2, and the way out that the exchanges of a connection share.

answer → Stream → Outbox (the client's windows, one write per turn of the event loop) → socket
"""

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from modelyard.inference.serve.transport.http2_frames import (
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME,
    HEADERS,
    MAX_FRAME_BYTES,
    ErrorCode,
)

if TYPE_CHECKING:
    from modelyard.inference.serve.transport.http2 import Http2Connection

_NEVER = float("inf")
_MAX_WRITE_BYTES = 256 * 1024
"""Of a large answer, before looking whether the client takes it."""


class Stream:
    """One exchange: a request's headers and body in, an answer out. The base of what a protocol makes of it.

    The connection calls the `on_` methods; the protocol answers with `answer`, or with `respond`, `write` and `finish`.
    """

    __slots__ = (
        "_outbox",
        "_responded",
        "client_done",
        "connection",
        "held_bytes",
        "id",
        "paused",
        "pending",
        "receive_window",
        "send_window",
        "server_done",
        "stalled_at_s",
        "trailers",
        "unread_body_bytes",
    )

    def __init__(self, connection: "Http2Connection", stream_id: int) -> None:
        self.connection = connection
        self.id = stream_id
        self.client_done = False
        """Nothing more comes from the client."""
        self.server_done = False
        """The answer is complete, or nobody waits for it any more."""
        self.paused = False
        """Nothing more is wanted for now: the client may send as much as its window still allows."""
        self.receive_window = connection.stream_window_bytes
        self.send_window = connection.peer_window_bytes
        self.held_bytes = 0
        self.unread_body_bytes = -1
        """How much of what content-length promised is to come; below 0 where it said nothing."""
        self.stalled_at_s = _NEVER
        """Since when the answer waits for the client; time.perf_counter()."""
        self.pending: deque[memoryview] | None = None
        self.trailers: bytes | None = None
        self._outbox = connection.outbox
        self._responded = False

    def on_open(self) -> None:
        """The headers are here; the body may follow."""

    def on_data(self, data: bytes, ended: bool) -> None:
        """Take the next part of the body; `ended` with the last one, which may be empty."""
        raise NotImplementedError

    def on_abandoned(self) -> None:
        """The client has reset the stream or is gone; nothing can be answered any more."""

    def on_draining(self) -> None:
        """The server is about to end: what has no end of its own should find one."""

    def on_time(self, now_s: float) -> None:
        """Look whether anything has run out of time; called about once a second with time.perf_counter()."""

    def answer(self, head: bytes, body: bytes, trailers: bytes) -> None:
        """Answer at once: a header block, a body and a trailer block."""
        outbox = self._outbox
        size = len(body)
        if (
            size > MAX_FRAME_BYTES
            or size > outbox.window
            or size > self.send_window
            or self.server_done
            or not self.client_done
        ):
            self.respond(head)
            self.write(body)
            self.finish(trailers)
            return
        outbox.window -= size
        stream_id = self.id
        outbox.write(
            b"%b%b%b%b%b%b"
            % (
                FRAME.pack(0, len(head), HEADERS, END_HEADERS, stream_id),
                head,
                FRAME.pack(0, size, DATA, 0, stream_id),
                body,
                FRAME.pack(0, len(trailers), HEADERS, END_HEADERS | END_STREAM, stream_id),
                trailers,
            )
        )
        self.server_done = True
        self.connection.answered(self)

    def respond(self, head: bytes) -> None:
        """Begin the answer with a header block."""
        if not self.server_done:
            self._responded = True
            self._outbox.write(FRAME.pack(0, len(head), HEADERS, END_HEADERS, self.id) + head)

    def write(self, data: bytes) -> None:
        """Go on with the answer; what the client's windows do not allow yet waits."""
        if self.server_done or not data:
            return
        if self.pending is None:
            self.pending = deque()
        self.pending.append(memoryview(data))
        self._outbox.pump(self)

    def finish(self, trailers: bytes) -> None:
        """End the answer with a trailer block; alone, where nothing has been sent, it is the whole answer."""
        if self.server_done or self.trailers is not None:
            return
        self.trailers = trailers
        self._outbox.pump(self)

    def reset(self, code: ErrorCode) -> None:
        """Break the exchange off."""
        self.connection.reset(self, code)

    @property
    def blocked(self) -> bool:
        """Whether some of the answer waits until the client takes it."""
        return bool(self.pending)

    def resume(self) -> None:
        """Let the client send again after `paused`."""
        self.paused = False
        self.connection.give_window(self)


class Outbox:
    """What a connection writes: whole frames, as the client's windows allow, together once per turn of the event loop."""

    __slots__ = (
        "_frames",
        "_loop",
        "_n_bytes",
        "_n_frames",
        "_waiting",
        "blocked",
        "closed",
        "flush_due",
        "max_frame_bytes",
        "transport",
        "window",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self.window = DEFAULT_WINDOW
        """Bytes of bodies the client still takes, on all streams together."""
        self.max_frame_bytes = MAX_FRAME_BYTES
        self.blocked = False
        """The client does not read."""
        self.closed = False
        """Nothing is written any more."""
        self.flush_due = False
        """Somebody will call `flush`."""
        self._frames: list[bytes] = []
        self._n_bytes = 0
        self._n_frames = 0
        self._waiting: dict[Stream, None] = {}

    def write(self, frames: bytes) -> None:
        """Write whole frames that no window holds back."""
        if self.closed:
            return
        self._frames.append(frames)
        if not self.flush_due:
            self.flush_due = True
            self._loop.call_soon(self._flush_later)

    def pump(self, stream: Stream) -> None:
        """Write as much of a stream's answer as the windows allow."""
        pending = stream.pending
        while pending and not self.blocked:
            room = min(self.window, stream.send_window, self.max_frame_bytes, _MAX_WRITE_BYTES)
            if room <= 0:
                break
            chunk = pending[0]
            size = len(chunk)
            if size > room:
                pending[0] = chunk[room:]
                chunk, size = chunk[:room], room
            else:
                pending.popleft()
            self.window -= size
            stream.send_window -= size
            stream.stalled_at_s = _NEVER
            self.write(FRAME.pack(size >> 16, size & 0xFFFF, DATA, 0, stream.id) + chunk)
            self._n_frames += 1
            self._n_bytes += size
            if self._n_bytes >= _MAX_WRITE_BYTES:
                self.flush()
        if pending:
            if stream.stalled_at_s == _NEVER:
                stream.stalled_at_s = time.perf_counter()
            self._waiting[stream] = None
            return
        self._waiting.pop(stream, None)
        trailers = stream.trailers
        if trailers is not None:
            stream.server_done = True
            self.write(FRAME.pack(0, len(trailers), HEADERS, END_HEADERS | END_STREAM, stream.id) + trailers)
            stream.connection.answered(stream)

    def pump_all(self) -> None:
        """Go on with the answers that wait, the oldest first."""
        for stream in tuple(self._waiting):
            if self.blocked or self.window <= 0:
                return
            self.pump(stream)

    def forget(self, stream: Stream) -> None:
        self._waiting.pop(stream, None)

    def take_n_frames(self) -> int:
        """Return how many frames of answers were written since this was last asked."""
        n_frames, self._n_frames = self._n_frames, 0
        return n_frames

    def flush(self) -> None:
        """Hand all that is written to the socket."""
        frames = self._frames
        if frames:
            data = frames[0] if len(frames) == 1 else b"".join(frames)
            frames.clear()
            self._n_bytes = 0
            assert self.transport is not None
            self.transport.write(data)

    def _flush_later(self) -> None:
        self.flush_due = False
        self.flush()
