"""Faults become answers: the client's are explained, a bug is logged and kept to ourselves."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import DigestMismatch, NotReady
from modelyard.inference.runtime._base import Arrays
from modelyard.inference.serve.app import App
from modelyard.inference.serve.messages import Request, Response, json_response
from modelyard.inference.serve.repository import Entry, Loaded, Pick, Repository
from modelyard.inference.serve.work import Instance

SPEC = TensorSpec(name="x", datatype="FP32", shape=(BATCH,))


class Faulty:
    """An engine with a bug."""

    name = "faulty 1"

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return {"x": inputs["x"] / inputs["y"]}

    def close(self) -> None:
        """Nothing to give back."""


def loaded(row_s: float) -> Loaded:
    signature = Signature(inputs=(SPEC,), outputs=(SPEC,))
    return Loaded("m", 1, signature, Instance(Faulty(), row_s, "m"), {"x": 1.0}, 0.0)


async def ready_repository(row_s: float) -> Repository:
    repository = Repository([Pick("m", 1)])
    changes: list[Entry] = []
    with ThreadPoolExecutor(1) as executor:
        await repository.load_all(lambda pick: loaded(row_s), executor, changes.append)
    assert [change.state for change in changes] == ["ready"]
    return repository


def request() -> Request:
    return Request("POST", "/v1/models/m:predict", "", {}, b'{"instances": [1.5]}', "the-id")


@pytest.mark.parametrize("row_s", [0.0, 1.0], ids=["on the loop", "on the thread"])
def test_a_bug_is_500_without_internals_and_its_traceback_goes_to_stderr(
    row_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask() -> Response:
        repository = await ready_repository(row_s)
        answer = App(repository).answer(request())
        response = answer if isinstance(answer, Response) else await answer
        repository.close()
        return response

    response = asyncio.run(ask())
    assert response.status == 500
    assert json.loads(response.body)["error"] == "internal error; see the server's log for request the-id"
    logged = capsys.readouterr().err
    assert "request the-id" in logged
    assert "KeyError: 'y'" in logged


def test_a_model_that_is_loading_is_503_and_says_when_to_come_back() -> None:
    repository = Repository([Pick("m", 1)])
    answer = App(repository).answer(request())
    assert isinstance(answer, Response)
    assert answer.status == 503
    assert (b"Retry-After", b"1") in answer.headers
    assert b"loading" in answer.body
    assert not repository.ready
    with pytest.raises(NotReady):
        repository.get("m")


def test_a_model_that_failed_to_load_says_why_and_asks_nobody_to_wait() -> None:
    async def failed() -> Repository:
        def load_one(pick: Pick) -> Loaded:
            raise DigestMismatch("model.onnx: its SHA-256 is another; fetch the bundle again")

        repository = Repository([Pick("m", 1)])
        with ThreadPoolExecutor(1) as executor:
            await repository.load_all(load_one, executor, lambda entry: None)
        return repository

    repository = asyncio.run(failed())
    with pytest.raises(
        NotReady, match=r"failed to load.*not become ready by itself: model\.onnx: its SHA-256"
    ) as caught:
        repository.get("m")
    assert "try again later" not in str(caught.value)


def test_a_draining_server_is_not_ready_and_goes_on_answering() -> None:
    async def drained() -> Repository:
        repository = await ready_repository(0.0)
        assert repository.ready
        repository.drain()
        return repository

    repository = asyncio.run(drained())
    assert not repository.ready
    assert repository.entry("m").state == "draining"
    assert repository.get("m").version == 1


def test_nan_in_answers_is_null() -> None:
    assert json_response({"x": np.array([np.nan, np.inf, 1], dtype=np.float32)}).body == b'{"x":[null,null,1.0]}'
