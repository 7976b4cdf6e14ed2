"""The timeline of a request: steps in order, the company it had, and a sentence that a person can read."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from in_process import serving
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.inference.serve.explain import explained
from modelyard.inference.serve.transport.messages import Response

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(BATCH, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(BATCH,)),),
)
PREDICT, INFER = "/v1/models/m:predict", "/v2/models/m/infer"
EXPLAIN = {"modelyard_explain": "true"}


def total(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    return {"y": inputs["x"].sum(axis=1)}


def asked_together(n: int) -> list[dict[str, Any]]:
    """Return the answers to `n` requests of one turn, of which all ask why."""

    async def main() -> list[dict[str, Any]]:
        async with serving(SIGNATURE, total) as server:
            asked = [server.ask(PREDICT, {"instances": [[i, 1]]}, x_request_id=f"id-{i}", **EXPLAIN) for i in range(n)]
            for one in asked:
                await asyncio.wait_for(one.answered.wait(), 60)
            return [json.loads(one.response.body) for one in asked if one.response]

    return asyncio.run(main())


def test_an_answer_tells_its_steps_in_their_order() -> None:
    (answer,) = asked_together(1)
    told = answer["timeline"]
    assert answer["predictions"] == [1.0]
    assert (told["request_id"], told["model"], told["version"], told["rows"]) == ("id-0", "m", 1, 1)
    assert told["deadline_ms"] == pytest.approx(30_000)
    assert 0 <= told["admitted_after_ms"] <= told["admitted_after_ms"] + told["waited_ms"] <= told["total_ms"]
    assert told["batch"]["rows"] == told["batch"]["requests"] == 1
    assert told["started_because"] == "instance free"
    assert re.fullmatch(
        r"arrived, was admitted [\d.e-]+ ms after it arrived, waited [\d.e-]+ ms \(instance free\), ran alone for [\d.e-]+ ms, and was "
        r"answered [\d.e-]+ ms after it arrived",
        told["summary"],
    )


def test_company_in_the_batch_is_told() -> None:
    for answer in asked_together(3):
        assert answer["timeline"]["batch"]["requests"] == 3
        assert "with 2 other requests (3 rows in all)" in answer["timeline"]["summary"]
    assert "with 1 other request (2 rows in all)" in asked_together(2)[0]["timeline"]["summary"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "cause"),
    [
        ({"instances": [["a", 1]]}, {}, 400, "bad_request"),
        ({"instances": [[1, 2]]}, {"modelyard_timeout_ms": "1e-6"}, 504, "deadline"),
    ],
)
def test_a_refusal_is_explained_too(body: Any, headers: dict[str, str], status: int, cause: str) -> None:
    async def main() -> Response:
        async with serving(SIGNATURE, total) as server:
            return await server.answer(PREDICT, body, **EXPLAIN, **headers)

    response = asyncio.run(main())
    answer = json.loads(response.body)
    assert response.status == status
    assert answer["timeline"]["cause"] == cause
    assert answer["timeline"]["summary"].startswith(f"arrived, was not admitted ({cause}), and was answered ")
    assert answer["timeline"]["admitted_after_ms"] is None


def test_beside_binary_tensors_the_timeline_is_a_header() -> None:
    head = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()

    async def main() -> Response:
        async with serving(SIGNATURE, total) as server:
            body = head + np.array([1, 2], dtype="<f4").tobytes()
            return await server.answer(INFER, body, inference_header_content_length=str(len(head)), **EXPLAIN)

    response = asyncio.run(main())
    headers = dict(response.headers)
    assert response.body.endswith(np.float32(3).tobytes())
    assert json.loads(headers[b"Modelyard-Timeline"])["batch"]["rows"] == 1
    assert b"Inference-Header-Content-Length" in headers


def test_the_timeline_fits_a_header_whatever_is_in_it() -> None:
    told = {"error": "line\r\nX-Evil: 1\x00", "model": "é"}
    response = explained(Response(200, b"raw", b"application/octet-stream"), told)
    ((name, text),) = response.headers
    assert name == b"Modelyard-Timeline"
    assert not set(text) & set(b"\r\n\x00")
    assert json.loads(text) == told


def test_who_does_not_ask_is_told_nothing() -> None:
    async def main() -> Response:
        async with serving(SIGNATURE, total) as server:
            return await server.answer(PREDICT, {"instances": [[1, 2]]})

    assert json.loads(asyncio.run(main()).body) == {"predictions": [3.0]}
