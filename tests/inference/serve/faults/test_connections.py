"""Connections that do not behave, by the thousand: the others are served, memory stays bounded, and all of it comes back."""

import json
import resource
import selectors
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from driver import PATIENCE_S, Client, post, resident_bytes, under_load, workers_of

pytestmark = pytest.mark.slow

ROW = json.dumps({"instances": [[0.5] * 30]}).encode()
PREDICT = post("/v1/models/tabular:predict", ROW)
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
N_IDLE = 10_000


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process, and the server it starts, have as many open files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < N_IDLE + 1000:
        pytest.skip(f"only {hard} open files are allowed here; raise the limit with ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (N_IDLE + 1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def opened(address: tuple[str, int], n: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S)) for _ in range(n)]


def n_open_files(server: Any) -> int:
    return sum(process.num_fds() for process in workers_of(server))


def await_open_files(server: Any, highest: int) -> None:
    """Ask the server again and again until its workers have so few files open."""
    until_s = monotonic() + PATIENCE_S
    with Client(server.address) as client:
        while n_open_files(server) > highest:
            assert monotonic() < until_s, n_open_files(server)
            assert client.ask(LIVE)[0] == 200


def read_all(one: socket.socket) -> bytes:
    """Return what comes until the server closes its side."""
    received = b""
    while part := one.recv(65536):
        received += part
    return received


def test_ten_thousand_idle_connections_cost_little_and_hold_up_nobody(
    many_files: None, store: Path, serve: Any
) -> None:
    """Half of them have never said a word, half have asked before and been answered."""
    with serve(store, "--workers", "2", "--model", "tabular") as server:
        with Client(server.address) as client:
            for _ in range(200):
                assert client.ask(PREDICT)[0] == 200
        before, files_before = resident_bytes(server), n_open_files(server)
        with opened(server.address, N_IDLE) as idle:
            for one in idle[::2]:
                one.sendall(PREDICT)
            for one in idle[::2]:
                assert one.recv(12) == b"HTTP/1.1 200"
            per_connection = (sum(resident_bytes(server)) - sum(before)) / N_IDLE
            assert per_connection < 32 * 1024
            with under_load(server.address, [PREDICT], 4) as load:
                load.await_more(2000)
            assert {outcome.status for outcome in load.outcomes} == {200}
            for one in idle:  # every one of them is still good
                one.setblocking(False)
                with suppress(BlockingIOError):  # the rest of the answer, and then nothing: not the end
                    while True:
                        assert one.recv(65536)
                one.settimeout(PATIENCE_S)
                one.sendall(LIVE)
            for one in idle:
                assert one.recv(12) == b"HTTP/1.1 200"
        await_open_files(server, files_before + 8)
        # What 10,000 connections needed is used again by the next 10,000.
        high = resident_bytes(server)
        for _ in range(2):
            with opened(server.address, N_IDLE // 2):
                pass
            await_open_files(server, files_before + 8)
        assert max(late - early for early, late in zip(high, resident_bytes(server), strict=True)) < 8 * 2**20


def test_slow_clients_are_cut_off_while_others_are_served(store: Path, serve: Any) -> None:
    """They send a byte now and then: of the request line, of headers, of a body, of a chunk."""
    starts = [
        b"GET /v2/health/liv",
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        PREDICT[:-100],
        b"POST /v1/models/tabular:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{",
    ]
    with serve(store, "--workers", "2", "--model", "tabular", "--read-timeout", "1") as server:
        files_before = n_open_files(server)
        with opened(server.address, 400) as slow, under_load(server.address, [PREDICT], 2) as load:
            answers = dict.fromkeys(slow, b"")
            with selectors.DefaultSelector() as selector:
                for number, one in enumerate(slow):
                    one.sendall(starts[number % len(starts)])
                    selector.register(one, selectors.EVENT_READ)
                dripping = set(slow)
                while dripping:
                    for key, _ in selector.select(0.2):
                        one = key.fileobj  # type: ignore[assignment]  # they were registered as sockets
                        part = one.recv(65536)
                        answers[one] += part
                        dripping.discard(one)
                        if not part:
                            selector.unregister(one)
                    for one in dripping:
                        one.send(b" ")
            for one in slow:
                answers[one] += read_all(one)
                status, _, body = answers[one].partition(b"\r\n")
                assert b" 408 " in status, status
                assert b"within 1 s" in body
                assert b"\r\nConnection: close\r\n" in body
            load.await_more(100)
        assert {outcome.status for outcome in load.outcomes} == {200}
        await_open_files(server, files_before + 8)


def test_a_slow_upload_is_no_overload(store: Path, serve: Any) -> None:
    """It takes longer than the model's target, which counts from when all of it is there."""
    with serve(store, "--model", "tabular", "--target", "0.05") as server, opened(server.address, 1) as (client,):
        client.sendall(PREDICT[:-1])
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(PATIENCE_S)
        client.sendall(PREDICT[-1:])
        assert client.recv(12) == b"HTTP/1.1 200"


def test_clients_that_vanish_leave_nothing(store: Path, serve: Any) -> None:
    """Closed in the middle of a head, of a body, after the request: with a farewell or with a reset."""
    reset = struct.pack("ii", 1, 0)
    with serve(store, "--workers", "2", "--model", "tabular") as server:

        def vanish(n: int) -> None:
            for number in range(n):
                one = socket.create_connection(server.address, timeout=PATIENCE_S)
                one.sendall([PREDICT[:30], PREDICT[:-20], PREDICT, PREDICT * 5, b""][number % 5])
                if number % 2:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                elif number % 3 == 0:
                    one.shutdown(socket.SHUT_WR)
                one.close()

        files_before = n_open_files(server)
        vanish(6000)
        before = resident_bytes(server)
        vanish(3000)
        await_open_files(server, files_before + 8)
        grown = [late - early for early, late in zip(before, resident_bytes(server), strict=True)]
        assert max(grown) < 6 * 2**20
        with Client(server.address) as client:
            assert client.ask(PREDICT)[0] == 200
        assert "Traceback" not in server.log.read_text()


def test_half_closed_clients_get_every_answer(store: Path, serve: Any) -> None:
    """And those that are half-closed without having asked are closed."""
    with serve(store, "--workers", "2", "--model", "tabular") as server:
        files_before = n_open_files(server)
        with opened(server.address, 300) as clients:
            for number, one in enumerate(clients):
                one.sendall(PREDICT * (number % 5))
                one.shutdown(socket.SHUT_WR)
            for number, one in enumerate(clients):
                assert read_all(one).count(b"HTTP/1.1 200 OK") == number % 5
            await_open_files(server, files_before + 8)


def test_pipelined_requests_of_many_clients_are_answered_in_order(store: Path, serve: Any) -> None:
    with serve(store, "--workers", "2", "--model", "tabular") as server, opened(server.address, 20) as clients:
        requests = b"".join(
            post("/v1/models/tabular:predict", ROW, b"X-Request-Id: %d" % number) if number % 3 else
            post("/v1/models/nobody:predict", ROW, b"X-Request-Id: %d" % number)
            for number in range(300)
        )  # fmt: skip
        for one in clients:
            one.sendall(requests)
            one.shutdown(socket.SHUT_WR)
        for one in clients:
            answers = read_all(one)
            ids = [int(line.split()[1]) for line in answers.split(b"\r\n") if line.startswith(b"X-Request-Id:")]
            assert ids == list(range(300))
            assert answers.count(b"HTTP/1.1 404") == 100


def test_more_connections_than_allowed_wait_and_are_served_in_the_end(store: Path, serve: Any) -> None:
    with (
        serve(store, "--workers", "2", "--model", "tabular", "--max-connections", "50") as server,
        opened(server.address, 50) as first,
    ):
        for one in first:
            one.sendall(LIVE)
            assert one.recv(12) == b"HTTP/1.1 200"
        with opened(server.address, 20) as late:
            for one in late:
                one.sendall(PREDICT)
            for one in first:
                one.close()
            for one in late:
                assert one.recv(12) == b"HTTP/1.1 200"


def test_http_1_0_clients_are_answered_and_closed(store: Path, serve: Any) -> None:
    old = PREDICT.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: x\r\n", b"")
    with serve(store, "--workers", "2", "--model", "tabular") as server, opened(server.address, 50) as clients:
        for one in clients:
            one.sendall(old)
        for one in clients:
            answer = read_all(one)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"\r\nConnection: close\r\n" in answer
