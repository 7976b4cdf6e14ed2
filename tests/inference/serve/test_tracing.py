"""Traces as OpenTelemetry sees them: its exporter in memory, and its protocol at a real receiver."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from modelyard.errors import ConfigError
from modelyard.inference.serve.metrics.observe import Timeline
from modelyard.inference.serve.metrics.tracing import Tracer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01".encode()
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00".encode()


def answered(traceparent: bytes = b"") -> Timeline:
    return Timeline(
        request_id=b"abc-1",
        protocol="rest-v2",
        path="/v2/models/late/infer",
        status=200,
        arrived_s=100.0,
        finished_s=100.030,
        model="late",
        version="3",
        tenant="acme",
        n_rows=2,
        batch_rows=8,
        admitted_s=100.001,
        started_s=100.011,
        computed_s=100.025,
        traceparent=traceparent,
    )


def refused() -> Timeline:
    return Timeline(b"abc-2", "rest-v2", "/v2/models/late/infer", 503, 100.0, 100.0001, cause="overload", model="late")


def spans_of(*timelines: Timeline) -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    tracer = Tracer(lambda: exporter)
    tracer.start()
    for timeline in timelines:
        tracer.record(timeline)
    tracer.close(20)
    assert tracer.n_dropped == 0
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_its_queue_and_its_computing_inside() -> None:
    queue, compute, request = spans_of(answered())
    assert [span.name for span in (request, queue, compute)] == ["infer late", "queue", "compute"]
    assert request.kind == SpanKind.SERVER
    assert request.parent is None
    for child in (queue, compute):
        assert child.parent is not None
        assert child.parent.span_id == request.context.span_id
        assert child.context.trace_id == request.context.trace_id
        assert child.kind == SpanKind.INTERNAL
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v2/models/late/infer",
        "modelyard.protocol": "rest-v2",
        "modelyard.request_id": "abc-1",
        "modelyard.model": "late",
        "modelyard.version": "3",
        "modelyard.rows": 2,
        "modelyard.batch_rows": 8,
        "modelyard.tenant": "acme",
    }
    assert request.status.status_code == StatusCode.UNSET


def test_spans_have_the_times_at_which_things_happened() -> None:
    queue, compute, request = spans_of(answered())
    arrived_ns = time.time_ns() - int((time.perf_counter() - 100.0) * 1e9)
    assert request.start_time == pytest.approx(arrived_ns, abs=1e9)

    def after_arrival_ms(span: ReadableSpan) -> tuple[int, int]:
        assert None not in (span.start_time, span.end_time, request.start_time)
        return tuple(round((at - request.start_time) / 1e6) for at in (span.start_time, span.end_time))  # type: ignore[operator,return-value]

    assert after_arrival_ms(request) == (0, 30)
    assert after_arrival_ms(queue) == (1, 11)
    assert after_arrival_ms(compute) == (11, 25)


def test_the_trace_of_the_client_goes_on() -> None:
    *_, request = spans_of(answered(SAMPLED))
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}" == TRACE_ID
    assert f"{request.parent.span_id:016x}" == PARENT_ID
    assert request.parent.is_remote


@pytest.mark.parametrize("traceparent", [b"nonsense", b"\xff" * 60, SAMPLED.replace(TRACE_ID.encode(), b"0" * 32)])
def test_a_traceparent_that_is_none_begins_a_new_trace(traceparent: bytes) -> None:
    *_, request = spans_of(answered(traceparent))
    assert request.parent is None
    assert f"{request.context.trace_id:032x}" != TRACE_ID


def test_a_refusal_has_no_children_and_says_why() -> None:
    (request,) = spans_of(refused())
    assert (request.attributes or {})["modelyard.cause"] == "overload"
    assert request.status.status_code == StatusCode.ERROR
    assert request.status.description == "overload"


def test_the_client_decides_what_is_sampled_and_else_a_share_is() -> None:
    chances = iter([0.05, 0.5])
    tracer = Tracer(sample=0.1, chance=lambda: next(chances))
    assert tracer.wanted(SAMPLED)
    assert not tracer.wanted(UNSAMPLED)
    assert [tracer.wanted(b""), tracer.wanted(b"")] == [True, False]
    with pytest.raises(ConfigError, match=r"--trace-sample must be in \[0, 1\], got -1"):
        Tracer(sample=-1)


class Receiver(HTTPServer):
    """An OTLP collector: reads what it is sent as the protocol defines it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.received: list[ExportTraceServiceRequest] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        assert self.headers["Content-Type"] == "application/x-protobuf"
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # as in the base class
        """Keep quiet."""


@contextmanager
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collector_gets_the_traces_over_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = Tracer()
        tracer.start()
        for _ in range(300):
            tracer.record(answered(SAMPLED))
        tracer.close(20)
    assert tracer.n_dropped == 0
    (resource,) = {
        (attribute.key, attribute.value.string_value)
        for request in collector.received
        for group in request.resource_spans
        for attribute in group.resource.attributes
        if attribute.key == "service.name"
    }
    assert resource == ("service.name", "modelyard")
    spans = [
        span
        for request in collector.received
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]
    assert len(spans) == 900
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert len({span.span_id for span in spans}) == 900
    assert {span.parent_span_id.hex() for span in spans if span.name == "infer late"} == {PARENT_ID}


class Refusing(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_traces_that_nobody_takes_are_counted() -> None:
    tracer = Tracer(Refusing)
    tracer.start()
    for _ in range(5):
        tracer.record(answered())
    tracer.close(20)
    assert tracer.n_dropped == 5


def test_a_collector_that_hangs_costs_traces_and_no_time() -> None:
    released = threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            released.wait(60)
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            released.set()

    tracer = Tracer(Hanging, max_pending=100)
    tracer.start()
    for _ in range(1000):
        tracer.record(answered())
    assert tracer.n_dropped >= 1000 - 100 - 513  # what pends, what is in the hands of the thread
    tracer.close(0.1)
    assert released.is_set()


def test_without_the_extra_it_is_named() -> None:
    script = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from modelyard.inference.serve.metrics.tracing import Tracer\n"
        "try:\n"
        "    Tracer().start()\n"
        "except ImportError as exc:\n"
        "    print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout == (
        "tracing needs opentelemetry-sdk, which is not installed; run: pip install 'modelyard[otel]'\n"
    )


def test_nothing_of_opentelemetry_is_imported_before_the_start() -> None:
    script = (
        "import sys\n"
        "from modelyard.inference.serve.metrics.tracing import Tracer\n"
        "Tracer()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
