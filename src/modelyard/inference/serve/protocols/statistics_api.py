"""Triton's extensions that tell how models are run and what came of it, and change what is logged and traced.

    metrics (what all workers counted) → `model_statistics` → GET /v2/models[/NAME[/versions/V]]/stats
    Loaded → `model_config` → GET /v2/models/NAME[/versions/V]/config
    GET, POST /v2/logging and /v2[/models/NAME]/trace/setting ↔ `LogControl`, `TraceControl` of every worker

https://github.com/triton-inference-server/server/tree/main/docs/protocol: extension_statistics, _model_configuration, _logging,
_trace. A setting is listed when it is true here, and can be changed when changing it does something; others are refused.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import RequestError, UnknownPath
from modelyard.inference.serve.metrics import triton_metrics as triton
from modelyard.inference.serve.metrics import vocabulary as names
from modelyard.inference.serve.metrics.metrics import Family, HistogramValue, Snapshot
from modelyard.inference.serve.models.repository import Broadcast, Json, Loaded, Repository
from modelyard.inference.serve.protocols.repository_api import RETRY_AFTER, failure_of
from modelyard.inference.serve.protocols.tensors import wire_shape
from modelyard.inference.serve.transport.messages import Request, Response, json_body, json_response
from modelyard.inference.serve.transport.routes import Route

EXTENSIONS = ("statistics", "model_configuration", "logging")

LOG_COMMAND, TRACE_COMMAND = "log settings", "trace settings"
STICKY = frozenset({LOG_COMMAND, TRACE_COMMAND})
"""Commands that a worker has to do again which replaces one that died."""

_LEVELS = range(10)
_TRITON_TYPES = {"BYTES": "TYPE_STRING"}


# Statistics.


def model_statistics(snapshot: Snapshot, served: Iterable[tuple[str, str]]) -> list[Json]:
    """Return Triton's statistics of each (model, version) in `served`, as ModelStatistics of its gRPC message.

    Nothing is counted for this alone: failures have no durations (0), assembling inputs is part of computing, and what is
    neither queue nor computing is output. Batches are counted by ranges of sizes, see /metrics, so batch_stats is empty.
    """
    shown = triton.triton_snapshot(snapshot)
    failures: dict[tuple[str, str], float] = {}
    for (model, version, _), value in shown.get(triton.FAILURE, {}).items():
        failures[model, version] = failures.get((model, version), 0.0) + _number(value)
    return [_one_model(key, shown, snapshot, int(failures.get(key, 0.0))) for key in served]


def _one_model(key: tuple[str, str], shown: Snapshot, snapshot: Snapshot, n_failed: int) -> Json:
    def of(family: Family) -> int:
        return int(_number(shown.get(family, {}).get(key, 0.0)))

    n_answered = of(triton.SUCCESS)
    last_s = _number(snapshot.get(names.LAST_REQUEST, {}).get(key, 0.0))
    memory_bytes = int(_number(snapshot.get(names.MODEL_MEMORY, {}).get(key, 0.0)))
    return {
        "name": key[0],
        "version": key[1],
        "last_inference": int(last_s * 1e3),
        "inference_count": of(triton.COUNT),
        "execution_count": of(triton.EXEC_COUNT),
        "inference_stats": {
            "success": _duration(n_answered, of(triton.REQUEST_US)),
            "fail": _duration(n_failed, 0),
            "queue": _duration(n_answered, of(triton.QUEUE_US)),
            "compute_input": _duration(n_answered, of(triton.INPUT_US)),
            "compute_infer": _duration(n_answered, of(triton.INFER_US)),
            "compute_output": _duration(n_answered, of(triton.OUTPUT_US)),
            "cache_hit": _duration(of(triton.CACHE_HITS), 0),
            "cache_miss": _duration(of(triton.CACHE_MISSES), 0),
        },
        "batch_stats": [],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": memory_bytes}] if memory_bytes else [],
        "response_stats": {},
    }


def _duration(count: int, total_us: int) -> Json:
    return {"count": count, "ns": total_us * 1000}


def _number(value: float | HistogramValue) -> float:
    return value.sum if isinstance(value, HistogramValue) else value


# Configuration.


def model_config(loaded: Loaded, versions: Sequence[int]) -> Json:
    """Return how a version is run in the words of Triton's ModelConfig; `versions` are all that are served of the model.

    max_batch_size is 0 where a client must give the batch axis itself: where there is none, and where an input is one value
    per row, since a tensor has at least one axis beside the batch's in Triton's configuration.
    """
    signature, policy = loaded.signature, loaded.executor.scheduler.policy
    batched = all(spec.batched for spec in signature.outputs) and all(
        spec.batched and spec.row_shape for spec in signature.inputs
    )
    config: Json = {
        "name": loaded.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": sorted(versions)}},
        "max_batch_size": policy.max_batch_size if batched else 0,
        "input": [_config_tensor(spec, batched=batched) for spec in signature.inputs],
        "output": [_config_tensor(spec, batched=batched) for spec in signature.outputs],
        "instance_group": [{"name": loaded.name, "kind": "KIND_CPU", "count": policy.n_instances}],
        "default_model_filename": "model.onnx",
        "parameters": {
            "max_batch_size": {"string_value": str(policy.max_batch_size)},
            "target_s": {"string_value": f"{policy.target_s:g}"},
        },
        "model_transaction_policy": {"decoupled": False},
    }
    if policy.max_batch_size > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(policy.allowed_sizes),
            "priority_levels": len(policy.priority_weights),
            "default_priority_level": policy.default_priority,
        }
    return config


def _config_tensor(spec: TensorSpec, *, batched: bool) -> Json:
    dims = wire_shape(spec)
    tensor: Json = {"name": spec.name, "data_type": _TRITON_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")}
    return tensor | {"dims": dims[1:] if batched else dims}


# Settings.


class LogControl:
    """What this worker logs. Belongs to the event loop."""

    def __init__(self, on_change: Callable[[int], None], *, verbose_level: int = 0, path: str = "") -> None:
        """`on_change` is told the new verbose level: 0 writes no access log, 1 and more a line per request. `path`: to which file."""
        self._on_change = on_change
        self._level = verbose_level
        self._path = path

    def settings(self) -> Json:
        return {
            "log_file": self._path,
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": self._level,
            "log_format": "default",
        }

    def check(self, changes: Any) -> None:
        """Raise RequestError unless these changes can be made."""
        present = self.settings()
        for name, value in _changes(changes, present).items():
            if name == "log_verbose_level":
                if isinstance(value, bool) or value not in _LEVELS:
                    raise RequestError(
                        f"log_verbose_level must be 0 for no access log, or 1 to 9 for a line per request, got {value!r:.60}"
                    )
            elif value != present[name]:
                raise RequestError(
                    f"{name} is {present[name]!r} and cannot be changed while serving, got {value!r:.60}; "
                    "log_verbose_level can: 0 for no access log, 1 for a line per request"
                )

    def apply(self, changes: Json) -> Json:
        """Make the changes and return all settings; raises RequestError."""
        self.check(changes)
        level = int(changes.get("log_verbose_level", self._level))
        if level != self._level:
            self._level = level
            self._on_change(level)
        return self.settings()


class TraceSettings(msgspec.Struct, frozen=True):
    """Which requests are traced."""

    on: bool = True
    rate: int = 1000
    """One request in so many."""


class TraceControl:
    """What this worker traces, of all models and of single ones. Belongs to the event loop."""

    def __init__(self, start: TraceSettings | None, on_change: Callable[[str | None, TraceSettings], None]) -> None:
        """
        Args:
            start: the settings the server was started with; None where it has nowhere to send traces to.
            on_change: told the settings that a model has from now on; None is every model without its own.
        """
        self.extensions = () if start is None else ("trace",)
        self._start = start or TraceSettings(on=False)
        self._on_change = on_change
        self._changes: dict[str | None, Json] = {}
        """What has been changed since the start, for a model or, under None, for all."""

    def of(self, model: str | None = None) -> TraceSettings:
        """Return what holds for a model; None for those without settings of their own."""
        found = _traced(self._changes.get(None, {}), self._start)
        return found if model is None else _traced(self._changes.get(model, {}), found)

    def settings(self, model: str | None = None) -> Json:
        """Return the settings of a model, or those of all; raises UnknownPath where there is nowhere to send traces to."""
        if not self.extensions:
            raise UnknownPath(
                "this server has no trace settings, since it was started with nowhere to send traces to; start it with --trace-sample"
            )
        found = self.of(model)
        return {
            "trace_level": ["TIMESTAMPS"] if found.on else ["OFF"],
            "trace_rate": str(found.rate),
            "trace_count": "-1",
            "log_frequency": "0",
            "trace_file": "",
            "trace_mode": "opentelemetry",
        }

    def check(self, changes: Any, model: str | None = None) -> None:
        """Raise RequestError unless these changes can be made."""
        present = self.settings(model)
        for name, value in _changes(changes, present).items():
            if value is None:  # back to what the server was started with, or to what holds for all models
                continue
            if name == "trace_level":
                if value not in (["TIMESTAMPS"], ["OFF"], "TIMESTAMPS", "OFF"):
                    raise RequestError(f'trace_level must be ["TIMESTAMPS"] or ["OFF"], got {value!r:.60}')
            elif name == "trace_rate":
                text = str(value)
                if isinstance(value, bool) or not (text.isascii() and text.isdigit() and 0 < int(text) < 10**9):
                    raise RequestError(
                        f"trace_rate must be a whole number from 1, one request in so many, got {value!r:.60}"
                    )
            elif value != present[name]:
                raise RequestError(
                    f"{name} is {present[name]!r} and cannot be changed, got {value!r:.60}; trace_level and trace_rate can"
                )

    def apply(self, changes: Json, model: str | None = None) -> Json:
        """Make the changes and return all settings of the model; raises RequestError."""
        self.check(changes, model)
        kept = self._changes.get(model, {}) | changes
        self._changes[model] = {name: value for name, value in kept.items() if value is not None}
        touched = sorted(self._changes, key=lambda one: one or "") if model is None else [model]
        for one in touched:
            self._on_change(one, self.of(one))
        return self.settings(model)


def apply(command: Json, log: LogControl, trace: TraceControl) -> Json:
    """Do on this worker what a command of these extensions says; {"error": …, "status": …} where it cannot be done."""
    try:
        if command["command"] == LOG_COMMAND:
            return log.apply(command["changes"])
        return trace.apply(command["changes"], command["model"])
    except RequestError as exc:
        return {"error": str(exc), "status": exc.status}


def _changes(changes: Any, present: Json) -> Json:
    if not isinstance(changes, dict):
        raise RequestError(
            f"the body must be an object of settings, got {changes!r:.60}; there are {', '.join(present)}"
        )
    unknown = [name for name in changes if name not in present]
    if unknown:
        raise RequestError(f"unknown setting {unknown[0]!r:.60}; there are {', '.join(present)}")
    return changes


def _traced(changes: Mapping[str, Any], otherwise: TraceSettings) -> TraceSettings:
    on = "OFF" not in changes["trace_level"] if "trace_level" in changes else otherwise.on
    return TraceSettings(on, int(changes.get("trace_rate", otherwise.rate)))


# The edge.


def routes(
    repository: Repository,
    snapshot: Callable[[], Snapshot],
    log: LogControl,
    trace: TraceControl,
    broadcast: Broadcast,
) -> Iterable[Route]:
    """Return the extensions' routes. They come before open_inference.py's, for which "stats" could be the name of a model.

    Args:
        snapshot: what all workers have counted; called on another thread.
        broadcast: has every worker, this one included, call `apply` with a command.
    """

    async def stats(request: Request, model: str | None = None, version: str | None = None) -> Response:
        if model is None:
            served = [(one["name"], one["version"]) for one in repository.index(only_ready=True)]
        elif version is None:
            served = [(model, str(entry.version)) for entry in repository.entries(model) if entry.loaded is not None]
        else:
            served = [(model, str(repository.entry(model, version).version))]
        return json_response({"model_stats": model_statistics(await asyncio.to_thread(snapshot), served)})

    async def config(request: Request, model: str, version: str | None = None) -> Response:
        loaded = await repository.ready_one(model, version)
        versions = [one.version for one in repository.entries(model) if one.loaded is not None]
        return json_response(model_config(loaded, versions))

    def log_settings(request: Request) -> Response:
        return json_response(log.settings())

    async def set_log(request: Request) -> Response:
        changes = json_body(request.body)
        log.check(changes)
        return await _everywhere(broadcast, {"command": LOG_COMMAND, "changes": changes})

    def trace_settings(request: Request, model: str | None = None) -> Response:
        _check_known(repository, model)
        return json_response(trace.settings(model))

    async def set_trace(request: Request, model: str | None = None) -> Response:
        _check_known(repository, model)
        changes = json_body(request.body)
        trace.check(changes, model)
        return await _everywhere(broadcast, {"command": TRACE_COMMAND, "model": model, "changes": changes})

    return [
        Route("GET", "/v2/models/stats", stats),
        Route("GET", "/v2/models/{model}/stats", stats),
        Route("GET", "/v2/models/{model}/versions/{version}/stats", stats),
        Route("GET", "/v2/models/{model}/config", config),
        Route("GET", "/v2/models/{model}/versions/{version}/config", config),
        Route("GET", "/v2/logging", log_settings),
        Route("POST", "/v2/logging", set_log),
        Route("GET", "/v2/trace/setting", trace_settings),
        Route("POST", "/v2/trace/setting", set_trace),
        Route("GET", "/v2/models/{model}/trace/setting", trace_settings),
        Route("POST", "/v2/models/{model}/trace/setting", set_trace),
    ]


async def _everywhere(broadcast: Broadcast, command: Json) -> Response:
    """Have every worker obey; answer the settings, or what went wrong."""
    answers = await broadcast(command)
    failure = failure_of(answers)
    if failure is None:
        return json_response(answers[0][1])
    headers = RETRY_AFTER if failure.status == 503 else ()
    return json_response(
        {"error": f"{failure.message}; ask what holds now, then send the settings again"}, failure.status, headers
    )


def _check_known(repository: Repository, model: str | None) -> None:
    if model is not None:
        repository.entries(model)
