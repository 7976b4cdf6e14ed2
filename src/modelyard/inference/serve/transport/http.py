"""The edge of the server: bytes on a socket ↔ requests and responses, HTTP/1.1 and 1.0.

httptools parses; this file adds what a parser does not: limits on header and body size, time limits for idle and slow
clients, answers in the order of the requests when a client pipelines, 100-continue, half-closed sockets, compressed bodies,
and a close that lets the client read why. `Connections` holds what all connections of a server share.

A client sends the same head again and again. A head that the parser has read once, as the whole head of a plain request, is
looked up instead of parsed from then on; equal bytes have equal meaning.
"""

import asyncio
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

import httptools

from modelyard.errors import (
    BodyTooLarge,
    ClientTooSlow,
    HeadersTooLarge,
    MethodNotAllowed,
    ModelyardError,
    RequestError,
)
from modelyard.inference.serve.transport.compression import accepted_coding, compressed, decompressed
from modelyard.inference.serve.transport.messages import Handler, Head, Request, Response, error_response

_NEVER = float("inf")
_PHRASES = {int(status): f"HTTP/1.1 {int(status)} {status.phrase}\r\n".encode() for status in HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MAX_KNOWN_HEADS, _MAX_KNOWN_HEAD_BYTES = 1024, 4096
_COMPRESS_FROM_BYTES = 1024
_BUSY_GAP_S = 50e-6
_PROBE_S = 0.02  # most answers are out before; a reset from far away is found by the sweep
_TCP_CLOSED = 7  # TCP_CLOSE of Linux's tcp_states.h
_LISTS = frozenset((b"content-encoding", b"transfer-encoding"))


@dataclass(frozen=True)
class HttpLimits:
    """What one client may cost."""

    max_header_bytes: int = 32 * 1024
    """Request line and headers together."""
    max_body_bytes: int = 64 * 1024 * 1024
    """Also of what a compressed body unpacks to."""
    read_timeout_s: float = 30.0
    """From the first byte of a request to its last; also how long a client may refuse to read its answers."""
    idle_timeout_s: float = 75.0
    """Silence between requests on a kept-alive connection."""
    linger_s: float = 2.0
    """How long the rest of a refused request is read and thrown away, so that the client gets to see the refusal."""
    max_pipelined: int = 64
    """Unanswered requests of one connection above which no more is read from it."""


class Connections:
    """The open connections of one server and what they share. Belongs to the event loop; not thread-safe."""

    def __init__(
        self,
        handler: Handler,
        limits: HttpLimits,
        *,
        on_served: Callable[[Request, Response], None] | None = None,
        on_refused: Callable[[Request, Exception], None] | None = None,
        on_open: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            on_served: told of every request as its answer is written.
            on_refused: told of every request that is answered with an error here, and which the handler never sees.
            on_open: told how many connections there are whenever that changes.
        """
        self.handler = handler
        self.limits = limits
        self.on_served = on_served
        self.on_refused = on_refused
        self.on_open = on_open
        self.open: set[HttpConnection] = set()
        self.n_received_bytes = self.n_sent_bytes = self.n_discarded_bytes = 0
        """Since the start; discarded is what came behind a refusal."""
        self.draining = False
        self.none_open = asyncio.Event()
        self.heads: dict[bytes, tuple[Head, int]] = {}
        """Bytes of a head → the head and the length of the body behind it."""
        self.date = b""
        self.ok_json = b""
        self._set_date()
        self._loop = asyncio.get_running_loop()
        self._in_turn = False
        self._turn_arrived_s = 0.0
        self._turn_began_s = 0.0
        self.turn_ended_s = 0.0
        """When the loop last did something for a client."""

    def new_connection(self) -> asyncio.Protocol:
        return HttpConnection(self)

    @property
    def n_busy(self) -> int:
        """Connections with a request that is not answered yet."""
        return sum(connection.busy for connection in self.open)

    def arrived_s(self) -> float:
        """Return when data that is read now has arrived, as far as can be known: time.perf_counter().

        All that one turn of the event loop reads was there when the loop looked. Where the loop had not waited for it, it
        may have come at any time since the turn before began, and the earliest moment is the safe one.
        """
        if not self._in_turn:
            self._in_turn = True
            now_s = time.perf_counter()
            waited = now_s - self.turn_ended_s > _BUSY_GAP_S
            self._turn_arrived_s = now_s if waited else self._turn_began_s
            self._turn_began_s = now_s
            self._loop.call_soon(self._end_turn)
        return self._turn_arrived_s

    def _end_turn(self) -> None:
        self._in_turn = False
        self.turn_ended_s = time.perf_counter()

    def sweep(self, now_s: float) -> None:
        """End what has run out of time; called about once a second with the loop's time."""
        self._set_date()
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

    def _set_date(self) -> None:
        self.date = formatdate(time.time(), usegmt=True).encode()
        self.ok_json = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: %b\r\nX-Request-Id: " % self.date


class _Exchange(Request):
    """A request on its connection: its answer goes out in the order in which the requests came."""

    __slots__ = ("close", "connection", "interim", "linger")

    def __init__(self, connection: "HttpConnection", head: Head, body: bytes, arrived_s: float, *, close: bool) -> None:
        super().__init__(head, body, arrived_s)
        self.connection: HttpConnection | None = connection
        self.close = close
        self.linger = False
        self.interim = b""

    def reply(self, response: Response) -> None:
        self.response = response
        self.on_gone = None
        connection = self.connection
        if connection is not None:  # else the client is gone
            connection.flush()


class HttpConnection(asyncio.Protocol):
    """One client's connection. The parser calls the `on_` methods while it is fed."""

    def __init__(self, shared: Connections) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._loop = asyncio.get_running_loop()
        self._exchanges: deque[_Exchange] = deque()
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
        self._n_messages = 0
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._head_bytes = 0
        self._unparsed_head_bytes = 0
        self._body_bytes = 0
        self._arrived_s = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._exchanges) or self._in_message

    # From the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._shared.open.add(self)
        if self._shared.on_open is not None:
            self._shared.on_open(len(self._shared.open))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stopped = True
        self._shared.open.discard(self)
        if self._shared.on_open is not None:
            self._shared.on_open(len(self._shared.open))
        for exchange in self._exchanges:
            exchange.connection = None
            if exchange.on_gone is not None:
                exchange.on_gone()  # nobody is left to answer
                exchange.on_gone = None
        self._exchanges.clear()
        if self._shared.draining and not self._shared.open:
            self._shared.none_open.set()

    def data_received(self, data: bytes) -> None:
        shared = self._shared
        shared.n_received_bytes += len(data)
        if self._stopped:
            shared.n_discarded_bytes += len(data)
            return  # the rest of something refused
        if not self._in_message:
            end = data.find(b"\r\n\r\n") + 4
            known = shared.heads.get(data[:end])
            if known is not None and len(data) - end == known[1]:
                self._arrived_s = shared.arrived_s()
                self._received(known[0], data[end:])
                return
            n_before = self._n_messages
            self._feed(data)
            if self._n_messages == n_before + 1 and not self._in_message:
                self._remember_head(data, end)
        else:
            if self._in_head:
                self._unparsed_head_bytes += len(data)
            self._feed(data)
        # The parser reports whole headers only: this bounds one that never ends.
        if self._in_head and self._unparsed_head_bytes > self._limits.max_header_bytes:
            self._refuse_head()

    def eof_received(self) -> bool:
        self._client_done = True
        if self._in_message and not self._stopped:
            self._refuse_rest()
        if self._exchanges:
            self._loop.call_later(_PROBE_S, self._probe)
        return bool(self._exchanges)  # True keeps our side open until the answers are out

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
        self._url, self._headers, self._body = b"", {}, b""
        self._head_bytes = self._unparsed_head_bytes = self._body_bytes = 0
        self._in_head = self._in_message = True
        self._arrived_s = self._shared.arrived_s()
        self._deadline_s = self._loop.time() + self._limits.read_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if self._in_head:  # a trailer after a chunked body says nothing we need
            name = name.lower()
            if name in _LISTS and name in self._headers:
                value = self._headers[name] + b", " + value
            self._headers[name] = value

    def on_headers_complete(self) -> None:
        if self._stopped or self._parser.should_upgrade():
            return
        self._in_head = False
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._refuse(RequestError(f"HTTP version {version} is not spoken here; use HTTP/1.1"))
        elif version == "1.1" and b"host" not in self._headers:
            self._refuse(RequestError("malformed HTTP request: no Host header; HTTP/1.1 requires one"))
        elif self._headers.get(b"transfer-encoding", b"chunked").strip().lower() != b"chunked":
            coding = self._headers[b"transfer-encoding"].decode("latin-1")
            self._refuse(
                RequestError(f"Transfer-Encoding of an HTTP request must be chunked, got {coding!r:.60}; send it so")
            )
        elif int(self._headers.get(b"content-length", b"0")) > self._limits.max_body_bytes:
            self._refuse_body()
        elif version == "1.1" and self._headers.get(b"expect", b"").lower() == b"100-continue":
            interim = _Exchange(self, Head("", ""), b"", self._arrived_s, close=False)
            interim.interim = _CONTINUE
            self._exchanges.append(interim)
            self.flush()

    def on_body(self, body: bytes) -> None:
        if self._stopped:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body()
        elif not self._body:
            self._body = body
        else:  # into one buffer: a list of parts would take many times the bytes of a body in tiny chunks
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body

    def on_message_complete(self) -> None:
        if self._stopped or self._parser.should_upgrade():
            return
        self._n_messages += 1
        self._in_message = False
        self._arrived_s = self._shared.arrived_s()  # all of it: a slow upload is no reason to hurry
        path, query = _split(self._url)
        self._head = Head(
            self._parser.get_method().decode(),
            path,
            query,
            self._headers,
            keep_alive=self._parser.should_keep_alive(),
            old_http=self._parser.get_http_version() == "1.0",
        )
        body = bytes(self._body)
        self._body = b""
        self._received(self._head, body)

    # Ours.

    def _received(self, head: Head, body: bytes) -> None:
        """A whole request is here: have it answered."""
        self._deadline_s = _NEVER  # from here on it is our turn
        exchange = _Exchange(self, head, body, self._arrived_s, close=not head.keep_alive)
        self._exchanges.append(exchange)
        if not head.keep_alive:
            self._stopped = True
        if b"content-encoding" in head.headers:
            try:
                exchange.body = decompressed(body, head.headers[b"content-encoding"], self._limits.max_body_bytes)
            except RequestError as exc:
                self._reply_error(exchange, exc)
                return
        self._shared.handler(exchange)
        if len(self._exchanges) >= self._limits.max_pipelined:
            self._throttle()

    def _remember_head(self, data: bytes, end: int) -> None:
        """Keep the head of the request that `data` was, if it was that and nothing else."""
        heads, head = self._shared.heads, self._head
        if (
            b"A" <= data[:1] <= b"Z"
            and end <= _MAX_KNOWN_HEAD_BYTES
            and head.keep_alive
            and not head.old_http
            and len(data) - end == self._body_bytes == int(head.headers.get(b"content-length", b"0"))
            and not head.headers.keys() & {b"transfer-encoding", b"upgrade", b"expect", b"x-request-id", b"traceparent"}
        ):
            if len(heads) >= _MAX_KNOWN_HEADS:
                heads.clear()
            heads[data[:end]] = (head, self._body_bytes)

    def check_time(self, now_s: float) -> None:
        if self._client_done and self._exchanges:
            self._check_gone()
        if now_s >= self._write_deadline_s or (self._lingering and now_s >= self._deadline_s):
            self.abort()
        elif now_s >= self._deadline_s and not self._read_paused:
            if self._in_message:
                self._refuse(
                    ClientTooSlow(
                        f"the request did not arrive within {self._limits.read_timeout_s:g} s; send it faster or in parts"
                    )
                )
            elif not self._exchanges:
                self.close()

    def _probe(self) -> None:
        """Find out whether a client that has closed its side still waits: if it is gone, what is sent to it brings a reset.

        Who waits skips an interim response (RFC 9110, 15.2.1), which HTTP/1.0 does not know.
        """
        if self._exchanges and not self._exchanges[0].head.old_http and not self._transport.is_closing():
            self._transport.write(_CONTINUE)
            self._shared.n_sent_bytes += len(_CONTINUE)
            self._loop.call_later(_PROBE_S, self._check_gone)

    def _check_gone(self) -> None:
        """Give up the answers of a client that has reset the connection.

        Having read the end of its side, the event loop does not read the reset any more; the kernel has to be asked.
        """
        connected = self._transport.get_extra_info("socket")
        if connected is None or self._transport.is_closing() or sys.platform != "linux":
            return
        if connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSED:
            self.abort()

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

    def _refuse_rest(self) -> None:
        length = self._headers.get(b"content-length")
        if self._in_head:
            text = "the HTTP request ended before its headers did; end them with an empty line"
        elif length is None:
            text = "the HTTP request ended before its last chunk; send all of the body"
        else:
            text = f"the HTTP request ended after {self._body_bytes} of {int(length)} body bytes; send all of them"
        self._refuse(RequestError(text))

    def _refuse(self, error: ModelyardError) -> None:
        """Answer the request in progress with `error`, after the answers before it, and read no more requests."""
        head = Head("", "")  # of a head that never ended nothing is certain
        if self._in_message and not self._in_head:
            head = Head(self._parser.get_method().decode(), *_split(self._url), self._headers)
        self._stopped, self._in_message, self._in_head = True, False, False
        self._body = b""
        self._deadline_s = _NEVER
        exchange = _Exchange(self, head, b"", self._arrived_s, close=True)
        exchange.linger = True
        self._exchanges.append(exchange)
        self._reply_error(exchange, error)

    def _reply_error(self, exchange: _Exchange, error: ModelyardError) -> None:
        if self._shared.on_refused is not None:
            self._shared.on_refused(exchange, error)
        exchange.reply(error_response(error))

    def flush(self) -> None:
        """Write the answers that are ready, in order, up to the first that is not."""
        exchanges = self._exchanges
        linger = close = False
        written: list[bytes] = []
        while exchanges and not close and ((exchange := exchanges[0]).response is not None or exchange.interim):
            exchanges.popleft()
            if exchange.interim:
                written.append(exchange.interim)
                continue
            close = exchange.close or (self._shared.draining and not exchanges and not self._in_message)
            linger = exchange.linger
            written.append(self._encode(exchange, close=close))
            exchange.served = None  # the call knows its request too, and only a collection would free the two
        if written:
            data = written[0] if len(written) == 1 else b"".join(written)
            self._transport.write(data)
            self._shared.n_sent_bytes += len(data)
            self._shared.turn_ended_s = time.perf_counter()
        if close:
            self._end(linger=linger)
        elif not exchanges and not self._in_message:
            self._deadline_s = self._loop.time() + self._limits.idle_timeout_s
            if self._client_done:
                self.close()
        if self._read_paused:
            self._throttle()

    def _encode(self, exchange: _Exchange, *, close: bool) -> bytes:
        response, head, shared = exchange.response, exchange.head, self._shared
        assert response is not None
        body = response.body
        extra = b""
        for header in response.headers:
            extra += b"%b: %b\r\n" % header
        if len(body) >= _COMPRESS_FROM_BYTES and b"accept-encoding" in head.headers:
            coding = accepted_coding(head.headers[b"accept-encoding"])
            if coding:
                body = compressed(body, coding)
                extra += b"Content-Encoding: %b\r\nVary: Accept-Encoding\r\n" % coding
        if close:
            extra += b"Connection: close\r\n"
        elif head.old_http:
            extra += b"Connection: keep-alive\r\n"
        if shared.on_served is not None:
            shared.on_served(exchange, response)
        if response.status == 200 and response.content_type == b"application/json" and head.method != "HEAD":
            return b"%b%b\r\n%bContent-Length: %d\r\n\r\n%b" % (
                shared.ok_json,
                exchange.request_id,
                extra,
                len(body),
                body,
            )
        return b"%bContent-Type: %b\r\nDate: %b\r\nX-Request-Id: %b\r\n%bContent-Length: %d\r\n\r\n%b" % (
            _PHRASES[response.status],
            response.content_type,
            shared.date,
            exchange.request_id,
            extra,
            len(body),
            b"" if head.method == "HEAD" else body,
        )

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
        pause = not self._lingering and (self._write_blocked or len(self._exchanges) >= self._limits.max_pipelined)
        if pause != self._read_paused and not self._transport.is_closing():
            self._read_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
                if self._in_message:  # the wait was ours
                    self._deadline_s = self._loop.time() + self._limits.read_timeout_s


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
