"""The Open Inference Protocol, asked by the unmodified tritonclient."""

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from numpy.testing import assert_allclose, assert_array_equal
from tritonclient.utils import np_to_triton_dtype


@pytest.fixture
def client(server: Any) -> Any:
    host, port = server.address
    with triton.InferenceServerClient(f"{host}:{port}") as client:
        yield client


def ask(client: Any, small: Any, *, binary: bool, **options: Any) -> Any:
    inputs = []
    for spec in small.signature.inputs:
        array = small.rows[spec.name]
        tensor = triton.InferInput(spec.name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=binary)
        inputs.append(tensor)
    if not binary:
        options["outputs"] = [
            triton.InferRequestedOutput(spec.name, binary_data=False) for spec in small.signature.outputs
        ]
    return client.infer(small.name, inputs, **options)


def post(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    """Return status and JSON of a POST."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, names)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("name", ["tabular", "images"])
def test_an_unmodified_client_gets_the_numbers_onnxruntime_computes(
    client: Any, small_models: Any, name: str, binary: bool
) -> None:
    small = small_models[name]
    answer = ask(client, small, binary=binary)
    for output, expected in small.answer().items():
        assert_allclose(answer.as_numpy(output), expected, rtol=1e-5, atol=1e-5)
        assert answer.as_numpy(output).dtype == expected.dtype


def test_text_integers_and_missing_values_travel_in_binary(client: Any, small_models: Any) -> None:
    small = small_models["flights"]
    answer = ask(client, small, binary=True)
    expected = small.answer()
    assert_allclose(answer.as_numpy("probabilities"), expected["probabilities"], rtol=1e-5, atol=1e-5)
    assert_array_equal([text.decode() for text in answer.as_numpy("label")], expected["label"])


def test_text_integers_and_missing_values_travel_as_json(server: Any, small_models: Any) -> None:
    """A missing number is null, since JSON has no NaN; that is why this one is not asked by the client."""
    small = small_models["flights"]
    data = {name: array.tolist() for name, array in small.rows.items()}
    data["distance"][1] = None
    tensors = [
        {"name": spec.name, "shape": [5], "datatype": spec.datatype, "data": data[spec.name]}
        for spec in small.signature.inputs
    ]
    status, answer = post(f"{server.url}/v2/models/flights/infer", json.dumps({"inputs": tensors}).encode())
    assert status == 200
    outputs = {output["name"]: output for output in answer["outputs"]}
    expected = small.answer()
    assert outputs["label"]["data"] == expected["label"].tolist()
    assert outputs["probabilities"]["shape"] == [5, 2]
    assert_allclose(outputs["probabilities"]["data"], expected["probabilities"].reshape(-1), rtol=1e-5, atol=1e-5)


def test_the_client_sees_health_metadata_and_versions(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("flights")
    assert client.is_model_ready("flights", "1")
    assert client.get_server_metadata()["extensions"][:4] == [
        "binary_tensor_data",
        "classification",
        "parameters",
        "schedule_policy",
    ]
    assert "trace" not in client.get_server_metadata()["extensions"]  # there is nowhere to send traces to
    metadata = client.get_model_metadata("flights", "1")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"][2] == {"name": "carrier", "datatype": "BYTES", "shape": [-1]}
    assert metadata["outputs"][1] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}


def test_id_version_and_requested_outputs_come_back(client: Any, small_models: Any) -> None:
    wanted = [triton.InferRequestedOutput("probabilities"), triton.InferRequestedOutput("label", binary_data=False)]
    answer = ask(client, small_models["images"], binary=True, request_id="a-7", model_version="1", outputs=wanted)
    response = answer.get_response()
    assert response["id"] == "a-7"
    assert (response["model_name"], response["model_version"]) == ("images", "1")
    assert [output["name"] for output in response["outputs"]] == ["probabilities", "label"]
    assert "data" not in response["outputs"][0]
    assert len(response["outputs"][1]["data"]) == 5


def test_nested_and_flat_data_are_the_same(server: Any, small_models: Any) -> None:
    row = small_models["tabular"].rows["features"][:2]
    answers = []
    for data in (row.tolist(), row.reshape(-1).tolist()):
        tensor = {"name": "features", "shape": [2, 30], "datatype": "FP32", "data": data}
        answers.append(post(f"{server.url}/v2/models/tabular/infer", json.dumps({"inputs": [tensor]}).encode()))
    assert answers[0] == answers[1]
    assert answers[0][0] == 200


def test_faults_of_the_client_are_4xx_and_say_what_is_wrong(server: Any) -> None:
    good = {"name": "features", "shape": [1, 30], "datatype": "FP32", "data": [0.5] * 30}
    infer = f"{server.url}/v2/models/tabular/infer"
    cases: list[tuple[Any, str]] = [
        ([], "must be an object"),
        ({}, "inputs must be a list"),
        ({"inputs": [], "id": "x"}, "'features' is missing"),
        ({"inputs": [good], "id": 7}, "id must be a string"),
        ({"inputs": [good, good]}, "given twice"),
        ({"inputs": [good | {"name": "other"}]}, "unknown input 'other'"),
        ({"inputs": [good | {"datatype": "FP64"}]}, "datatype FP32"),
        ({"inputs": [good | {"shape": [1, 31]}]}, "shape [-1, 30]"),
        ({"inputs": [good | {"shape": [True, 30]}]}, "shape [-1, 30]"),
        ({"inputs": [good | {"shape": [0, 30], "data": []}]}, "no rows"),
        ({"inputs": [good | {"shape": [2**62, 30]}]}, "takes 138"),
        ({"inputs": [good | {"data": [0.5] * 29}]}, "has 29 elements"),
        ({"inputs": [good | {"data": [[0.5] * 29 + [[1]]]}]}, "data[29]"),
        ({"inputs": [good | {"data": [0.5] * 29 + ["NaN"]}]}, "data[29]"),
        ({"inputs": [good | {"data": [0.5] * 29 + [None]}]}, "missing"),
        ({"inputs": [good | {"data": [0.5] * 29 + [True]}]}, "got True"),
        ({"inputs": [good | {"data": [0.5] * 29 + [1e300]}]}, "got 1e+300"),
        ({"inputs": [good | {"data": 5}]}, "must be a list"),
        ({"inputs": [good | {"parameters": {"binary_data_size": 120}}]}, "either data or"),
        ({"inputs": [good | {"parameters": 5}]}, "must be an object"),
        ({"inputs": [good], "outputs": [{"name": "x"}]}, "unknown output 'x'"),
        ({"inputs": [good], "outputs": [{"name": "scores", "parameters": {"classification": -1}}]}, "classification"),
        ({"inputs": [good], "parameters": {"timeout": -1}}, "microseconds"),
        ({"inputs": [good], "parameters": {"priority": "high"}}, "priority"),
        ({"inputs": [good], "parameters": {"binary_data_output": "yes"}}, "true or false"),
    ]
    for body, message in cases:
        status, answer = post(infer, json.dumps(body).encode())
        assert (status, message in answer["error"]) == (400, True), (body, status, answer)
    status, answer = post(infer, b'{"inputs": [NaN')
    assert (status, "not valid JSON" in answer["error"]) == (400, True)
    for model in ("nobody", "tabular/versions/9"):
        status, answer = post(f"{server.url}/v2/models/{model}/infer", json.dumps({"inputs": [good]}).encode())
        assert (status, "there are:" in answer["error"]) == (404, True)


def test_lying_binary_lengths_are_refused(server: Any) -> None:
    infer = f"{server.url}/v2/models/tabular/infer"

    def ask_binary(size: Any, tail: bytes, length: str | None = None) -> tuple[int, str]:
        tensor = {"name": "features", "shape": [1, 30], "datatype": "FP32", "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        status, answer = post(infer, head + tail, Inference_Header_Content_Length=length or str(len(head)))
        return status, answer.get("error", "")

    row = np.zeros(30, dtype="<f4").tobytes()
    assert ask_binary(120, row)[0] == 200
    for size, tail, length, message in [
        (120, row[:-1], None, "119 bytes are left"),
        (119, row[:-1], None, "takes 120 bytes"),
        (120, row + b"x", None, "1 bytes are left"),
        (-1, row, None, "number of bytes"),
        (2**62, row, None, "bytes are left"),
        ("120", row, None, "number of bytes"),
        (120, row, "999999", "must be from 0"),
        (120, row, "-5", "must be from 0"),
        (120, row, "0", "takes 120 bytes"),
        (120, row, "10", "not valid JSON"),
        (120, np.full(30, np.nan, dtype="<f4").tobytes(), None, "NaN"),
    ]:
        status, error = ask_binary(size, tail, length)
        assert (status, message in error) == (400, True), (size, length, status, error)


def test_damaged_binary_text_is_refused(server: Any) -> None:
    def ask_text(raw: bytes) -> tuple[int, Any]:
        tensors = [
            {"name": "dep_hour", "shape": [1], "datatype": "INT64", "data": [7]},
            {"name": "distance", "shape": [1], "datatype": "FP32", "data": [100]},
            {"name": "carrier", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}},
        ]
        head = json.dumps({"inputs": tensors}).encode()
        return post(f"{server.url}/v2/models/flights/infer", head + raw, Inference_Header_Content_Length=str(len(head)))

    assert ask_text(b"\x02\x00\x00\x00UA")[0] == 200
    for raw, message in [
        (b"\x02\x00", "within the length"),
        (b"\xff\xff\xff\x7fUA", "more than there are"),
        (b"\x02\x00\x00\x00\xff\xfe", "not UTF-8"),
        (b"\x01\x00\x00\x00U\x01\x00\x00\x00A", "2 elements"),
        (b"", "0 elements"),
    ]:
        status, answer = ask_text(raw)
        assert (status, message in answer["error"]) == (400, True), (raw, status, answer)


def test_the_wrong_verb_is_405_and_names_the_right_one(server: Any) -> None:
    request = urllib.request.Request(f"{server.url}/v2/models/tabular/infer", method="GET")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    with refused.value as answer:
        assert answer.code == 405
        assert answer.headers["Allow"] == "POST"
