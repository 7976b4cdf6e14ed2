"""What Prometheus scrapes, and what the access log and traces are told of a request."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from in_process import Asked, serving
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.inference.serve.metrics.observe import Timeline
from modelyard.inference.serve.protocols.monitoring import http_status_of, timeline_of
from modelyard.inference.serve.transport.messages import Head, Request, Response

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(BATCH, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(BATCH,)),),
)
PREDICT = "/v1/models/m:predict"


def total(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    return {"y": inputs["x"].sum(axis=1)}


@pytest.mark.parametrize("path", ["/metrics", "/monitoring/prometheus/metrics"])
def test_both_paths_give_the_same_numbers_in_the_text_format(path: str) -> None:
    async def main() -> Response:
        async with serving(SIGNATURE, total) as server:
            await server.answer(PREDICT, {"instances": [[1, 2]]})
            return await server.answer(path, method="GET")

    response = asyncio.run(main())
    assert response.content_type.startswith(b"text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.body.decode())}
    (sample,) = families["modelyard_requests"].samples
    assert sample.labels["model"] == "m"
    assert sample.value == 1.0


def told_of(body: Any, **headers: str) -> Timeline:
    """Return what is told of a request with this body."""

    async def main() -> Timeline:
        async with serving(SIGNATURE, total) as server:
            asked = server.ask(PREDICT, body, x_request_id="the-id", **headers)
            await asyncio.wait_for(asked.answered.wait(), 60)
            assert asked.response is not None
            return timeline_of(asked, asked.response, asked.arrived_s + 60.0)

    return asyncio.run(main())


def test_an_inference_is_told_step_by_step() -> None:
    told = told_of({"instances": [[1, 2], [3, 4]]}, modelyard_tenant="acme", traceparent="00-1-2-01")
    assert (told.request_id, told.protocol, told.method, told.path) == (b"the-id", "rest-v1", "POST", PREDICT)
    assert (told.status, told.cause) == (200, "")
    assert (told.model, told.version, told.tenant, told.n_rows, told.batch_rows) == ("m", "1", "acme", 2, 2)
    assert told.traceparent == b"00-1-2-01"
    assert told.arrived_s <= told.admitted_s <= told.started_s <= told.computed_s <= told.finished_s
    assert told.request_bytes > 0
    assert told.response_bytes == len(b'{"predictions":[3.0,7.0]}')


@pytest.mark.parametrize(
    ("body", "headers", "status", "cause"),
    [
        ({"instances": [["a", 1]]}, {}, 400, "bad_request"),
        ({"instances": [[1, 2]]}, {"modelyard_timeout_ms": "1e-6"}, 504, "deadline"),
    ],
)
def test_a_refusal_is_told_with_its_cause_and_no_steps_it_never_took(
    body: Any, headers: dict[str, str], status: int, cause: str
) -> None:
    told = told_of(body, modelyard_tenant="acme", **headers)
    assert (told.status, told.cause, told.tenant, told.model) == (status, cause, "acme", "m")
    assert told.started_s == told.computed_s == 0.0


def test_what_is_no_inference_is_told_as_plain_http() -> None:
    request = Asked(Head("GET", "/v2/health/live"), b"")
    told = timeline_of(request, Response(200, b"{}"), request.arrived_s + 1.0)
    assert (told.protocol, told.method, told.path, told.model) == ("http", "GET", "/v2/health/live", "")


def test_grpc_statuses_have_the_words_of_http() -> None:
    assert [http_status_of(code) for code in (0, 3, 4, 5, 8, 14, 2, 13, 99)] == [
        200,
        400,
        504,
        404,
        413,
        503,
        500,
        500,
        500,
    ]


def test_requests_without_an_answer_in_hand_are_told_without_one() -> None:
    request = Request(Head("GET", "/"), b"", 1.0)
    assert timeline_of(request, Response(404, b"{}"), 2.0).status == 404
