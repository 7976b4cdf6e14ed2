"""Clients that keep a server busy and remember what became of every request; and what the server's processes weigh."""

import itertools
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import psutil

Address = tuple[str, int]

PATIENCE_S = 60.0
"""What a single step may take on a busy machine; no test waits this long when things work."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    client: int
    sent_s: float
    ended_s: float
    status: int
    """0 where there was no answer."""
    body: bytes
    """Or the reason why there was no answer."""


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Client:
    """One kept-alive connection, opened anew after it broke."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._stream: Any = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def connect(self) -> None:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=PATIENCE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stream = self._socket.makefile("rb")

    def ask(self, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return status, headers in lower case and body; raises OSError where there is no whole answer."""
        try:
            self.connect()
            assert self._socket is not None
            self._socket.sendall(request)
            return self._answer()
        except OSError:
            self.close()
            raise

    def _answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("no answer")
        headers: dict[bytes, bytes] = {}
        while (header := self._stream.readline()) != b"\r\n":
            if not header:
                raise ConnectionResetError("no whole answer")
            name, _, value = header.partition(b": ")
            headers[name.lower()] = value.strip()
        length = int(headers.get(b"content-length", 0))
        body = self._stream.read(length)
        if len(body) < length:
            raise ConnectionResetError("no whole answer")
        if headers.get(b"connection") == b"close":
            self.close()
        return int(line.split()[1]), headers, body

    def close(self) -> None:
        if self._socket is not None:
            self._stream.close()
            self._socket.close()
            self._socket = None


class Load:
    """Threads that send one request after the other, each on its own connection, until `stop` or `n_requests` in all."""

    def __init__(
        self, address: Address, requests: Sequence[bytes], n_clients: int, n_requests: int | None = None
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._address = address
        self._requests = requests
        self._left = None if n_requests is None else iter(range(n_requests))
        self._stopped = threading.Event()
        self._progress = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(n_clients)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Outcome]:
        """Let the requests under way end; return what became of all."""
        self._stopped.set()
        return self.join()

    def join(self) -> list[Outcome]:
        for thread in self._threads:
            thread.join()
        return self.outcomes

    def await_more(self, n: int) -> None:
        """Wait until `n` more requests have ended, whatever way."""
        wanted = len(self.outcomes) + n
        with self._progress:
            assert self._progress.wait_for(lambda: len(self.outcomes) >= wanted, PATIENCE_S), Counter(
                outcome.status for outcome in self.outcomes
            )

    def _run(self, number: int) -> None:
        client = Client(self._address)
        for turn in itertools.count(number):
            if self._stopped.is_set() or (self._left is not None and next(self._left, None) is None):
                break
            sent_s = perf_counter()
            try:
                status, _, body = client.ask(self._requests[turn % len(self._requests)])
            except OSError as exc:
                status, body = 0, repr(exc).encode()
            outcome = Outcome(number, sent_s, perf_counter(), status, body)
            self.outcomes.append(outcome)
            with self._progress:
                self._progress.notify_all()
        client.close()


@contextmanager
def under_load(address: Address, requests: Sequence[bytes], n_clients: int = 4) -> Iterator[Load]:
    load = Load(address, requests, n_clients)
    load.start()
    try:
        yield load
    finally:
        load.stop()


def statuses(outcomes: Sequence[Outcome]) -> dict[int, int]:
    return dict(Counter(outcome.status for outcome in outcomes))


def workers_of(server: Any) -> list[psutil.Process]:
    """Return the server's worker processes, oldest first."""
    children: list[psutil.Process] = psutil.Process(server.process.pid).children()
    return sorted(children, key=lambda process: process.create_time())


def resident_bytes(server: Any) -> list[int]:
    """Return what each worker has in memory."""
    return [process.memory_info().rss for process in workers_of(server)]
