"""Metrics over HTTP, and what the access log and traces know of a request."""

from collections.abc import Iterable

from modelyard.inference.serve.messages import Request, Response
from modelyard.inference.serve.observe import ServerMetrics, Timeline
from modelyard.inference.serve.routes import Route


def routes(metrics: ServerMetrics) -> Iterable[Route]:
    """Return the routes that Prometheus scrapes: ours, and TensorFlow Serving's path for the same."""

    def scrape(request: Request) -> Response:
        content_type, body = metrics.exposition(request.headers.get(b"accept", b""))
        return Response(200, body, content_type)

    return [Route("GET", "/metrics", scrape), Route("GET", "/monitoring/prometheus/metrics", scrape)]


def timeline_of(request: Request, response: Response, finished_s: float) -> Timeline:
    """Return the steps of an HTTP request that has just been answered."""
    call = request.served
    if call is None:
        return Timeline(
            request_id=request.request_id,
            protocol="http",
            method=request.method,
            path=request.path,
            status=response.status,
            arrived_s=request.arrived_s,
            finished_s=finished_s,
            request_bytes=len(request.body),
            response_bytes=len(response.body),
        )
    run, loaded = call.run, call.loaded
    return Timeline(
        request_id=request.request_id,
        protocol=call.adapter.protocol,
        method=request.method,
        path=request.path,
        status=response.status,
        cause=call.error.facts.get("cause", "") if hasattr(call.error, "facts") else "",
        arrived_s=call.arrived_s,
        finished_s=finished_s,
        request_bytes=len(request.body),
        response_bytes=len(response.body),
        model=loaded.name,
        version=str(loaded.version),
        tenant=call.terms.tenant,
        n_rows=call.n_rows,
        batch_rows=0 if run is None else run.n_rows,
        admitted_s=call.admitted_s,
        started_s=0.0 if run is None else run.started_s,
        computed_s=0.0 if run is None else run.computed_s,
        traceparent=call.terms.traceparent,
    )
