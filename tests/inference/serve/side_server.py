"""A server in this process, on a thread of its own: real sockets, models and metrics, and any set of routes."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelyard.bundle.store import open_store
from modelyard.inference.serve.app import App
from modelyard.inference.serve.front import Front
from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.models.repository import Entry, Json, Loaded, Pick, Repository, load, loader_pool
from modelyard.inference.serve.protocols import (
    monitoring,
    open_inference,
    openapi,
    operations,
    pages,
    repository_api,
    statistics_api,
    tensorflow,
)
from modelyard.inference.serve.protocols.statistics_api import LogControl, TraceControl, TraceSettings
from modelyard.inference.serve.transport.http import Connections, HttpLimits

OPERATIONS = (
    *operations.TENSORFLOW,
    *operations.OPEN_INFERENCE,
    *operations.STATISTICS,
    *operations.REPOSITORY,
    *operations.MONITORING,
)

TRACES = TraceSettings(rate=1000)


@dataclass
class SideServer:
    """What a test may ask for and look at."""

    url: str
    repository: Repository
    metrics: ServerMetrics
    log: LogControl
    trace: TraceControl
    log_levels: list[int] = field(default_factory=list)
    """What the access log was told."""
    traced: list[tuple[str | None, TraceSettings]] = field(default_factory=list)
    """What the tracer was told."""
    commands: list[Json] = field(default_factory=list)
    answers: list[tuple[int, Json]] | None = None
    """What a broadcast returns, in place of this worker's own answer."""
    paths: list[tuple[str, str]] = field(default_factory=list)
    """Method and template of every route."""


@contextmanager
def side_server(
    store: Path,
    picks: Iterable[Pick],
    *,
    load_one: Callable[[Pick], Loaded] | None = None,
    traces: TraceSettings | None = TRACES,
) -> Iterator[SideServer]:
    """Serve these versions of `store` until the block ends; one that cannot be loaded is reported as failed."""
    loop = asyncio.new_event_loop()
    started: list[SideServer] = []
    up, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        opened = open_store(str(store))
        repository = Repository(picks)
        metrics = ServerMetrics(new_slabs())
        found: SideServer

        def on_level(level: int) -> None:
            found.log_levels.append(level)

        def on_trace(model: str | None, settings: TraceSettings) -> None:
            found.traced.append((model, settings))

        async def broadcast(command: Json) -> list[tuple[int, Json]]:
            found.commands.append(command)
            if found.answers:
                return found.answers
            if command["command"] in statistics_api.STICKY:
                return [(0, statistics_api.apply(command, found.log, found.trace))]
            return [(0, await repository.apply(command))]

        found = SideServer("", repository, metrics, LogControl(on_level), TraceControl(traces, on_trace))
        front = Front(repository, metrics)
        routes = [
            *statistics_api.routes(repository, metrics.snapshot, found.log, found.trace, broadcast),
            *open_inference.routes(front, repository),
            *tensorflow.routes(front, repository),
            *repository_api.routes(repository, broadcast),
            *monitoring.routes(metrics),
            *openapi.routes(repository, OPERATIONS),
            *pages.routes(repository),
        ]
        found.paths = [(route.method, route.template) for route in routes]
        connections = Connections(App(routes), HttpLimits())

        def on_change(entry: Entry) -> None:
            if entry.loaded is not None:
                entry.loaded.executor.metrics = metrics.model(entry.name, entry.version)

        server = await asyncio.get_running_loop().create_server(connections.new_connection, "127.0.0.1", 0)
        with loader_pool() as pool:
            await repository.load_all(load_one or (lambda pick: load(opened, pick)), pool, on_change)
            host, port = server.sockets[0].getsockname()[:2]
            found.url = f"http://{host}:{port}"
            started.append(found)
            up.set()
            await stop.wait()
            server.close()
            connections.abort()
            repository.close()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            up.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    up.wait()
    assert started, "the server did not start"
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """GET, or POST where there is a body; return status and JSON."""
    import json
    import urllib.error
    import urllib.request

    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)
