"""HTTP/2 on a socket, the server's side: frames ↔ streams, by prior knowledge and without TLS. gRPC stands on it.

    bytes → Http2Connection (frames, limits, windows) → http2_headers.py → Stream (one exchange; grpc.py derives its calls from it)
          ← Outbox (http2_stream.py) ←

Answers leave once per turn of the event loop, those of all streams in one write. What a client may cost is bounded: open streams,
headers, unfinished messages, time, and frames that ask for work and bring none.

https://www.rfc-editor.org/rfc/rfc9113
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

from modelyard.inference.serve.transport.http2_frames import (
    ACK,
    CONTINUATION,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME,
    FRAME_HEAD_BYTES,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_BYTES,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    MAX_STREAM_ID,
    MAX_STREAMS,
    MAX_WINDOW,
    PADDED,
    PREFACE,
    SETTING,
    SETTINGS,
    WITH_PRIORITY,
    ConnectionFault,
    ErrorCode,
    StreamFault,
    goaway,
    ping,
    rst_stream,
    settings,
    window_update,
    without_padding,
)  # fmt: skip
from modelyard.inference.serve.transport.http2_headers import HeaderReader, are_trailers
from modelyard.inference.serve.transport.http2_stream import Outbox, Stream
from modelyard.inference.serve.transport.messages import Head

_NEVER = float("inf")
_MAX_REMEMBERED_RESETS = 1024
_CREDIT_PER_ANSWER, _CREDIT_PER_FRAME = 4, 2
_DRAIN_GRACE_S = 1.0
_PING_DRAIN = b"draining"
_PING_ALIVE = b"alive?  "
_SETTINGS_ACK = FRAME.pack(0, 0, SETTINGS, ACK, 0)
_NO_HTTP1 = b"This port speaks gRPC, which is HTTP/2; REST is answered on another port.\n"
_WRONG_PROTOCOL = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
    % (len(_NO_HTTP1), _NO_HTTP1)
)


@dataclass(frozen=True)
class Http2Limits:
    """What one client may cost."""

    max_streams: int = 256
    """Open at once on a connection."""
    max_header_bytes: int = 32 * 1024
    """Of one request's headers, names and values with 32 bytes for each pair, as HTTP/2 counts them."""
    max_held_bytes: int = 256 * 1024 * 1024
    """Parts of unfinished messages, on all streams of a connection."""
    stream_window_bytes: int = 1024 * 1024
    connection_window_bytes: int = 8 * 1024 * 1024
    read_timeout_s: float = 30.0
    """From the first byte of a message to its last; also how long a client may refuse to take its answers."""
    linger_s: float = 2.0
    """How long what a refused client still sends is read and thrown away, so that it gets to see the refusal."""
    idle_timeout_s: float = 600.0
    """Without an open stream."""
    alive_every_s: float = 60.0
    """A client with open streams that is silent for so long is asked for a sign of life, and cut off after as long again."""
    max_control_frames: int = 4096
    """Frames in a row that ask for work and bring none: PING, SETTINGS, RST_STREAM, empty DATA. Answers and time win them back."""


Opener = Callable[["Http2Connection", int], Stream]
"""What a block of headers leads to: called with the connection and the stream's number."""
Prepare = Callable[[Head], Opener]
"""Called once for each distinct block of request headers; must not raise."""


class Http2Connections:
    """The open connections of one server and what they share. Belongs to the event loop; not thread-safe."""

    def __init__(
        self,
        prepare: Prepare,
        limits: Http2Limits,
        *,
        arrived_s: Callable[[], float] = time.perf_counter,
        on_open: Callable[[int], None] | None = None,
    ) -> None:
        """`arrived_s` says when data that is read now has arrived; `on_open` is told how many connections there are."""
        self.prepare = prepare
        self.limits = limits
        self.arrived_s = arrived_s
        self.on_open = on_open
        self.open: set[Http2Connection] = set()
        self.draining = False
        self.none_open = asyncio.Event()
        self.greeting = settings(
            (MAX_STREAMS, limits.max_streams),
            (INITIAL_WINDOW_SIZE, limits.stream_window_bytes),
            (MAX_HEADER_LIST_SIZE, limits.max_header_bytes),
        ) + window_update(0, limits.connection_window_bytes - DEFAULT_WINDOW)

    def new_connection(self) -> asyncio.Protocol:
        return Http2Connection(self)

    @property
    def n_busy(self) -> int:
        """Connections with a request that is not answered yet."""
        return sum(connection.busy for connection in self.open)

    def sweep(self, now_s: float) -> None:
        """End what has run out of time; called about once a second with the loop's time."""
        # Arrivals are counted by another clock than the loop's.
        perf_s = time.perf_counter() + now_s - asyncio.get_running_loop().time()
        for connection in tuple(self.open):
            connection.check_time(now_s, perf_s)

    def drain(self) -> None:
        """Ask every client to open no more streams; `none_open` is set when the last one is answered and all are gone."""
        self.draining = True
        for connection in tuple(self.open):
            connection.drain()
        if not self.open:
            self.none_open.set()

    def abort(self) -> None:
        for connection in tuple(self.open):
            connection.abort()


class Http2Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, shared: Http2Connections) -> None:
        limits = shared.limits
        self._shared = shared
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self.arrived_s = 0.0
        """When the frame at hand arrived; time.perf_counter()."""
        self.stream_window_bytes = limits.stream_window_bytes
        self.peer_window_bytes = DEFAULT_WINDOW
        self.outbox = Outbox(self._loop)
        self._receive_window = limits.connection_window_bytes
        self._low_window = limits.connection_window_bytes // 2
        self._streams: dict[int, Stream] = {}
        self._last_id = 0
        self._reset_ids: dict[int, None] = {}  # reset by us: what the client sent before it knew is passed over
        self._headers = HeaderReader(shared.prepare, limits.max_header_bytes)
        self._unfinished: tuple[int, bool] | None = None  # stream and END_STREAM of headers that go on in CONTINUATION
        self._block = bytearray()
        self._rest = b""
        self._greeted = False
        self._set_up = False
        self._credit = limits.max_control_frames
        self._held_bytes = 0
        self._stopped = False
        self._going_away = False  # the last word on which streams will be answered is said
        self._drain_asked = False
        self._client_done = False
        now_s = self._loop.time()
        self._idle_deadline_s = now_s + limits.read_timeout_s  # for the preface
        self._block_deadline_s = _NEVER
        self._write_deadline_s = _NEVER
        self._drain_deadline_s = _NEVER
        self._on_frame = (
            self._on_data,
            self._on_headers,
            self._on_priority,
            self._on_rst_stream,
            self._on_settings,
            self._on_push_promise,
            self._on_ping,
            self._on_goaway,
            self._on_window_update,
            self._on_continuation,
        )

    @property
    def busy(self) -> bool:
        return bool(self._streams)

    # From the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self.outbox.transport = cast(asyncio.Transport, transport)
        self._shared.open.add(self)
        if self._shared.on_open is not None:
            self._shared.on_open(len(self._shared.open))
        self._transport.write(self._shared.greeting)

    def connection_lost(self, exc: Exception | None) -> None:
        shared = self._shared
        self._stop()
        shared.open.discard(self)
        if shared.on_open is not None:
            shared.on_open(len(shared.open))
        self._abandon(self._streams.values())
        if shared.draining and not shared.open:
            shared.none_open.set()

    def eof_received(self) -> bool:
        # In HTTP/2 a client that closes its side has left: one that still waits for answers says GOAWAY.
        self._abandon(self._streams.values())
        return False

    def pause_writing(self) -> None:
        self.outbox.blocked = True
        if not self._transport.is_closing():
            self._write_deadline_s = self._loop.time() + self._limits.read_timeout_s
            self._transport.pause_reading()  # who does not take answers gets to ask nothing more

    def resume_writing(self) -> None:
        self.outbox.blocked = False
        self._write_deadline_s = _NEVER
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self.outbox.pump_all()

    def data_received(self, data: bytes) -> None:
        if self._stopped:
            return
        self.arrived_s = self._shared.arrived_s()
        outbox = self.outbox
        outbox.flush_due = True  # at the end of this method
        if self._rest:
            data = self._rest + data
        try:
            read = self._read_frames(data, 0) if self._greeted else self._greet(data)
        except ConnectionFault as fault:
            self._give_up(fault)
            return
        self._rest = data[read:]
        outbox.flush_due = False
        outbox.flush()

    # Reading.

    def _greet(self, data: bytes) -> int:
        """Read the client's preface and what follows; return how many bytes were read."""
        if not data.startswith(PREFACE):
            if not PREFACE.startswith(data):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"not an HTTP/2 preface: {data[:24]!r}")
            return 0
        self._greeted = True
        self._idle_deadline_s = self._loop.time() + self._limits.idle_timeout_s
        return self._read_frames(data, len(PREFACE))

    def _read_frames(self, data: bytes, at: int) -> int:
        """Handle the whole frames in `data` from `at` on; return where the first unfinished one begins."""
        end = len(data)
        read_head = FRAME.unpack_from
        on_frame = self._on_frame
        while end - at >= FRAME_HEAD_BYTES:
            size_high, size, kind, flags, stream_id = read_head(data, at)
            if size_high or size > MAX_FRAME_BYTES:
                raise ConnectionFault(
                    ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size_high << 16 | size} bytes; at most {MAX_FRAME_BYTES}"
                )
            start = at + FRAME_HEAD_BYTES
            if end - start < size:
                break
            at = start + size
            if self._unfinished is not None and kind != CONTINUATION:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "headers were begun and not gone on with")
            if kind > CONTINUATION:
                self._spend()
                continue  # extensions are ignored
            if not self._set_up and kind != SETTINGS:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            stream_id &= MAX_STREAM_ID
            try:
                on_frame[kind](flags, stream_id, data, start, at)
            except StreamFault as fault:
                self._refuse_stream(stream_id, fault)
            if self._stopped:
                return end
        return at

    def _on_data(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        size = end - start  # padding counts
        self._receive_window -= size
        if self._receive_window < self._low_window:
            self._give_connection_window()
        stream = self._streams.get(stream_id)
        if stream is None or stream.client_done:
            self._late(stream, stream_id, "DATA")
            return
        if size > stream.receive_window:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window allows")
        stream.receive_window -= size
        if flags & PADDED:
            start, end = without_padding(data, start, end)
        if stream.unread_body_bytes >= 0:
            self._count_body(stream, end - start, flags & END_STREAM)
        if flags & END_STREAM:
            stream.client_done = True
            stream.on_data(data[start:end], True)
            return
        if start == end:
            self._spend()
        stream.on_data(data[start:end], False)
        if not stream.paused:
            self.give_window(stream)

    def _on_headers(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if flags & PADDED:
            start, end = without_padding(data, start, end)
        if flags & WITH_PRIORITY:
            start += 5
            if start > end:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for the priority it announces")
        if flags & END_HEADERS:
            self._on_block(stream_id, bool(flags & END_STREAM), data[start:end])
            return
        self._unfinished = (stream_id, bool(flags & END_STREAM))
        self._block += data[start:end]
        self._block_deadline_s = self._loop.time() + self._limits.read_timeout_s

    def _on_continuation(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if self._unfinished is None or self._unfinished[0] != stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without headers to go on with")
        self._spend()
        self._block += data[start:end]
        if len(self._block) > self._limits.max_header_bytes:
            raise ConnectionFault(
                ErrorCode.ENHANCE_YOUR_CALM, f"a block of headers of more than {self._limits.max_header_bytes} bytes"
            )
        if flags & END_HEADERS:
            ended = self._unfinished[1]
            block = bytes(self._block)
            self._unfinished = None
            self._block.clear()
            self._block_deadline_s = _NEVER
            self._on_block(stream_id, ended, block)

    def _on_block(self, stream_id: int, ended: bool, block: bytes) -> None:
        """Open a stream with its request headers, or end one with its trailers."""
        if stream_id <= self._last_id:
            self._on_trailers(stream_id, ended, block)
            return
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} is not for clients to open")
        self._last_id = stream_id
        opener, body_bytes = self._headers.request(block)
        streams = self._streams
        if self._going_away:
            return  # the client was told
        if len(streams) >= self._limits.max_streams:
            self._spend()
            raise StreamFault(ErrorCode.REFUSED_STREAM, f"more than {self._limits.max_streams} streams at once")
        stream = streams[stream_id] = opener(self, stream_id)
        stream.unread_body_bytes = body_bytes
        if ended:
            if body_bytes > 0:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "content-length promises a body and none follows")
            stream.client_done = True
        stream.on_open()
        if self._drain_asked:
            stream.on_draining()
        if ended:
            stream.on_data(b"", True)

    def _on_trailers(self, stream_id: int, ended: bool, block: bytes) -> None:
        if stream_id == 0 or not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        fields = self._headers.fields(block)
        stream = self._streams.get(stream_id)
        if stream is None or stream.client_done:
            self._late(stream, stream_id, "HEADERS")
            return
        if not ended:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "trailers that do not end the stream")
        if not are_trailers(fields):
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "trailers with a pseudo-header or capitals")
        if stream.unread_body_bytes > 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "the body is shorter than content-length says")
        stream.client_done = True
        stream.on_data(b"", True)

    def _on_priority(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        self._spend()
        if stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if end - start != 5:
            raise StreamFault(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY is 5 bytes long")

    def _on_rst_stream(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if end - start != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is 4 bytes long")
        self._must_not_be_idle(stream_id, "RST_STREAM")
        self._spend()
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._abandon((stream,))

    def _on_settings(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if start != end:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK is empty")
            return
        if (end - start) % 6:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS is a multiple of 6 bytes long")
        self._spend()
        self._set_up = True
        for name, value in SETTING.iter_unpack(data[start:end]):
            self._set(name, value)
        self.outbox.write(_SETTINGS_ACK)

    def _set(self, name: int, value: int) -> None:
        if name == INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
            change = value - self.peer_window_bytes
            self.peer_window_bytes = value
            for stream in self._streams.values():
                stream.send_window += change
                if stream.send_window > MAX_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window of more than 2^31 - 1 bytes")
            self.outbox.pump_all()
        elif name == MAX_FRAME_SIZE:
            if not 16_384 <= value <= 2**24 - 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
            self.outbox.max_frame_bytes = value
        elif name == ENABLE_PUSH and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        # Nothing else concerns us: we push nothing, open no streams, and leave the client's header table alone.

    def _on_push_promise(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients do not push")

    def _on_ping(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if end - start != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING is 8 bytes long")
        if not flags & ACK:
            self._spend()
            self.outbox.write(ping(data[start:end], ack=True))
        elif data[start:end] == _PING_DRAIN and self._drain_asked:
            self._say_goaway()

    def _on_goaway(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if end - start < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is at least 8 bytes long")
        self._client_done = True
        self._close_if_done()

    def _on_window_update(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        if end - start != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is 4 bytes long")
        increment = int.from_bytes(data[start:end], "big") & MAX_STREAM_ID
        self._spend()
        if stream_id == 0:
            if increment == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a window grows by at least 1 byte")
            self.outbox.window += increment
            if self.outbox.window > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window of more than 2^31 - 1 bytes")
            self.outbox.pump_all()
            return
        self._must_not_be_idle(stream_id, "WINDOW_UPDATE")
        if increment == 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a window grows by at least 1 byte")
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.send_window += increment
            if stream.send_window > MAX_WINDOW:
                raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "a window of more than 2^31 - 1 bytes")
            if stream.blocked:
                self.outbox.pump(stream)

    # Windows.

    def give_window(self, stream: Stream) -> None:
        """Allow the client to send as much again on a stream as it has sent."""
        used = self.stream_window_bytes - stream.receive_window
        if used * 2 > self.stream_window_bytes and not stream.client_done:
            stream.receive_window += used
            self.outbox.write(window_update(stream.id, used))

    def _give_connection_window(self) -> None:
        if self._receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window allows")
        used = self._limits.connection_window_bytes - self._receive_window
        self._receive_window += used
        self.outbox.write(window_update(0, used))

    def hold(self, stream: Stream, n_bytes: int) -> bool:
        """Count bytes of an unfinished message that are kept for a stream; False when the client keeps too many at once."""
        self._held_bytes += n_bytes
        stream.held_bytes += n_bytes
        return self._held_bytes <= self._limits.max_held_bytes

    # Ends.

    def answered(self, stream: Stream) -> None:
        """Forget a stream whose answer is complete; called by the stream."""
        if not stream.client_done:
            # The whole answer is out before the request: the client is asked to stop sending, which is no error.
            self.reset(stream, ErrorCode.NO_ERROR)
            return
        self._credit = min(self._credit + _CREDIT_PER_ANSWER, self._limits.max_control_frames)
        self._forget(stream)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        if stream.id in self._streams:
            stream.client_done = stream.server_done = True
            self._write_reset(stream.id, code)
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is None:
            return
        self._held_bytes -= stream.held_bytes
        self.outbox.forget(stream)
        if not self._streams:
            self._idle_deadline_s = self._loop.time() + self._limits.idle_timeout_s
            if self._going_away or self._client_done:
                self._close_if_done()

    def _abandon(self, streams: Iterable[Stream]) -> None:
        """Nobody waits for their answers any more."""
        for stream in tuple(streams):
            stream.client_done = stream.server_done = True
            self._forget(stream)
            stream.on_abandoned()

    def _refuse_stream(self, stream_id: int, fault: StreamFault) -> None:
        self._spend()
        stream = self._streams.get(stream_id)
        self._write_reset(stream_id, fault.code)
        if stream is not None:
            self._abandon((stream,))

    def _write_reset(self, stream_id: int, code: ErrorCode) -> None:
        if len(self._reset_ids) >= _MAX_REMEMBERED_RESETS:
            del self._reset_ids[next(iter(self._reset_ids))]
        self._reset_ids[stream_id] = None
        self.outbox.write(rst_stream(stream_id, code))

    def _late(self, stream: Stream | None, stream_id: int, what: str) -> None:
        """A frame came for a stream on which the client has, or should have, nothing more to say."""
        self._must_not_be_idle(stream_id, what)
        if stream is not None:
            raise StreamFault(ErrorCode.STREAM_CLOSED, f"{what} after the end of the stream")
        if stream_id not in self._reset_ids and not self._going_away:
            raise ConnectionFault(ErrorCode.STREAM_CLOSED, f"{what} on the closed stream {stream_id}")

    def _must_not_be_idle(self, stream_id: int, what: str) -> None:
        if stream_id == 0 or stream_id > self._last_id or not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {stream_id}, which is not open")

    def _count_body(self, stream: Stream, n_bytes: int, ended: int) -> None:
        stream.unread_body_bytes -= n_bytes
        if stream.unread_body_bytes < 0 or (ended and stream.unread_body_bytes):
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "the body has another length than content-length says")

    def _spend(self) -> None:
        """Count a frame that asks for work and brings none."""
        self._credit -= 1
        if self._credit < 0:
            self._credit += _CREDIT_PER_FRAME * self.outbox.take_n_frames()
            if self._credit < 0:
                raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")

    def _give_up(self, fault: ConnectionFault) -> None:
        """End the connection with the reason."""
        if not self._greeted:
            self.outbox.write(_WRONG_PROTOCOL)
        else:
            self.outbox.write(goaway(self._last_id, fault.code, str(fault)))
        self.outbox.flush()
        self._stop()
        self._abandon(self._streams.values())
        # Closing on unread bytes would reset the connection, and the client would not get to read why.
        self._write_deadline_s = self._loop.time() + self._limits.linger_s
        if not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._transport.write_eof()

    def drain(self) -> None:
        """Tell the client that no more streams should be opened, and, once it must know, which is the last one answered."""
        if self._stopped or self._drain_asked:
            return
        self._drain_asked = True
        if not self._greeted:
            self._end()
            return
        # Streams that are already on their way are still served: the last word comes when the client has answered the ping.
        self.outbox.write(goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR, "draining") + ping(_PING_DRAIN))
        self._drain_deadline_s = self._loop.time() + _DRAIN_GRACE_S
        for stream in tuple(self._streams.values()):
            stream.on_draining()

    def _say_goaway(self) -> None:
        if not self._going_away:
            self._going_away = True
            self.outbox.write(goaway(self._last_id, ErrorCode.NO_ERROR, "draining"))
            self._close_if_done()

    def _close_if_done(self) -> None:
        if not self._streams and not self._stopped:
            self.outbox.flush()
            self._end()

    def _stop(self) -> None:
        """From here on nothing is read as a frame and nothing more is written."""
        self._stopped = self.outbox.closed = True

    def _end(self) -> None:
        self._stop()
        self._write_deadline_s = self._loop.time() + self._limits.read_timeout_s
        self._transport.close()

    def abort(self) -> None:
        self._stop()
        self._transport.abort()

    def check_time(self, now_s: float, perf_s: float) -> None:
        """End what has run out of time. The same moment by both clocks: the loop's and time.perf_counter()."""
        limits = self._limits
        self._credit = min(self._credit + limits.max_control_frames // 4, limits.max_control_frames)
        if now_s >= self._write_deadline_s:
            self.abort()
        elif self._stopped:
            return
        elif now_s >= self._block_deadline_s:
            self._give_up(ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "headers that never end"))
        elif now_s >= self._drain_deadline_s:
            self._say_goaway()
        elif self._streams:
            self._check_streams(perf_s)
        elif now_s >= self._idle_deadline_s:
            self._say_goaway()

    def _check_streams(self, perf_s: float) -> None:
        timeout_s = self._limits.read_timeout_s
        for stream in tuple(self._streams.values()):
            if perf_s - stream.stalled_at_s > timeout_s:
                self._write_reset(stream.id, ErrorCode.CANCEL)
                self._abandon((stream,))
            else:
                stream.on_time(perf_s)
        silent_s = perf_s - self.arrived_s
        if silent_s > 2 * self._limits.alive_every_s:
            self.abort()
        elif silent_s > self._limits.alive_every_s:
            self.outbox.write(ping(_PING_ALIVE))
