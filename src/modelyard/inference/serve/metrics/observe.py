"""What the server records: counts and times per model, and the steps of one request for who wants them.

    request → `ModelMetrics` (counts, times)            → the worker's slab → any worker → GET /metrics
            → `Timeline` (the steps of one request)     → access_log.py, tracing.py

The names are in vocabulary.py. Times are seconds, sizes bytes. Everything here belongs to a worker's event loop.
"""

import os
import sys
import threading
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from modelyard import __version__
from modelyard.inference.serve.metrics import vocabulary as names
from modelyard.inference.serve.metrics.exposition import expose, negotiate
from modelyard.inference.serve.metrics.metrics import (
    BoundedLabel,
    Counter,
    CounterFamily,
    Gauge,
    GaugeFamily,
    Reader,
    Registry,
    Snapshot,
)
from modelyard.inference.serve.metrics.triton_metrics import triton_snapshot
from modelyard.inference.serve.metrics.vocabulary import ROWS, SECONDS, Outcome

MAX_TENANTS = 100
"""Distinct tenants that become label values; further ones are counted together as "other"."""


class Timeline(msgspec.Struct, frozen=True):
    """The steps of one request, on the clock of time.perf_counter(); a step that was never reached is 0.

    `arrived_s` ≤ `admitted_s` ≤ `started_s` ≤ `computed_s` ≤ `finished_s`: its first byte was here, it was queued, its batch
    started, its batch was computed, its answer was written.
    """

    request_id: bytes
    protocol: str
    path: str
    status: int
    """HTTP's, or gRPC's translated into it."""
    arrived_s: float
    finished_s: float
    request_bytes: int = 0
    response_bytes: int = 0
    cause: str = ""
    """Why it was not answered, as in modelyard_requests_total."""
    model: str = ""
    version: str = ""
    tenant: str = ""
    n_rows: int = 0
    batch_rows: int = 0
    admitted_s: float = 0.0
    started_s: float = 0.0
    computed_s: float = 0.0
    traceparent: bytes = b""
    method: str = "POST"


class ModelMetrics:
    """What is recorded of one version of a model. Resolved once, held while the version is served."""

    def __init__(self, registry: Registry, tenants: BoundedLabel, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self._registry = registry
        self._cells = registry.cells
        self._tenants = tenants
        self._answered: dict[str, tuple[int, int]] = {}
        self._ended: dict[tuple[str, str, str], Counter] = {}
        self._batches: dict[str, int] = {}
        self._compute_by_tenant: dict[str, Counter] = {}
        self._queue_seconds = registry.histogram(names.QUEUE_SECONDS, model, version).index
        self._request_compute_seconds = registry.counter(names.REQUEST_COMPUTE_SECONDS, model, version).index
        self._rows = registry.counter(names.ROWS_TOTAL, model, version).index
        self._batch_rows = registry.histogram(names.BATCH_ROWS, model, version).index
        self._batch_compute_seconds = registry.histogram(names.BATCH_COMPUTE_SECONDS, model, version).index
        self._gauges: dict[tuple[str, ...], Gauge] = {}
        self._rows_seen = self._cells[self._rows]

    def answered(self, protocol: str, request_s: float, queue_s: float) -> None:
        """Count an answer that took `request_s` from arrival to reply, `queue_s` of them in the queue."""
        # Once per request: Counter.add and Histogram.observe written out, since calling them would cost half as much again.
        places = self._answered.get(protocol) or self._answered_by(protocol)
        cells = self._cells
        cells[places[0]] += 1.0
        first = places[1]
        cells[first] += request_s
        cells[first + 1 + bisect_left(SECONDS, request_s)] += 1.0
        first = self._queue_seconds
        cells[first] += queue_s
        cells[first + 1 + bisect_left(SECONDS, queue_s)] += 1.0

    def answered_many(self, protocol: str, requests_s: Sequence[float], queues_s: Sequence[float]) -> None:
        """The same for the answers of a whole batch, at about half the price of one by one."""
        requests, first = self._answered.get(protocol) or self._answered_by(protocol)
        cells = self._cells
        cells[requests] += len(requests_s)
        cells[first] += sum(requests_s)
        for request_s in requests_s:
            cells[first + 1 + bisect_left(SECONDS, request_s)] += 1.0
        first = self._queue_seconds
        cells[first] += sum(queues_s)
        for queue_s in queues_s:
            cells[first + 1 + bisect_left(SECONDS, queue_s)] += 1.0

    def refused(self, protocol: str, cause: str) -> None:
        """Count a request that was not admitted."""
        self.ended(protocol, "refused", cause)

    def dropped(self, protocol: str, cause: str) -> None:
        """Count a request that was admitted and given up before it ran."""
        self.ended(protocol, "dropped", cause)

    def client_error(self, protocol: str, cause: str) -> None:
        """Count a request that the client has to correct."""
        self.ended(protocol, "client_error", cause)

    def failed(self, protocol: str, cause: str) -> None:
        """Count a request that failed in our hands."""
        self.ended(protocol, "error", cause)

    def cancelled(self, protocol: str) -> None:
        """Count a request whose client went away before its answer."""
        self.ended(protocol, "cancelled", "")

    def ended(self, protocol: str, outcome: Outcome, cause: str, n: int = 1) -> None:
        """Count `n` requests that were not answered. `cause` is a word of the code's, never of a client's."""
        counter = self._ended.get((protocol, outcome, cause))
        if counter is None:
            counter = self._registry.counter(names.REQUESTS, self.model, self.version, protocol, outcome, cause)
            self._ended[protocol, outcome, cause] = counter
        counter.add(n)

    def batch(self, n_rows: int, n_calls: int, compute_s: float, reason: str) -> None:
        """Count a batch; `reason` says why it started when it did, in the scheduler's words."""
        # At light load a batch is a request: written out, as above.
        place = self._batches.get(reason) or self._batches_for(reason)
        cells = self._cells
        cells[place] += 1.0
        cells[self._rows] += n_rows
        cells[self._request_compute_seconds] += compute_s * n_calls
        first = self._batch_rows
        cells[first] += n_rows
        cells[first + 1 + bisect_left(ROWS, n_rows)] += 1.0
        first = self._batch_compute_seconds
        cells[first] += compute_s
        cells[first + 1 + bisect_left(SECONDS, compute_s)] += 1.0

    def compute(self, tenant: str, seconds: float) -> None:
        """Charge computing time to a tenant, "" where none is named: once for a whole batch, or for each share of it."""
        counter = self._compute_by_tenant.get(tenant)
        if counter is None:
            label = self._tenants.value(tenant) if tenant else ""
            counter = self._registry.counter(names.COMPUTE_SECONDS, self.model, self.version, label)
            if label == tenant:
                self._compute_by_tenant[tenant] = counter
        counter.add(seconds)

    def scheduling(
        self,
        *,
        queued_rows: int,
        target_batch: int,
        feasible_batch: int,
        batch_limit: int,
        learned_one_s: float,
        learned_target_s: float,
        arrival_rate_per_s: float,
        inflation: float,
    ) -> None:
        """Show what the scheduler believes now; called on a timer, not per request."""
        self._set(names.QUEUED_ROWS, queued_rows)
        self._set(names.TARGET_BATCH, target_batch)
        self._set(names.FEASIBLE_BATCH, feasible_batch)
        self._set(names.BATCH_LIMIT, batch_limit)
        self._set(names.LEARNED_SECONDS, learned_one_s, "one")
        self._set(names.LEARNED_SECONDS, learned_target_s, "target")
        self._set(names.ARRIVAL_RATE, arrival_rate_per_s)
        self._set(names.INFLATION, inflation)

    def loaded(self, load_s: float, memory_bytes: float) -> None:
        """Count a load that succeeded; `memory_bytes` is what it added to this worker's resident memory."""
        self._registry.counter(names.MODEL_LOADS, self.model, self.version, "ok").add()
        self._set(names.MODEL_LOAD_SECONDS, load_s)
        self._set(names.MODEL_MEMORY, memory_bytes)
        self._set(names.MODEL_READY, 1.0)

    def load_failed(self) -> None:
        self._registry.counter(names.MODEL_LOADS, self.model, self.version, "failed").add()
        self._set(names.MODEL_READY, 0.0)

    def unloaded(self, cause: str) -> None:
        """Count an unload and let the gauges disappear; what was counted stays."""
        self._registry.counter(names.MODEL_UNLOADS, self.model, self.version, cause).add()
        for gauge in self._gauges.values():
            gauge.clear()

    def cache_hit(self) -> None:
        self._registry.counter(names.CACHE_HITS, self.model, self.version).add()

    def cache_miss(self) -> None:
        self._registry.counter(names.CACHE_MISSES, self.model, self.version).add()

    def split(self) -> None:
        """Count a request that a weighted split gave to this version."""
        self._registry.counter(names.SPLIT_REQUESTS, self.model, self.version).add()

    def shadowed(self, shadow_version: str, outcome: Literal["agreed", "differed", "failed", "skipped"]) -> None:
        """Count a request of this version that was, or should have been, repeated on its shadow."""
        self._registry.counter(names.SHADOW_REQUESTS, self.model, self.version, shadow_version, outcome).add()

    def refresh(self, now_s: float) -> None:
        """Note that it computed something since the last refresh; `now_s` is seconds since 1970."""
        n_rows = self._cells[self._rows]
        if n_rows != self._rows_seen:
            self._rows_seen = n_rows
            self._set(names.LAST_REQUEST, now_s)

    def _set(self, family: GaugeFamily, value: float, *more: str) -> None:
        gauge = self._gauges.get((family.name, *more))
        if gauge is None:
            gauge = self._registry.gauge(family, self.model, self.version, *more)
            self._gauges[family.name, *more] = gauge
        gauge.set(value)

    def _answered_by(self, protocol: str) -> tuple[int, int]:
        requests = self._registry.counter(names.REQUESTS, self.model, self.version, protocol, "ok", "")
        request_seconds = self._registry.histogram(names.REQUEST_SECONDS, self.model, self.version, protocol)
        places = self._answered[protocol] = (requests.index, request_seconds.index)
        return places

    def _batches_for(self, reason: str) -> int:
        place = self._batches[reason] = self._registry.counter(names.BATCHES, self.model, self.version, reason).index
        return place


class ServerMetrics:
    """What one worker records, and the text of what all of them have recorded.

    Made in the worker, after the fork. `slabs` are those of all workers (`metrics.new_slabs`, or the supervisor's), of which
    number `worker` is this one's to write.
    """

    def __init__(self, slabs: Sequence[memoryview], worker: int = 0, *, triton: bool = False) -> None:
        """`triton` adds the same numbers under the names of Triton's metrics."""
        import onnxruntime  # a server has it loaded; whoever only reads the vocabulary need not

        self.registry = Registry(names.FAMILIES, slabs, worker)
        self._reader = Reader(names.FAMILIES, slabs)
        self._reading = threading.Lock()
        self._worker = str(worker)
        self._triton = triton
        self._tenants = BoundedLabel("tenant", MAX_TENANTS, self.registry, slabs)
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._ended: dict[tuple[str, str, str], Counter] = {}
        self._cpu_s = 0.0
        self._lost: dict[str, int] = {}
        self.registry.counter(names.WORKER_STARTS, self._worker).add()
        python = ".".join(map(str, sys.version_info[:3]))
        self.registry.gauge(names.BUILD, __version__, onnxruntime.__version__, python).set(1.0)

    def model(self, name: str, version: str | int) -> ModelMetrics:
        """Return the handle of a version that is served; the same one each time."""
        key = (name, str(version))
        found = self._models.get(key)
        if found is None:
            found = self._models[key] = ModelMetrics(self.registry, self._tenants, *key)
        return found

    def ended(self, protocol: str, outcome: Outcome, cause: str, n: int = 1) -> None:
        """Count `n` requests that met no model: an unknown name or path, a broken body, a body too large.

        What clients call a model that is not served never becomes a label: strangers could fill the memory with it.
        """
        counter = self._ended.get((protocol, outcome, cause))
        if counter is None:
            counter = self.registry.counter(names.REQUESTS, "", "", protocol, outcome, cause)
            self._ended[protocol, outcome, cause] = counter
        counter.add(n)

    def connections(self, listener: str) -> Gauge:
        """Return the gauge of open connections; to be held, as the counters below."""
        return self.registry.gauge(names.CONNECTIONS, listener)

    def received_bytes(self, listener: str) -> Counter:
        return self.registry.counter(names.RECEIVED_BYTES, listener)

    def sent_bytes(self, listener: str) -> Counter:
        return self.registry.counter(names.SENT_BYTES, listener)

    def discarded_bytes(self, listener: str) -> Counter:
        """Return the counter of bytes that were not read as a request because it had been refused before."""
        return self.registry.counter(names.DISCARDED_BYTES, listener)

    def lost(self, *, log_lines: int = 0, traces: int = 0) -> None:
        """Say how many lines of the access log and how many traces have been dropped so far."""
        self._count_up_to(names.LOG_LINES_DROPPED, log_lines)
        self._count_up_to(names.TRACES_DROPPED, traces)

    def refresh(self, now_s: float) -> None:
        """Look at the process and the models; called about once a second with the seconds since 1970."""
        spent = os.times()
        cpu_s = spent.user + spent.system
        self.registry.counter(names.CPU_SECONDS, self._worker).add(cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        statm = _read_words(Path("/proc/self/statm"))
        if len(statm) > 1:  # Linux
            self.registry.gauge(names.RESIDENT_BYTES).set(int(statm[1]) * os.sysconf("SC_PAGE_SIZE"))
        for model in self._models.values():
            model.refresh(now_s)

    def snapshot(self) -> Snapshot:
        """Return what all workers have recorded; on any thread."""
        with self._reading:
            return self._reader.snapshot()

    def exposition(self, accept: bytes = b"") -> tuple[bytes, bytes]:
        """Return content type and body of the answer to a scraper that sent this Accept header; on any thread."""
        snapshot = self.snapshot()
        if self._triton:
            snapshot = {**snapshot, **triton_snapshot(snapshot)}
        content_type = negotiate(accept)
        return content_type, expose(snapshot, content_type)

    def _count_up_to(self, family: CounterFamily, n: int) -> None:
        self.registry.counter(family).add(n - self._lost.get(family.name, 0))
        self._lost[family.name] = n


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
