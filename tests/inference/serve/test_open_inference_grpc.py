"""The Open Inference Protocol over gRPC, by way of unmodified clients: tritonclient, grpcio's health and reflection clients."""

import asyncio
import json
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_serving import CallServer, answering_models
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from modelyard.inference.serve.transport.grpc import Status

SmallModels = Any
KINDS = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8", "object": "BYTES"}


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[CallServer]:
    with answering_models(store, max_message_bytes=300_000) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: CallServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: CallServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def inputs_of(rows: dict[str, NDArray[Any]], module: Any = triton) -> list[Any]:
    inputs = []
    for name, array in rows.items():
        tensor = module.InferInput(name, list(array.shape), KINDS[str(array.dtype)])
        if array.dtype == object:  # the client takes bytes
            array = np.array([text.encode() for text in array.reshape(-1)], dtype=object).reshape(array.shape)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def assert_same(result: Any, expected: dict[str, NDArray[Any]]) -> None:
    for name, array in expected.items():
        got = result.as_numpy(name)
        if array.dtype == object:
            assert [text.decode() for text in got.reshape(-1)] == array.reshape(-1).tolist()
        else:
            np.testing.assert_allclose(got, array, rtol=1e-5, atol=1e-6)


class TestInfer:
    @pytest.mark.parametrize("name", ["tabular", "flights", "images"])
    def test_answers_are_those_of_the_runtime(self, client: Any, small_models: SmallModels, name: str) -> None:
        small = small_models[name]
        for n_rows in (1, 3, len(next(iter(small.rows.values())))):
            rows = {key: array[:n_rows] for key, array in small.rows.items()}
            result = client.infer(name, inputs_of(rows), request_id="one", client_timeout=20)
            assert_same(result, small.answer(rows))
            assert (result.get_response().model_name, result.get_response().id) == (name, "one")

    def test_by_way_of_the_asyncio_client(self, server: CallServer, small_models: SmallModels) -> None:
        small = small_models["tabular"]

        async def ask() -> list[Any]:
            async with triton_aio.InferenceServerClient(server.target) as client:
                asked = [
                    client.infer("tabular", inputs_of({"features": small.rows["features"][i : i + 1]}, triton_aio))
                    for i in (*range(7), *range(7))
                ]
                return list(await asyncio.gather(*asked))

        expected = small.answer()["scores"]
        for i, result in enumerate(asyncio.run(ask())):
            assert_same(result, {"scores": expected[i % 7 : i % 7 + 1]})

    def test_requested_outputs_in_their_order(self, client: Any, small_models: SmallModels) -> None:
        small = small_models["flights"]
        wanted = [triton.InferRequestedOutput("probabilities"), triton.InferRequestedOutput("label")]
        result = client.infer("flights", inputs_of(small.rows), outputs=wanted, client_timeout=20)
        assert [output.name for output in result.get_response().outputs] == ["probabilities", "label"]
        assert_same(result, small.answer())
        result = client.infer("flights", inputs_of(small.rows), outputs=wanted[:1], client_timeout=20)
        assert [output.name for output in result.get_response().outputs] == ["probabilities"]

    def test_classification(self, client: Any, small_models: SmallModels) -> None:
        small = small_models["tabular"]
        wanted = [triton.InferRequestedOutput("scores", class_count=1)]
        result = client.infer("tabular", inputs_of(small.rows), outputs=wanted, client_timeout=20)
        best = small.answer()["scores"].argmax(axis=1)
        told = [text.decode().split(":")[1:] for text in result.as_numpy("scores").reshape(-1)]
        assert told == [[str(i), ("benign", "malignant")[i]] for i in best]

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_compression(self, client: Any, small_models: SmallModels, algorithm: str) -> None:
        small = small_models["images"]
        result = client.infer("images", inputs_of(small.rows), compression_algorithm=algorithm, client_timeout=20)
        assert_same(result, small.answer())

    def test_a_request_that_asks_is_told_what_happened_to_it(self, client: Any, small_models: SmallModels) -> None:
        inputs = inputs_of(small_models["tabular"].rows)
        asked = (
            client.infer("tabular", inputs, parameters={"explain": True}, client_timeout=20),
            client.infer("tabular", inputs, headers={"modelyard-explain": "true"}, client_timeout=20),
        )
        for result in asked:
            timeline = json.loads(result.get_response().parameters["timeline"].string_param)
            assert (timeline["model"], timeline["rows"]) == ("tabular", 7)

    @pytest.mark.parametrize(
        ("change", "status", "text"),
        [
            ({"model_name": "nope"}, "NOT_FOUND", "no model 'nope'"),
            ({"model_version": "77"}, "NOT_FOUND", "version '77'"),
            ({"outputs": [triton.InferRequestedOutput("nope")]}, "INVALID_ARGUMENT", "unknown output 'nope'"),
            ({"inputs": []}, "INVALID_ARGUMENT", "'features' is missing"),
            ({"inputs": inputs_of({"features": np.zeros((1, 31), np.float32)})}, "INVALID_ARGUMENT", "must have the shape"),
            ({"inputs": inputs_of({"features": np.full((1, 30), np.nan, np.float32)})}, "INVALID_ARGUMENT", "holds NaN"),
            ({"inputs": inputs_of({"features": np.zeros((3000, 30), np.float32)})}, "RESOURCE_EXHAUSTED", "at most 300000"),
            ({"headers": {"modelyard-priority": "high"}}, "INVALID_ARGUMENT", "Modelyard-Priority"),
            ({"timeout": 1}, "DEADLINE_EXCEEDED", ""),
        ],
    )  # fmt: skip
    def test_what_cannot_be_answered_is_explained(
        self, client: Any, small_models: SmallModels, change: dict[str, Any], status: str, text: str
    ) -> None:
        good = {"model_name": "tabular", "inputs": inputs_of(small_models["tabular"].rows), "client_timeout": 20}
        with pytest.raises(InferenceServerException) as caught:
            client.infer(**{**good, **change})
        assert caught.value.status() == f"StatusCode.{status}"
        assert text in caught.value.message()

    def test_bytes_that_are_no_request(self, channel: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff", timeout=20)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(b"\xff", timeout=20)
        error = caught.value
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT

    def test_a_call_that_comes_too_late_is_refused_with_when_to_try_again(
        self, client: Any, small_models: SmallModels
    ) -> None:
        inputs = inputs_of(small_models["tabular"].rows)
        call = client._client_stub.ModelInfer
        request = triton.service_pb2.ModelInferRequest(model_name="tabular")
        request.inputs.extend([tensor._get_tensor() for tensor in inputs])
        request.raw_input_contents.extend([tensor._get_content() for tensor in inputs])
        request.parameters["timeout"].int64_param = 1
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=20)
        error: Any = caught.value
        trailers = dict(error.trailing_metadata())
        assert int(trailers["retry-after"]) >= 1
        assert int(trailers["grpc-retry-pushback-ms"]) >= 1

    def test_in_a_stream_a_refusal_says_so_in_its_place_and_explains_itself(
        self, channel: Any, small_models: SmallModels
    ) -> None:
        inputs = inputs_of(small_models["tabular"].rows)
        request = triton.service_pb2.ModelInferRequest(model_name="tabular", id="7")
        request.inputs.extend([tensor._get_tensor() for tensor in inputs])
        request.raw_input_contents.extend([tensor._get_content() for tensor in inputs])
        request.parameters["timeout"].int64_param = 1
        request.parameters["explain"].bool_param = True
        stream = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        (answer,) = stream(iter([request]), timeout=20)
        parameters = answer.infer_response.parameters
        assert "deadline" in answer.error_message
        assert answer.infer_response.id == "7"
        assert int(parameters["retry-after"].string_param) >= 1
        assert json.loads(parameters["modelyard-timeline"].string_param)["cause"] == "deadline"

    def test_a_client_that_leaves_is_not_computed_for(
        self, server: CallServer, channel: Any, small_models: SmallModels
    ) -> None:
        """`patient` runs for seconds on its own thread; calls behind it leave the queue with their client."""
        request = triton.service_pb2.ModelInferRequest(model_name="patient")
        request.inputs.add(name="n_steps", datatype="INT64", shape=[1])
        request.raw_input_contents.append(np.array([100], "<i8").tobytes())
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=triton.service_pb2.ModelInferRequest.SerializeToString,
        )
        before = len(server.answered)
        futures = [call.future(request, timeout=20) for _ in range(10)]
        server.wait_until(lambda: sum(one.busy for one in server.connections.open) >= 1)
        for future in futures[1:]:
            future.cancel()
        futures[0].result()
        server.wait_until(lambda: len(server.answered) - before >= 10)
        statuses = [one.status for one in server.answered[before : before + 10]]
        assert statuses.count(Status.OK) == 1
        assert statuses.count(Status.CANCELLED) == 9


class TestStreaming:
    def ask(self, client: Any, requests: list[tuple[str, list[Any]]], **stream: Any) -> list[tuple[Any, Any]]:
        """Return (result, error) of each request of one stream."""
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)), **stream)
        for i, (name, inputs) in enumerate(requests):
            client.async_stream_infer(name, inputs, request_id=str(i))
        got = [answers.get(timeout=20) for _ in requests]
        client.stop_stream()
        return got

    def test_answers_come_in_order_each_marked_as_the_last(self, client: Any, small_models: SmallModels) -> None:
        """Also where one model computes on a thread and another on the loop."""
        patient = inputs_of({"n_steps": np.array([20], np.int64)})
        tabular = inputs_of({"features": small_models["tabular"].rows["features"][:1]})
        requests = [("patient", patient), ("tabular", tabular)] * 20
        patience = {"modelyard-timeout-ms": "20000"}
        for i, (result, error) in enumerate(self.ask(client, requests, headers=patience)):
            assert error is None
            response = result.get_response()
            assert (response.id, response.model_name) == (str(i), requests[i][0])
            assert response.parameters["triton_final_response"].bool_param is True

    def test_an_error_stands_in_its_requests_place_and_the_stream_goes_on(
        self, client: Any, small_models: SmallModels
    ) -> None:
        good = inputs_of({"features": small_models["tabular"].rows["features"][:1]})
        got = self.ask(client, [("tabular", good), ("nope", good), ("tabular", good)])
        assert [error is None for _, error in got] == [True, False, True]
        assert "no model 'nope'" in got[1][1].message()

    def test_real_errors_on_request(self, client: Any, small_models: SmallModels) -> None:
        good = inputs_of({"features": small_models["tabular"].rows["features"][:1]})
        got = self.ask(client, [("nope", good)], headers={"triton_grpc_error": "true"})
        assert got[0][1].status() == "StatusCode.NOT_FOUND"

    def test_many_requests_at_once(self, client: Any, small_models: SmallModels) -> None:
        """More than one stream may have unanswered: the client is held back meanwhile."""
        rows = small_models["tabular"].rows
        expected = small_models["tabular"].answer()["scores"]
        requests = [("tabular", inputs_of({"features": rows["features"][i % 7 : i % 7 + 1]})) for i in range(2000)]
        for i, (result, error) in enumerate(self.ask(client, requests)):
            assert error is None
            assert_same(result, {"scores": expected[i % 7 : i % 7 + 1]})

    def test_a_streams_deadline_ends_it(self, client: Any) -> None:
        slow = inputs_of({"n_steps": np.array([3000], np.int64)})
        ((_, error),) = self.ask(client, [("patient", slow)], stream_timeout=0.2)
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED"

    def test_draining_ends_an_idle_stream(self, store: Path, small_models: SmallModels) -> None:
        good = inputs_of({"features": small_models["tabular"].rows["features"][:1]})
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        with answering_models(store) as server, triton.InferenceServerClient(server.target) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer("tabular", good)
            assert answers.get(timeout=20)[1] is None
            server.drain()
            assert answers.get(timeout=20)[1].status() == "StatusCode.UNAVAILABLE"
            server.wait_none_open()


class TestServer:
    def test_health(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tabular")
        assert client.is_model_ready("tabular", "1")
        assert not client.is_model_ready("tabular", "2")
        assert not client.is_model_ready("nope")

    def test_metadata(self, client: Any) -> None:
        server = client.get_server_metadata(as_json=True)
        assert server["name"] == "modelyard"
        assert {"binary_tensor_data", "statistics", "model_repository", "logging"} <= set(server["extensions"])
        assert "system_shared_memory" not in server["extensions"]
        model = client.get_model_metadata("tabular", as_json=True)
        assert model["inputs"] == [{"name": "features", "datatype": "FP32", "shape": ["-1", "30"]}]
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.get_model_metadata("nope")

    def test_configuration(self, client: Any) -> None:
        config = client.get_model_config("tabular", as_json=True)["config"]
        assert config["input"] == [{"name": "features", "data_type": "TYPE_FP32", "dims": ["30"]}]
        assert client.get_model_config("flights", as_json=True)["config"]["input"][2]["data_type"] == "TYPE_STRING"

    def test_statistics_count(self, client: Any, small_models: SmallModels) -> None:
        def counted() -> int:
            stats = client.get_inference_statistics("tabular", as_json=True)["model_stats"][0]
            return int(stats["inference_stats"]["success"].get("count", 0))

        before = counted()
        client.infer("tabular", inputs_of(small_models["tabular"].rows), client_timeout=20)
        assert counted() == before + 1
        names = [one["name"] for one in client.get_inference_statistics(as_json=True)["model_stats"]]
        assert sorted(set(names)) == ["flights", "images", "patient", "tabular"]

    def test_repository(self, client: Any) -> None:
        index = client.get_model_repository_index(as_json=True)["models"]
        assert {(one["name"], one["version"], one["state"]) for one in index} >= {("tabular", "1", "READY")}
        client.load_model("tabular")
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.load_model("nope")
        with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*not taken from requests"):
            client.load_model("tabular", config="{}", files={"file:1/model.onnx": b"abc"})

    def test_settings(self, client: Any) -> None:
        assert client.get_log_settings(as_json=True)["settings"]["log_verbose_level"]["uint32_param"] == 0
        changed = client.update_log_settings({"log_verbose_level": 1}, as_json=True)
        assert changed["settings"]["log_verbose_level"]["uint32_param"] == 1
        client.update_log_settings({"log_verbose_level": 0})
        with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*cannot be changed"):
            client.update_log_settings({"log_info": False})
        changed = client.update_trace_settings("tabular", {"trace_level": ["OFF"], "trace_rate": "7"}, as_json=True)
        assert changed["settings"]["trace_rate"]["value"] == ["7"]
        back = client.update_trace_settings("tabular", {"trace_level": None, "trace_rate": None}, as_json=True)
        assert back["settings"]["trace_rate"]["value"] == ["1000"]

    def test_what_is_not_offered_is_unimplemented(self, client: Any) -> None:
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.get_system_shared_memory_status()


class TestStandardServices:
    def test_health_checking(self, channel: Any) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=20)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.NOT_FOUND

    def test_watching_health(self, channel: Any) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == 1
        watch.cancel()
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nope"), timeout=20)
        assert next(unknown).status == 3
        unknown.cancel()

    def test_who_watches_is_told_of_a_change(self, store: Path) -> None:
        with answering_models(store) as server, grpc.insecure_channel(server.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
            assert next(watch).status == 1
            assert server.repository is not None
            server.on_loop(server.repository.drain)
            server.later(0.0)
            assert next(watch).status == 2
            server.drain()
            with pytest.raises(grpc.RpcError):
                next(watch)
            server.wait_none_open()

    def test_a_call_can_be_made_from_reflection_alone(self, channel: Any, small_models: SmallModels) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(database.get_services())
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelMetadata"]
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelMetadata",
            request_serializer=lambda made: made.SerializeToString(),
            response_deserializer=response.FromString,
        )
        assert call(request(name="images"), timeout=20).inputs[0].name == "image"
        with pytest.raises(KeyError):
            pool.FindServiceByName("inference.Nope")


def test_many_clients_at_once(server: CallServer, small_models: SmallModels) -> None:
    small = small_models["images"]
    expected = small.answer()["probabilities"]
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with triton.InferenceServerClient(server.target) as client:
                for i in range(40):
                    rows = {"image": small.rows["image"][i % 5 : i % 5 + 1]}
                    assert_same(
                        client.infer("images", inputs_of(rows), client_timeout=20),
                        {"probabilities": expected[i % 5 : i % 5 + 1]},
                    )
        except BaseException as exc:  # noqa: BLE001  # told by the test's thread
            failures.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


class TestServe:
    """`modelyard serve --grpc-port`, as a user would start it."""

    def free_port(self) -> int:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port: int = taken.getsockname()[1]
            return port

    def test_workers_share_the_port_and_sigterm_ends_in_flight_calls_well(
        self, store: Path, serve: Any, small_models: SmallModels
    ) -> None:
        port = self.free_port()
        small = small_models["tabular"]
        with serve(store, "--grpc-port", str(port), "--workers", "2") as server:
            clients = [
                triton.InferenceServerClient(f"127.0.0.1:{port}", channel_args=[("grpc.use_local_subchannel_pool", 1)])
                for _ in range(4)
            ]
            for client in clients:
                assert_same(client.infer("tabular", inputs_of(small.rows), client_timeout=20), small.answer())
            answers: queue.Queue[Any] = queue.Queue()
            slow = inputs_of({"n_steps": np.array([1000], np.int64)})
            for client in clients:
                client.async_infer(
                    "patient", slow, lambda result, error: answers.put((result, error)), client_timeout=20
                )
            stats = clients[0].get_inference_statistics("tabular", as_json=True)["model_stats"][0]
            assert int(stats["inference_stats"]["success"]["count"]) == 4  # of both workers
            server.terminate()
            for _ in clients:
                result, error = answers.get(timeout=20)
                assert error is None, error
                assert result.as_numpy("value").shape == (256, 256)
            assert server.process.wait(20) == 0
            for client in clients:
                client.close()
