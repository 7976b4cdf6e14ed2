"""A gRPC server on a thread of this process, over real sockets: of the test's own methods, or of real models."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import uvloop

from modelyard.bundle.store import open_store
from modelyard.inference.serve.front import Front
from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.models.repository import Entry, Json, Repository, choose, load, loader_pool
from modelyard.inference.serve.protocols.extensions_grpc import Extensions
from modelyard.inference.serve.protocols.open_inference_grpc import InferenceService
from modelyard.inference.serve.protocols.statistics_api import (
    LOG_COMMAND,
    TRACE_COMMAND,
    LogControl,
    TraceControl,
    TraceSettings,
    apply,
)
from modelyard.inference.serve.transport.grpc import Answered, Rpc, Streaming, StreamingCall, Unary, UnaryCall
from modelyard.inference.serve.transport.http2 import Http2Connections, Http2Limits

T = TypeVar("T")


@dataclass
class CallServer:
    """A server that listens."""

    port: int
    loop: asyncio.AbstractEventLoop
    connections: Http2Connections
    answered: list[Answered]
    """The calls that have been answered."""
    repository: Repository | None = None
    """The models, where it serves some."""

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def on_loop(self, function: Callable[[], T]) -> T:
        """Return what `function` returns when the event loop calls it."""

        async def called() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(20)

    def later(self, seconds: float) -> None:
        """Look for what has run out of time as if `seconds` had passed, by the event loop's clock."""
        self.on_loop(lambda: self.connections.sweep(self.loop.time() + seconds))

    def drain(self) -> None:
        self.on_loop(self.connections.drain)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when a condition on the loop's state holds."""
        end_s = time.monotonic() + 20
        while not self.on_loop(condition):
            assert time.monotonic() < end_s, "it never came to hold"

    def wait_none_open(self) -> None:
        asyncio.run_coroutine_threadsafe(self.connections.none_open.wait(), self.loop).result(20)


@contextmanager
def answering(
    methods: Mapping[str, Unary | Streaming],
    limits: Http2Limits | None = None,
    *,
    max_message_bytes: int = 64 * 1024 * 1024,
) -> Iterator[CallServer]:
    """Answer `methods` until the block ends."""

    async def made() -> Mapping[str, Unary | Streaming]:
        return methods

    with _serving(made, limits or Http2Limits(), max_message_bytes) as server:
        yield server


@contextmanager
def answering_models(store: Path, *, max_message_bytes: int = 64 * 1024 * 1024) -> Iterator[CallServer]:
    """Answer for every model in `store`, all extensions included, until the block ends."""
    opened = open_store(str(store))
    repository = Repository(choose(opened))
    metrics = ServerMetrics(new_slabs())
    log, trace = LogControl(lambda level: None), TraceControl(TraceSettings(), lambda model, settings: None)
    pool = loader_pool()

    async def obey(command: Json) -> list[tuple[int, Json]]:
        if command["command"] in (LOG_COMMAND, TRACE_COMMAND):
            return [(0, apply(command, log, trace))]
        return [(0, await repository.apply(command))]

    def on_change(entry: Entry) -> None:
        if entry.loaded is not None:
            entry.loaded.executor.metrics = metrics.model(entry.name, entry.version)

    async def made() -> Mapping[str, Unary | Streaming]:
        await repository.load_all(lambda pick: load(opened, pick), pool, on_change)
        extensions = Extensions(repository, metrics.snapshot, log, trace, obey)
        return InferenceService(Front(repository, metrics), repository, extensions).methods()

    try:
        with _serving(made, Http2Limits(), max_message_bytes) as server:
            server.repository = repository
            yield server
    finally:
        repository.close()
        pool.shutdown()


@contextmanager
def _serving(
    made: Callable[[], Awaitable[Mapping[str, Unary | Streaming]]], limits: Http2Limits, max_message_bytes: int
) -> Iterator[CallServer]:
    answered: list[Answered] = []
    started: list[tuple[CallServer, asyncio.Event]] = []
    up = threading.Event()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        rpc = Rpc(await made(), max_message_bytes=max_message_bytes, on_answered=answered.append)
        connections = Http2Connections(rpc.prepare, limits)
        server = await loop.create_server(connections.new_connection, "127.0.0.1", 0)
        stop = asyncio.Event()
        started.append((CallServer(server.sockets[0].getsockname()[1], loop, connections, answered), stop))
        up.set()
        await stop.wait()
        server.close()
        connections.abort()
        await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    assert up.wait(30)
    running, stop = started[0]
    try:
        yield running
    finally:
        running.loop.call_soon_threadsafe(stop.set)
        thread.join(20)


def echo(call: UnaryCall) -> None:
    call.reply(call.message)


def echo_stream(call: StreamingCall) -> None:
    call.on_message = call.send
    call.on_half_close = call.end


def silent(call: UnaryCall) -> None:
    """Never answer."""
