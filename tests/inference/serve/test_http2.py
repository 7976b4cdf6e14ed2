"""HTTP/2 over raw sockets: what the specification asks of a server, frame by frame, and what a client may cost.

Names of sections are those of RFC 9113. The answers are read by `h2`, a public implementation, or frame by frame.
"""

import asyncio
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import hpack
import pytest
from grpc_serving import CallServer, answering, echo, echo_stream, silent
from http2_client import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    REQUEST,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    Client,
    asking,
    frame,
    message,
    number,
    setting,
    with_header,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.inference.serve.transport.grpc import Rpc, Streaming, Unary
from modelyard.inference.serve.transport.http2 import Http2Connection, Http2Connections, Http2Limits
from modelyard.inference.serve.transport.http2_frames import PREFACE, ErrorCode

METHODS: dict[str, Unary | Streaming] = {
    "/test.Echo/Unary": Unary(echo),
    "/test.Echo/Stream": Streaming(echo_stream),
    "/test.Echo/Silent": Unary(silent),
}


@pytest.fixture(scope="module")
def server() -> Iterator[CallServer]:
    with answering(METHODS) as running:
        yield running


@pytest.fixture
def client(server: CallServer) -> Iterator[Client]:
    with Client(server) as client:
        yield client


class TestConnections:
    def test_a_request_is_answered(self, client: Client) -> None:
        client.send(client.request(1))
        assert client.answer(1) == b"hello"

    def test_answers_of_one_turn_leave_together_and_streams_go_on(self, client: Client) -> None:
        client.send(*(client.request(stream_id, b"%d" % stream_id) for stream_id in range(1, 41, 2)))
        for stream_id in range(1, 41, 2):
            assert client.answer(stream_id) == b"%d" % stream_id

    def test_frames_may_come_in_any_pieces(self, server: CallServer) -> None:
        with Client(server, greet=False) as client:
            for byte in PREFACE + frame(SETTINGS, 0, 0) + client.request(1):
                client.send(bytes((byte,)))
            assert [client.read().kind for _ in range(3)] == [SETTINGS, WINDOW_UPDATE, SETTINGS]
            assert client.answer(1) == b"hello"

    def test_what_is_not_http2_is_told_so_in_http1(self, server: CallServer) -> None:
        with Client(server, greet=False) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            client.read()
            client.read()
            assert client.stream.readline() == b"HTTP/1.1 505 HTTP Version Not Supported\r\n"
            assert b"gRPC" in client.stream.read()

    def test_the_first_frame_must_be_settings(self, server: CallServer) -> None:
        with Client(server, greet=False) as client:
            client.send(PREFACE, frame(PING, 0, 0, bytes(8)))
            client.is_gone(ErrorCode.PROTOCOL_ERROR)

    def test_unknown_frames_flags_and_settings_are_ignored(self, client: Client) -> None:
        client.send(
            frame(0x16, 0xFF, 0, b"extension"), frame(SETTINGS, 0, 0, setting(0xFF, 1)), frame(PING, 0xFE, 0, bytes(8))
        )
        assert client.read_until(SETTINGS).flags == ACK
        assert client.read_until(PING).flags == ACK
        client.is_served(1)

    def test_the_reserved_bit_is_ignored(self, client: Client) -> None:
        client.send(frame(PING, 0, 1 << 31, bytes(8)))
        assert client.read().kind == PING

    def test_a_ping_is_answered_and_its_answer_is_not(self, client: Client) -> None:
        client.send(frame(PING, ACK, 0, b"an answr"), frame(PING, 0, 0, b"question"))
        assert client.read() == (PING, ACK, 0, b"question")

    def test_priority_and_padding_mean_nothing(self, client: Client) -> None:
        priority = number(3) + b"\x10"
        padded = bytes((7,)) + priority + client.block() + bytes(7)
        data = bytes((3,)) + message(b"padded") + bytes(3)
        client.send(
            frame(PRIORITY, 0, 1, priority),
            frame(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, 1, padded),
            frame(DATA, END_STREAM | PADDED, 1, data),
        )
        assert client.answer(1) == b"padded"

    def test_headers_may_go_on_in_continuations(self, client: Client) -> None:
        block = client.block()
        client.send(
            frame(HEADERS, 0, 1, block[:1]),
            frame(CONTINUATION, 0, 1, block[1:4]),
            frame(CONTINUATION, END_HEADERS, 1, block[4:]),
            frame(DATA, END_STREAM, 1, message(b"in parts")),
        )
        assert client.answer(1) == b"in parts"

    def test_trailers_end_a_request(self, client: Client) -> None:
        trailers = client.headers(1, ((b"x-checksum", b"7"),), END_HEADERS | END_STREAM)
        client.send(client.headers(1), frame(DATA, 0, 1, message(b"with trailers")), trailers)
        assert client.answer(1) == b"with trailers"

    def test_a_client_that_says_goaway_gets_its_answers_and_an_end(self, client: Client) -> None:
        client.send(client.request(1), frame(GOAWAY, 0, 0, bytes(8)))
        assert client.answer(1) == b"hello"
        assert client.stream.read() == b""


BROKEN: dict[str, tuple[ErrorCode, Any]] = {
    # 4.2 Frame Size
    "a frame of more than 16,384 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda c: c.headers(1) + frame(DATA, 1, 1, bytes(16_385))),
    # 4.3 Field Section Compression
    "a header block that is none": (ErrorCode.COMPRESSION_ERROR, lambda c: frame(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff\xff")),
    "another frame amid headers": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1, flags=0) + frame(PRIORITY, 0, 1, bytes(5))),
    "another stream's headers amid headers": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1, flags=0) + c.headers(3)),
    "an unknown frame amid headers": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1, flags=0) + frame(0x16, 0, 1)),
    # 5.1 Stream States
    "DATA on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(DATA, 1, 1, message(b""))),
    "RST_STREAM on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(RST_STREAM, 0, 1, number(8))),
    "WINDOW_UPDATE on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(WINDOW_UPDATE, 0, 1, number(1))),
    "CONTINUATION on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(CONTINUATION, 4, 1, b"")),
    "DATA on a closed stream": (ErrorCode.STREAM_CLOSED, lambda c: c.request(1) + frame(DATA, 1, 1, b"")),
    "HEADERS on a closed stream": (ErrorCode.STREAM_CLOSED, lambda c: c.request(1) + c.headers(1, flags=5)),
    "DATA after the client's own RST_STREAM": (
        ErrorCode.STREAM_CLOSED, lambda c: c.headers(1) + frame(RST_STREAM, 0, 1, number(8)) + frame(DATA, 1, 1, b""),
    ),
    # 5.1.1 Stream Identifiers
    "an even stream": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(2)),
    "a stream number that goes back": (ErrorCode.STREAM_CLOSED, lambda c: c.request(5) + c.headers(3)),
    # 6 Frame Definitions
    "DATA on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(DATA, 1, 0, b"")),
    "DATA of padding only": (ErrorCode.FRAME_SIZE_ERROR, lambda c: c.headers(1) + frame(DATA, PADDED, 1, b"")),
    "DATA with more padding than frame": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1) + frame(DATA, PADDED, 1, b"\x05abc")),
    "HEADERS on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(0)),
    "HEADERS with more padding than frame": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(HEADERS, PADDED | 4, 1, b"\xffabc")),
    "HEADERS without their priority": (ErrorCode.FRAME_SIZE_ERROR, lambda c: frame(HEADERS, WITH_PRIORITY | 4, 1, b"abc")),
    "PRIORITY on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(PRIORITY, 0, 0, bytes(5))),
    "RST_STREAM on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(RST_STREAM, 0, 0, bytes(4))),
    "RST_STREAM of 3 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda c: c.headers(1) + frame(RST_STREAM, 0, 1, bytes(3))),
    "SETTINGS on a stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(SETTINGS, 0, 1)),
    "SETTINGS ACK that says something": (ErrorCode.FRAME_SIZE_ERROR, lambda c: frame(SETTINGS, ACK, 0, setting(4, 1))),
    "SETTINGS of 3 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda c: frame(SETTINGS, 0, 0, bytes(3))),
    "ENABLE_PUSH 2": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(SETTINGS, 0, 0, setting(2, 2))),
    "INITIAL_WINDOW_SIZE of 2^31": (ErrorCode.FLOW_CONTROL_ERROR, lambda c: frame(SETTINGS, 0, 0, setting(4, 2**31))),
    "MAX_FRAME_SIZE of 16,383": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(SETTINGS, 0, 0, setting(5, 16_383))),
    "MAX_FRAME_SIZE of 2^24": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(SETTINGS, 0, 0, setting(5, 2**24))),
    "PUSH_PROMISE": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1) + frame(PUSH_PROMISE, 4, 1, number(2))),
    "PING on a stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(PING, 0, 1, bytes(8))),
    "PING of 6 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda c: frame(PING, 0, 0, bytes(6))),
    "GOAWAY on a stream": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(GOAWAY, 0, 1, bytes(8))),
    "GOAWAY of 4 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda c: frame(GOAWAY, 0, 0, bytes(4))),
    "WINDOW_UPDATE of 0": (ErrorCode.PROTOCOL_ERROR, lambda c: frame(WINDOW_UPDATE, 0, 0, number(0))),
    "WINDOW_UPDATE of 3 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda c: frame(WINDOW_UPDATE, 0, 0, bytes(3))),
    "a connection window of 2^31": (
        ErrorCode.FLOW_CONTROL_ERROR, lambda c: frame(WINDOW_UPDATE, 0, 0, number(2**31 - 1)) * 2,
    ),
    "CONTINUATION without headers": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1) + frame(CONTINUATION, 4, 1, b"")),
    "CONTINUATION on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda c: c.headers(1, flags=0) + frame(CONTINUATION, 4, 0, b"")),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_connection_ends_with_the_reason(server: CallServer, what: str) -> None:
    code, broken = BROKEN[what]
    with Client(server) as client:
        client.send(broken(client))
        assert client.is_gone(code)


MALFORMED: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "a name in capitals": with_header((b"X-Test", b"1")),
    "an empty name": with_header((b"", b"1")),
    "an unknown pseudo-header": with_header((b":test", b"1"), without=b"te"),
    "a pseudo-header of responses": ((b":status", b"200"), *REQUEST),
    "a pseudo-header behind others": with_header((b":path", b"/"), without=b":path"),
    "no :method": with_header(without=b":method"),
    "no :scheme": with_header(without=b":scheme"),
    "no :path": with_header(without=b":path"),
    "an empty :path": ((b":path", b""), *with_header(without=b":path")),
    "a :method twice": ((b":method", b"POST"), *REQUEST),
    "connection": with_header((b"connection", b"keep-alive")),
    "transfer-encoding": with_header((b"transfer-encoding", b"chunked")),
    "te other than trailers": with_header((b"te", b"gzip"), without=b"te"),
    "content-length that is no number": with_header((b"content-length", b"-1")),
    "content-length above the body": with_header((b"content-length", b"11")),
    "content-length below the body": with_header((b"content-length", b"9")),
}


class TestStreams:
    @pytest.mark.parametrize("what", MALFORMED)
    def test_a_malformed_request_ends_its_stream_alone(self, client: Client, what: str) -> None:
        client.send(client.headers(1, MALFORMED[what]), frame(DATA, END_STREAM, 1, message(b"12345")))
        got = client.read()
        assert (got.kind, got.stream_id, got.code) == (RST_STREAM, 1, ErrorCode.PROTOCOL_ERROR)
        client.is_served(3)

    def test_content_length_may_be_right(self, client: Client) -> None:
        client.send(
            client.headers(1, with_header((b"content-length", b"10"))), frame(DATA, END_STREAM, 1, message(b"12345"))
        )
        assert client.answer(1) == b"12345"

    @pytest.mark.parametrize("flags", [END_HEADERS, END_HEADERS | END_STREAM])
    def test_trailers_must_end_the_stream_and_hold_no_pseudo_header(self, client: Client, flags: int) -> None:
        fields = ((b"x", b"1"),) if flags == END_HEADERS else ((b":path", b"/"),)
        client.send(client.headers(1), frame(DATA, 0, 1, message(b"12345")), client.headers(1, fields, flags))
        assert client.read().code == ErrorCode.PROTOCOL_ERROR
        client.is_served(3)

    def test_nothing_may_follow_the_end_of_a_request(self, client: Client) -> None:
        client.send(
            client.headers(1, asking("/test.Echo/Silent")),
            frame(DATA, END_STREAM, 1, message(b"")),
            frame(DATA, END_STREAM, 1, message(b"")),
        )
        assert client.read().code == ErrorCode.STREAM_CLOSED
        client.is_served(3)

    def test_priority_of_the_wrong_size_is_the_streams_error(self, client: Client) -> None:
        client.send(client.headers(1), frame(PRIORITY, 0, 1, bytes(4)))
        assert client.read().code == ErrorCode.FRAME_SIZE_ERROR
        client.is_served(3)

    def test_a_window_grows_by_at_least_one_byte(self, client: Client) -> None:
        client.send(client.headers(1), frame(WINDOW_UPDATE, 0, 1, number(0)))
        assert client.read().code == ErrorCode.PROTOCOL_ERROR
        client.is_served(3)

    def test_a_streams_window_has_an_upper_end(self, client: Client) -> None:
        client.send(client.headers(1), frame(WINDOW_UPDATE, 0, 1, number(2**31 - 1)))
        assert client.read().code == ErrorCode.FLOW_CONTROL_ERROR
        client.is_served(3)

    def test_what_was_under_way_when_a_stream_was_reset_is_passed_over(self, client: Client) -> None:
        """The server resets a stream; frames that the client had sent before it knew are no error."""
        client.send(client.headers(1, MALFORMED["connection"]), *[frame(DATA, 0, 1, message(b"late"))] * 3)
        client.send(client.headers(1, ((b"late", b"trailers"),), END_HEADERS | END_STREAM))
        assert client.read().kind == RST_STREAM
        client.is_served(3)

    def test_more_streams_than_allowed_are_refused_and_may_be_tried_again(self) -> None:
        with answering(METHODS, Http2Limits(max_streams=2)) as server, Client(server) as client:
            client.send(client.headers(1), client.headers(3), client.headers(5))
            got = client.read()
            assert (got.stream_id, got.code) == (5, ErrorCode.REFUSED_STREAM)
            client.send(frame(DATA, END_STREAM, 1, message(b"one")))
            assert client.answer(1) == b"one"
            client.is_served(7)


class TestWindows:
    def test_an_answer_waits_for_the_streams_window(self, server: CallServer) -> None:
        with Client(server, window=3) as client:
            client.send(client.request(1, b"0123456789"))
            assert client.read().kind == HEADERS
            assert client.read() == (DATA, 0, 1, message(b"0123456789")[:3])
            client.send(frame(WINDOW_UPDATE, 0, 1, number(4)))
            assert client.read() == (DATA, 0, 1, message(b"0123456789")[3:7])
            client.send(frame(SETTINGS, 0, 0, setting(4, 11)))  # 8 more for streams that are open, too
            assert client.read() == (DATA, 0, 1, message(b"0123456789")[7:])
            assert client.read().flags == END_HEADERS | END_STREAM

    def test_a_window_may_go_below_zero(self, server: CallServer) -> None:
        with Client(server, window=10) as client:
            client.send(client.request(1, b"0123456789"))
            assert client.read().kind == HEADERS
            assert len(client.read().payload) == 10
            client.send(frame(SETTINGS, 0, 0, setting(4, 2)), frame(WINDOW_UPDATE, 0, 1, number(8)))
            assert client.read().kind == SETTINGS
            client.send(frame(PING, 0, 0, bytes(8)))
            assert client.read().kind == PING  # nothing was sent: the window is at 0
            client.send(frame(WINDOW_UPDATE, 0, 1, number(5)))
            assert client.read() == (DATA, 0, 1, b"56789")

    def test_the_connections_window_is_shared_and_small_answers_pass_those_that_wait(self, server: CallServer) -> None:
        with Client(server, window=2**20) as client:
            body = bytes(100_000)
            sent = client.headers(1) + b"".join(
                frame(DATA, END_STREAM if i + 16_000 >= 100_005 else 0, 1, message(body)[i : i + 16_000])
                for i in range(0, 100_005, 16_000)
            )
            client.send(sent)
            assert client.read().kind == HEADERS
            got = 0
            while got < 65_535:
                got += len(client.read().payload)
            client.send(client.request(3, b""), frame(WINDOW_UPDATE, 0, 0, number(5)))
            rest = [client.read() for _ in range(2)]
            assert [(one.stream_id, one.kind) for one in rest] == [(3, HEADERS), (1, DATA)]
            client.send(frame(WINDOW_UPDATE, 0, 0, number(2**20)))
            while got < 100_005 - 5:
                one = client.read()
                got += len(one.payload) if (one.stream_id, one.kind) == (1, DATA) else 0

    def test_a_client_may_not_send_more_than_the_window(self) -> None:
        limits = Http2Limits(stream_window_bytes=1000)
        with answering({"/test.Echo/Unary": Unary(silent)}, limits) as server, Client(server) as client:
            client.send(client.headers(1), frame(DATA, 0, 1, bytes(1001)))
            assert client.read().code == ErrorCode.FLOW_CONTROL_ERROR
            client.send(client.headers(3), frame(DATA, 0, 3, message(bytes(5000))[:600]))
            assert client.read() == (WINDOW_UPDATE, 0, 3, number(600))

    @pytest.mark.parametrize("size", [16_380, 65_531, 1_000_000, 20_000_000])
    def test_messages_of_any_size_go_both_ways(self, server: CallServer, size: int) -> None:
        """By way of `h2`, which counts windows of its own."""
        body = bytes(range(256)) * (size // 256 + 1)
        assert h2_echo(server.port, body[:size]) == body[:size]


def h2_echo(port: int, body: bytes) -> bytes:
    """Send a message to the echo and return its answer, as fast as the windows allow."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        client.initiate_connection()
        stream_id = client.get_next_available_stream_id()
        client.send_headers(stream_id, REQUEST)
        left = memoryview(message(body))
        got = bytearray()
        while True:
            while (
                left and (room := min(client.local_flow_control_window(stream_id), client.max_outbound_frame_size)) > 0
            ):
                client.send_data(stream_id, left[:room].tobytes(), end_stream=room >= len(left))
                left = left[room:]
            sock.sendall(client.data_to_send())
            for event in client.receive_data(sock.recv(2**18)):
                if isinstance(event, h2.events.DataReceived):
                    got += event.data
                    client.acknowledge_received_data(event.flow_controlled_length, stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    return bytes(got[5:])
                assert not isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated), event


FLOODS: dict[str, Any] = {
    "pings": lambda c, i: frame(PING, 0, 0, bytes(8)),
    "settings": lambda c, i: frame(SETTINGS, 0, 0),
    "resets": lambda c, i: c.headers(2 * i + 1) + frame(RST_STREAM, 0, 2 * i + 1, number(8)),
    "empty data": lambda c, i: (c.headers(1) if i == 0 else b"") + frame(DATA, 0, 1, b""),
    "priorities": lambda c, i: frame(PRIORITY, 0, 1, bytes(5)),
    "unknown frames": lambda c, i: frame(0x20, 0, 0, b""),
    "empty continuations": lambda c, i: c.headers(1, flags=0) if i == 0 else frame(CONTINUATION, 0, 1, b""),
    "malformed requests": lambda c, i: frame(HEADERS, 5, 2 * i + 1, b"\x82"),
    "useless window updates": lambda c, i: frame(WINDOW_UPDATE, 0, 0, number(1)),
}


class TestLimits:
    @pytest.mark.parametrize("what", FLOODS)
    def test_a_flood_of_frames_that_bring_nothing_ends_the_connection(self, what: str) -> None:
        with answering(METHODS, Http2Limits(max_control_frames=100)) as server, Client(server) as client:
            client.send(*(FLOODS[what](client, i) for i in range(120)))
            client.is_gone(ErrorCode.ENHANCE_YOUR_CALM)

    def test_answers_win_back_what_control_frames_cost(self) -> None:
        with answering(METHODS, Http2Limits(max_control_frames=100)) as server, Client(server) as client:
            for stream_id in range(1, 401, 2):
                client.send(
                    frame(PING, 0, 0, bytes(8)), frame(WINDOW_UPDATE, 0, 0, number(1)), client.request(stream_id)
                )
                assert client.read().kind == PING
                assert client.answer(stream_id) == b"hello"

    def test_so_does_time(self) -> None:
        with answering(METHODS, Http2Limits(max_control_frames=100)) as server, Client(server) as client:
            for _ in range(10):
                client.send(frame(PING, 0, 0, bytes(8)) * 25)
                assert all(client.read().kind == PING for _ in range(25))
                server.later(1.0)
            client.is_served(1)

    def test_too_many_bytes_of_headers_end_the_stream(self, client: Client) -> None:
        block = (
            client.block(with_header((b"x-large", b"a" * 3000))) + b"\xbe" * 12
        )  # and twelve references to that field
        client.send(frame(HEADERS, END_HEADERS, 1, block))
        assert client.read().code == ErrorCode.ENHANCE_YOUR_CALM
        client.is_served(3)

    def test_a_bomb_of_headers_ends_the_connection(self, client: Client) -> None:
        """A kilobyte of references to one long field of the table."""
        large = client.block(with_header((b"x-large", b"a" * 3000)))
        client.send(
            frame(HEADERS, END_HEADERS, 1, large), frame(HEADERS, END_HEADERS, 3, client.block() + b"\xbe" * 1000)
        )
        client.is_gone(ErrorCode.ENHANCE_YOUR_CALM)

    def test_headers_that_never_end_are_cut_off_by_size(self, client: Client) -> None:
        client.send(client.headers(1, flags=0), *[frame(CONTINUATION, 0, 1, bytes(16_000))] * 3)
        client.is_gone(ErrorCode.ENHANCE_YOUR_CALM)

    def test_and_by_time(self, server: CallServer) -> None:
        with Client(server) as client:
            client.send(client.headers(1, flags=0), frame(CONTINUATION, 0, 1, b""))
            server.wait_until(lambda: any(one._unfinished is not None for one in server.connections.open))
            server.later(31.0)
            client.is_gone(ErrorCode.ENHANCE_YOUR_CALM)

    def test_unfinished_messages_are_bounded_together(self) -> None:
        limits = Http2Limits(max_held_bytes=100_000)
        with answering(METHODS, limits) as server, Client(server) as client:
            for stream_id in range(1, 15, 2):
                client.send(client.headers(stream_id), frame(DATA, 0, stream_id, message(bytes(20_000))[:16_000]))
            got = client.read()
            assert got.kind == HEADERS
            assert client.fields(got)["grpc-status"] == "8"
            assert client.read().code == ErrorCode.NO_ERROR  # and the client need not send the rest
            client.send(frame(RST_STREAM, 0, 1, number(8)), frame(RST_STREAM, 0, 3, number(8)))
            client.is_served(101)

    @pytest.mark.parametrize("greet", [True, False])
    def test_a_silent_client_is_sent_away(self, server: CallServer, greet: bool) -> None:
        with Client(server, greet=greet) as client:
            server.wait_until(lambda: any(one._greeted == greet for one in server.connections.open))
            server.later(601.0)
            client.is_gone(ErrorCode.NO_ERROR)

    def test_a_client_with_open_streams_is_asked_whether_it_is_alive(self, server: CallServer) -> None:
        with Client(server) as client:
            client.send(client.headers(1, asking("/test.Echo/Stream")))
            server.wait_until(lambda: any(one.busy for one in server.connections.open))
            server.later(61.0)
            assert client.read_until(PING).payload == b"alive?  "
            server.later(121.0)
            with pytest.raises((AssertionError, ConnectionError)):
                client.read()

    def test_a_client_that_does_not_read_is_cut_off(self) -> None:
        """Its answers fill the socket; other clients are served meanwhile."""
        with answering(METHODS) as server, Client(server, window=2**31 - 1) as client:
            client.send(frame(WINDOW_UPDATE, 0, 0, number(2**30)))
            body = message(bytes(8_000_000))
            client.socket.settimeout(0.2)

            def ask_and_never_read() -> None:
                for stream_id in range(1, 201, 2):
                    client.send(client.headers(stream_id))
                    for i in range(0, len(body), 16_000):
                        ends = END_STREAM if i + 16_000 >= len(body) else 0
                        client.send(frame(DATA, ends, stream_id, body[i : i + 16_000]))

            with pytest.raises((TimeoutError, ConnectionError)):
                ask_and_never_read()
            with Client(server) as other:
                other.is_served(1)
            server.later(31.0)
            server.wait_until(lambda: not server.connections.open)

    def test_an_answer_that_is_not_taken_is_given_up(self) -> None:
        """The client reads, but never widens the stream's window."""
        with answering(METHODS) as server, Client(server, window=1) as client:
            client.send(client.request(1))
            assert client.read_until(DATA).payload == b"\0"
            server.later(31.0)
            assert client.read_until(RST_STREAM).code == ErrorCode.CANCEL


class TestDraining:
    def test_what_is_in_flight_is_answered_and_what_is_idle_ends(self) -> None:
        with answering(METHODS) as server, Client(server) as busy, Client(server) as idle:
            busy.send(busy.headers(1), frame(DATA, 0, 1, message(b"before and after")[:7]))
            server.wait_until(lambda: sum(one.busy for one in server.connections.open) == 1)
            server.drain()
            for client in (busy, idle):
                first = client.read()
                assert (first.kind, int.from_bytes(first.payload[:4], "big"), first.code) == (
                    GOAWAY,
                    2**31 - 1,
                    ErrorCode.NO_ERROR,
                )
                ask = client.read()
                assert ask.kind == PING
                client.send(client.request(3, b"sent before it could know"), frame(PING, ACK, 0, ask.payload))
                assert client.answer(3) == b"sent before it could know"
                last = client.read()
                assert (last.kind, int.from_bytes(last.payload[:4], "big")) == (GOAWAY, 3)
            assert idle.stream.read() == b""
            busy.send(frame(DATA, END_STREAM, 1, message(b"before and after")[7:]))
            assert busy.answer(1) == b"before and after"
            assert busy.stream.read() == b""
            server.wait_none_open()

    def test_a_client_that_does_not_answer_the_ping_is_not_waited_for(self) -> None:
        with answering(METHODS) as server, Client(server) as client:
            server.wait_until(lambda: bool(server.connections.open))
            server.drain()
            server.later(2.0)
            assert [client.read().kind for _ in range(3)] == [GOAWAY, PING, GOAWAY]
            assert client.stream.read() == b""
            server.wait_none_open()


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    abort = close


def converse(chunks: list[bytes]) -> bytes:
    """Return all that a server answers to chunks of bytes."""

    async def run() -> bytes:
        connection = Http2Connection(Http2Connections(Rpc(METHODS).prepare, Http2Limits(max_control_frames=50)))
        wire = Wire()
        connection.connection_made(wire)
        for chunk in chunks:
            if not wire.closed:
                connection.data_received(chunk)
        await asyncio.sleep(0)
        connection.connection_lost(None)
        return bytes(wire.written)

    return asyncio.run(run())


def conversation() -> bytes:
    """Return a client's bytes that use much of the protocol."""
    encoder = hpack.Encoder()
    parts = [PREFACE, frame(SETTINGS, 0, 0, setting(4, 70_000))]
    for stream_id in (1, 3, 5):
        fields = with_header((b"x-request-id", b"given-%d" % stream_id))
        block = encoder.encode(fields)
        parts += [frame(HEADERS, 0, stream_id, block[:3]), frame(CONTINUATION, END_HEADERS, stream_id, block[3:])]
        parts += [frame(DATA, 0, stream_id, message(b"abcdef")[:4]), frame(PING, 0, 0, bytes(8))]
        parts += [
            frame(DATA, PADDED, stream_id, b"\x02" + message(b"abcdef")[4:] + bytes(2)),
            frame(WINDOW_UPDATE, 0, 0, number(9)),
        ]
        parts.append(frame(DATA, END_STREAM, stream_id, b""))
    return b"".join(parts)


CONVERSATION = conversation()


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=12))
@settings(deadline=None, max_examples=60)
def test_law_how_bytes_are_cut_changes_no_answer(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(CONVERSATION)]
    chunks = [CONVERSATION[start:end] for start, end in itertools.pairwise(places)]
    assert converse(chunks) == converse([CONVERSATION])


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=40)), max_size=20)
)
@settings(deadline=None, max_examples=300)
def test_law_no_sequence_of_frames_breaks_the_server(frames: list[tuple[int, int, int, bytes]]) -> None:
    """It answers in whole frames that `h2` takes, whatever comes."""
    sent = PREFACE + frame(SETTINGS, 0, 0) + b"".join(frame(*one) for one in frames)
    written = converse([sent])
    assert written.startswith(frame(SETTINGS, 0, 0, written[9:27]))
    at = 0
    while at < len(written):
        at += 9 + int.from_bytes(written[at : at + 3], "big")
    assert at == len(written)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_law_no_damage_to_a_conversation_breaks_the_server(data: st.DataObject) -> None:
    damaged = bytearray(CONVERSATION)
    for place in data.draw(st.lists(st.integers(len(PREFACE), len(damaged) - 1), min_size=1, max_size=5)):
        damaged[place] = data.draw(st.integers(0, 255))
    converse([bytes(damaged)])
