"""What happened to a request, on request: the header Modelyard-Explain: true puts a timeline into the answer."""

from datetime import UTC, datetime
from time import perf_counter, time
from typing import Any

import orjson

from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.transport.messages import Response

TIMELINE = b"Modelyard-Timeline"
CACHED = "cached"
"""The reason of a run that was none."""


def timeline(call: Call) -> dict[str, Any]:
    """Return the call's way from its arrival until now; times in milliseconds, rounded to a microsecond."""
    now_s = perf_counter()
    arrived_at = datetime.fromtimestamp(time() - (now_s - call.arrived_s), UTC)
    loaded, run = call.loaded, call.run
    told: dict[str, Any] = {
        "request_id": call.asker.request_id.decode("latin-1"),
        "model": loaded.name if loaded else None,
        "version": loaded.version if loaded else None,
        "rows": call.n_rows,
        "arrived_at": arrived_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "deadline_ms": _ms(call.deadline_s - call.arrived_s),
    }
    if call.load_wait_s:
        told["load_wait_ms"] = _ms(call.load_wait_s)
    told["admitted_after_ms"] = _ms(call.admitted_s - call.arrived_s) if call.admitted_s else None
    if run is not None:
        told |= {"waited_ms": _ms(run.started_s - call.admitted_s), "started_because": run.reason}
        if run.reason != CACHED:
            told["batch"] = {"rows": run.n_rows, "requests": run.n_calls, "compute_ms": _ms(run.compute_s)}
    if call.error is not None:
        told["cause"] = call.cause
    told["total_ms"] = _ms(now_s - call.arrived_s)
    told["summary"] = _sentence(call, now_s)
    return told


def explained(response: Response, told: dict[str, Any]) -> Response:
    """Return the answer with the timeline: in its JSON, or in a header where the body is binary."""
    text = orjson.dumps(told)
    if response.content_type == b"application/json" and response.body.endswith(b"}"):
        body = b'%b,"timeline":%b}' % (response.body[:-1], text)
        return Response(response.status, body, headers=response.headers)
    return Response(response.status, response.body, response.content_type, (*response.headers, (TIMELINE, text)))


def _sentence(call: Call, now_s: float) -> str:
    run, replied_ms = call.run, _ms(now_s - call.arrived_s)
    loading = f"waited {_ms(call.load_wait_s):g} ms for its version to be loaded, " if call.load_wait_s else ""
    if run is None:
        what = (
            f"was given up ({call.cause}) after its admission"
            if call.admitted_s
            else f"was not admitted ({call.cause})"
        )
        return f"arrived, {loading}{what}, and was answered {replied_ms:g} ms after it arrived"
    if run.reason == CACHED:
        return f"arrived, and was answered from the cache {replied_ms:g} ms later"
    others = run.n_calls - 1
    company = (
        "alone" if not others else f"with {others} other request{'s' if others > 1 else ''} ({run.n_rows} rows in all)"
    )
    return (
        f"arrived, {loading}was admitted {_ms(call.admitted_s - call.arrived_s):g} ms after it arrived, waited "
        f"{_ms(run.started_s - call.admitted_s):g} ms ({run.reason}), ran {company} for {_ms(run.compute_s):g} ms, and was answered "
        f"{replied_ms:g} ms after it arrived"
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
