"""The one door: every request is answered once, counted once, and forgotten."""

import asyncio
import gc
import json
import threading
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
from in_process import serving
from numpy.typing import NDArray
from wire import Wire, connections

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import (
    BodyTooLarge,
    Cold,
    DeadlineExceeded,
    DigestMismatch,
    MethodNotAllowed,
    ModelyardError,
    NotInStore,
    NotReady,
    Overloaded,
    RequestError,
    UnknownModel,
    UnsupportedEncoding,
)
from modelyard.inference.serve.calls import Call, Terms
from modelyard.inference.serve.front import HttpAdapter, fault, is_explained, outcome_of
from modelyard.inference.serve.transport.http import HttpConnection
from modelyard.inference.serve.transport.messages import Request, Response, error_response

Arrays = Mapping[str, NDArray[Any]]
X = TensorSpec(name="x", datatype="FP32", shape=(BATCH, 2))
Y = TensorSpec(name="y", datatype="FP32", shape=(BATCH,))
SIGNATURE = Signature(inputs=(X,), outputs=(Y,))
PREDICT, INFER = "/v1/models/m:predict", "/v2/models/m/infer"


def total(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"].sum(axis=1)}


def tensor(data: Any, **more: Any) -> Any:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": data}], **more}


def error_of(response: Response) -> str:
    return str(json.loads(response.body)["error"])


def test_a_request_is_answered_and_counted_by_its_protocol() -> None:
    async def main() -> Any:
        async with serving(SIGNATURE, total) as server:
            rows = await server.answer(PREDICT, {"instances": [[1, 2], [3, 4]]})
            tensors = await server.answer(INFER, tensor([1, 2]))
            return rows, tensors, server.counted()

    rows, tensors, counted = asyncio.run(main())
    assert json.loads(rows.body) == {"predictions": [3.0, 7.0]}
    assert json.loads(tensors.body)["outputs"][0]["data"] == [3.0]
    assert counted == {("m", "1", "rest-v1", "ok", ""): 1.0, ("m", "1", "rest-v2", "ok", ""): 1.0}


@pytest.mark.parametrize("path", [PREDICT, INFER])
def test_what_is_read_too_late_is_turned_away_alike(path: str) -> None:
    async def main() -> Any:
        async with serving(SIGNATURE, total, target_s=10.0) as server:
            body = {"instances": [[1, 2]]} if path == PREDICT else tensor([1, 2])
            server.waited_s = 6.0
            refused = [await server.answer(path, body) for _ in range(2)]
            told = await server.answer(path, body, modelyard_explain="true")
            if path == INFER:  # the body says that it has more time
                patient = tensor([1, 2], parameters={"timeout": 20_000_000})
                assert (await server.answer(path, patient)).status == 200
            return refused, told, {key: n for key, n in server.counted().items() if key[3] != "ok"}

    (first, second), told, counted = asyncio.run(main())
    assert first.status == second.status == told.status == 503
    assert first.headers == ((b"Retry-After", b"1"),)
    assert error_of(first) == error_of(second) == error_of(told)
    assert "reads requests later than they could be answered" in error_of(first)
    assert json.loads(told.body)["timeline"]["cause"] == "overload"
    assert list(counted.values()) == [3.0]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "counted"),
    [
        (PREDICT, b"{", {}, 400, ("m", "1", "rest-v1", "client_error", "bad_request")),
        (PREDICT, {"instances": [[1]]}, {}, 400, ("m", "1", "rest-v1", "client_error", "bad_request")),
        (PREDICT, {"instances": [[1, 2]] * 4}, {}, 413, ("m", "1", "rest-v1", "client_error", "body_too_large")),
        (INFER, tensor([1]), {}, 400, ("m", "1", "rest-v2", "client_error", "bad_request")),
        ("/v1/models/n:predict", {"instances": []}, {}, 404, ("", "", "rest-v1", "client_error", "unknown_model")),
        ("/v2/models/m/versions/9/infer", {}, {}, 404, ("", "", "rest-v2", "client_error", "unknown_model")),
        (PREDICT, {"instances": [[1, 2]]}, {"modelyard_timeout_ms": "1e-6"}, 504, ("m", "1", "rest-v1", "refused", "deadline")),
    ],
)  # fmt: skip
def test_a_refusal_is_counted_by_its_cause(
    path: str, body: Any, headers: dict[str, str], status: int, counted: tuple[str, ...]
) -> None:
    async def main() -> Any:
        async with serving(SIGNATURE, total, max_rows=3) as server:
            return await server.answer(path, body, **headers), server.counted()

    response, counts = asyncio.run(main())
    assert response.status == status
    assert error_of(response)
    assert counts == {counted: 1.0}


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (Overloaded("x", retry_after_s=0.01), {b"Retry-After": b"1"}),
        (Overloaded("x", retry_after_s=2.1), {b"Retry-After": b"3"}),
        (DeadlineExceeded("x", retry_after_s=4.0), {b"Retry-After": b"4"}),
        (NotReady("x"), {b"Retry-After": b"1"}),
        (NotReady("x", retry=False), {}),
        (MethodNotAllowed("x", allow="GET, HEAD"), {b"Allow": b"GET, HEAD"}),
        (RequestError("x"), {}),
    ],
)
def test_an_error_says_when_to_come_back_and_what_is_allowed(
    error: ModelyardError, headers: dict[bytes, bytes]
) -> None:
    assert dict(error_response(error).headers) == headers


def test_an_error_may_quote_what_no_text_may_hold() -> None:
    assert error_of(error_response(RequestError("got '\ud800'"))) == "got '\\ud800'"


@pytest.mark.parametrize("depth", [100, 500, 900])
@pytest.mark.parametrize("path", [PREDICT, INFER])
def test_however_deep_a_body_is_nested_it_is_refused(path: str, depth: int) -> None:
    """Up to where the JSON parser gives up, and beyond."""
    bodies = [
        b'{"instances":' + b"[" * depth + b"]" * depth + b"}",
        b'{"instances":[' + b'{"x":' * depth + b"1" + b"}" * depth + b"]}",
        b'{"inputs":' + b"[" * depth + b"]" * depth + b"}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":' + b"[" * depth + b"]" * depth + b"}]}",
        b'{"inputs":[],"outputs":'
        + b"[" * depth
        + b"]" * depth
        + b',"signature_name":'
        + b"[" * depth
        + b"]" * depth
        + b"}",
    ]

    async def main() -> list[Response]:
        async with serving(SIGNATURE, total) as server:
            return [await server.answer(path, body) for body in bodies]

    for response in asyncio.run(main()):
        assert response.status == 400
        assert len(error_of(response)) < 500


@pytest.mark.parametrize("on_thread", [False, True], ids=["on the loop", "on a thread"])
def test_a_bug_in_the_engine_or_the_answer_is_500_and_its_mates_are_answered(
    on_thread: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def buggy(inputs: Arrays) -> Arrays:
        assert not (inputs["x"] == 666).any(), "the beast"
        return {"y": inputs["x"].sum(axis=1)}

    async def main() -> Any:
        async with serving(SIGNATURE, buggy, on_thread=on_thread) as server:
            asked = [server.ask(PREDICT, {"instances": [[value, 1]]}) for value in (1, 666, 2)]
            for one in asked:
                await asyncio.wait_for(one.answered.wait(), 60)
            return [(one.response.status, one.n_replies) for one in asked if one.response], server.counted()

    answers, counted = asyncio.run(main())
    assert answers == [(200, 1), (500, 1), (200, 1)]
    assert counted["m", "1", "rest-v1", "error", "bug"] == 1.0
    logged = capsys.readouterr().err
    assert "the beast" in logged


def test_an_adapter_that_cannot_write_its_answer_is_a_bug_and_answered(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(HttpAdapter):
        def read(self, request: Any, loaded: Any) -> Any:
            return loaded.packer.pack({"x": np.zeros((1, 2), dtype=np.float32)}, 1)

        def write(self, request: Any, call: Any) -> Response:
            raise ZeroDivisionError("oops")

    async def main() -> Response | None:
        async with serving(SIGNATURE, total) as server:
            from modelyard.inference.serve.packing import Packer

            server.loaded.packer = Packer(SIGNATURE)
            asked = server.ask("/nowhere", b"")
            asked.answered.clear()
            server.front.ask(asked, Terms(), Broken(), "m")
            await asyncio.wait_for(asked.answered.wait(), 60)
            return asked.response

    response = asyncio.run(main())
    assert response is not None
    assert response.status == 500
    assert "oops" not in error_of(response)
    assert "oops" in capsys.readouterr().err


def test_a_client_that_goes_is_not_answered_and_its_mates_are() -> None:
    release = threading.Event()

    def held(inputs: Arrays) -> Arrays:
        assert release.wait(60)
        return {"y": inputs["x"].sum(axis=1)}

    async def main() -> Any:
        async with serving(SIGNATURE, held, on_thread=True) as server:
            asked = [server.ask(PREDICT, {"instances": [[1, 2]]}) for _ in range(3)]
            await asyncio.sleep(0)
            assert asked[1].on_gone is not None
            asked[1].on_gone()
            release.set()
            for one in (asked[0], asked[2]):
                await asyncio.wait_for(one.answered.wait(), 60)
            return [one.n_replies for one in asked], server.counted()

    replies, counted = asyncio.run(main())
    assert replies == [1, 0, 1]
    assert counted == {("m", "1", "rest-v1", "ok", ""): 2.0, ("m", "1", "rest-v1", "cancelled", ""): 1.0}


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [[1, 2]]}, {"inputs": [1, 2]}, {"instances": [{"x": [1, 2]}]}, b"{", {"instances": [["a", 1]]},
        {"instances": [[1, 2]] * 50}, b'{"instances": ' + b"[" * 900 + b"]" * 900 + b"}", {"instances": [[666, 1]]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("header", [b"X: y", b"Modelyard-Explain: true"])
def test_a_request_is_freed_with_its_answer_and_not_by_a_later_collection(body: Any, header: bytes) -> None:
    """Bodies are large and collections rare: requests that only a collection frees would keep gigabytes."""

    def picky(inputs: Arrays) -> Arrays:
        if (inputs["x"] == 666).any():
            raise RequestError("onnxruntime could not compute this input")
        return {"y": inputs["x"].sum(axis=1)}

    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [b"POST /v1/models/m:predict HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(raw), header]

    def n_alive() -> int:
        # By type(): isinstance would ask proxies of other tests, whose objects may be gone, for their class.
        return sum(issubclass(type(one), Call | Request) for one in gc.get_objects())

    async def main() -> tuple[bytes, int]:
        async with serving(SIGNATURE, picky, max_rows=20) as server:
            shared = connections(server.app)
            n_before = n_alive()
            connection, wire = shared.new_connection(), Wire()
            wire.connect(cast(HttpConnection, connection))
            connection.data_received(b"\r\n".join(head) + b"\r\n\r\n" + raw)
            while not wire.written:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            n_left = n_alive() - n_before
            wire.close()
            return bytes(wire.written), n_left

    gc.collect()
    gc.disable()
    try:
        written, n_left = asyncio.run(main())
    finally:
        gc.enable()
    assert written.startswith(b"HTTP/1.1 ")
    assert n_left == 0


@pytest.mark.parametrize(
    ("error", "explained", "admitted", "outcome"),
    [
        (RequestError("x"), True, False, ("client_error", "bad_request")),
        (UnknownModel("x"), True, False, ("client_error", "unknown_model")),
        (BodyTooLarge("x"), True, False, ("client_error", "body_too_large")),
        (MethodNotAllowed("x"), True, False, ("client_error", "method")),
        (UnsupportedEncoding("x"), True, False, ("client_error", "unsupported_encoding")),
        (Overloaded("x", cause="queue_full", retry_after_s=1.0), True, False, ("refused", "queue_full")),
        (DeadlineExceeded("x", cause="expired", retry_after_s=1.0), True, True, ("dropped", "expired")),
        (NotReady("x"), True, False, ("refused", "not_ready")),
        (Cold("x"), True, False, ("refused", "not_ready")),
        (NotInStore("x"), True, False, ("client_error", "bad_request")),
        (DigestMismatch("x"), False, False, ("error", "bug")),
        (ZeroDivisionError("x"), False, True, ("error", "bug")),
    ],
)
def test_each_error_is_somebodys(error: Exception, explained: bool, admitted: bool, outcome: tuple[str, str]) -> None:
    assert is_explained(error) is explained
    assert outcome_of(error, admitted=admitted) == outcome
    response = fault(error, b"the-id")
    if explained:
        assert error_of(response) == "x"
    else:
        assert (response.status, error_of(response)) == (500, "internal error; see the server's log for request the-id")
