"""The same numbers under the names of Triton's metrics, for dashboards and alerts that exist already.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html. Nothing is recorded for it:
the names are derived from a snapshot of ours when one is read.
"""

from collections.abc import Callable, Mapping

from modelyard.inference.serve.metrics import vocabulary as names
from modelyard.inference.serve.metrics.metrics import (
    CounterFamily,
    Family,
    GaugeFamily,
    HistogramValue,
    Labels,
    Snapshot,
    Value,
)

_MODEL = ("model", "version")

SUCCESS = CounterFamily("nv_inference_request_success", "Requests answered.", _MODEL)
FAILURE = CounterFamily("nv_inference_request_failure", "Requests not answered.", (*_MODEL, "reason"))
COUNT = CounterFamily("nv_inference_count", "Rows computed.", _MODEL)
EXEC_COUNT = CounterFamily("nv_inference_exec_count", "Batches computed.", _MODEL)
PENDING = GaugeFamily("nv_inference_pending_request_count", "Rows waiting.", _MODEL)
REQUEST_US = CounterFamily("nv_inference_request_duration_us", "From arrival to answer, summed over requests.", _MODEL)
QUEUE_US = CounterFamily("nv_inference_queue_duration_us", "Waiting, summed over requests.", _MODEL)
INPUT_US = CounterFamily(
    "nv_inference_compute_input_duration_us", "Always 0: inputs are batched within the computing time.", _MODEL
)
INFER_US = CounterFamily("nv_inference_compute_infer_duration_us", "Computing, summed over requests.", _MODEL)
OUTPUT_US = CounterFamily(
    "nv_inference_compute_output_duration_us", "Reading requests and writing answers, summed over requests.", _MODEL
)
CACHE_HITS = CounterFamily("nv_cache_num_hits_per_model", "Requests answered from the response cache.", _MODEL)
CACHE_MISSES = CounterFamily("nv_cache_num_misses_per_model", "Requests looked for in the cache in vain.", _MODEL)
LOAD_SECONDS = GaugeFamily("nv_model_load_duration_secs", "What the last load took.", _MODEL)

FAMILIES: tuple[Family, ...] = tuple(
    found for found in tuple(globals().values()) if isinstance(found, Family) and found.name.startswith("nv_")
)

_REASONS = {"refused": "REJECTED", "dropped": "REJECTED", "cancelled": "CANCELED", "error": "BACKEND"}
"""Triton's reasons for our outcomes; any other outcome is OTHER."""


def triton_snapshot(snapshot: Snapshot) -> Snapshot:
    """Return Triton's families for what `snapshot` says of models."""
    seconds = _by(snapshot.get(names.REQUEST_SECONDS, {}), _version)
    queued = _by(snapshot.get(names.QUEUE_SECONDS, {}), _version)
    infer = _by(snapshot.get(names.REQUEST_COMPUTE_SECONDS, {}), _version)
    rest = {
        labels: max(0.0, total - queued.get(labels, 0.0) - infer.get(labels, 0.0)) for labels, total in seconds.items()
    }
    found: dict[Family, Mapping[Labels, Value]] = {
        SUCCESS: _by(snapshot.get(names.REQUESTS, {}), _success),
        FAILURE: _by(snapshot.get(names.REQUESTS, {}), _failure),
        COUNT: _by(snapshot.get(names.ROWS_TOTAL, {}), _version),
        EXEC_COUNT: _by(snapshot.get(names.BATCHES, {}), _version),
        PENDING: _by(snapshot.get(names.QUEUED_ROWS, {}), _version),
        REQUEST_US: _us(seconds),
        QUEUE_US: _us(queued),
        INPUT_US: dict.fromkeys(seconds, 0.0),
        INFER_US: _us(infer),
        OUTPUT_US: _us(rest),
        CACHE_HITS: _by(snapshot.get(names.CACHE_HITS, {}), _version),
        CACHE_MISSES: _by(snapshot.get(names.CACHE_MISSES, {}), _version),
        LOAD_SECONDS: _by(snapshot.get(names.MODEL_LOAD_SECONDS, {}), _version),
    }
    return {family: series for family, series in found.items() if series}


def _by(series: Mapping[Labels, Value], key: Callable[[Labels], Labels | None]) -> dict[Labels, float]:
    """Return the values, of a histogram its sum, added up by `key`; None leaves a series out."""
    found: dict[Labels, float] = {}
    for labels, value in series.items():
        place = key(labels)
        if place is not None and place[0]:  # a request for no model of ours has no place in Triton's metrics
            found[place] = found.get(place, 0.0) + (value.sum if isinstance(value, HistogramValue) else value)
    return found


def _version(labels: Labels) -> Labels:
    return labels[:2]


def _success(labels: Labels) -> Labels | None:
    model, version, _, outcome, _ = labels
    return (model, version) if outcome == "ok" else None


def _failure(labels: Labels) -> Labels | None:
    model, version, _, outcome, _ = labels
    return None if outcome == "ok" else (model, version, _REASONS.get(outcome, "OTHER"))


def _us(seconds: Mapping[Labels, float]) -> dict[Labels, float]:
    """Return whole microseconds."""
    return {labels: float(int(value * 1e6)) for labels, value in seconds.items()}
