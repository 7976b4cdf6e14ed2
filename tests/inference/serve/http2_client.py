"""HTTP/2 frame by frame, as a test's client writes and reads them."""

import socket
import struct
from typing import NamedTuple, cast

import hpack
from grpc_serving import CallServer

from modelyard.inference.serve.transport.http2_frames import PREFACE, ErrorCode

(DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION) = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 1, 1, 4, 8, 32
REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/test.Echo/Unary"),
    (b":authority", b"test"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


def with_header(*fields: tuple[bytes, bytes], without: bytes = b"") -> tuple[tuple[bytes, bytes], ...]:
    return (*(pair for pair in REQUEST if pair[0] != without), *fields)


def asking(path: str) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name, path.encode() if name == b":path" else value) for name, value in REQUEST)


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


def setting(name: int, value: int) -> bytes:
    return struct.pack(">HI", name, value)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> ErrorCode:
        return ErrorCode(int.from_bytes(self.payload[4:8] if self.kind == GOAWAY else self.payload, "big"))


class Client:
    """A client that writes and reads frames."""

    def __init__(self, server: CallServer, *, greet: bool = True, window: int | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self.stream = self.socket.makefile("rb")
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        if greet:
            own = b"" if window is None else setting(4, window)
            self.send(PREFACE, frame(SETTINGS, 0, 0, own))
            assert [self.read().kind for _ in range(3)] == [SETTINGS, WINDOW_UPDATE, SETTINGS]

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def headers(
        self, stream_id: int, fields: tuple[tuple[bytes, bytes], ...] = REQUEST, flags: int = END_HEADERS
    ) -> bytes:
        return frame(HEADERS, flags, stream_id, self.block(fields))

    def block(self, fields: tuple[tuple[bytes, bytes], ...] = REQUEST) -> bytes:
        return self.encoder.encode(fields)

    def request(self, stream_id: int, data: bytes = b"hello") -> bytes:
        return self.headers(stream_id) + frame(DATA, END_STREAM, stream_id, message(data))

    def read(self) -> Frame:
        head = self.stream.read(9)
        assert len(head) == 9, "the server has closed the connection"
        payload = self.stream.read(int.from_bytes(head[:3], "big"))
        return Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    def read_until(self, kind: int) -> Frame:
        while True:
            got = self.read()
            if got.kind == kind:
                return got

    def fields(self, got: Frame) -> dict[str, str]:
        return dict(cast(list[tuple[str, str]], self.decoder.decode(got.payload)))

    def answer(self, stream_id: int) -> bytes:
        """Read an answer of one DATA frame; other streams' frames are no part of it."""
        head, body, trailers = (self.read() for _ in range(3))
        assert [(got.kind, got.stream_id) for got in (head, body, trailers)] == [
            (HEADERS, stream_id), (DATA, stream_id), (HEADERS, stream_id),
        ]  # fmt: skip
        assert self.fields(head)[":status"] == "200"
        assert self.fields(trailers) == {"grpc-status": "0"}
        assert trailers.flags == END_HEADERS | END_STREAM
        return body.payload[5:]

    def is_served(self, stream_id: int) -> None:
        """Assert that the connection still works."""
        self.send(self.request(stream_id, b"still here"))
        assert self.answer(stream_id) == b"still here"

    def is_gone(self, code: ErrorCode) -> str:
        """Assert that the connection ends for that reason; return it in words."""
        got = self.read_until(GOAWAY)
        assert got.code == code, got
        assert self.stream.read(1) == b""
        return got.payload[8:].decode()
