"""The edge of the server: bytes on a socket ↔ requests and responses, HTTP/1.1 and 1.0.

httptools parses; this file adds what a parser does not: limits on header and body size, time limits for idle and slow
clients, answers in the order of the requests when a client pipelines, 100-continue, half-closed sockets, and a close that
lets the client read why. `Connections` holds what all connections of a server share.
"""

import asyncio
import itertools
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

import httptools
import msgspec

from modelyard.errors import (
    BodyTooLarge,
    ClientTooSlow,
    HeadersTooLarge,
    MethodNotAllowed,
    ModelyardError,
    RequestError,
)
from modelyard.inference.serve.messages import Answer, Handler, Request, Response, error_response

_NEVER = float("inf")
_STATUS_LINES = {int(status): f"HTTP/1.1 {int(status)} {status.phrase}\r\n".encode() for status in HTTPStatus}
_SANE_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True)
class HttpLimits:
    """What one client may cost."""

    max_header_bytes: int = 32 * 1024
    """Request line and headers together."""
    max_body_bytes: int = 64 * 1024 * 1024
    read_timeout_s: float = 30.0
    """From the first byte of a request to its last; also how long a client may refuse to read its answers."""
    idle_timeout_s: float = 75.0
    """Silence between requests on a kept-alive connection."""
    linger_s: float = 2.0
    """How long the rest of a refused request is read and thrown away, so that the client gets to see the refusal."""
    max_pipelined: int = 64
    """Unanswered requests of one connection above which no more is read from it."""


class Served(msgspec.Struct, frozen=True):
    """One answered request, for the access log."""

    time_s: float
    """When it was answered, seconds since 1970."""
    request_id: str
    method: str
    path: str
    status: int
    request_bytes: int
    response_bytes: int
    duration_s: float
    """From the first byte of the request to the answer being written."""


class Connections:
    """The open connections of one server and what they share. Belongs to the event loop; not thread-safe."""

    def __init__(self, handler: Handler, limits: HttpLimits, on_served: Callable[[Served], None] | None = None) -> None:
        self.handler = handler
        self.limits = limits
        self.on_served = on_served
        self.open: set[HttpConnection] = set()
        self.draining = False
        self.none_open = asyncio.Event()
        self.date = formatdate(usegmt=True).encode()
        self._id_prefix = secrets.token_hex(6)
        self._ids = itertools.count(1)

    def new_connection(self) -> asyncio.Protocol:
        return HttpConnection(self)

    def new_request_id(self) -> str:
        return f"{self._id_prefix}-{next(self._ids):x}"

    @property
    def n_busy(self) -> int:
        """Connections with a request that is not answered yet."""
        return sum(connection.busy for connection in self.open)

    def sweep(self, now_s: float) -> None:
        """End what has run out of time; called about once a second with the loop's time."""
        self.date = formatdate(time.time(), usegmt=True).encode()
        for connection in tuple(self.open):
            connection.check_time(now_s)

    def drain(self) -> None:
        """Close idle connections now and every other one after its last answer; `none_open` is set when all are gone."""
        self.draining = True
        for connection in tuple(self.open):
            if not connection.busy:
                connection.close()
        if not self.open:
            self.none_open.set()

    def abort(self) -> None:
        for connection in tuple(self.open):
            connection.abort()


class _Slot:
    """The place of one answer in the order of a connection's answers."""

    __slots__ = ("close", "interim", "linger", "old_http", "request", "response", "started_s", "task")

    def __init__(self, request: Request | None, started_s: float, *, close: bool, old_http: bool = False) -> None:
        self.request = request
        self.started_s = started_s
        self.close = close
        self.old_http = old_http
        self.linger = False
        self.interim = b""
        self.response: Response | None = None
        self.task: asyncio.Task[None] | None = None


class HttpConnection(asyncio.Protocol):
    """One client's connection. The parser calls the `on_` methods while it is fed."""

    def __init__(self, shared: Connections) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._loop = asyncio.get_running_loop()
        self._slots: deque[_Slot] = deque()
        self._in_head = False
        self._in_message = False
        self._stopped = False  # nothing more is read as a request
        self._lingering = False
        self._client_done = False  # the client has closed its side
        self._write_blocked = False
        self._read_paused = False
        self._deadline_s = self._loop.time() + self._limits.idle_timeout_s
        self._write_deadline_s = _NEVER
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._head_bytes = 0
        self._unparsed_head_bytes = 0
        self._body_bytes = 0
        self._started_s = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._slots) or self._in_message

    # From the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._shared.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stopped = True
        self._shared.open.discard(self)
        for slot in self._slots:
            if slot.task is not None:
                slot.task.cancel()  # nobody is left to answer
        self._slots.clear()
        if self._shared.draining and not self._shared.open:
            self._shared.none_open.set()

    def data_received(self, data: bytes) -> None:
        if self._stopped:
            return  # the rest of something refused
        continues_head = self._in_head
        if continues_head:
            self._unparsed_head_bytes += len(data)
        self._feed(data)
        # The parser reports whole headers only: this bounds one that never ends.
        if self._in_head and continues_head and self._unparsed_head_bytes > self._limits.max_header_bytes:
            self._refuse_head()

    def eof_received(self) -> bool:
        self._client_done = True
        if self._in_message and not self._stopped:
            self._stopped, self._in_message, self._in_head = True, False, False  # cut off: nothing to answer
        return bool(self._slots)  # True keeps our side open until the answers are out

    def pause_writing(self) -> None:
        self._write_blocked = True
        self._write_deadline_s = self._loop.time() + self._limits.read_timeout_s
        self._throttle()

    def resume_writing(self) -> None:
        self._write_blocked = False
        self._write_deadline_s = _NEVER
        self._throttle()

    # From the parser.

    def on_message_begin(self) -> None:
        if self._stopped:
            return
        self._url, self._headers, self._parts = b"", {}, []
        self._head_bytes = self._unparsed_head_bytes = self._body_bytes = 0
        self._in_head = self._in_message = True
        self._started_s = time.perf_counter()
        self._deadline_s = self._loop.time() + self._limits.read_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if self._in_head:  # a trailer after a chunked body says nothing we need
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._stopped or self._parser.should_upgrade():
            return
        self._in_head = False
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._refuse(RequestError(f"HTTP version {version} is not spoken here; use HTTP/1.1"))
        elif version == "1.1" and b"host" not in self._headers:
            self._refuse(RequestError("malformed HTTP request: no Host header; HTTP/1.1 requires one"))
        elif int(self._headers.get(b"content-length", b"0")) > self._limits.max_body_bytes:
            self._refuse_body()
        elif version == "1.1" and self._headers.get(b"expect", b"").lower() == b"100-continue":
            interim = _Slot(None, self._started_s, close=False)
            interim.interim = _CONTINUE
            self._slots.append(interim)
            self._flush()

    def on_body(self, body: bytes) -> None:
        if self._stopped:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body()
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._stopped or self._parser.should_upgrade():
            return
        self._in_message = False
        self._deadline_s = _NEVER  # from here on it is our turn
        keep_alive = self._parser.should_keep_alive()
        path, query = _split(self._url)
        request = Request(
            self._parser.get_method().decode(),
            path,
            query,
            self._headers,
            self._parts[0] if len(self._parts) == 1 else b"".join(self._parts),
            self._request_id(),
        )
        old_http = self._parser.get_http_version() == "1.0"
        slot = _Slot(request, self._started_s, close=not keep_alive, old_http=old_http)
        self._slots.append(slot)
        if not keep_alive:
            self._stopped = True
        answer = self._shared.handler(request)
        if isinstance(answer, Response):
            slot.response = answer
            self._flush()
        else:
            slot.task = self._loop.create_task(self._finish(slot, answer))
            self._throttle()

    # Ours.

    def check_time(self, now_s: float) -> None:
        if now_s >= self._write_deadline_s or (self._lingering and now_s >= self._deadline_s):
            self.abort()
        elif now_s >= self._deadline_s and not self._read_paused:
            if self._in_message:
                self._refuse(
                    ClientTooSlow(
                        f"the request did not arrive within {self._limits.read_timeout_s:g} s; send it faster or in parts"
                    )
                )
            elif not self._slots:
                self.close()

    def close(self) -> None:
        self._stopped = True
        self._transport.close()

    def abort(self) -> None:
        self._stopped = True
        self._transport.abort()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                data = self._without_upgrade() + data[exc.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserCallbackError:
                raise  # a bug of ours
            except httptools.HttpParserError as exc:
                if not self._stopped:
                    self._refuse(RequestError(f"malformed HTTP request: {exc}"))
                return
            else:
                return

    def _without_upgrade(self) -> bytes:
        """Return the head just read without its offer to upgrade.

        No other protocol is spoken here and the offer may be ignored, but the parser takes the body for the other protocol's;
        so the same request is read once more as a plain one.
        """
        if self._parser.get_method() == b"CONNECT":
            if not self._stopped:
                self._refuse(MethodNotAllowed("CONNECT is not taken here; this is no proxy", allow="GET, HEAD, POST"))
            return b""
        line = b"%b %b HTTP/%b\r\n" % (
            self._parser.get_method(),
            self._url,
            self._parser.get_http_version().encode(),
        )
        kept = [pair for pair in self._headers.items() if pair[0] not in (b"connection", b"upgrade")]
        return line + b"".join([b"%b: %b\r\n" % pair for pair in kept]) + b"\r\n"

    def _count_head(self, n_bytes: int) -> None:
        self._head_bytes += n_bytes
        if self._head_bytes > self._limits.max_header_bytes and not self._stopped:
            self._refuse_head()

    def _refuse_head(self) -> None:
        limit = self._limits.max_header_bytes
        self._refuse(HeadersTooLarge(f"request line and headers exceed {limit} bytes; send fewer or shorter ones"))

    def _refuse_body(self) -> None:
        limit = self._limits.max_body_bytes
        self._refuse(
            BodyTooLarge(f"the body exceeds {limit} bytes; split the request, or start with a larger --max-body-bytes")
        )

    def _refuse(self, error: ModelyardError) -> None:
        """Answer the request in progress with `error`, after the answers before it, and read no more requests."""
        self._stopped, self._in_message, self._in_head = True, False, False
        self._deadline_s = _NEVER
        method = (self._parser.get_method() or b"").decode("latin-1")
        request = Request(method, _split(self._url)[0], "", {}, b"", self._request_id())
        slot = _Slot(request, self._started_s, close=True)
        slot.linger = True
        slot.response = error_response(error)
        self._slots.append(slot)
        self._flush()

    async def _finish(self, slot: _Slot, answer: Answer) -> None:
        slot.response = answer if isinstance(answer, Response) else await answer
        self._flush()

    def _flush(self) -> None:
        """Write the answers that are ready, in order, up to the first that is not."""
        slots = self._slots
        written: list[bytes] = []
        linger = close = False
        while slots and not close and (slots[0].response is not None or slots[0].interim):
            slot = slots.popleft()
            if slot.interim:
                written.append(slot.interim)
                continue
            close = slot.close or (self._shared.draining and not self.busy)
            linger = slot.linger
            written += self._encode(slot, close=close)
        if written:
            self._transport.write(b"".join(written))
        if close:
            self._end(linger=linger)
        elif not self.busy:
            self._deadline_s = self._loop.time() + self._limits.idle_timeout_s
            if self._client_done:
                self.close()
        self._throttle()

    def _encode(self, slot: _Slot, *, close: bool) -> tuple[bytes, bytes]:
        request, response = slot.request, slot.response
        assert request is not None
        assert response is not None
        body = b"" if request.method == "HEAD" else response.body
        extra = b"".join([b"%b: %b\r\n" % header for header in response.headers])
        if close:
            extra += b"Connection: close\r\n"
        elif slot.old_http:
            extra += b"Connection: keep-alive\r\n"
        head = (
            b"%bContent-Type: %b\r\nContent-Length: %d\r\nX-Request-Id: %b\r\nDate: %b\r\nServer: modelyard\r\n%b\r\n"
            % (
                _STATUS_LINES[response.status],
                response.content_type,
                len(response.body),
                request.request_id.encode(),
                self._shared.date,
                extra,
            )
        )
        if self._shared.on_served is not None:
            self._shared.on_served(
                Served(
                    time.time(),
                    request.request_id,
                    request.method,
                    request.path,
                    response.status,
                    len(request.body),
                    len(body),
                    time.perf_counter() - slot.started_s,
                )
            )
        return head, body

    def _end(self, *, linger: bool) -> None:
        """Close; after a refusal wait a little, since closing on unread bytes would reset the connection."""
        self._stopped = True
        self._write_deadline_s = self._loop.time() + self._limits.read_timeout_s
        if linger and not self._client_done and self._transport.can_write_eof():
            self._lingering = True
            self._deadline_s = self._loop.time() + self._limits.linger_s
            self._transport.write_eof()
        else:
            self._transport.close()

    def _throttle(self) -> None:
        """Stop reading while the client does not read, or has more requests open than it may."""
        pause = not self._lingering and (self._write_blocked or len(self._slots) >= self._limits.max_pipelined)
        if pause != self._read_paused and not self._transport.is_closing():
            self._read_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
                if self._in_message:  # the wait was ours
                    self._deadline_s = self._loop.time() + self._limits.read_timeout_s

    def _request_id(self) -> str:
        """Return the client's own id where it is printable and short, else a fresh one."""
        given = self._headers.get(b"x-request-id", b"")
        return given.decode() if _SANE_REQUEST_ID.fullmatch(given) else self._shared.new_request_id()


def _split(url: bytes) -> tuple[str, str]:
    """Return path and query of a request target; a target that cannot be parsed is all path."""
    if not url.startswith(b"/"):
        try:
            parsed = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            return url.decode("latin-1"), ""
        return (parsed.path or b"").decode("latin-1"), (parsed.query or b"").decode("latin-1")
    path, _, query = url.partition(b"?")
    return path.decode("latin-1"), query.decode("latin-1")
