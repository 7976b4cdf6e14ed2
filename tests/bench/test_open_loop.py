"""The open-loop generator against a small real server: it holds nothing back, and counts what came back."""

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "serve" / "open_loop.c"
REQUEST = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{}"

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


class Answering:
    """A server that answers every request with `answer`, or never where that is empty; in a thread of its own."""

    def __init__(self) -> None:
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,))
        self.thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.readexactly(len(REQUEST)):
                    writer.write(self.answer)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        async def serve() -> None:
            self.end = asyncio.Event()
            server = await asyncio.start_server(respond, "127.0.0.1", 0, backlog=1024)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await self.end.wait()
            server.close()

        self.loop.run_until_complete(serve())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open-loop") / "open_loop"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", str(path), str(SOURCE), "-lm"], check=True)
    return path


@pytest.fixture
def server() -> Iterator[Answering]:
    answering = Answering()
    yield answering
    answering.stop()


def ask(program: Path, port: int, folder: Path, n_connections: int, most_connections: int) -> dict[str, float]:
    request = folder / "request"
    request.write_bytes(REQUEST)
    arguments = [port, request, 500, 0.4, n_connections, most_connections, 1, 7, folder / "latencies"]
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=30)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_every_request_is_accounted_for(program: Path, server: Answering, tmp_path: Path) -> None:
    found = ask(program, server.port, tmp_path, 8, 8)
    assert found["n_sent"] == found["n_ok"] == found["n_in_time"] > 100
    sent_s, latency_s = np.fromfile(tmp_path / "latencies").reshape(-1, 2).T
    assert len(sent_s) == found["n_ok"]
    assert latency_s.min() > 0


def test_refusals_and_failures_are_told_apart(program: Path, server: Answering, tmp_path: Path) -> None:
    server.answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    found = ask(program, server.port, tmp_path, 8, 8)
    assert found["n_refused"] == found["n_sent"]
    server.answer = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
    found = ask(program, server.port, tmp_path, 8, 8)
    assert found["n_failed"] == found["n_sent"]


def test_a_server_that_answers_nothing_is_offered_everything(program: Path, server: Answering, tmp_path: Path) -> None:
    server.answer = b""
    held = ask(program, server.port, tmp_path, 2, 2)
    assert held["n_held_back"] == held["n_sent"] - 2
    free = ask(program, server.port, tmp_path, 2, 1000)
    assert free["n_held_back"] == 0
    assert free["n_connections"] == free["n_unanswered"] == free["n_sent"]


def test_the_same_seed_gives_the_same_arrivals(program: Path, server: Answering, tmp_path: Path) -> None:
    assert ask(program, server.port, tmp_path, 8, 8)["n_sent"] == ask(program, server.port, tmp_path, 8, 8)["n_sent"]
