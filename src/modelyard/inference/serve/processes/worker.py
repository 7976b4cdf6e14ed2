"""A worker's life: load the models, answer the connections it is given, drain, end. One event loop, one process.

seat.py (connections, commands) → http.py | http2.py → app.py | grpc.py → protocols → front.py → models
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from modelyard.errors import MissingExtra, ModelyardError, StoreError
from modelyard.inference.serve.app import App
from modelyard.inference.serve.front import Front, outcome_of
from modelyard.inference.serve.metrics.access_log import AccessLog
from modelyard.inference.serve.metrics.observe import ServerMetrics, Timeline
from modelyard.inference.serve.metrics.tracing import Tracer
from modelyard.inference.serve.models.loading import Loaded, Pick, Turns, load_quietly, loader_pool
from modelyard.inference.serve.models.repository import STICKY, Entry, Repository
from modelyard.inference.serve.processes.seat import Json, Seat
from modelyard.inference.serve.processes.server import ServerSettings
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
from modelyard.inference.serve.protocols.monitoring import timeline_of
from modelyard.inference.serve.protocols.statistics_api import LogControl, TraceControl, TraceSettings
from modelyard.inference.serve.transport.http import Connections
from modelyard.inference.serve.transport.messages import Request, Response
from modelyard.inference.serve.transport.routes import Route

_SWEEP_EVERY_S = 1.0
_OPERATIONS = (
    *operations.TENSORFLOW,
    *operations.OPEN_INFERENCE,
    *operations.STATISTICS,
    *operations.REPOSITORY,
    *operations.MONITORING,
)


@dataclass(frozen=True)
class Models:
    """What a worker serves."""

    repository: Callable[..., Repository]
    """Makes the table of models; given `on_unload`."""
    load_one: Callable[[Pick], Loaded]
    """Loads a version; called on a thread."""
    describe: Callable[[Loaded], str]
    """Returns a command that asks a model something, for the report."""
    turns: Turns
    """Made before the workers were: they load one after the other while they answer."""


class Worker:
    """Serves models on the connections of one seat."""

    def __init__(self, seat: Seat, settings: ServerSettings, models: Models) -> None:
        self._seat = seat
        self._settings = settings
        self._models = models
        self._drain, self._end = asyncio.Event(), asyncio.Event()
        self._adopting: set[asyncio.Task[Any]] = set()
        self._counted: dict[int, int] = {}
        slabs = [seat.slab if number == seat.number else slab for number, slab in enumerate(seat.slabs)]
        self._metrics = ServerMetrics(slabs, seat.number, triton=settings.triton_metrics)
        self._repository = models.repository(on_unload=self._on_unload)
        self._access_log: AccessLog | None = None
        self._tracer: Tracer | None = None
        self._log = LogControl(
            self._set_log, verbose_level=int(settings.access_log), path=str(settings.access_log_path or "")
        )
        share = settings.trace_sample
        traces = None if share is None else TraceSettings(on=share > 0, rate=round(1 / share) if share > 0 else 1000)
        self._trace = TraceControl(traces, self._set_trace)

    async def run(self) -> int:
        """Return the exit code."""
        loop = self._loop = asyncio.get_running_loop()
        settings, seat, repository = self._settings, self._seat, self._repository
        self._set_log(int(settings.access_log))
        if settings.trace_sample is not None:
            self._tracer = Tracer(sample=settings.trace_sample)
            self._tracer.start()
        front = Front(repository, self._metrics)
        self._http = Connections(
            App(self._routes(front), on_refused=self._on_refused),
            settings.limits,
            on_served=self._on_served,
            on_refused=self._on_refused,
            on_open=self._count,
        )
        self._listeners: dict[str, Any] = {"http": self._http}
        if settings.grpc_port is not None:
            self._listeners["grpc"] = self._grpc(front)
        seat.attach(
            loop,
            on_connection=self._adopt,
            on_command=self._obey,
            on_drain=self._drain.set,
            on_end=self._end.set,
        )
        sweeper = loop.create_task(self._sweep())
        pool = loader_pool()
        load_one, turns = self._models.load_one, self._models.turns
        load_beside = partial(load_quietly, load_one, turns)
        loading = loop.create_task(repository.load_all(load_one, pool, self._on_change, load_beside))
        watching: asyncio.Task[None] | None = None
        try:
            await _first(loading, self._drain.wait(), self._end.wait())
            if loading.done():
                await loading
                self._report()
                if settings.poll_s and seat.number == 0:
                    watching = loop.create_task(repository.watch(settings.poll_s, self._broadcast))
                await _first(self._drain.wait(), self._end.wait())
            repository.drain()
            for connections in self._listeners.values():
                connections.drain()
            none_open = [connections.none_open.wait() for connections in self._listeners.values()]
            await _first(_all(none_open), self._end.wait())
            n_cut_off = sum(connections.n_busy for connections in self._listeners.values())
            seat.drained(n_cut_off)
            return 1 if n_cut_off else 0
        finally:
            for connections in self._listeners.values():
                connections.abort()
            for task in (sweeper, loading, watching):
                if task is not None:
                    task.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            if self._access_log is not None:
                self._access_log.close()
            if self._tracer is not None:
                self._tracer.close()

    # Protocols.

    def _routes(self, front: Front) -> Iterable[Route]:
        repository = self._repository
        extensions = (
            *open_inference.EXTENSIONS,
            *statistics_api.EXTENSIONS,
            *self._trace.extensions,
            repository_api.EXTENSION,
        )
        return [
            *statistics_api.routes(repository, self._metrics.snapshot, self._log, self._trace, self._broadcast),
            *open_inference.routes(front, repository, extensions),
            *tensorflow.routes(front, repository),
            *repository_api.routes(repository, self._broadcast),
            *monitoring.routes(self._metrics),
            *openapi.routes(repository, _OPERATIONS),
            *pages.routes(repository),
        ]

    def _grpc(self, front: Front) -> Any:
        """Return the connections of the gRPC port; raises MissingExtra."""
        try:
            from modelyard.inference.serve.protocols.extensions_grpc import Extensions
            from modelyard.inference.serve.protocols.open_inference_grpc import InferenceService
            from modelyard.inference.serve.transport.grpc import Rpc
            from modelyard.inference.serve.transport.http2 import Http2Connections, Http2Limits
        except ModuleNotFoundError as exc:
            raise MissingExtra(exc.name or "hpack", "grpc", "gRPC") from exc
        limits = self._settings.limits
        extensions = Extensions(self._repository, self._metrics.snapshot, self._log, self._trace, self._broadcast)
        rpc = Rpc(
            InferenceService(front, self._repository, extensions).methods(),
            max_message_bytes=limits.max_body_bytes,
            read_timeout_s=limits.read_timeout_s,
            on_answered=self._on_answered,
        )
        return Http2Connections(
            rpc.prepare,
            Http2Limits(read_timeout_s=limits.read_timeout_s),
            arrived_s=self._http.arrived_s,
            on_open=self._count,
        )

    # Connections.

    def _adopt(self, tag: str, accepted: socket.socket) -> None:
        """Take over an accepted connection."""
        task = self._loop.create_task(self._connect(tag, accepted))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)
        self._count()

    async def _connect(self, tag: str, accepted: socket.socket) -> None:
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._listeners[tag].new_connection, accepted)
        except OSError:  # it has gone again
            accepted.close()

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        self._count()

    def _count(self, n_open: int = 0) -> None:
        n = sum(len(connections.open) for connections in self._listeners.values())
        self._seat.count_open(n + len(self._adopting))

    # Commands.

    async def _broadcast(self, command: Json) -> list[tuple[int, Json]]:
        """Have every worker do it."""
        sticky = command["command"] in STICKY or command["command"] in statistics_api.STICKY
        return await self._seat.broadcast(command, sticky=sticky, timeout_s=self._settings.command_timeout_s)

    async def _obey(self, command: Json) -> Json:
        if command["command"] in statistics_api.STICKY:
            return statistics_api.apply(command, self._log, self._trace)
        if command["command"] == "reload" and self._access_log is not None:
            self._access_log.reopen()
        return await self._repository.apply(command)

    def _set_log(self, level: int) -> None:
        if level and self._access_log is None:
            self._access_log = AccessLog(self._settings.access_log_path, sample=self._settings.access_log_sample)
            self._access_log.start()
        elif not level and self._access_log is not None:
            self._access_log.close()
            self._access_log = None

    def _set_trace(self, model: str | None, settings: TraceSettings) -> None:
        if self._tracer is not None:
            self._tracer.set_sample(1.0 / settings.rate if settings.on else 0.0, model)

    # What is told.

    def _on_change(self, entry: Entry) -> None:
        metrics = self._metrics.model(entry.name, entry.version)
        if entry.loaded is None:
            metrics.load_failed()
        else:
            entry.loaded.executor.metrics = metrics
            metrics.loaded(entry.loaded.load_s, entry.loaded.memory_bytes)

    def _on_unload(self, name: str, version: int, cause: str) -> None:
        self._metrics.model(name, version).unloaded(cause)

    def _on_refused(self, request: Request, error: Exception) -> None:
        """A request is answered with an error and never meets the front, which counts what does."""
        outcome, cause = outcome_of(error, admitted=False)
        self._metrics.ended("http", outcome, cause)
        request.served = cause

    def _on_served(self, request: Request, response: Response) -> None:
        if self._access_log is not None or self._tracer is not None:
            call = request.served
            if isinstance(call, str):  # the cause of a refusal
                request.served = None
                self._tell(response.status, None, partial(_refused, request, response, call))
                return
            self._tell(
                response.status,
                call,
                partial(timeline_of, request, response, time.perf_counter()),
            )

    def _on_answered(self, answered: Any) -> None:
        """A gRPC call was answered."""
        if self._access_log is not None or self._tracer is not None:
            self._tell(
                monitoring.http_status_of(answered.status),
                answered.call.served,
                partial(monitoring.timeline_of_grpc, answered, time.perf_counter()),
            )

    def _tell(self, status: int, call: Any, timeline: Callable[[], Timeline]) -> None:
        log, tracer = self._access_log, self._tracer
        logged = log is not None and log.wanted(status)
        traced = tracer is not None and call is not None and tracer.wanted(call.terms.traceparent, call.loaded.name)
        if logged or traced:
            told = timeline()
            if logged and log is not None:
                log.record(told)
            if traced and tracer is not None:
                tracer.record(told)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            for connections in self._listeners.values():
                connections.sweep(self._loop.time())
            self._measure()

    def _measure(self) -> None:
        """Bring up to date what is not counted as it happens."""
        metrics, http = self._metrics, self._http
        for tag, connections in self._listeners.items():
            metrics.connections(tag).set(len(connections.open))
        for counter, total in (
            (metrics.received_bytes("http"), http.n_received_bytes),
            (metrics.sent_bytes("http"), http.n_sent_bytes),
            (metrics.discarded_bytes("http"), http.n_discarded_bytes),
        ):
            counter.add(total - self._counted.get(counter.index, 0))
            self._counted[counter.index] = total
        metrics.lost(
            log_lines=self._access_log.n_dropped if self._access_log is not None else 0,
            traces=self._tracer.n_dropped if self._tracer is not None else 0,
        )
        metrics.refresh(time.time())
        self._repository.observe()

    def _report(self) -> None:
        """Say that this worker is ready, and with what; raises StoreError where nothing can be served."""
        repository = self._repository
        entries = [entry for name in repository.names() for entry in _entries(repository, name)]
        if not repository.ready:
            reasons = "".join(f"\n  {one.name} version {one.version}: {one.reason}" for one in entries)
            raise StoreError(
                f"no model could be loaded, for these reasons; correct them, or serve others with --model:{reasons}"
            )
        self._seat.ready({"models": [self._told(entry) for entry in entries]})

    def _told(self, entry: Entry) -> Json:
        told: Json = {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        if entry.loaded is not None:
            told |= {"load_s": entry.loaded.load_s, "example": self._models.describe(entry.loaded)}
        return told


def _entries(repository: Repository, name: str) -> tuple[Entry, ...]:
    try:
        return repository.entries(name)
    except ModelyardError:  # its policy asks for what the store has not
        return ()


def _refused(request: Request, response: Response, cause: str) -> Timeline:
    return msgspec.structs.replace(timeline_of(request, response, time.perf_counter()), cause=cause)


async def _first(*awaitables: Awaitable[object]) -> None:
    """Return when the first of them is done; coroutines among them are cancelled then, tasks are left alone."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for one, task in zip(awaitables, tasks, strict=True):
        if one is not task:
            task.cancel()


async def _all(awaitables: Iterable[Awaitable[object]]) -> None:
    await asyncio.gather(*awaitables)


def run_worker(seat: Seat, settings: ServerSettings, models: Models) -> int:
    """Run a worker in this process, which ends without waiting for runs or loads that nobody wants any more."""
    import uvloop

    async def main() -> int:
        return await Worker(seat, settings, models).run()

    code = uvloop.run(main())
    seat.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
