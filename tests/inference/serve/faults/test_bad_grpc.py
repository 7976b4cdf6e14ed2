"""Bad gRPC requests to a real server, from an unmodified client: the right status, a clear message, nothing left behind."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from driver import workers_of
from tritonclient.grpc import service_pb2

pytestmark = pytest.mark.slow

INFER = "/inference.GRPCInferenceService/ModelInfer"
N_FLOATS = 30


def request(**changes: Any) -> Any:
    """Return a good request for the tabular model, with raw tensors."""
    made = service_pb2.ModelInferRequest(model_name="tabular")
    made.inputs.add(name="features", datatype="FP32", shape=[1, N_FLOATS])
    made.raw_input_contents.append(np.zeros(N_FLOATS, dtype="<f4").tobytes())
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def changed(change: Any) -> bytes:
    made = request()
    change(made)
    data: bytes = made.SerializeToString()
    return data


def with_contents(made: Any, n: int) -> None:
    del made.raw_input_contents[:]
    made.inputs[0].contents.fp32_contents.extend([0.5] * n)


def set_raw(made: Any, raw: bytes) -> None:
    made.raw_input_contents[0] = raw


def set_shape(made: Any, *shape: int) -> None:
    del made.inputs[0].shape[:]
    made.inputs[0].shape.extend(shape)


INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
GOOD = request().SerializeToString()
CASES: dict[str, tuple[bytes, Any, str]] = {
    "no message": (b"\xff\xff\xff", INVALID, ""),
    "half a message": (GOOD[:-7], INVALID, ""),
    "nothing": (b"", NOT_FOUND, ""),
    "unknown model": (changed(lambda made: setattr(made, "model_name", "nobody")), NOT_FOUND, "nobody"),
    "unknown version": (changed(lambda made: setattr(made, "model_version", "9")), NOT_FOUND, "9"),
    "unknown input": (changed(lambda made: setattr(made.inputs[0], "name", "x")), INVALID, "unknown input 'x'"),
    "wrong datatype": (changed(lambda made: setattr(made.inputs[0], "datatype", "FP64")), INVALID, "FP32"),
    "wrong shape": (changed(lambda made: set_shape(made, 1, 31)), INVALID, "shape"),
    "negative shape": (changed(lambda made: set_shape(made, -1, 30)), INVALID, "shape"),
    "huge shape": (changed(lambda made: set_shape(made, 2**62, 30)), INVALID, "bytes"),
    "no shape": (changed(lambda made: set_shape(made)), INVALID, "shape"),
    "raw too short": (changed(lambda made: set_raw(made, bytes(119))), INVALID, "119"),
    "raw too long": (changed(lambda made: set_raw(made, bytes(121))), INVALID, "121"),
    "two raws": (changed(lambda made: made.raw_input_contents.append(b"")), INVALID, "raw_input_contents"),
    "raw and contents": (changed(lambda made: made.inputs[0].contents.fp32_contents.append(1)), INVALID, "contents"),
    "too few contents": (changed(lambda made: with_contents(made, 29)), INVALID, "29"),
    "NaN": (changed(lambda made: set_raw(made, np.full(N_FLOATS, np.nan, dtype="<f4").tobytes())), INVALID, "NaN"),
    "unknown output": (changed(lambda made: made.outputs.add(name="x")), INVALID, "unknown output 'x'"),
    "input twice": (changed(lambda made: made.inputs.add(name="features", datatype="FP32", shape=[1, 30])), INVALID, ""),
}  # fmt: skip


@pytest.fixture
def server(store: Path, serve: Any) -> Iterator[Any]:
    with serve(store, "--workers", "1", "--grpc-port", "0", "--model", "tabular") as running:
        yield running
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


@pytest.fixture
def infer(server: Any) -> Iterator[Any]:
    """Send bytes as a ModelInferRequest; returns the answer's bytes or raises RpcError."""
    addresses = {
        f"{connection.laddr.ip}:{connection.laddr.port}"
        for connection in psutil.Process(server.process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    (address,) = addresses - {":".join(map(str, server.address))}
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield channel.unary_unary(INFER)


def test_bad_requests_get_their_status_and_a_message_and_leave_nothing(server: Any, infer: Any) -> None:
    def send(n_rounds: int, numbers: Iterator[int]) -> None:
        for number in itertools.islice(numbers, n_rounds):
            various = request(model_name=f"model-{number}" * 50).SerializeToString()
            for name, (data, status, message) in (CASES | {"various": (various, NOT_FOUND, "model")}).items():
                with pytest.raises(grpc.RpcError) as caught:
                    infer(data, timeout=60)
                assert (name, caught.value.code()) == (name, status), caught.value.details()
                assert message in caught.value.details(), (name, caught.value.details())
                assert 0 < len(caught.value.details()) < 1000
            assert infer(GOOD, timeout=60)

    numbers = itertools.count()
    send(50, numbers)
    (worker,) = workers_of(server)
    before = worker.memory_info().rss
    send(100, numbers)
    assert worker.memory_info().rss - before < 6 * 2**20


def test_an_output_that_is_asked_for_again_and_again_is_no_bomb(infer: Any) -> None:
    """A request of a megabyte must not have an answer of gigabytes."""

    def many(made: Any) -> None:
        for _ in range(100_000):
            made.outputs.add(name="scores")

    with pytest.raises(grpc.RpcError) as caught:
        infer(changed(many), timeout=60)
    assert caught.value.code() == INVALID
