"""Faults become answers: the client's are explained, a bug is logged and kept to ourselves."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import DigestMismatch
from modelyard.inference.runtime._base import Arrays
from modelyard.inference.serve.app import App
from modelyard.inference.serve.executor import Executor
from modelyard.inference.serve.front import Front
from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.models.repository import Entry, Loaded, Pick, Repository
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols import tensorflow
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Policy, Scheduler
from modelyard.inference.serve.transport.messages import Head, Request, Response, json_response
from modelyard.inference.serve.transport.routes import Route

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
    scheduler = Scheduler(Policy(target_s=10.0, max_batch_size=8), LatencyModel(8, guess_row_s=row_s))
    executor = Executor(Faulty(), Packer(signature), scheduler, name="m version 1", max_batch_size=8)
    return Loaded("m", 1, signature, executor, 10.0, {"x": 1.0}, 0.0)


def app_of(repository: Repository) -> App:
    return App(tensorflow.routes(Front(repository, ServerMetrics(new_slabs())), repository))


class Asked(Request):
    """A request whose answer can be awaited."""

    __slots__ = ("answered",)

    def __init__(self, path: str = "/v1/models/m:predict") -> None:
        super().__init__(
            Head("POST", path, headers={b"x-request-id": b"the-id"}), b'{"instances": [1.5]}', arrived_s=float("inf")
        )
        self.answered = asyncio.Event()

    def reply(self, response: Response) -> None:
        super().reply(response)
        self.answered.set()


@pytest.mark.parametrize("row_s", [1e-6, 1.0], ids=["on the loop", "on a thread"])
def test_a_bug_is_500_without_internals_and_its_traceback_goes_to_stderr(
    row_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask() -> Response:
        repository = Repository([Pick("m", 1)])
        changes: list[Entry] = []
        with ThreadPoolExecutor(1) as pool:
            await repository.load_all(lambda pick: loaded(row_s), pool, changes.append)
        assert [change.state for change in changes] == ["ready"]
        request = Asked()
        app_of(repository)(request)
        await request.answered.wait()
        repository.close()
        assert request.response is not None
        return request.response

    response = asyncio.run(ask())
    assert response.status == 500
    assert json.loads(response.body)["error"] == "internal error; see the server's log for request the-id"
    logged = capsys.readouterr().err
    assert "request the-id" in logged
    assert "KeyError: 'y'" in logged


def test_a_request_for_a_model_that_is_loading_waits_for_it() -> None:
    async def ask() -> Response:
        repository = Repository([Pick("m", 1)])
        asked = Asked()
        app = app_of(repository)

        def load_one(pick: Pick) -> Loaded:
            asyncio.run_coroutine_threadsafe(send(), loop).result()  # while it loads
            return loaded(1e-6)

        async def send() -> None:
            app(asked)
            assert asked.response is None
            assert not repository.ready

        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as pool:
            await repository.load_all(load_one, pool, lambda entry: None)
        await asked.answered.wait()
        repository.close()
        assert asked.response is not None
        return asked.response

    assert asyncio.run(ask()).status == 500  # by the model's bug: it has been asked


def test_a_model_that_failed_to_load_is_503_with_the_reason_and_no_time_to_come_back() -> None:
    async def fail() -> Response | None:
        def load_one(pick: Pick) -> Loaded:
            raise DigestMismatch("model.onnx: the digest is wrong")

        repository = Repository([Pick("m", 1)])
        with ThreadPoolExecutor(1) as pool:
            await repository.load_all(load_one, pool, lambda entry: None)
        request = Asked()
        app_of(repository)(request)
        return request.response

    response = asyncio.run(fail())
    assert response is not None
    assert response.status == 503
    assert b"the digest is wrong" in response.body
    assert not response.headers


def test_a_handler_may_answer_later_and_its_bug_is_caught_too(capsys: pytest.CaptureFixture[str]) -> None:
    async def slowly(request: Request) -> Response:
        await asyncio.sleep(0)
        return json_response({"done": request.body == b'{"instances": [1.5]}'})

    async def badly(request: Request) -> Response:
        await asyncio.sleep(0)
        raise KeyError("oops")

    async def ask(path: str) -> Response:
        app = App([Route("POST", "/slow", slowly), Route("POST", "/bad", badly)])
        request = Asked(path)
        app(request)
        await request.answered.wait()
        assert request.response is not None
        return request.response

    assert asyncio.run(ask("/slow")).body == b'{"done":true}'
    assert asyncio.run(ask("/bad")).status == 500
    assert "oops" in capsys.readouterr().err


def test_who_is_told_of_refusals_hears_of_those_that_the_front_does_not_see() -> None:
    told: list[tuple[str, str]] = []
    repository = Repository([Pick("m", 1)])
    app = App(
        tensorflow.routes(Front(repository, ServerMetrics(new_slabs())), repository),
        on_refused=lambda request, error: told.append((request.path, type(error).__name__)),
    )
    for path in ("/nowhere", "/v1/models", "/v1/models/nobody:predict"):  # the last one is the front's to count
        app(Asked(path))
    assert told == [("/nowhere", "UnknownPath"), ("/v1/models", "MethodNotAllowed")]
