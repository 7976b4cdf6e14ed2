"""gRPC, by way of grpcio's own client: calls, statuses, deadlines, cancelling, compression, limits, draining."""

import gzip
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import grpc
import pytest
from grpc_serving import CallServer, answering, echo, echo_stream, silent
from http2_client import DATA, END_HEADERS, END_STREAM, HEADERS, PING, REQUEST, Client, asking, frame, with_header
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    ModelyardError,
    NotReady,
    Overloaded,
    RequestError,
    UnknownModel,
)
from modelyard.inference.serve.transport.grpc import Status, Streaming, StreamingCall, Unary, UnaryCall, status_of

LIMIT = 300_000
ECHO, STREAM, REFUSE, BUG = "/test.Echo/Unary", "/test.Echo/Stream", "/test.Echo/Refuse", "/test.Echo/Bug"


def refuse(call: UnaryCall) -> None:
    call.fail(Status.UNAVAILABLE, "nicht möglich: 100 % busy\n", ((b"retry-after", b"7"),))


def bug(call: UnaryCall) -> None:
    raise ZeroDivisionError("a bug of the handler")


def tell_metadata(call: UnaryCall) -> None:
    call.reply(call.metadata[b"x-test"] + b" " + call.request_id, ((b"x-answer", b"yes"),))


def refuse_second(call: StreamingCall) -> None:
    n_messages = 0

    def on_message(data: bytes) -> None:
        nonlocal n_messages
        n_messages += 1
        if n_messages == 2:
            call.fail(Status.INVALID_ARGUMENT, "the second is one too many")
        else:
            call.send(data)

    call.on_message = on_message


def stream_bug(call: StreamingCall) -> None:
    def on_message(data: bytes) -> None:
        raise ZeroDivisionError("a bug of the handler")

    call.on_message = on_message


METHODS: dict[str, Unary | Streaming] = {
    ECHO: Unary(echo),
    STREAM: Streaming(echo_stream),
    REFUSE: Unary(refuse),
    BUG: Unary(bug),
    "/test.Echo/Metadata": Unary(tell_metadata),
    "/test.Echo/RefuseSecond": Streaming(refuse_second),
    "/test.Echo/StreamBug": Streaming(stream_bug),
}


@pytest.fixture(scope="module")
def server() -> Iterator[CallServer]:
    with answering(METHODS, max_message_bytes=LIMIT) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: CallServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield channel


class TestUnary:
    @pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 100_000, LIMIT])
    def test_a_message_comes_back(self, channel: Any, size: int) -> None:
        assert channel.unary_unary(ECHO)(bytes(size), timeout=20) == bytes(size)

    def test_many_at_once_over_one_connection(self, channel: Any) -> None:
        call = channel.unary_unary(ECHO)
        with ThreadPoolExecutor(16) as pool:
            sent = [b"%d" % i * (i * 7 % 500) for i in range(1000)]
            assert list(pool.map(lambda data: call(data, timeout=20), sent)) == sent

    def test_more_at_once_than_streams_are_allowed_wait_in_the_client(self, channel: Any) -> None:
        call = channel.unary_unary(ECHO)
        futures = [call.future(b"%d" % i, timeout=20) for i in range(1000)]
        assert [future.result() for future in futures] == [b"%d" % i for i in range(1000)]

    def test_an_error_has_status_text_and_trailers(self, channel: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(REFUSE)(b"", timeout=20)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "nicht möglich: 100 % busy\n"
        assert ("retry-after", "7") in [tuple(pair) for pair in error.trailing_metadata()]

    def test_an_unknown_method_is_unimplemented(self, channel: Any) -> None:
        for call in (channel.unary_unary("/test.Echo/Nope"), channel.unary_unary("nonsense")):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=20)
            error: Any = caught.value
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
            assert "reflection" in error.details()

    def test_an_unknown_streaming_method_is_unimplemented_at_once(self, channel: Any) -> None:
        """Also where the client sends nothing before it has heard of the server."""
        waits = threading.Event()

        def requests() -> Iterator[bytes]:
            waits.wait(20)
            yield b""

        with pytest.raises(grpc.RpcError) as caught:
            next(channel.stream_stream("/test.Echo/Nope")(requests(), timeout=20))
        waits.set()
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED

    def test_a_bug_is_the_end_of_its_call_alone_and_tells_nothing(self, channel: Any, capfd: Any) -> None:
        for method in (BUG, "/test.Echo/StreamBug"):
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream(method)(iter([b""]), timeout=20))
            error: Any = caught.value
            assert error.code() == grpc.StatusCode.INTERNAL
            assert "ZeroDivisionError" not in error.details()
        assert channel.unary_unary(ECHO)(b"goes on", timeout=20) == b"goes on"
        assert capfd.readouterr().err.count("ZeroDivisionError: a bug of the handler") == 2

    def test_metadata_goes_both_ways(self, channel: Any) -> None:
        answer, call = channel.unary_unary("/test.Echo/Metadata").with_call(
            b"", timeout=20, metadata=(("x-test", "a, b"),)
        )
        initial = dict(call.initial_metadata())
        assert answer == b"a, b " + initial["x-request-id"].encode()
        assert initial["x-answer"] == "yes"

    def test_the_clients_own_request_id_comes_back(self, channel: Any) -> None:
        _, call = channel.unary_unary(ECHO).with_call(b"", timeout=20, metadata=(("x-request-id", "mine-7"),))
        assert dict(call.initial_metadata())["x-request-id"] == "mine-7"

    def test_request_ids_differ(self, channel: Any) -> None:
        ids = {
            dict(channel.unary_unary(ECHO).with_call(b"", timeout=20)[1].initial_metadata())["x-request-id"]
            for _ in range(50)
        }
        assert len(ids) == 50

    def test_a_message_over_the_limit_is_refused_before_it_is_there(self, channel: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(ECHO)(bytes(LIMIT + 1), timeout=20)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(LIMIT) in error.details()
        assert channel.unary_unary(ECHO)(b"goes on", timeout=20) == b"goes on"

    def test_every_call_is_told_to_the_access_log_once(self, server: CallServer, channel: Any) -> None:
        before = len(server.answered)
        channel.unary_unary(ECHO)(b"one", timeout=20)
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(REFUSE)(b"", timeout=20)
        assert [(one.call.head.path, one.status) for one in server.answered[before:]] == [
            (ECHO, Status.OK), (REFUSE, Status.UNAVAILABLE),
        ]  # fmt: skip


class TestCompression:
    @pytest.mark.parametrize("method", [grpc.Compression.Gzip, grpc.Compression.Deflate])
    @pytest.mark.parametrize("size", [3, 2000, 250_000])
    def test_messages_may_be_compressed_both_ways(self, channel: Any, method: Any, size: int) -> None:
        assert channel.unary_unary(ECHO)(bytes(size), timeout=20, compression=method) == bytes(size)
        assert (
            list(channel.stream_stream(STREAM)(iter([bytes(size)] * 3), timeout=20, compression=method))
            == [bytes(size)] * 3
        )

    @pytest.mark.parametrize(("encoding", "compress"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
    def test_an_answer_is_compressed_when_its_request_was_and_it_is_long(
        self, server: CallServer, encoding: bytes, compress: Any
    ) -> None:
        fields = with_header((b"grpc-encoding", encoding), (b"grpc-accept-encoding", b"identity, " + encoding))
        for size in (1000, 20_000):
            with Client(server) as client:
                packed = compress(bytes(size))
                client.send(
                    client.headers(1, fields), frame(DATA, END_STREAM, 1, struct.pack(">BI", 1, len(packed)) + packed)
                )
                assert client.fields(client.read())["grpc-encoding"] == encoding.decode()
                flag, n_bytes = struct.unpack_from(">BI", body := client.read().payload)
                assert (flag, n_bytes < size) == ((1, True) if size == 20_000 else (0, False))
                assert n_bytes == len(body) - 5

    def test_a_bomb_is_refused(self, channel: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(ECHO)(bytes(50_000_000), timeout=20, compression=grpc.Compression.Gzip)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.parametrize(
        ("encoding", "flag", "data", "status"),
        [
            (b"snappy", 1, b"abc", "12"),
            (b"identity", 1, b"abc", "13"),
            (b"gzip", 1, b"not gzip", "13"),
            (b"gzip", 1, gzip.compress(b"cut off")[:-9], "13"),
            (b"gzip", 2, b"abc", "13"),
        ],
    )
    def test_what_cannot_be_unpacked_is_refused(
        self, server: CallServer, encoding: bytes, flag: int, data: bytes, status: str
    ) -> None:
        with Client(server) as client:
            client.send(client.headers(1, with_header((b"grpc-encoding", encoding))))
            client.send(frame(DATA, END_STREAM, 1, struct.pack(">BI", flag, len(data)) + data))
            fields = client.fields(client.read())
            assert fields["grpc-status"] == status
            if status == "12":
                assert fields["grpc-accept-encoding"] == "identity,deflate,gzip"

    def test_an_encoding_that_is_not_used_does_not_matter(self, server: CallServer) -> None:
        with Client(server) as client:
            client.send(client.headers(1, with_header((b"grpc-encoding", b"snappy"))))
            client.send(frame(DATA, END_STREAM, 1, struct.pack(">BI", 0, 3) + b"abc"))
            assert client.answer(1) == b"abc"


class TestStreaming:
    def test_messages_come_back_in_order(self, channel: Any) -> None:
        sent = [b"%d" % i * (i % 300) for i in range(2000)]
        assert list(channel.stream_stream(STREAM)(iter(sent), timeout=20)) == sent

    def test_large_messages_come_back(self, channel: Any) -> None:
        sent = [bytes(250_000)] * 20
        assert list(channel.stream_stream(STREAM)(iter(sent), timeout=20)) == sent

    def test_a_stream_may_end_with_an_error(self, channel: Any) -> None:
        answers = channel.stream_stream("/test.Echo/RefuseSecond")(iter([b"1", b"2", b"3"]), timeout=20)
        assert next(answers) == b"1"
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT

    def test_a_stream_without_messages_ends_well(self, channel: Any) -> None:
        assert list(channel.stream_stream(STREAM)(iter([]), timeout=20)) == []

    def test_a_paused_stream_holds_its_client_back_and_resumes(self) -> None:
        calls: list[StreamingCall] = []
        received = 0

        def hold(call: StreamingCall) -> None:
            def on_message(data: bytes) -> None:
                nonlocal received
                received += len(data)
                call.paused = True

            calls.append(call)
            call.on_message = on_message
            call.on_half_close = call.end

        with answering({STREAM: Streaming(hold)}) as server, grpc.insecure_channel(server.target) as channel:
            answers = channel.stream_stream(STREAM)(iter([bytes(100_000)] * 100), timeout=20)
            server.wait_until(lambda: received >= 900_000)
            assert server.on_loop(lambda: received) <= 2**20
            server.on_loop(lambda: setattr(calls[0], "on_message", lambda data: None))
            server.on_loop(calls[0].resume)
            assert list(answers) == []


class TestFraming:
    """What no client of gRPC sends."""

    @pytest.mark.parametrize(
        "parts",
        [
            [b""],
            [b"\x00\x00"],
            [b"\x00\x00\x00\x00\x05abc"],
            [b"\x00\x00\x00\x00\x01ab"],
            [b"\x00\x00\x00\x00\x00" * 2],
        ],
    )
    def test_one_call_holds_one_whole_message(self, server: CallServer, parts: list[bytes]) -> None:
        with Client(server) as client:
            client.send(client.headers(1), *[frame(DATA, END_STREAM, 1, part) for part in parts])
            assert client.fields(client.read())["grpc-status"] == "13"
            client.is_served(3)

    def test_a_stream_may_not_end_within_a_message(self, server: CallServer) -> None:
        with Client(server) as client:
            client.send(client.headers(1, asking(STREAM)), frame(DATA, END_STREAM, 1, b"\x00\x00\x00\x00\x05abc"))
            assert client.fields(client.read())["grpc-status"] == "13"

    @pytest.mark.parametrize(
        ("name", "value", "status"),
        [(b":method", b"GET", "405"), (b"content-type", b"application/json", "415"), (b"content-type", b"", "415")],
    )
    def test_what_is_no_call_gets_an_http_status(
        self, server: CallServer, name: bytes, value: bytes, status: str
    ) -> None:
        fields = tuple((key, value if key == name else old) for key, old in REQUEST)
        with Client(server) as client:
            client.send(client.headers(1, fields, END_HEADERS | END_STREAM))
            got = client.read()
            assert (got.kind, got.flags) == (HEADERS, END_HEADERS | END_STREAM)
            assert client.fields(got)[":status"] == status

    @pytest.mark.parametrize("timeout", [b"1", b"", b"-1S", b"123456789S", b"1x", b"1.5S"])
    def test_a_malformed_timeout_is_refused(self, server: CallServer, timeout: bytes) -> None:
        with Client(server) as client:
            client.send(client.headers(1, with_header((b"grpc-timeout", timeout)), END_HEADERS | END_STREAM))
            assert client.fields(client.read())["grpc-status"] == "13"

    @pytest.mark.parametrize(
        ("timeout", "seconds"), [(b"2H", 7200), (b"3M", 180), (b"5S", 5), (b"20m", 0.02), (b"7u", 7e-6), (b"9n", 9e-9)]
    )
    def test_a_timeout_becomes_a_deadline(self, timeout: bytes, seconds: float) -> None:
        seen: list[float] = []

        def note(call: UnaryCall) -> None:
            assert call.deadline_s is not None
            seen.append(call.deadline_s - call.arrived_s)
            call.reply(b"")

        with answering({ECHO: Unary(note)}) as server, Client(server) as client:
            client.send(
                client.headers(1, with_header((b"grpc-timeout", timeout))), frame(DATA, END_STREAM, 1, bytes(5))
            )
            client.answer(1)
            assert seen == [pytest.approx(seconds, abs=1e-9)]


class TestEnds:
    def test_a_client_that_cancels_is_told_of(self) -> None:
        gone = threading.Event()

        def wait(call: UnaryCall) -> None:
            call.on_gone = gone.set

        with answering({ECHO: Unary(wait)}) as server, grpc.insecure_channel(server.target) as channel:
            future = channel.unary_unary(ECHO).future(b"", timeout=20)
            server.wait_until(lambda: server.connections.n_busy == 1)
            future.cancel()
            assert gone.wait(20)
            server.wait_until(lambda: server.connections.n_busy == 0)
            assert [one.status for one in server.answered] == [Status.CANCELLED]

    def test_so_is_one_that_goes_away(self) -> None:
        gone = threading.Event()
        calls: list[UnaryCall] = []

        def wait(call: UnaryCall) -> None:
            call.on_gone = gone.set
            calls.append(call)

        with answering({ECHO: Unary(wait)}) as server:
            with Client(server) as client:
                client.send(client.request(1))
                server.wait_until(lambda: bool(calls))
            assert gone.wait(20)
            server.on_loop(lambda: calls[0].reply(b"too late"))  # nothing happens

    def test_a_client_stops_waiting_at_its_deadline(self) -> None:
        with answering({ECHO: Unary(silent)}) as server, grpc.insecure_channel(server.target) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(ECHO)(b"", timeout=0.05)
            error: Any = caught.value
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            server.wait_until(lambda: server.connections.n_busy == 0)

    def test_a_call_that_nobody_answers_ends_some_time_after_its_deadline(self) -> None:
        with answering({ECHO: Unary(silent)}) as server, Client(server) as client:
            client.send(client.headers(1, with_header((b"grpc-timeout", b"1n"))), frame(DATA, END_STREAM, 1, bytes(5)))
            server.wait_until(lambda: server.connections.n_busy == 1)
            server.later(2.0)
            assert client.fields(client.read())["grpc-status"] == "4"

    @pytest.mark.parametrize("sent", [b"", b"\x00\x00\x00\x00\x05abc"])
    def test_a_message_that_does_not_arrive_in_time_is_given_up(self, sent: bytes) -> None:
        with answering({ECHO: Unary(echo)}) as server, Client(server) as client:
            client.send(client.headers(1), frame(DATA, 0, 1, sent) if sent else b"", frame(PING, 0, 0, bytes(8)))
            assert client.read().kind == PING  # the server has read so far
            server.later(31.0)
            fields = client.fields(client.read())
            assert fields["grpc-status"] == "4"
            assert "did not arrive" in unquote(fields["grpc-message"])

    def test_draining_answers_what_is_in_flight_and_the_client_finds_another_server(self) -> None:
        calls: list[UnaryCall] = []
        with answering({ECHO: Unary(calls.append)}) as server, grpc.insecure_channel(server.target) as channel:
            future = channel.unary_unary(ECHO).future(b"", timeout=20)
            server.wait_until(lambda: bool(calls))
            server.drain()
            server.on_loop(lambda: calls[0].reply(b"the last one"))
            assert future.result() == b"the last one"
            server.wait_none_open()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x"), Status.INVALID_ARGUMENT),
        (UnknownModel("x"), Status.NOT_FOUND),
        (BodyTooLarge("x"), Status.RESOURCE_EXHAUSTED),
        (NotReady("x"), Status.UNAVAILABLE),
        (Overloaded("x"), Status.UNAVAILABLE),
        (DeadlineExceeded("x"), Status.DEADLINE_EXCEEDED),
        (ModelyardError("x"), Status.INTERNAL),
    ],
)
def test_errors_have_the_status_that_fits(error: ModelyardError, status: Status) -> None:
    assert status_of(error) == status


@pytest.fixture(scope="module")
def text_channel() -> Iterator[Any]:
    def say(call: UnaryCall) -> None:
        call.fail(Status.ABORTED, call.message.decode("utf-8", "surrogatepass"))

    with answering({ECHO: Unary(say)}) as server, grpc.insecure_channel(server.target) as channel:
        yield channel


@given(text=st.text(min_size=1, max_size=300))
def test_law_a_status_text_arrives_as_it_was(text_channel: Any, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        text_channel.unary_unary(ECHO)(text.encode(), timeout=20)
    error: Any = caught.value
    assert error.details() == text
