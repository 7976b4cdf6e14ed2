"""A connection without a socket: what a client sends, in pieces of any size, and the bytes it gets back.

For laws about the HTTP edge. Real sockets show that it works; here every byte string and every way of cutting it can be tried,
and nothing depends on time.
"""

import asyncio
import base64
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson

from modelyard.inference.serve.transport.http import Connections, HttpConnection, HttpLimits
from modelyard.inference.serve.transport.messages import Head, Request, Response

OWN_ID = re.compile(rb"X-Request-Id: [0-9a-f]{12}-[0-9a-f]+\r\n")
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Z]")


class Forgetful(dict[bytes, tuple[Head, int]]):
    """A memory of heads that keeps none: every request goes to the parser."""

    def __setitem__(self, key: bytes, value: tuple[Head, int]) -> None:
        """Forget it."""


class Wire(asyncio.Transport):
    """What asyncio puts between a socket and a protocol. Closing tells the protocol at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.paused = False
        self.closed = False
        self.ended = False
        self._protocol: HttpConnection | None = None

    def connect(self, protocol: HttpConnection) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        assert not self.ended, "written after the end"
        if not self.closed:
            self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            assert self._protocol is not None
            self._protocol.connection_lost(None)

    def abort(self) -> None:
        self.close()


def told(request: Request) -> Response:
    """Return all that was understood of a request, as JSON."""
    head = request.head
    return Response(
        200,
        orjson.dumps(
            {
                "method": head.method,
                "path": head.path,
                "query": head.query,
                "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in head.headers.items()],
                "keep_alive": head.keep_alive,
                "old_http": head.old_http,
                "body": base64.b85encode(request.body).decode(),
            }
        ),
    )


class Later:
    """A handler that answers when it is told to, in the order that `ranks` gives: lowest first."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._n_asked = 0
        self._waiting: list[tuple[int, int, Request]] = []

    def __call__(self, request: Request) -> None:
        rank = self._ranks[self._n_asked % len(self._ranks)]
        self._waiting.append((rank, self._n_asked, request))
        self._n_asked += 1

    def answer_all(self) -> None:
        waiting, self._waiting = sorted(self._waiting, key=lambda one: one[:2]), []
        for _, _, request in waiting:
            request.reply(told(request))


def at_once(request: Request) -> None:
    request.reply(told(request))


def connections(
    handler: Callable[[Request], None] = at_once, *, remembers: bool = True, limits: HttpLimits | None = None
) -> Connections:
    """Return what the connections of a server share; in a running loop. Its date stands still."""
    shared = Connections(handler, limits or HttpLimits())
    shared.date = b"Thu, 01 Jan 1970 00:00:00 GMT"
    shared.ok_json = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: %b\r\nX-Request-Id: " % shared.date
    if not remembers:
        shared.heads = Forgetful()
    return shared


def converse(
    shared: Connections, pieces: Iterable[bytes], *, half_close: bool = True, stalled: Callable[[], None] | None = None
) -> tuple[bytes, bool]:
    """Send `pieces` on a new connection; return all that came back, ids made here blanked, and whether it was closed.

    Args:
        half_close: close the client's side in the end.
        stalled: called where the server has stopped reading, and in the end: lets a `Later` answer.
    """
    connection = shared.new_connection()
    assert isinstance(connection, HttpConnection)
    wire = Wire()
    wire.connect(connection)
    for piece in pieces:
        if wire.paused and stalled is not None:
            stalled()
        if wire.closed:
            break
        assert not wire.paused, "the server never reads on"
        connection.data_received(piece)
    if stalled is not None:
        stalled()
    if half_close and not wire.closed and not connection.eof_received():
        wire.close()
    ended = wire.closed or wire.ended
    wire.close()
    assert connection not in shared.open
    return OWN_ID.sub(b"X-Request-Id: own\r\n", bytes(wire.written)), ended


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in STATUS.findall(answers)]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Return `data` in pieces, cut at `places` (taken modulo its length)."""
    at = sorted({place % len(data) for place in places} - {0}) if data else []
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]
