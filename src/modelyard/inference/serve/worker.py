"""A worker's life: load the models, answer the connections it is given, drain, end. One event loop, one process.

seat.py (connections, commands) → http.py → app.py → protocols → front.py → models
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modelyard.errors import StoreError
from modelyard.inference.serve import monitoring, open_inference, tensorflow
from modelyard.inference.serve.access_log import AccessLog
from modelyard.inference.serve.app import App
from modelyard.inference.serve.front import Front
from modelyard.inference.serve.http import Connections
from modelyard.inference.serve.messages import Request, Response
from modelyard.inference.serve.monitoring import timeline_of
from modelyard.inference.serve.observe import ServerMetrics
from modelyard.inference.serve.repository import Entry, Loaded, Pick, Repository
from modelyard.inference.serve.seat import Json, Seat
from modelyard.inference.serve.server import ServerSettings
from modelyard.inference.serve.tracing import Tracer

_SWEEP_EVERY_S = 1.0


class Worker:
    """Serves `picks` on the connections of one seat."""

    def __init__(
        self,
        seat: Seat,
        settings: ServerSettings,
        repository: Repository,
        load_one: Callable[[Pick], Loaded],
        describe: Callable[[Loaded], str],
    ) -> None:
        """
        Args:
            load_one: loads a version; called on a thread.
            describe: returns a command that asks a model something, for the report.
        """
        self._seat = seat
        self._settings = settings
        self._repository = repository
        self._load_one = load_one
        self._describe = describe
        self._counted: dict[int, int] = {}
        self._drain, self._end = asyncio.Event(), asyncio.Event()
        self._adopting: set[asyncio.Task[Any]] = set()
        self._access_log: AccessLog | None = None
        self._tracer: Tracer | None = None

    async def run(self) -> int:
        """Return the exit code."""
        self._loop = asyncio.get_running_loop()
        repository = self._repository
        seat = self._seat
        slabs = [seat.slab if number == seat.number else slab for number, slab in enumerate(seat.slabs)]
        self._metrics = ServerMetrics(slabs, seat.number, triton=self._settings.triton_metrics)
        if self._settings.access_log:
            self._access_log = AccessLog(self._settings.access_log_path, sample=self._settings.access_log_sample)
            self._access_log.start()
        if self._settings.trace_sample is not None:
            self._tracer = Tracer(sample=self._settings.trace_sample)
            self._tracer.start()
        front = Front(repository, self._metrics)
        app = App(
            [
                *open_inference.routes(front, repository),
                *tensorflow.routes(front, repository),
                *monitoring.routes(self._metrics),
            ]
        )
        self._http = Connections(
            app,
            self._settings.limits,
            on_served=self._on_served if self._access_log is not None or self._tracer is not None else None,
            on_open=self._count,
        )
        self._seat.attach(
            self._loop,
            on_connection=self._adopt,
            on_command=self._obey,
            on_drain=self._drain.set,
            on_end=self._end.set,
        )
        sweeper = self._loop.create_task(self._sweep())
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        entries: list[Entry] = []

        def on_change(entry: Entry) -> None:
            entries.append(entry)
            metrics = self._metrics.model(entry.name, entry.version)
            if entry.loaded is None:
                metrics.load_failed()
            else:
                entry.loaded.executor.metrics = metrics
                metrics.loaded(entry.loaded.load_s, 0.0)

        loading = self._loop.create_task(repository.load_all(self._load_one, loader, on_change))
        try:
            await _first(loading, self._drain.wait(), self._end.wait())
            if loading.done():
                await loading
                if not repository.ready:
                    reasons = "".join(f"\n  {one.name} version {one.version}: {one.reason}" for one in entries)
                    raise StoreError(
                        f"no model could be loaded, for these reasons; correct them, or serve others with --model:{reasons}"
                    )
                self._seat.ready({"models": [self._report(entry) for entry in entries]})
                await _first(self._drain.wait(), self._end.wait())
            repository.drain()
            self._http.drain()
            await _first(self._http.none_open.wait(), self._end.wait())
            n_cut_off = self._http.n_busy
            self._seat.drained(n_cut_off)
            return 1 if n_cut_off else 0
        finally:
            self._http.abort()
            sweeper.cancel()
            loading.cancel()
            loader.shutdown(wait=False, cancel_futures=True)
            if self._access_log is not None:
                self._access_log.close()
            if self._tracer is not None:
                self._tracer.close()

    def _adopt(self, tag: str, accepted: socket.socket) -> None:
        """Take over an accepted connection."""
        task = self._loop.create_task(self._connect(accepted))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)
        self._count(len(self._http.open))

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._http.new_connection, accepted)
        except OSError:  # it has gone again
            accepted.close()

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        self._count(len(self._http.open))

    def _count(self, n_open: int) -> None:
        self._seat.count_open(n_open + len(self._adopting))

    async def _obey(self, command: Json) -> Json:
        if command.get("command") == "reload" and self._access_log is not None:
            self._access_log.reopen()
        return {"error": f"unknown command {command.get('command')!r}"}

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            self._http.sweep(self._loop.time())
            self._measure()

    def _measure(self) -> None:
        """Bring up to date what is not counted as it happens."""
        metrics, http = self._metrics, self._http
        metrics.connections("http").set(len(http.open))
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

    def _on_served(self, request: Request, response: Response) -> None:
        log, tracer = self._access_log, self._tracer
        logged = log is not None and log.wanted(response.status)
        traced = tracer is not None and request.served is not None and tracer.wanted(request.served.terms.traceparent)
        if logged or traced:
            timeline = timeline_of(request, response, time.perf_counter())
            if logged and log is not None:
                log.record(timeline)
            if traced and tracer is not None:
                tracer.record(timeline)

    def _report(self, entry: Entry) -> Json:
        report: Json = {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        if entry.loaded is not None:
            report |= {"load_s": entry.loaded.load_s, "example": self._describe(entry.loaded)}
        return report


async def _first(*awaitables: Awaitable[object]) -> None:
    """Return when the first of them is done; coroutines among them are cancelled then, tasks are left alone."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for one, task in zip(awaitables, tasks, strict=True):
        if one is not task:
            task.cancel()


def run_worker(
    seat: Seat,
    settings: ServerSettings,
    repository: Repository,
    load_one: Callable[[Pick], Loaded],
    describe: Callable[[Loaded], str],
) -> int:
    """Run a worker in this process, which ends without waiting for runs or loads that nobody wants any more."""
    import uvloop

    async def main() -> int:
        return await Worker(seat, settings, repository, load_one, describe).run()

    code = uvloop.run(main())
    seat.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
