"""Counts are right across processes, survive their death, and read well to the real Prometheus parsers."""

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from modelyard.errors import ConfigError
from modelyard.inference.serve.metrics.exposition import OPENMETRICS, TEXT, expose, negotiate
from modelyard.inference.serve.metrics.metrics import (
    SERIES_DROPPED,
    BoundedLabel,
    CounterFamily,
    GaugeFamily,
    HistogramFamily,
    HistogramValue,
    Reader,
    Registry,
    Snapshot,
    new_slabs,
)

SEEN = CounterFamily("seen_total", "What was seen.", ("model",))
LATENCY = HistogramFamily("latency_seconds", "How long.", ("model",), "seconds", (0.001, 0.01, 0.1))
QUEUE = GaugeFamily("queued_rows", "Waiting.", ("model",), "rows", merge="sum")
TARGET = GaugeFamily("target_rows", "Wanted.", (), "rows", merge="max")
READY = GaugeFamily("ready", "Ready.", (), merge="min")
MEMORY = GaugeFamily("memory_bytes", "Resident.", (), "bytes", merge="worker")
FAMILIES = (SEEN, LATENCY, QUEUE, TARGET, READY, MEMORY)

Parser = Callable[[str], Iterable[Any]]
parse_text: Parser = text_string_to_metric_families
parse_openmetrics: Parser = openmetrics_parser.text_string_to_metric_families

# These tests fork as the supervisor does; Python 3.12 warns of it where a library has left a thread behind.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended_well(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def parsed(snapshot: Snapshot, content_type: bytes = TEXT) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every sample as the real parser reads it."""
    parse = parse_openmetrics if content_type == OPENMETRICS else parse_text
    families = parse(expose(snapshot, content_type).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_workers_add_up() -> None:
    slabs = new_slabs(2, 65536)

    def work(worker: int, n: int) -> None:
        registry = Registry(FAMILIES, slabs, worker)
        seen, latency = registry.counter(SEEN, "a"), registry.histogram(LATENCY, "a")
        for _ in range(n):
            seen.add()
            latency.observe(0.005)
        registry.gauge(QUEUE, "a").set(n)
        registry.gauge(TARGET).set(n)
        registry.gauge(READY).set(n)
        registry.gauge(MEMORY).set(n)

    children = [in_child(lambda: work(0, 1000)), in_child(lambda: work(1, 500))]
    assert all(ended_well(pid) for pid in children)
    snapshot = Reader(FAMILIES, slabs).snapshot()
    assert snapshot[SEEN] == {("a",): 1500.0}
    latency = snapshot[LATENCY][("a",)]
    assert isinstance(latency, HistogramValue)
    assert latency.counts == (0.0, 1500.0, 0.0, 0.0)
    assert latency.sum == pytest.approx(7.5)
    assert snapshot[QUEUE] == {("a",): 1500.0}
    assert snapshot[TARGET] == {(): 1000.0}
    assert snapshot[READY] == {(): 500.0}
    assert snapshot[MEMORY] == {("0",): 1000.0, ("1",): 500.0}


def test_a_replacement_goes_on_counting_where_the_dead_worker_stopped() -> None:
    slabs = new_slabs(1, 65536)
    ready, told = os.pipe()

    def work() -> None:
        registry = Registry(FAMILIES, slabs)
        registry.counter(SEEN, "a").add(3)
        registry.histogram(LATENCY, "a").observe(1.0)
        registry.gauge(QUEUE, "a").set(7)
        os.write(told, b"x")
        signal.pause()

    pid = in_child(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    registry = Registry(FAMILIES, slabs)
    assert QUEUE not in Reader(FAMILIES, slabs).snapshot(), "what a dead worker had queued is not waiting any more"
    registry.counter(SEEN, "a").add()
    registry.histogram(LATENCY, "a").observe(0.001)
    for model in "bcdefghi":
        registry.counter(SEEN, model).add()
    snapshot = Reader(FAMILIES, slabs).snapshot()
    assert snapshot[SEEN] == {("a",): 4.0} | {(model,): 1.0 for model in "bcdefghi"}
    assert snapshot[SERIES_DROPPED] == {(): 0.0}
    assert snapshot[LATENCY] == {("a",): HistogramValue((1.0, 0.0, 0.0, 1.0), 1.001)}


def test_a_worker_killed_at_any_moment_leaves_a_slab_that_reads() -> None:
    slabs = new_slabs(1, 1 << 20)
    reader = Reader(FAMILIES, slabs)

    def work() -> None:
        registry = Registry(FAMILIES, slabs)
        for number in range(1 << 30):
            registry.counter(SEEN, f"model-{number}").add()

    pid = in_child(work)
    n_series = 0
    try:
        while n_series < 5000:  # series are being added all the while
            series = reader.snapshot().get(SEEN, {})
            assert len(series) >= n_series
            assert all(value in (0.0, 1.0) for value in series.values())
            n_series = len(series)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    registry = Registry(FAMILIES, slabs)
    registry.counter(SEEN, "model-0").add()
    assert reader.snapshot()[SEEN][("model-0",)] == 2.0


def test_a_full_slab_drops_new_series_and_counts_them() -> None:
    slabs = new_slabs(1, 4096)
    registry = Registry(FAMILIES, slabs)
    counters = [registry.counter(SEEN, f"model-{number}") for number in range(200)]
    for counter in counters:
        counter.add()
    registry.histogram(LATENCY, "late").observe(0.5)
    registry.gauge(QUEUE, "late").set(3)
    snapshot = Reader(FAMILIES, slabs).snapshot()
    n_kept = len(snapshot[SEEN])
    assert 30 < n_kept < 200
    assert set(snapshot[SEEN].values()) == {1.0}
    assert snapshot[SERIES_DROPPED] == {(): 200 - n_kept + 2}
    assert LATENCY not in snapshot


def test_a_slab_that_is_too_small_or_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="slab_bytes must be a multiple of 8 from 4096 on, got 64"):
        Registry(FAMILIES, [memoryview(bytearray(64))])
    with pytest.raises(ConfigError, match="holds something else"):
        Registry(FAMILIES, [memoryview(bytearray(b"x" * 4096))])


def test_a_wrong_number_of_labels_is_a_bug() -> None:
    with pytest.raises(TypeError, match="seen_total has the labels"):
        Registry(FAMILIES, new_slabs(1, 4096)).counter(SEEN)


def test_at_most_so_many_values_of_a_label_over_all_workers() -> None:
    slabs = new_slabs(3, 65536)
    labels = [BoundedLabel("tenant", 10, Registry(FAMILIES, slabs, worker), slabs) for worker in range(3)]
    shown = {labels[number % 3].value(f"tenant-{number}") for number in range(60)}
    assert shown == {f"tenant-{number}" for number in range(10)} | {"other"}
    for label in labels:  # whoever admitted it, all know it
        assert [label.value(f"tenant-{number}") for number in range(12)] == [
            *(f"tenant-{number}" for number in range(10)),
            "other",
            "other",
        ]


def test_of_two_workers_that_add_the_last_value_at_once_one_withdraws() -> None:
    slabs = new_slabs(2, 65536)
    second = BoundedLabel("tenant", 1, Registry(FAMILIES, slabs, 1), slabs)

    class Slow(Registry):
        """Between its look and its own announcement the other worker is faster."""

        def announce(self, line: list[str]) -> bool:
            assert second.value("b") == "b"
            return super().announce(line)

    first = BoundedLabel("tenant", 1, Slow(FAMILIES, slabs, 0), slabs)
    assert first.value("a") == "other"
    assert [label.value(value) for label in (first, second) for value in "ab"] == ["other", "b", "other", "b"]


def test_workers_that_admit_at_once_stay_within_the_limit() -> None:
    slabs = new_slabs(4, 1 << 20)
    family = CounterFamily("cost_total", "Cost.", ("tenant",))
    barrier_read, barrier_write = os.pipe()

    def work(worker: int) -> None:
        registry = Registry([family], slabs, worker)
        label = BoundedLabel("tenant", 20, registry, slabs)
        os.close(barrier_write)
        os.read(barrier_read, 1)  # ends for all when the parent closes its end
        for number in range(200):
            registry.counter(family, label.value(f"{number % 50}-{worker % 2}")).add()

    children = [in_child(lambda worker=worker: work(worker)) for worker in range(4)]  # type: ignore[misc]
    os.close(barrier_write)
    assert all(ended_well(pid) for pid in children)
    os.close(barrier_read)
    series = Reader([family], slabs).snapshot()[family]
    assert len({tenant for (tenant,) in series} - {"other"}) <= 20
    assert sum(value for value in series.values() if isinstance(value, float)) == 800


@given(st.lists(st.lists(st.floats(0, 1e9), max_size=50), min_size=1, max_size=4))
def test_buckets_count_what_is_not_above_their_bound(by_worker: list[list[float]]) -> None:
    slabs = new_slabs(len(by_worker), 4096)
    for worker, values in enumerate(by_worker):
        histogram = Registry(FAMILIES, slabs, worker).histogram(LATENCY, "a")
        histogram.observe_many(values[:10])
        for value in values[10:]:
            histogram.observe(value)
    everything = [value for values in by_worker for value in values]
    merged = Reader(FAMILIES, slabs).snapshot()[LATENCY][("a",)]
    assert isinstance(merged, HistogramValue)
    assert merged.sum == pytest.approx(sum(everything))
    for content_type in (TEXT, OPENMETRICS):
        samples = parsed({LATENCY: {("a",): merged}}, content_type)
        for bound in LATENCY.bounds:
            below = sum(value <= bound for value in everything)
            assert samples["latency_seconds_bucket", frozenset({("model", "a"), ("le", f"{bound}")})] == below
        assert samples["latency_seconds_bucket", frozenset({("model", "a"), ("le", "+Inf")})] == len(everything)
        assert samples["latency_seconds_count", frozenset({("model", "a")})] == len(everything)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(allow_nan=False))
def test_any_label_and_any_value_survive(label: str, value: float) -> None:
    slabs = new_slabs(1, 1 << 16)
    registry = Registry(FAMILIES, slabs)
    registry.gauge(QUEUE, label).set(value)
    registry.histogram(LATENCY, label).observe(0.5)
    snapshot = Reader(FAMILIES, slabs).snapshot()
    for content_type in (TEXT, OPENMETRICS):
        samples = parsed(snapshot, content_type)
        assert samples["queued_rows", frozenset({("model", label)})] == value
        assert samples["latency_seconds_bucket", frozenset({("model", label), ("le", "+Inf")})] == 1


def test_both_formats_tell_type_unit_and_help() -> None:
    slabs = new_slabs(1, 65536)
    registry = Registry(FAMILIES, slabs)
    registry.counter(SEEN, "").add(2)
    registry.histogram(LATENCY, "a").observe(0.002)
    registry.gauge(MEMORY).set(1.5)
    snapshot = Reader(FAMILIES, slabs).snapshot()
    assert (
        expose({SEEN: snapshot[SEEN]}) == b"# HELP seen_total What was seen.\n# TYPE seen_total counter\nseen_total 2\n"
    )
    assert expose({SEEN: snapshot[SEEN]}, OPENMETRICS) == (
        b"# TYPE seen counter\n# HELP seen What was seen.\nseen_total 2\n# EOF\n"
    )
    text = {family.name: family for family in parse_text(expose(snapshot).decode())}
    openmetrics = {family.name: family for family in parse_openmetrics(expose(snapshot, OPENMETRICS).decode())}
    assert [(f.name, f.type, f.unit) for f in openmetrics.values()] == [
        ("seen", "counter", ""),
        ("latency_seconds", "histogram", "seconds"),
        ("memory_bytes", "gauge", "bytes"),
        ("modelyard_metric_series_dropped", "counter", ""),
    ]
    assert {name: f.type for name, f in text.items()} == {name: f.type for name, f in openmetrics.items()}
    assert text["memory_bytes"].samples[0].labels == {"worker": "0"}


def test_nothing_counted_is_an_empty_page() -> None:
    assert expose({}) == b""
    assert list(parse_openmetrics(expose({}, OPENMETRICS).decode())) == []


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (b"", TEXT),
        (b"*/*", TEXT),
        (b"text/plain", TEXT),
        (b"text/html,application/xhtml+xml", TEXT),
        (b"application/openmetrics-text", OPENMETRICS),
        (b"Application/OpenMetrics-Text; Version=1.0.0; charset=utf-8", OPENMETRICS),
        (b"application/openmetrics-text;version=9.9.9,text/plain;version=0.0.4;q=0.1", TEXT),
        (b"application/openmetrics-text;q=0.2,text/plain;q=0.9", TEXT),
        (b"application/openmetrics-text;q=0", TEXT),
        (b"application/openmetrics-text;q=nonsense", TEXT),
        (  # what Prometheus 2.5x sends
            b"application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
            b"text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            OPENMETRICS,
        ),
        (  # what Prometheus 3 sends
            b"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            b"application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
            b"text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            OPENMETRICS,
        ),
    ],
)
def test_the_format_follows_the_accept_header(accept: bytes, expected: bytes) -> None:
    assert negotiate(accept) == expected
