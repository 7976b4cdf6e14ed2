"""Metrics over HTTP, and what the access log and traces know of a request."""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.front import outcome_of
from modelyard.inference.serve.metrics.observe import ServerMetrics, Timeline
from modelyard.inference.serve.transport.messages import Request, Response
from modelyard.inference.serve.transport.routes import Route

if TYPE_CHECKING:
    from modelyard.inference.serve.transport.grpc import Answered

_HTTP_STATUS = {0: 200, 1: 499, 3: 400, 4: 504, 5: 404, 8: 413, 9: 400, 11: 400, 12: 501, 14: 503}


def routes(metrics: ServerMetrics) -> Iterable[Route]:
    """Return the routes that Prometheus scrapes: ours, and TensorFlow Serving's path for the same."""

    async def scrape(request: Request) -> Response:
        # On a thread: with many models it takes some milliseconds.
        loop = asyncio.get_running_loop()
        accept = request.headers.get(b"accept", b"")
        content_type, body = await loop.run_in_executor(None, metrics.exposition, accept)
        return Response(200, body, content_type)

    return [Route("GET", "/metrics", scrape), Route("GET", "/monitoring/prometheus/metrics", scrape)]


def timeline_of(request: Request, response: Response, finished_s: float) -> Timeline:
    """Return the steps of an HTTP request that has just been answered."""
    return _timeline(
        request.served,
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


def timeline_of_grpc(answered: "Answered", finished_s: float) -> Timeline:
    """Return the steps of a gRPC call that has just been answered."""
    call = answered.call
    return _timeline(
        call.served,
        request_id=call.request_id,
        protocol="grpc",
        method="POST",
        path=call.head.path,
        status=http_status_of(answered.status),
        arrived_s=call.arrived_s,
        finished_s=finished_s,
        request_bytes=answered.request_bytes,
        response_bytes=answered.response_bytes,
    )


def http_status_of(status: int) -> int:
    """Return HTTP's word for a gRPC status, so that logs and traces have one vocabulary."""
    return _HTTP_STATUS.get(status, 500)


def _timeline(call: Call | None, *, protocol: str, finished_s: float, **told: Any) -> Timeline:
    if call is None or call.loaded is None:
        return Timeline(protocol=protocol, finished_s=finished_s, **told)
    run, loaded = call.run, call.loaded
    return Timeline(
        protocol=call.adapter.protocol,
        cause="" if call.error is None else outcome_of(call.error, admitted=call.admitted_s > 0)[1],
        finished_s=finished_s,
        model=loaded.name,
        version=str(loaded.version),
        tenant=call.terms.tenant,
        n_rows=call.n_rows,
        batch_rows=0 if run is None else run.n_rows,
        admitted_s=call.admitted_s,
        started_s=0.0 if run is None else run.started_s,
        computed_s=0.0 if run is None else run.computed_s,
        traceparent=call.terms.traceparent,
        **told,
    )
