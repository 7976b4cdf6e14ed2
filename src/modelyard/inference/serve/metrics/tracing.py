"""OpenTelemetry traces, behind the extra `otel`: a span per request, with children for the queue and the computing.

    event loop → `Tracer.record` (a value onto a list) → thread (spans with the times as they were) → exporter → collector

The event loop makes no spans: three of them cost some 60 us, more than a small model. A trace goes on from the client's
`traceparent` (https://www.w3.org/TR/trace-context), and is sampled when the client's is; without one a share is taken. Where to
send traces, and under which name, is read by OpenTelemetry from its usual OTEL_EXPORTER_OTLP_* and OTEL_SERVICE_NAME.
"""

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelyard import __version__
from modelyard.errors import ConfigError, MissingExtra
from modelyard.inference.serve.metrics.backlog import Backlog
from modelyard.inference.serve.metrics.observe import Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer as SpanMaker

_MAX_SPANS = 512  # of one export
_SAMPLED = frozenset(b"13579bdf")
_TRACEPARENT_BYTES = 55


class Tracer:
    """Sends traces. `wanted` and `record` belong to the event loop, `close` may be called from any thread."""

    def __init__(
        self,
        exporter: "Callable[[], SpanExporter] | None" = None,
        *,
        sample: float = 1.0,
        max_pending: int = 2048,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """
        Args:
            exporter: makes what sends the spans, by default OTLP over HTTP; called in `start`.
            sample: the share of requests without a `traceparent` to trace, in [0, 1].
            max_pending: traces that may wait to be sent; later ones are dropped.
            chance: returns a number in [0, 1).

        Raises:
            ConfigError: the share is out of range.
        """
        if not 0 <= sample <= 1:
            raise ConfigError(f"--trace-sample must be in [0, 1], got {sample:g}; 0.01 traces one request in a hundred")
        self._make_exporter = exporter or _otlp_exporter
        self._sample = sample
        self._samples: dict[str, float] = {}
        self._chance = chance
        self._backlog: Backlog[Timeline] = Backlog(
            "tracer", self._send_pending, max_pending=max_pending, gather_s=0.5, hurry_at=128
        )
        self.record = self._backlog.put
        """Takes a request's `Timeline`; on the event loop."""
        self._spans: list[ReadableSpan] = []  # finished, not sent
        self._exporter: SpanExporter | None = None
        self._maker: SpanMaker | None = None
        self._n_lost = 0

    @property
    def n_dropped(self) -> int:
        """Traces lost so far."""
        return self._backlog.n_dropped + self._n_lost

    def start(self) -> None:
        """Start the thread; after the fork, since threads do not survive one.

        Raises:
            MissingExtra: OpenTelemetry is not installed.
        """
        try:
            self._exporter = self._make_exporter()
            self._maker = _span_maker(self._spans)
        except ImportError as exc:
            raise MissingExtra("opentelemetry-sdk", "otel", "tracing") from exc
        self._backlog.start()

    def wanted(self, traceparent: bytes, model: str = "") -> bool:
        """Say whether to trace a request; asked once per request, before its `Timeline` is made."""
        if len(traceparent) >= _TRACEPARENT_BYTES:
            return traceparent[_TRACEPARENT_BYTES - 1] in _SAMPLED
        sample = self._samples.get(model, self._sample) if self._samples else self._sample
        return self._chance() < sample

    def set_sample(self, sample: float, model: str | None = None) -> None:
        """Take this share from now on: of a model's requests, or of those of all models without a share of their own."""
        if model is None:
            self._sample = sample
        else:
            self._samples[model] = sample

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is pending, for as long as `timeout_s`; a collector that hangs is left behind."""
        self._backlog.close(timeout_s)
        if self._exporter is not None:
            self._exporter.shutdown()

    # On the thread.

    def _send_pending(self, backlog: Backlog[Timeline]) -> None:
        assert self._maker is not None
        epoch_s = time.time() - time.perf_counter()
        for timeline in backlog.take(1):
            _make_spans(self._maker, timeline, epoch_s)
            if len(self._spans) >= _MAX_SPANS:
                self._export()
        self._export()

    def _export(self) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult
        from opentelemetry.trace import SpanKind

        assert self._exporter is not None
        spans = tuple(self._spans)
        self._spans.clear()
        if spans and self._exporter.export(spans) != SpanExportResult.SUCCESS:
            self._n_lost += sum(span.kind == SpanKind.SERVER for span in spans)


def _make_spans(maker: "SpanMaker", timeline: Timeline, epoch_s: float) -> None:
    """Make the spans of one request, as if they had been made while it was served."""
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    def ns(at_s: float) -> int:
        return int((epoch_s + at_s) * 1e9)

    parent = TraceContextTextMapPropagator().extract(
        {"traceparent": timeline.traceparent.decode("latin-1")}, context=Context()
    )
    request = maker.start_span(
        f"infer {timeline.model}" if timeline.model else timeline.method,
        parent,
        SpanKind.SERVER,
        _attributes(timeline),
        start_time=ns(timeline.arrived_s),
    )
    inside = set_span_in_context(request, parent)
    if timeline.started_s:
        queue = maker.start_span("queue", inside, start_time=ns(timeline.admitted_s))
        queue.end(ns(timeline.started_s))
    if timeline.computed_s:
        batch = {"modelyard.batch_rows": timeline.batch_rows}
        compute = maker.start_span("compute", inside, attributes=batch, start_time=ns(timeline.started_s))
        compute.end(ns(timeline.computed_s))
    if (
        timeline.status >= 500
    ):  # as OpenTelemetry's conventions for servers have it: a client's fault is no error of ours
        request.set_status(Status(StatusCode.ERROR, timeline.cause or None))
    request.end(ns(timeline.finished_s))


def _attributes(timeline: Timeline) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "http.request.method": timeline.method,
        "http.response.status_code": timeline.status,
        "url.path": timeline.path,
        "modelyard.protocol": timeline.protocol,
        "modelyard.request_id": timeline.request_id.decode("latin-1"),
    }
    if timeline.model:
        attributes["modelyard.model"] = timeline.model
        attributes["modelyard.version"] = timeline.version
        attributes["modelyard.rows"] = timeline.n_rows
        attributes["modelyard.batch_rows"] = timeline.batch_rows
    if timeline.tenant:
        attributes["modelyard.tenant"] = timeline.tenant
    if timeline.cause:
        attributes["modelyard.cause"] = timeline.cause
    return attributes


def _otlp_exporter() -> "SpanExporter":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _span_maker(finished: "list[ReadableSpan]") -> "SpanMaker":
    """Return what makes spans and puts each on `finished` when it ends."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    class Collect(SpanProcessor):
        def on_end(self, span: "ReadableSpan") -> None:
            finished.append(span)

    resource = Resource.create()  # with OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "modelyard", "service.version": __version__}))
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(Collect())
    return provider.get_tracer("modelyard", __version__)
