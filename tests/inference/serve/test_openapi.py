"""The OpenAPI document says what the server does: what it takes, what it answers, and where."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from side_server import OPERATIONS, SideServer, ask, side_server

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.rows import rows_to_arrays
from modelyard.inference.serve.models.repository import Pick
from modelyard.inference.serve.protocols.json_schema import prediction_schema, row_schema
from modelyard.inference.serve.protocols.openapi import Described, document

Json = dict[str, Any]

MODELS = ("flights", "images", "patient", "tabular")
HOUR = TensorSpec(name="hour", datatype="INT8", shape=(BATCH,))
MILES = TensorSpec(name="miles", datatype="FP16", shape=(BATCH,), nullable=True, unit="mi", description="Great circle")
CARRIER = TensorSpec(name="carrier", datatype="BYTES", shape=(BATCH,), nullable=True, categories=("UA", "DL"))
NIGHT = TensorSpec(name="night", datatype="BOOL", shape=(BATCH,))
PIXELS = TensorSpec(name="pixels", datatype="UINT8", shape=(BATCH, 2, 2, 1))
WORDS = TensorSpec(name="words", datatype="BYTES", shape=(BATCH, "n"))
SCORE = TensorSpec(name="score", datatype="FP32", shape=(BATCH,))
TABLE = Signature(inputs=(HOUR, MILES, CARRIER, NIGHT), outputs=(SCORE,))


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[SideServer]:
    with side_server(store, [Pick(name, 1) for name in MODELS]) as running:
        yield running


@pytest.fixture(scope="module")
def openapi(server: SideServer) -> Json:
    status, found = ask(f"{server.url}/openapi.json")
    assert status == 200
    assert isinstance(found, dict)
    return found


def fits(value: Any, schema: Json, components: Json | None = None) -> bool:
    return jsonschema.Draft202012Validator({**schema, "components": components or {}}).is_valid(value)


def takes(signature: Signature, row: Any) -> bool:
    try:
        rows_to_arrays([row], signature)
    except RequestError:
        return False
    return True


# The document itself.


def test_the_document_is_valid_openapi(server: SideServer, openapi: Json) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(openapi)
    validator.validate(ask(f"{server.url}/v2/models/flights/openapi.json")[1])


def test_every_route_is_described_and_nothing_else(server: SideServer, openapi: Json) -> None:
    """Beside the page, which is for people, and :explain, which only says that there is no such thing."""

    def anywhere(path: str) -> str:
        return re.sub(r"\{\w+\}", "*", path)

    routes = {(method, anywhere(path)) for method, path in server.paths}
    routes = {(method, path) for method, path in routes if not path.startswith("/docs") and path != "/"}
    routes = {(method, path) for method, path in routes if not path.endswith(":explain")}
    told = {
        (method.upper(), anywhere(re.sub(rf"/models/({'|'.join(MODELS)})(?=[:/])", "/models/{model}", path)))
        for path, operations in openapi["paths"].items()
        for method in operations
    }
    versioned = {(method, path) for method, path in routes if re.search(r"/(versions|labels)/\*(:|/infer)", path)}
    regress = {("POST", "/v1/models/*:regress")}  # none of the models is a regression
    slash = {("GET", "/v2/")}  # the same as /v2
    assert told == routes - versioned - regress - slash


def test_a_model_has_a_document_of_its_own(server: SideServer) -> None:
    _, found = ask(f"{server.url}/v2/models/flights/openapi.json")
    assert set(found["paths"]) == {
        "/v1/models/flights:predict",
        "/v1/models/flights:classify",
        "/v2/models/flights/infer",
    }
    status, answer = ask(f"{server.url}/v2/models/nobody/openapi.json")
    assert status == 404
    assert "nobody" in answer["error"]


def test_other_versions_stand_at_their_own_paths() -> None:
    described = [Described("m", 3, TABLE), Described("m", 2, TABLE, is_default=False)]
    paths = document(described)["paths"]
    assert {"/v1/models/m:predict", "/v1/models/m/versions/2:predict", "/v2/models/m/versions/2/infer"} <= set(paths)
    ids = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(ids) == len(set(ids))


def test_classify_and_regress_are_described_where_they_are_answered(server: SideServer, openapi: Json) -> None:
    for name in MODELS:
        example = openapi["components"]["schemas"][f"{name}.1.Row"].get("examples", [{}])[0]
        for verb in ("classify", "regress"):
            _, answer = ask(f"{server.url}/v1/models/{name}:{verb}", {"examples": [example]})
            is_answered = "use :predict" not in answer.get("error", "")
            assert (f"/v1/models/{name}:{verb}" in openapi["paths"]) == is_answered, (name, verb, answer)


def test_the_document_follows_the_state_of_the_models(tmp_path: Path, publish: Any, small_models: Any) -> None:
    for _ in range(2):
        publish(tmp_path, small_models["tabular"], "m")
    with side_server(tmp_path, [Pick("m", 1)]) as server:
        assert "/v1/models/m:predict" in ask(f"{server.url}/openapi.json")[1]["paths"]

    def fails(pick: Pick) -> Any:
        raise OSError("the disk has gone")

    with side_server(tmp_path, [Pick("m", 1)], load_one=fails) as server:
        found = ask(f"{server.url}/openapi.json")[1]
        assert "/v1/models/m:predict" not in found["paths"]
        assert "/v2/health/ready" in found["paths"]


# What is taken.


def test_the_examples_of_the_document_are_answered_as_it_says(server: SideServer, openapi: Json) -> None:
    n_asked = 0
    for path, operations in openapi["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" not in content:
            continue
        n_asked += 1
        assert fits(content["example"], content["schema"], openapi["components"]), path
        status, answer = ask(server.url + path, content["example"], Modelyard_Explain="true")
        assert status == 200, answer
        schema = operations["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert fits(answer, schema, openapi["components"]), (path, answer)
        assert answer["timeline"]["summary"].startswith("arrived")
    assert n_asked >= 6  # an image is too long to be shown


def test_all_forms_of_a_request_are_answered_as_the_document_says(server: SideServer, openapi: Json) -> None:
    row = {"dep_hour": 7, "distance": None, "carrier": "never seen"}
    columns = {"dep_hour": [7, 8], "distance": [None, 2.5], "carrier": ["UA", ""]}
    pixels = [[[i % 256 for i in range(28)] for _ in range(28)]]
    for model, body in (
        ("flights", {"instances": [row, row]}),
        ("flights", {"inputs": columns}),
        ("flights", {"inputs": row}),
        ("images", {"instances": [{"image": pixels[0]}]}),
        ("images", {"instances": pixels}),
        ("tabular", {"instances": [[0.5] * 30]}),
        ("tabular", {"inputs": [0.5] * 30}),
        ("tabular", {"inputs": [[0.5] * 30] * 3}),
    ):
        assert fits(body, {"$ref": f"#/components/schemas/{model}.1.PredictRequest"}, openapi["components"]), body
        status, answer = ask(f"{server.url}/v1/models/{model}:predict", body)
        assert status == 200, answer
        schema = {"$ref": f"#/components/schemas/{model}.1.PredictAnswer"}
        assert fits(answer, schema, openapi["components"]), (body, answer)


def test_faults_are_answered_as_the_document_says(server: SideServer, openapi: Json) -> None:
    schema = {"$ref": "#/components/schemas/Error"}
    for path, body in (
        ("/v1/models/flights:predict", b"{"),
        ("/v1/models/flights:predict", {"instances": [{"dep_hour": 1.5}]}),
        ("/v2/models/flights/infer", {"inputs": []}),
        ("/v2/models/nobody", None),
    ):
        status, answer = ask(server.url + path, body)
        assert str(status) in ("400", "404")
        assert fits(answer, schema, openapi["components"])


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-300, 300),
    st.sampled_from([0.5, 1e5, -65504.0, 70000.0]),
    st.sampled_from(["UA", "", "never seen"]),
    st.lists(st.integers(0, 1), max_size=2),
)
rows = st.dictionaries(st.sampled_from(["hour", "miles", "carrier", "night", "other"]), values, max_size=5)


@given(
    st.one_of(
        rows, values, st.builds(dict, hour=st.integers(-130, 130), night=st.booleans(), miles=values, carrier=values)
    )
)
@settings(max_examples=300, deadline=None)
def test_a_row_is_taken_exactly_when_it_fits_the_schema(row: Any) -> None:
    assert takes(TABLE, row) == fits(row, row_schema(TABLE)), row


pixels = st.recursive(st.integers(-1, 256), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6)
pixel = st.one_of(st.integers(0, 255), st.lists(st.integers(0, 256), min_size=1, max_size=1))
two_by_two = st.lists(st.lists(pixel, min_size=2, max_size=2), min_size=2, max_size=2)


@given(st.one_of(pixels, two_by_two, st.lists(st.lists(st.text(max_size=2), max_size=3), max_size=3)))
@settings(max_examples=300, deadline=None)
def test_a_tensor_is_taken_exactly_when_it_fits_the_schema(value: Any) -> None:
    for spec in (PIXELS, WORDS):
        signature = Signature(inputs=(spec,), outputs=(SCORE,))
        assert takes(signature, value) == fits(value, row_schema(signature)), (spec.name, value)
        assert takes(signature, {spec.name: value}) == fits({spec.name: value}, row_schema(signature)), value


def test_a_column_says_what_a_person_should_know() -> None:
    columns = row_schema(TABLE, {"hour": 5, "miles": 200.5, "carrier": "UA", "night": True})["properties"]
    assert columns["hour"] == {
        "type": "integer",
        "minimum": -128,
        "maximum": 127,
        "description": "INT8.",
        "x-datatype": "INT8",
        "examples": [5],
    }
    assert columns["miles"]["description"] == "Great circle. FP16, in mi. May be missing."
    assert columns["miles"]["x-unit"] == "mi"
    assert columns["carrier"]["anyOf"][0] == {"enum": ["UA", "DL"]}
    assert "any other is taken" in columns["carrier"]["description"]


def test_long_lists_of_categories_and_long_examples_are_cut() -> None:
    spec = TensorSpec(name="city", datatype="BYTES", shape=(BATCH,), categories=tuple(f"city {i}" for i in range(5000)))
    signature = Signature(inputs=(spec, HOUR), outputs=(SCORE,))
    schema = row_schema(signature, {"city": "x" * 3000, "hour": 1})
    assert len(schema["properties"]["city"]["anyOf"][0]["enum"]) == 100
    assert "the first 100" in schema["properties"]["city"]["description"]
    assert "examples" not in schema


# What is answered.


def test_labels_are_listed_where_they_are_the_answer() -> None:
    label = TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=("late", "on_time"))
    scores = TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 2), labels=("late", "on_time"))
    schema = prediction_schema(Signature(inputs=(HOUR,), outputs=(label, scores)))
    assert fits({"label": "late", "scores": {"late": 0.5, "on_time": None}}, schema)
    assert not fits({"label": "early", "scores": {"late": 0.5, "on_time": 0.5}}, schema)
    assert not fits({"label": "late", "scores": {"late": 0.5}}, schema)


def test_texts_in_base64_are_described_as_such() -> None:
    raw = TensorSpec(name="raw_bytes", datatype="BYTES", shape=(BATCH,))
    answer = {"predictions": [{"raw_bytes": {"b64": "Nw=="}, "score": 0.5}]}
    for outputs, one in (((raw, SCORE), answer), ((raw,), {"predictions": [{"b64": "Nw=="}]})):
        schemas = document([Described("m", 1, Signature(inputs=(HOUR,), outputs=outputs))])["components"]
        assert fits(one, {"$ref": "#/components/schemas/m.1.PredictAnswer"}, schemas)


# Everything at once.


@pytest.mark.slow
def test_schemathesis_finds_nothing(store: Path) -> None:
    """Thousands of requests made from the document: never a bug, and every answer is one that the document describes.

    A 503 or 504 is no bug: a client may ask for less time than there is. Where the document cannot say all, as that two lists
    are equally long, requests that fit it may be refused.
    """
    schemathesis = pytest.importorskip("schemathesis")
    checks = importlib.import_module("schemathesis.specs.openapi.checks")
    excluded = [
        schemathesis.checks.not_a_server_error,
        checks.positive_data_acceptance,
        checks.negative_data_rejection,
    ]
    with side_server(store, [Pick("flights", 1), Pick("tabular", 1)]) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        n_asked = 0
        for found in schema.get_all_operations():
            operation = found.ok()

            @given(case=operation.as_strategy())
            @settings(max_examples=100, deadline=None, derandomize=True, database=None)
            def asks(case: Any) -> None:
                nonlocal n_asked
                n_asked += 1
                answer = case.call()
                assert answer.status_code not in (500, 501, 502), answer.text
                case.validate_response(answer, excluded_checks=excluded)

            asks()
        assert n_asked > 20 * len(OPERATIONS)
