"""TensorFlow Serving's REST protocol as its guide has it: predict in rows and in columns, classify, regress, status, metadata."""

import asyncio
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import Compute, serving
from numpy.typing import NDArray
from side_server import ask as get

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.inference.serve.transport.messages import Response

Arrays = Mapping[str, NDArray[Any]]
COLUMNS = (
    TensorSpec(name="hour", datatype="INT64", shape=(BATCH,)),
    TensorSpec(name="miles", datatype="FP32", shape=(BATCH,), nullable=True),
    TensorSpec(name="carrier", datatype="BYTES", shape=(BATCH,), nullable=True),
)
SCORES = TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 2), labels=("late", "on_time"))
LABEL = TensorSpec(name="label", datatype="BYTES", shape=(BATCH,))
FLIGHTS = Signature(inputs=COLUMNS, outputs=(LABEL, SCORES))
POINTS = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(BATCH, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(BATCH,)),),
)


def flights(inputs: Arrays) -> Arrays:
    late = np.where(np.isnan(inputs["miles"]), 0.5, (inputs["hour"] > 12) * 0.75).astype(np.float32)
    label = np.array(
        [f"{carrier}:{hour}" for carrier, hour in zip(inputs["carrier"], inputs["hour"], strict=True)], dtype=object
    )
    return {"label": label, "scores": np.stack([late, 1 - late], axis=1)}


NAMED = Signature(
    inputs=COLUMNS,
    outputs=tuple(TensorSpec(name=name, datatype="BYTES", shape=(BATCH,)) for name in ("raw_bytes", "raw")),
)


def named(inputs: Arrays) -> Arrays:
    texts = flights(inputs)["label"]
    plain = np.array([text.replace(":", "") for text in texts], dtype=object)
    return {"raw_bytes": plain, "raw": plain}


def total(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"].sum(axis=1)}


def ask(
    path: str, body: Any = b"", method: str = "POST", of: Signature = FLIGHTS, compute: Compute = flights
) -> Response:
    async def main() -> Response:
        async with serving(of, compute) as server:
            return await server.answer(path, body, method)

    return asyncio.run(main())


def answered(
    path: str, body: Any = b"", method: str = "POST", of: Signature = FLIGHTS, compute: Compute = flights
) -> Any:
    response = ask(path, body, method, of, compute)
    assert response.status == 200, response.body
    return json.loads(response.body)


def refused(path: str, body: Any, of: Signature = FLIGHTS, compute: Compute = flights) -> str:
    response = ask(path, body, of=of, compute=compute)
    assert response.status == 400, response.body
    return str(json.loads(response.body)["error"])


ROWS = [{"hour": 20, "miles": 100, "carrier": "UA"}, {"hour": 7, "miles": None, "carrier": "DL"}, {"hour": 8}]
ANSWERS = [
    {"label": "UA:20", "scores": {"late": 0.75, "on_time": 0.25}},
    {"label": "DL:7", "scores": {"late": 0.5, "on_time": 0.5}},
    {"label": ":8", "scores": {"late": 0.5, "on_time": 0.5}},
]


class TestPredict:
    def test_rows_are_answered_row_by_row(self) -> None:
        assert answered("/v1/models/m:predict", {"instances": ROWS}) == {"predictions": ANSWERS}

    def test_columns_are_answered_in_columns(self) -> None:
        columns = {"hour": [20, 7], "miles": [100, None], "carrier": ["UA", "DL"]}
        assert answered("/v1/models/m:predict", {"inputs": columns}) == {
            "outputs": {"label": ["UA:20", "DL:7"], "scores": [[0.75, 0.25], [0.5, 0.5]]}
        }

    def test_a_single_row_may_leave_out_its_batch_axis(self) -> None:
        assert answered("/v1/models/m:predict", {"inputs": ROWS[0]}) == {
            "outputs": {"label": "UA:20", "scores": [0.75, 0.25]}
        }

    def test_a_model_with_one_input_and_one_output_takes_and_gives_bare_values(self) -> None:
        def one(body: Any) -> Any:
            return answered("/v1/models/m:predict", body, of=POINTS, compute=total)

        assert (
            one({"instances": [[1, 2], [3, 4]]})
            == one({"instances": [{"x": [1, 2]}, {"x": [3, 4]}]})
            == {"predictions": [3, 7]}
        )
        assert one({"inputs": [[1, 2], [3, 4]]}) == one({"inputs": {"x": [[1, 2], [3, 4]]}}) == {"outputs": [3, 7]}
        assert one({"inputs": [1, 2]}) == {"outputs": 3}

    @pytest.mark.parametrize("name", ["", "serving_default", "predict"])
    def test_the_signature_may_be_named(self, name: str) -> None:
        assert answered("/v1/models/m:predict", {"signature_name": name, "instances": ROWS[:1]}) == {
            "predictions": ANSWERS[:1]
        }

    def test_nan_is_a_missing_value_as_null_is(self) -> None:
        body = b'{"instances": [{"hour": 7, "miles": NaN, "carrier": "DL"}]}'
        assert answered("/v1/models/m:predict", body) == {"predictions": ANSWERS[1:2]}

    def test_b64_stands_for_text_anywhere(self) -> None:
        text = {"b64": base64.b64encode("é✈".encode()).decode()}
        body = {"instances": [{"hour": 7, "carrier": text}]}
        assert answered("/v1/models/m:predict", body)["predictions"][0]["label"] == "é✈:7"
        columns = {"inputs": {"hour": [7], "miles": [1], "carrier": [text]}}
        assert answered("/v1/models/m:predict", columns)["outputs"]["label"] == ["é✈:7"]

    @pytest.mark.parametrize("path", ["m:predict", "m/versions/1:predict", "m/versions/0:predict", "m:Predict"])
    def test_versions_and_case_of_the_path(self, path: str) -> None:
        for root in ("/v1/models/", "/V1/Models/"):
            assert answered(root + path, {"instances": ROWS}) == {"predictions": ANSWERS}

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"inputs": {"hour": [1, 2], "miles": [1], "carrier": ["a"]}}, "all equally long, got {'hour': 2"),
            ({"inputs": {"hour": [1, 2], "miles": 1, "carrier": ["a", "b"]}}, "all equally long"),
            ({"inputs": {"hours": [1]}}, "inputs: unknown column 'hours'"),
            ({"inputs": [1, 2]}, "inputs must be an object of columns"),
            ({"inputs": None}, "inputs must be an object of columns"),
            ({"instances": {"hour": 1}}, "instances must be a list of rows"),
            ({"instances": [{"hour": 1, "carrier": {"b64": "!"}}]}, "b64 must be the base64 of UTF-8 text, got '!'"),
            ({"instances": [{"hour": 1, "carrier": {"b64": "é"}}]}, "b64 must be"),
            ({"instances": [{"hour": 1, "carrier": {"b64": "/w=="}}]}, "b64 must be"),
            ({"instances": [{"hour": 1, "carrier": {"b64": [1]}}]}, "b64 must be"),
            ({"instances": ROWS, "signature_name": ["predict"]}, "signature_name must be serving_default"),
            (b'{"instances": [{"hour": Infinity}]}', "'hour' must be a whole number"),
            (b'{"instances": [{"hour": 7, "miles": NaN, "carrier": "\\ud800"}]}', "not valid JSON"),
            (b'{"instances": [NaN', "not valid JSON"),
            ('{"instances": [NaN]}'.encode("utf-16"), "not valid JSON"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named(self, body: Any, message: str) -> None:
        assert message in refused("/v1/models/m:predict", body)


class TestBase64:
    """Texts of outputs called …_bytes are written in base64, as TensorFlow Serving does."""

    def test_it_is_so_in_rows_and_in_columns(self) -> None:
        def asked(body: Any) -> Any:
            return answered("/v1/models/m:predict", body, of=NAMED, compute=named)

        e, nothing = {"b64": base64.b64encode("é7".encode()).decode()}, {"b64": "Nw=="}
        rows = [{"hour": 7, "miles": 1, "carrier": "é"}, {"hour": 7, "miles": 1, "carrier": ""}]
        assert asked({"instances": rows}) == {
            "predictions": [{"raw_bytes": e, "raw": "é7"}, {"raw_bytes": nothing, "raw": "7"}]
        }
        assert asked({"inputs": rows[0]}) == {"outputs": {"raw_bytes": e, "raw": "é7"}}
        columns = {"hour": [7, 7], "miles": [1, 1], "carrier": ["é", ""]}
        assert asked({"inputs": columns}) == {"outputs": {"raw_bytes": [e, nothing], "raw": ["é7", "7"]}}

    def test_the_open_inference_protocol_gives_the_text(self) -> None:
        tensors = [
            {"name": spec.name, "datatype": spec.datatype, "shape": [1], "data": [value]}
            for spec, value in zip(COLUMNS, (7, 1, "é"), strict=True)
        ]
        outputs = answered("/v2/models/m/infer", {"inputs": tensors}, of=NAMED, compute=named)["outputs"]
        assert [output["data"] for output in outputs] == [["é7"], ["é7"]]


class TestExamples:
    def test_classify_gives_pairs_of_label_and_score(self) -> None:
        body = {"examples": [{"hour": 20}, {"hour": 7}], "context": {"miles": 10, "carrier": "UA"}}
        assert answered("/v1/models/m:classify", body) == {
            "results": [[["late", 0.75], ["on_time", 0.25]], [["late", 0.0], ["on_time", 1.0]]]
        }

    def test_an_example_says_more_than_the_context(self) -> None:
        body = {"examples": [{"hour": 7}], "context": {"hour": 20, "miles": 10, "carrier": "UA"}}
        assert answered("/v1/models/m:classify", body)["results"] == [[["late", 0.0], ["on_time", 1.0]]]

    def test_regress_gives_one_number_a_row(self) -> None:
        body = {"examples": [{"x": [1, 2]}, {"x": [3, 4]}]}
        assert answered("/v1/models/m:regress", body, of=POINTS, compute=total) == {"results": [3, 7]}

    @pytest.mark.parametrize(
        ("path", "body", "message"),
        [
            ("/v1/models/m:classify", {}, "examples must be a list"),
            ("/v1/models/m:classify", {"examples": [1]}, "examples must be a list"),
            ("/v1/models/m:classify", {"examples": [], "context": {}}, "no rows"),
            ("/v1/models/m:classify", {"examples": [{"hour": 7}], "context": []}, "context must be an object"),
            (
                "/v1/models/m:regress",
                {"examples": [{"hour": 7}]},
                "no regression with one number per row; use :predict",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, path: str, body: Any, message: str) -> None:
        assert message in refused(path, body)

    def test_a_model_without_scores_does_not_classify(self) -> None:
        body = {"examples": [{"x": [1, 2]}]}
        assert "no scores per class" in refused("/v1/models/m:classify", body, of=POINTS, compute=total)


@pytest.mark.parametrize("path", ["m:explain", "m/versions/1:explain", "m/labels/champion:Explain"])
def test_kserves_explain_is_404_with_what_there_is_instead(path: str) -> None:
    response = ask(f"/v1/models/{path}", {"instances": ROWS})
    assert response.status == 404
    assert "explanations of predictions are not offered here; POST the rows to :predict" in response.body.decode()


class TestStatus:
    def test_a_version_is_available(self) -> None:
        status = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        for path in ("/v1/models/m", "/v1/models/m/versions/1"):
            assert answered(path, method="GET") == {"name": "m", "ready": True, "model_version_status": [status]}
        assert answered("/v1/models", method="GET") == {"models": ["m"]}

    def test_a_version_that_its_first_request_loads_is_ready_in_every_protocol(self, store: Path, serve: Any) -> None:
        """A client that waited for it to be ready would wait for ever."""
        with serve(store, "--model", "tabular", "--load", "lazy") as server:
            status, told = get(f"{server.url}/v1/models/tabular")
            assert (status, told["ready"], told["model_version_status"][0]["state"]) == (200, True, "AVAILABLE")
            assert get(f"{server.url}/v2/models/tabular/ready") == (200, {"name": "tabular", "ready": True})

    def test_metadata_is_in_tensorflows_words(self) -> None:
        told = answered("/v1/models/m/metadata", method="GET")
        assert told["model_spec"] == {"name": "m", "signature_name": "", "version": "1"}
        signature = told["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["inputs"]["hour"]["dtype"] == "DT_INT64"
        assert signature["outputs"]["scores"]["tensor_shape"]["dim"] == [
            {"size": "-1", "name": ""},
            {"size": "2", "name": ""},
        ]

    @pytest.mark.parametrize(
        "path", ["/v1/models/n", "/v1/models/m/versions/2", "/v1/models/m/labels/canary", "/v1/models/m/versions/x"]
    )
    def test_what_is_not_there_is_404(self, path: str) -> None:
        assert ask(path, method="GET").status == 404
