"""gRPC over HTTP/2: calls, messages, deadlines, status codes and compression (http2.py has the frames below).

    Stream → UnaryCall: one message in, one out
           → StreamingCall: any number in, any number out, in order
    Methods says which function answers which path.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

import re
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any
from urllib.parse import quote

import msgspec

from modelyard.errors import BodyTooLarge, ModelyardError, RequestError, UnsupportedEncoding
from modelyard.inference.serve.transport.compression import compressed, decompressed
from modelyard.inference.serve.transport.http2 import Http2Connection, Opener
from modelyard.inference.serve.transport.http2_headers import literal
from modelyard.inference.serve.transport.http2_stream import Stream
from modelyard.inference.serve.transport.messages import Head, new_request_id

Metadata = tuple[tuple[bytes, bytes], ...]

_SANE_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_ENCODINGS = (b"gzip", b"deflate")
_COMPRESS_FROM_BYTES = 1024
_PREFIX = struct.Struct(">BI")
"""Before every message: whether it is compressed, and its length."""
_GRACE_S = 1.0
_NEVER = float("inf")
_MAX_STATUS_TEXT = 2048
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

_STATUS_200, _STATUS_405, _STATUS_415 = b"\x88", b"\x08\x03405", b"\x08\x03415"  # :status, as HPACK writes it
_CONTENT_TYPE = literal(b"content-type", b"application/grpc")
_OK = _STATUS_200 + _CONTENT_TYPE
_ACCEPTED = literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
_ENCODING_FIELDS = {name: literal(b"grpc-encoding", name) for name in _ENCODINGS}
_REQUEST_ID = literal(b"x-request-id", b"")[:-1]  # the value with its length follows
_STATUS_OK = literal(b"grpc-status", b"0")


class Status(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_STATUS_OF_HTTP = {
    404: Status.NOT_FOUND,
    405: Status.UNIMPLEMENTED,
    408: Status.DEADLINE_EXCEEDED,
    413: Status.RESOURCE_EXHAUSTED,
    431: Status.RESOURCE_EXHAUSTED,
    501: Status.UNIMPLEMENTED,
    503: Status.UNAVAILABLE,
    504: Status.DEADLINE_EXCEEDED,
}


def status_of(error: ModelyardError) -> Status:
    """Return the status that says what the error's HTTP status says."""
    return _STATUS_OF_HTTP.get(error.status, Status.INVALID_ARGUMENT if error.status < 500 else Status.INTERNAL)


@dataclass(frozen=True)
class Unary:
    """A method with one message in and one out; `answer` is called on the event loop with the message, and never raises."""

    answer: "Callable[[UnaryCall], None]"


@dataclass(frozen=True)
class Streaming:
    """Any other method; `start` is called when the headers are there, sets the call's hooks, and never raises."""

    start: "Callable[[StreamingCall], None]"


class Answered(msgspec.Struct, frozen=True):
    """One finished call, for the access log."""

    call: Any
    """A UnaryCall or StreamingCall, or what stands for one request of a stream."""
    status: Status
    message: str = ""
    request_bytes: int = 0
    """Of the message, unpacked; 0 for a stream as a whole."""
    response_bytes: int = 0


class Plan:
    """What a block of headers asks for. Equal blocks share one, so nothing in it belongs to a single call."""

    __slots__ = ("accepts", "encoding", "handler", "head", "request_id", "rpc", "timeout_s")

    def __init__(self, head: Head, rpc: "Rpc") -> None:
        headers = head.headers
        self.head = head
        self.rpc = rpc
        self.handler: Callable[[Any], None] = _unhandled
        self.timeout_s: float | None = None
        self.encoding = headers.get(b"grpc-encoding", b"identity")
        accepted = headers.get(b"grpc-accept-encoding", b"").replace(b" ", b"").split(b",")
        self.accepts = self.encoding if self.encoding in _ENCODINGS and self.encoding in accepted else b""
        """The encoding for answers: the request's own, where the client says that it can read it."""
        given = headers.get(b"x-request-id", b"")
        self.request_id: bytes | None = given if _SANE_REQUEST_ID.fullmatch(given) else None


class Rpc:
    """Finds out what a client wants from the headers of a call."""

    def __init__(
        self,
        methods: Mapping[str, Unary | Streaming],
        *,
        max_message_bytes: int = 64 * 1024 * 1024,
        read_timeout_s: float = 30.0,
        on_answered: Callable[[Answered], None] | None = None,
    ) -> None:
        """
        Args:
            methods: by path, "/package.Service/Method".
            max_message_bytes: also of what a compressed one unpacks to.
            read_timeout_s: from the first byte of a message to its last.
        """
        self.methods = methods
        self.max_message_bytes = max_message_bytes
        self.read_timeout_s = read_timeout_s
        self.on_answered = on_answered

    def prepare(self, head: Head) -> Opener:
        """Return what opens a call with these headers; see http2.Prepare."""
        plan = Plan(head, self)
        if head.method != "POST":
            return partial(RefusedCall, plan, Status.INTERNAL, "gRPC calls are made with POST", _STATUS_405)
        if not head.headers.get(b"content-type", b"").startswith(b"application/grpc"):
            return partial(RefusedCall, plan, Status.INTERNAL, "content-type must be application/grpc", _STATUS_415)
        timeout = head.headers.get(b"grpc-timeout")
        if timeout is not None:
            match = _TIMEOUT.fullmatch(timeout)
            if match is None:
                return partial(RefusedCall, plan, Status.INTERNAL, f"malformed grpc-timeout {timeout[:20]!r}", b"")
            plan.timeout_s = int(match[1]) * _UNIT_S[match[2]]
        method = self.methods.get(head.path)
        if method is None:
            text = f"no method {head.path[:200]!r} here; server reflection lists those there are"
            return partial(RefusedCall, plan, Status.UNIMPLEMENTED, text, b"")
        if isinstance(method, Unary):
            plan.handler = method.answer
            return partial(UnaryCall, plan)
        plan.handler = method.start
        return partial(StreamingCall, plan)


class _Call(Stream):
    """What all calls share."""

    __slots__ = ("_messages", "_request_id", "arrived_s", "deadline_s", "on_gone", "plan", "served")

    def __init__(self, plan: Plan, connection: Http2Connection, stream_id: int) -> None:
        super().__init__(connection, stream_id)
        self.plan = plan
        self.arrived_s = connection.arrived_s
        timeout_s = plan.timeout_s
        self.deadline_s: float | None = None if timeout_s is None else self.arrived_s + timeout_s
        """By when the client wants it; time.perf_counter()."""
        self.on_gone: Callable[[], object] | None = None
        """Called when the client cancels or goes away before it is answered; set by whoever works on the answer."""
        self.served: Any = None
        """What the access log should know of the inference."""
        self._request_id: bytes | None = plan.request_id
        self._messages: _Messages | None = None  # where a message does not come in one frame

    @property
    def head(self) -> Head:
        return self.plan.head

    @property
    def metadata(self) -> dict[bytes, bytes]:
        return self.plan.head.headers

    @property
    def request_id(self) -> bytes:
        """The client's own id, from the metadata x-request-id, where it is printable and short, else a fresh one."""
        if self._request_id is None:
            self._request_id = new_request_id()
        return self._request_id

    def fail(self, status: Status, message: str, metadata: Metadata = ()) -> None:
        """Answer with an error; `metadata` goes into the trailers."""
        self._end(status, message, metadata)

    def on_abandoned(self) -> None:
        self._call_hook()
        self._log(Status.CANCELLED, "the client cancelled or went away")

    def on_time(self, now_s: float) -> None:
        rpc = self.plan.rpc
        if self.deadline_s is not None and now_s > self.deadline_s + _GRACE_S:
            # Whoever answers drops what is late and says so; this is for what nobody looks at.
            self._expire(f"not done within the {self.plan.timeout_s:g} s that grpc-timeout allows")
        elif now_s > self._waits_since_s() + rpc.read_timeout_s:
            self._expire(f"the message did not arrive within {rpc.read_timeout_s:g} s; send it faster")

    def _waits_since_s(self) -> float:
        """Return since when a message has begun and not ended."""
        return _NEVER if self._messages is None else self._messages.begun_s

    def _expire(self, message: str) -> None:
        self._call_hook()
        self.fail(Status.DEADLINE_EXCEEDED, message)

    def _guarded(self, handler: Callable[..., object], *arguments: Any) -> None:
        """Call what answers; a bug of it is the end of this call and of nothing else."""
        try:
            handler(*arguments)
        except Exception as exc:  # noqa: BLE001  # the last place where a bug can become an answer
            request_id = self.request_id.decode("latin-1")
            text = "".join(traceback.format_exception(exc))
            sys.stderr.write(f"bug: {self.plan.head.path} (request {request_id}) failed:\n{text}")
            self.fail(Status.INTERNAL, f"internal error; see the server's log for request {request_id}")

    def _call_hook(self) -> None:
        hook = self.on_gone
        self.on_gone = None
        if hook is not None:
            hook()

    def _answer_head(self) -> bytes:
        """Return the headers of an answer."""
        request_id = self._request_id or self.request_id
        head = b"%b%b%c%b" % (_OK, _REQUEST_ID, len(request_id), request_id)
        return head + _ENCODING_FIELDS[self.plan.accepts] if self.plan.accepts else head

    def _framed(self, message: bytes) -> bytes:
        """Return a message as it goes into the body."""
        coding = self.plan.accepts
        if coding and len(message) >= _COMPRESS_FROM_BYTES:
            message = compressed(message, coding)
            return _PREFIX.pack(1, len(message)) + message
        return _PREFIX.pack(0, len(message)) + message

    def _end(self, status: Status, message: str = "", metadata: Metadata = ()) -> None:
        """End the answer with a status; where there is none yet, this is all of it."""
        if self.server_done:
            return
        self.on_gone = None
        self.finish(
            b"".join(
                (
                    b"" if self._responded else self._answer_head(),
                    literal(b"grpc-status", b"%d" % status),
                    literal(b"grpc-message", _percent_encoded(message)) if message else b"",
                    _ACCEPTED if status is Status.UNIMPLEMENTED else b"",
                    *[literal(name, value) for name, value in metadata],
                )
            )
        )
        self._log(status, message)

    def _log(self, status: Status, message: str = "") -> None:
        on_answered = self.plan.rpc.on_answered
        if on_answered is not None:
            on_answered(Answered(self, status, message))

    def _feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that `data` completes; fails the call where they cannot be taken."""
        messages = self._messages
        if messages is None:
            messages = self._messages = _Messages()
        messages.add(data, self.connection.arrived_s)
        limit = self.plan.rpc.max_message_bytes
        while not self.server_done:
            size = messages.next_size()
            if size > limit:
                self.fail(
                    Status.RESOURCE_EXHAUSTED,
                    f"a message of {size} bytes; at most {limit} are taken: split the request, or start with a larger --max-body-bytes",
                )
                return
            message = messages.take()
            if not self.connection.hold(self, messages.n_bytes - self.held_bytes):
                self.fail(
                    Status.RESOURCE_EXHAUSTED, "too many unfinished messages on this connection; send fewer at once"
                )
                return
            if message is None:
                return
            try:
                plain = self._unpacked(*message)
            except BodyTooLarge as exc:
                self.fail(Status.RESOURCE_EXHAUSTED, str(exc))
                return
            except UnsupportedEncoding as exc:
                self.fail(Status.UNIMPLEMENTED, str(exc))
                return
            except RequestError as exc:
                self.fail(Status.INTERNAL, str(exc))
                return
            yield plain

    def _unpacked(self, flag: int, message: bytes) -> bytes:
        if flag == 0:
            return message
        encoding = self.plan.encoding
        if flag != 1:
            raise RequestError(f"the flag before a message must be 0 or 1, got {flag}")
        if encoding == b"identity":
            raise RequestError(
                "a compressed message, and no grpc-encoding says how; name it, or send the message as it is"
            )
        if encoding not in _ENCODINGS:
            raise UnsupportedEncoding(
                f"grpc-encoding {encoding.decode('latin-1')!r:.60} is not taken; use gzip, deflate or identity"
            )
        return decompressed(message, encoding, self.plan.rpc.max_message_bytes)


class UnaryCall(_Call):
    """One message in, one out."""

    __slots__ = ("_n_messages", "form", "message")

    def __init__(self, plan: Plan, connection: Http2Connection, stream_id: int) -> None:
        super().__init__(plan, connection, stream_id)
        self.message = b""
        self.form: Any = None
        """What the handler has read of the message, for when it answers."""
        self._n_messages = 0

    def reply(self, message: bytes, metadata: Metadata = ()) -> None:
        """Answer; `metadata` goes into the headers. Nothing happens where the client is gone."""
        if self.server_done:
            return
        self.on_gone = None
        head = self._answer_head()
        if metadata:
            head += b"".join([literal(name, value) for name, value in metadata])
        self.answer(head, self._framed(message), _STATUS_OK)
        on_answered = self.plan.rpc.on_answered
        if on_answered is not None:
            on_answered(Answered(self, Status.OK, "", len(self.message), len(message)))

    def on_data(self, data: bytes, ended: bool) -> None:
        if ended and self._messages is None and len(data) >= _PREFIX.size:
            flag, size = _PREFIX.unpack_from(data)
            if flag == 0 and size == len(data) - _PREFIX.size and size <= self.plan.rpc.max_message_bytes:
                self.message = data[_PREFIX.size :]
                self._guarded(self.plan.handler, self)
                return
        self._gather(data, ended)

    def _gather(self, data: bytes, ended: bool) -> None:
        """Take a message that comes in several frames, or compressed."""
        for message in self._feed(data):
            self.message = message
            self._n_messages += 1
        if self._n_messages > 1:
            self.fail(Status.INTERNAL, "more than one message in a unary call; send one")
        elif ended and self._waits_since_s() != _NEVER:
            self.fail(Status.INTERNAL, "the request ends within a message; send all of it")
        elif ended and not self._n_messages:
            self.fail(Status.INTERNAL, "the request holds no message; send one")
        elif ended and not self.server_done:
            self._guarded(self.plan.handler, self)

    def _waits_since_s(self) -> float:
        return super()._waits_since_s() if self.client_done else self.arrived_s


class StreamingCall(_Call):
    """Any number of messages in and out, in order."""

    __slots__ = ("on_drain", "on_half_close", "on_message", "on_tick")

    def __init__(self, plan: Plan, connection: Http2Connection, stream_id: int) -> None:
        super().__init__(plan, connection, stream_id)
        self.on_message: Callable[[bytes], object] = _pass_over
        self.on_half_close: Callable[[], object] = _nothing
        """Called when the client has sent its last message."""
        self.on_drain: Callable[[], object] = _nothing
        """Called when the server is about to end: what has no end of its own should find one."""
        self.on_tick: Callable[[], object] = _nothing
        """Called about once a second."""

    def send(self, message: bytes) -> None:
        """Send a message. Nothing happens where the client is gone."""
        if not self._responded:
            self.respond(self._answer_head())
        self.write(self._framed(message))

    def end(self) -> None:
        """Say that all went well and nothing follows."""
        if not self._responded:
            self.respond(self._answer_head())
        self._end(Status.OK)

    def on_open(self) -> None:
        self._guarded(self.plan.handler, self)

    def on_time(self, now_s: float) -> None:
        super().on_time(now_s)
        if not self.server_done:
            self._guarded(self.on_tick)

    def on_draining(self) -> None:
        self._guarded(self.on_drain)

    def on_data(self, data: bytes, ended: bool) -> None:
        for message in self._feed(data):
            self._guarded(self.on_message, message)
        if ended and not self.server_done:
            if self._waits_since_s() != _NEVER:
                self.fail(Status.INTERNAL, "the request ends within a message; send all of it")
            else:
                self._guarded(self.on_half_close)


class RefusedCall(_Call):
    """A call that is answered before anybody looks at its messages."""

    __slots__ = ("_http_status", "_status", "_text")

    def __init__(
        self, plan: Plan, status: Status, text: str, http_status: bytes, connection: Http2Connection, stream_id: int
    ) -> None:
        """`http_status` is the answer to what is no gRPC at all."""
        super().__init__(plan, connection, stream_id)
        self._status = status
        self._text = text
        self._http_status = http_status

    def on_open(self) -> None:
        if self._http_status:
            self.finish(self._http_status)
        else:
            self.fail(self._status, self._text)

    def on_data(self, data: bytes, ended: bool) -> None:
        """Pass over it."""


class _Messages:
    """Puts messages together from the parts of a body."""

    __slots__ = ("_at", "_buffer", "_flag", "_parts", "_size", "begun_s", "n_bytes")

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0
        self._parts: list[bytes] = []
        self._flag = 0
        self._size = -1
        self.n_bytes = 0
        """Of what is here and not taken yet."""
        self.begun_s = _NEVER
        """When the message that is not whole yet began."""

    def add(self, data: bytes, now_s: float) -> None:
        if data:
            if not self.n_bytes:
                self.begun_s = now_s
            self._parts.append(data)
            self.n_bytes += len(data)

    def next_size(self) -> int:
        """Return the length of the next message, -1 while it is not known."""
        if self._size < 0 and self.n_bytes >= _PREFIX.size:
            self._join()
            self._flag, self._size = _PREFIX.unpack_from(self._buffer, self._at)
        return self._size

    def take(self) -> tuple[int, bytes] | None:
        """Return flag and bytes of the next message, None while it is not whole."""
        end = _PREFIX.size + self._size
        if self._size < 0 or self.n_bytes < end:
            return None
        self._join()
        message = self._buffer[self._at + _PREFIX.size : self._at + end]
        self._at += end
        self.n_bytes -= end
        self._size = -1
        if not self.n_bytes:
            self._buffer, self._at, self.begun_s = b"", 0, _NEVER
        return self._flag, message

    def _join(self) -> None:
        if self._parts:
            self._buffer = b"".join((self._buffer[self._at :], *self._parts))
            self._at = 0
            self._parts.clear()


def _percent_encoded(text: str) -> bytes:
    """Return text as grpc-message carries it, cut where it is long."""
    return quote(text.encode("utf-8", "backslashreplace")[:_MAX_STATUS_TEXT], safe=_PLAIN).encode()


def _unhandled(call: Any) -> None:
    raise AssertionError("a plan without a handler")


def _pass_over(message: bytes) -> None:
    """Nobody wants the messages."""


def _nothing() -> None:
    """Nobody waits for the end."""
