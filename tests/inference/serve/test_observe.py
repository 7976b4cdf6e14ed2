"""One vocabulary: what is recorded comes out under the documented names, for every worker, and for who knows Triton's."""

import json
import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from modelyard.inference.serve.metrics import triton_metrics, vocabulary
from modelyard.inference.serve.metrics.exposition import OPENMETRICS, TEXT
from modelyard.inference.serve.metrics.metrics import (
    SERIES_DROPPED,
    CounterFamily,
    HistogramFamily,
    HistogramValue,
    Snapshot,
    label_names,
    new_slabs,
)
from modelyard.inference.serve.metrics.observe import MAX_TENANTS, ModelMetrics, ServerMetrics

Parser = Callable[[str], Iterable[Any]]
parse_text: Parser = text_string_to_metric_families
parse_openmetrics: Parser = openmetrics_parser.text_string_to_metric_families
REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"
FAMILIES = (*vocabulary.FAMILIES, SERIES_DROPPED)
LATE = ("late", "3")


def busy(metrics: ServerMetrics) -> ModelMetrics:
    """Record one of everything."""
    late = metrics.model("late", 3)
    late.loaded(0.25, 5_000_000)
    late.answered("rest-v2", 0.030, 0.010)
    late.answered_many("grpc", [0.020, 0.040], [0.001, 0.002])
    late.batch(n_rows=6, n_calls=3, compute_s=0.015, reason="instance free")
    late.compute("acme", 0.010)
    late.compute("", 0.005)
    late.refused("rest-v2", "overload")
    late.dropped("rest-v2", "expired")
    late.client_error("rest-v2", "bad_request")
    late.failed("grpc", "bug")
    late.cancelled("grpc")
    late.scheduling(
        queued_rows=4,
        target_batch=8,
        feasible_batch=16,
        batch_limit=32,
        learned_one_s=0.003,
        learned_target_s=0.012,
        arrival_rate_per_s=120.5,
        inflation=1.1,
    )
    late.cache_hit()
    late.cache_miss()
    late.split()
    late.shadowed("4", "agreed")
    metrics.model("late", 2).load_failed()
    metrics.model("late", 1).unloaded("replaced")
    metrics.ended("rest-v2", "client_error", "unknown_model")
    metrics.connections("http").set(12)
    metrics.received_bytes("http").add(100)
    metrics.sent_bytes("http").add(200)
    metrics.discarded_bytes("http").add(300)
    metrics.lost(log_lines=2, traces=3)
    metrics.refresh(1_700_000_000.0)
    return late


def by_name(body: bytes) -> dict[str, Any]:
    return {family.name: family for family in parse_text(body.decode())}


def test_everything_in_the_vocabulary_can_be_recorded_and_read() -> None:
    metrics = ServerMetrics(new_slabs())
    busy(metrics)
    assert set(metrics.snapshot()) == set(FAMILIES)


def test_requests_are_counted_by_outcome_and_cause_in_every_protocol() -> None:
    metrics = ServerMetrics(new_slabs())
    busy(metrics)
    assert metrics.snapshot()[vocabulary.REQUESTS] == {
        (*LATE, "rest-v2", "ok", ""): 1,
        (*LATE, "grpc", "ok", ""): 2,
        (*LATE, "rest-v2", "refused", "overload"): 1,
        (*LATE, "rest-v2", "dropped", "expired"): 1,
        (*LATE, "rest-v2", "client_error", "bad_request"): 1,
        (*LATE, "grpc", "error", "bug"): 1,
        (*LATE, "grpc", "cancelled", ""): 1,
        ("", "", "rest-v2", "client_error", "unknown_model"): 1,
    }


def histogram(snapshot: Snapshot, family: HistogramFamily, *labels: str) -> HistogramValue:
    value = snapshot[family][labels]
    assert isinstance(value, HistogramValue)
    return value


def test_times_and_sizes_are_distributions() -> None:
    metrics = ServerMetrics(new_slabs())
    busy(metrics)
    snapshot = metrics.snapshot()
    requests = histogram(snapshot, vocabulary.REQUEST_SECONDS, *LATE, "grpc")
    assert requests.count == 2
    assert requests.sum == pytest.approx(0.060)
    queued = histogram(snapshot, vocabulary.QUEUE_SECONDS, *LATE)
    assert queued.count == 3
    assert queued.sum == pytest.approx(0.013)
    batches = histogram(snapshot, vocabulary.BATCH_ROWS, *LATE)
    assert (batches.count, batches.sum) == (1, 6)
    assert batches.counts[vocabulary.ROWS.index(8)] == 1
    assert snapshot[vocabulary.ROWS_TOTAL][LATE] == 6
    assert snapshot[vocabulary.COMPUTE_SECONDS] == {(*LATE, "acme"): 0.010, (*LATE, ""): 0.005}


def test_one_by_one_and_many_at_a_time_count_the_same() -> None:
    seconds = [10**exponent for exponent in range(-7, 3)]
    metrics = ServerMetrics(new_slabs())
    for value in seconds:
        metrics.model("one", 1).answered("grpc", value, value / 2)
    metrics.model("many", 1).answered_many("grpc", seconds, [value / 2 for value in seconds])
    snapshot = metrics.snapshot()
    for family, more in ((vocabulary.REQUEST_SECONDS, ("grpc",)), (vocabulary.QUEUE_SECONDS, ())):
        one, many = histogram(snapshot, family, "one", "1", *more), histogram(snapshot, family, "many", "1", *more)
        assert one.counts == many.counts
        assert one.sum == pytest.approx(many.sum)


def test_any_worker_shows_what_all_have_recorded() -> None:
    slabs = new_slabs(2)
    first, second = ServerMetrics(slabs, 0), ServerMetrics(slabs, 1)
    busy(first)
    busy(second)
    assert first.snapshot() == second.snapshot()
    snapshot = second.snapshot()
    assert snapshot[vocabulary.ROWS_TOTAL][LATE] == 12
    assert snapshot[vocabulary.QUEUED_ROWS] == {LATE: 8}
    assert snapshot[vocabulary.TARGET_BATCH] == {LATE: 8}
    assert snapshot[vocabulary.MODEL_MEMORY] == {LATE: 10_000_000}
    assert set(snapshot[vocabulary.RESIDENT_BYTES]) == {("0",), ("1",)}
    assert snapshot[vocabulary.WORKER_STARTS] == {("0",): 1, ("1",): 1}
    ServerMetrics(slabs, 1)
    assert first.snapshot()[vocabulary.WORKER_STARTS] == {("0",): 1, ("1",): 2}


def test_a_version_that_failed_in_one_worker_is_not_ready() -> None:
    slabs = new_slabs(2)
    first, second = ServerMetrics(slabs, 0), ServerMetrics(slabs, 1)
    first.model("late", 3).loaded(0.1, 1e6)
    second.model("late", 3).load_failed()
    assert first.snapshot()[vocabulary.MODEL_READY] == {LATE: 0}


def test_what_is_unloaded_loses_its_gauges_and_keeps_its_counts() -> None:
    metrics = ServerMetrics(new_slabs())
    busy(metrics).unloaded("requested")
    snapshot = metrics.snapshot()
    for family in (vocabulary.TARGET_BATCH, vocabulary.LEARNED_SECONDS, vocabulary.MODEL_MEMORY):
        assert family not in snapshot
    assert snapshot[vocabulary.ROWS_TOTAL][LATE] == 6
    metrics.model("late", 3).loaded(0.1, 7)
    assert metrics.snapshot()[vocabulary.MODEL_MEMORY] == {LATE: 7}


def test_at_most_a_hundred_tenants_have_names_and_none_is_lost() -> None:
    slabs = new_slabs(2)
    workers = [ServerMetrics(slabs, 0), ServerMetrics(slabs, 1)]
    for number in range(300):
        workers[number % 2].model("late", number % 3).compute(f"tenant-{number % 150}", 1.0)
    workers[0].model("late", 0).compute("", 1.0)
    series = workers[0].snapshot()[vocabulary.COMPUTE_SECONDS]
    tenants = {tenant for _, _, tenant in series}
    assert len(tenants - {"", "other"}) == MAX_TENANTS
    assert sum(value for value in series.values() if isinstance(value, float)) == 301


def test_a_version_was_last_asked_when_it_last_computed() -> None:
    metrics = ServerMetrics(new_slabs())
    late = metrics.model("late", 3)
    metrics.refresh(1000.0)
    assert vocabulary.LAST_REQUEST not in metrics.snapshot()
    late.batch(1, 1, 0.001, "instance free")
    metrics.refresh(1001.0)
    metrics.refresh(1002.0)
    assert metrics.snapshot()[vocabulary.LAST_REQUEST] == {LATE: 1001.0}


def test_what_the_observers_have_lost_is_told_as_a_total_and_counted_once() -> None:
    slabs = new_slabs()
    metrics = ServerMetrics(slabs)
    metrics.lost(log_lines=5, traces=1)
    metrics.lost(log_lines=7, traces=1)
    successor = ServerMetrics(slabs)
    successor.lost(log_lines=1, traces=0)
    snapshot = successor.snapshot()
    assert (snapshot[vocabulary.LOG_LINES_DROPPED], snapshot[vocabulary.TRACES_DROPPED]) == ({(): 8}, {(): 1})


def test_processor_time_goes_on_over_a_replacement() -> None:
    slabs = new_slabs()
    ServerMetrics(slabs).refresh(0.0)
    before = ServerMetrics(slabs).snapshot()[vocabulary.CPU_SECONDS][("0",)]
    successor = ServerMetrics(slabs)
    successor.refresh(0.0)
    after = successor.snapshot()[vocabulary.CPU_SECONDS][("0",)]
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert after >= before > 0


@pytest.mark.parametrize("triton", [False, True])
def test_both_formats_are_taken_by_the_real_parsers(triton: bool) -> None:
    metrics = ServerMetrics(new_slabs(), triton=triton)
    busy(metrics)
    content_type, body = metrics.exposition(b"application/openmetrics-text; version=1.0.0")
    assert content_type == OPENMETRICS
    openmetrics = {family.name: family for family in parse_openmetrics(body.decode())}
    content_type, body = metrics.exposition()
    assert content_type == TEXT
    text = by_name(body)
    samples = {
        kind: sum(len(family.samples) for family in families.values())
        for kind, families in (("text", text), ("openmetrics", openmetrics))
    }
    assert samples["text"] == samples["openmetrics"] > 150
    assert openmetrics["modelyard_request_seconds"].unit == "seconds"
    assert openmetrics["modelyard_compute_seconds"].type == "counter"
    assert openmetrics["modelyard_batch_compute_seconds"].type == "histogram"
    assert ("nv_inference_count" in text) == triton


def test_tritons_names_say_the_same() -> None:
    metrics = ServerMetrics(new_slabs(), triton=True)
    busy(metrics)
    _, body = metrics.exposition()
    families = by_name(body)

    def value(name: str, **labels: str) -> float:
        (found,) = [
            sample.value
            for sample in families[name].samples
            if sample.labels == {"model": "late", "version": "3", **labels}
        ]
        return float(found)

    assert value("nv_inference_request_success") == 3
    assert value("nv_inference_request_failure", reason="REJECTED") == 2
    assert value("nv_inference_request_failure", reason="BACKEND") == 1
    assert value("nv_inference_request_failure", reason="CANCELED") == 1
    assert value("nv_inference_request_failure", reason="OTHER") == 1
    assert value("nv_inference_count") == 6
    assert value("nv_inference_exec_count") == 1
    assert value("nv_inference_pending_request_count") == 4
    assert value("nv_inference_request_duration_us") == 90_000
    assert value("nv_inference_queue_duration_us") == 13_000
    assert value("nv_inference_compute_input_duration_us") == 0
    assert value("nv_inference_compute_infer_duration_us") == 45_000
    assert value("nv_inference_compute_output_duration_us") == pytest.approx(32_000, abs=1)
    assert value("nv_cache_num_hits_per_model") == 1
    assert value("nv_cache_num_misses_per_model") == 1
    assert value("nv_model_load_duration_secs") == 0.25
    assert {name for name in families if name.startswith("nv_")} == {f.name for f in triton_metrics.FAMILIES}


def test_names_follow_the_conventions() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    openmetrics = [family.name.removesuffix("_total") for family in FAMILIES]
    assert len(set(openmetrics)) == len(openmetrics), "a counter and another family would share a name in OpenMetrics"
    for family in FAMILIES:
        assert family.name.startswith("modelyard_")
        assert family.name.endswith("_total") == isinstance(family, CounterFamily)
        assert not family.unit or family.name.removesuffix("_total").endswith(f"_{family.unit}")
        assert family.help.endswith(".")
        if isinstance(family, HistogramFamily):
            assert family.bounds == tuple(sorted(set(family.bounds)))


def test_every_metric_is_documented_with_its_labels() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \|([^|]*)\|", REFERENCE.read_text(), re.M)
    documented = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    written = {
        family.name: (
            "counter"
            if isinstance(family, CounterFamily)
            else "histogram"
            if isinstance(family, HistogramFamily)
            else "gauge",
            label_names(family),
        )
        for family in (*FAMILIES, *triton_metrics.FAMILIES)
    }
    assert documented == written


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    dashboard = json.loads((files("modelyard.inference.serve.metrics") / "dashboards" / "grafana.json").read_text())
    known = {family.name: set(label_names(family)) for family in FAMILIES}
    histograms = {family.name for family in FAMILIES if isinstance(family, HistogramFamily)}
    known |= {f"{name}_bucket": known[name] | {"le"} for name in histograms}
    known |= {f"{name}_{part}": known[name] for name in histograms for part in ("sum", "count")}
    asked = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert len(asked) > 20
    used: set[str] = set()
    for query in asked:
        names = re.findall(r"\bmodelyard_\w+", query)
        assert names, query
        for name, selector in re.findall(r"\b(modelyard_\w+)(?:\{([^}]*)\})?", query):
            assert name in known, f"{name} in {query}"
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= known[name], query
            used.add(name)
        grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
        assert grouped <= set().union(*(known[name] for name in names)), query
    for must in (
        "requests_total",
        "queue_seconds_bucket",
        "batch_rows_sum",
        "target_batch_rows",
        "compute_seconds_total",
    ):
        assert f"modelyard_{must}" in used


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels, those inside rows too."""
    return [found for panel in dashboard["panels"] for found in (panel, *panel.get("panels", []))]


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    dashboard = json.loads((files("modelyard.inference.serve.metrics") / "dashboards" / "grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels(dashboard)}) == len(panels(dashboard))
