"""The names of everything the server counts, the same for every protocol.

docs/reference/metrics.md explains them for who reads them; a test holds the two together. Who records what is in observe.py.
"""

from typing import Literal

from modelyard.inference.serve.metrics.metrics import CounterFamily, Family, GaugeFamily, HistogramFamily

Outcome = Literal["ok", "refused", "dropped", "client_error", "error", "cancelled"]
"""What became of a request: answered; not admitted; admitted, then given up before it ran; the client's fault; ours; given up
by the client."""

SECONDS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)

_MODEL = ("model", "version")

# Requests. The labels model and version are empty where a request names no model that is served here.
REQUESTS = CounterFamily(
    "modelyard_requests_total",
    "Requests by what became of them and why.",
    (*_MODEL, "protocol", "outcome", "cause"),
)
REQUEST_SECONDS = HistogramFamily(
    "modelyard_request_seconds",
    "From the arrival of a request to its answer; answered requests only.",
    (*_MODEL, "protocol"),
    "seconds",
    SECONDS,
)
QUEUE_SECONDS = HistogramFamily(
    "modelyard_queue_seconds",
    "From the admission of a request to the start of its batch; answered requests only.",
    _MODEL,
    "seconds",
    SECONDS,
)
REQUEST_COMPUTE_SECONDS = CounterFamily(
    "modelyard_request_compute_seconds_total",
    "Computing time of its batch, counted once for every request that rode in it.",
    _MODEL,
    "seconds",
)

# Batches.
ROWS_TOTAL = CounterFamily("modelyard_rows_total", "Rows computed.", _MODEL, "rows")
BATCHES = CounterFamily(
    "modelyard_batches_total", "Batches computed, by why they started when they did.", (*_MODEL, "reason")
)
BATCH_ROWS = HistogramFamily("modelyard_batch_rows", "Rows per batch.", _MODEL, "rows", ROWS)
BATCH_COMPUTE_SECONDS = HistogramFamily(
    "modelyard_batch_compute_seconds", "Computing time per batch.", _MODEL, "seconds", SECONDS
)
COMPUTE_SECONDS = CounterFamily(
    "modelyard_compute_seconds_total",
    "Computing time, shared out to tenants by rows: what a model, a version, a tenant costs.",
    (*_MODEL, "tenant"),
    "seconds",
)

# What the scheduler believes and plans.
QUEUED_ROWS = GaugeFamily("modelyard_queued_rows", "Rows waiting.", _MODEL, "rows")
TARGET_BATCH = GaugeFamily(
    "modelyard_target_batch_rows", "b*: the rows a batch waits for, if it waits.", _MODEL, "rows", merge="max"
)
FEASIBLE_BATCH = GaugeFamily(
    "modelyard_feasible_batch_rows",
    "bmax: the rows of the largest batch that meets the target.",
    _MODEL,
    "rows",
    merge="max",
)
BATCH_LIMIT = GaugeFamily(
    "modelyard_batch_limit_rows", "B: the rows a batch may have, as the guard sees it.", _MODEL, "rows", merge="min"
)
LEARNED_SECONDS = GaugeFamily(
    "modelyard_learned_latency_seconds",
    'l(b): the learned latency of a batch, of one row (at="one") and of the target batch (at="target").',
    (*_MODEL, "at"),
    "seconds",
    merge="max",
)
ARRIVAL_RATE = GaugeFamily("modelyard_arrival_rate_rows_per_second", "Rows arriving, smoothed.", _MODEL)
INFLATION = GaugeFamily(
    "modelyard_latency_inflation",
    "By how much the guard multiplies the learned latency after misses.",
    _MODEL,
    merge="max",
)

# Models.
MODEL_READY = GaugeFamily("modelyard_model_ready", "1 where every worker can answer with it.", _MODEL, merge="min")
MODEL_LOADS = CounterFamily(
    "modelyard_model_loads_total", "Loads of a version by outcome, ok or failed.", (*_MODEL, "outcome")
)
MODEL_UNLOADS = CounterFamily(
    "modelyard_model_unloads_total",
    "Unloads of a version by cause: requested, replaced or evicted.",
    (*_MODEL, "cause"),
)
MODEL_LOAD_SECONDS = GaugeFamily(
    "modelyard_model_load_seconds", "What the last load took, golden cases included.", _MODEL, "seconds", merge="max"
)
MODEL_MEMORY = GaugeFamily(
    "modelyard_model_memory_bytes", "Resident memory that a version takes, all workers.", _MODEL, "bytes"
)
LAST_REQUEST = GaugeFamily(
    "modelyard_last_request_timestamp_seconds",
    "When it last answered, seconds since 1970, to within a refresh.",
    _MODEL,
    "seconds",
    merge="max",
)
CACHE_HITS = CounterFamily("modelyard_cache_hits_total", "Requests answered from the response cache.", _MODEL)
CACHE_MISSES = CounterFamily(
    "modelyard_cache_misses_total", "Requests looked for in the response cache in vain.", _MODEL
)
SPLIT_REQUESTS = CounterFamily(
    "modelyard_split_requests_total", "Requests that a weighted split gave to this version.", _MODEL
)
SHADOW_REQUESTS = CounterFamily(
    "modelyard_shadow_requests_total",
    "Requests repeated on a shadow version: agreed, differed, failed or skipped.",
    (*_MODEL, "shadow_version", "outcome"),
)

# The server.
CONNECTIONS = GaugeFamily("modelyard_connections_open", "Open connections by listener.", ("listener",))
RECEIVED_BYTES = CounterFamily("modelyard_received_bytes_total", "Bodies received.", ("listener",), "bytes")
SENT_BYTES = CounterFamily("modelyard_sent_bytes_total", "Bodies sent.", ("listener",), "bytes")
DISCARDED_BYTES = CounterFamily(
    "modelyard_discarded_bytes_total", "Bodies of refused requests, thrown away unread.", ("listener",), "bytes"
)
LOG_LINES_DROPPED = CounterFamily(
    "modelyard_access_log_dropped_total", "Lines of the access log lost to a full disk or a reader that is too slow."
)
TRACES_DROPPED = CounterFamily("modelyard_traces_dropped_total", "Traces lost because they could not be sent in time.")
BUILD = GaugeFamily(
    "modelyard_build_info", "What runs here; always 1.", ("version", "onnxruntime", "python"), merge="max"
)
WORKER_STARTS = CounterFamily(
    "modelyard_worker_starts_total", "Starts of a worker, the first one included.", ("worker",)
)
RESIDENT_BYTES = GaugeFamily(
    "modelyard_process_resident_bytes",
    "Resident memory of a worker, shared pages included.",
    (),
    "bytes",
    merge="worker",
)
CPU_SECONDS = CounterFamily(
    "modelyard_process_cpu_seconds_total", "Processor time of a worker.", ("worker",), "seconds"
)

FAMILIES: tuple[Family, ...] = tuple(found for found in tuple(globals().values()) if isinstance(found, Family))
"""All of the above, in the order in which they are shown; metrics.SERIES_DROPPED, which counts for itself, comes last."""
