"""Rows with named columns over HTTP, asked with nothing but the standard library."""

import json
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
from numpy.testing import assert_allclose


def post(url: str, body: Any) -> tuple[int, Any, Any]:
    """Return status, JSON and headers of a POST."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url, raw) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc), exc.headers


def test_rows_of_named_columns_come_back_as_labels_with_probabilities(server: Any, small_models: Any) -> None:
    rows = [{"dep_hour": 23, "distance": 2475.0, "carrier": "B6"}, {"dep_hour": 5, "distance": 200.5, "carrier": "DL"}]
    status, answer, headers = post(f"{server.url}/v1/models/flights:predict", {"instances": rows})
    assert status == 200
    assert headers["X-Request-Id"]
    assert [prediction["label"] for prediction in answer["predictions"]] == ["late", "on_time"]
    assert answer["predictions"][0]["probabilities"]["late"] > 0.5
    assert sum(answer["predictions"][0]["probabilities"].values()) == pytest.approx(1)


def test_null_missing_and_unknown_values_are_answered_as_the_graph_answers_them(server: Any, small_models: Any) -> None:
    small = small_models["flights"]
    rows = [
        {"dep_hour": 5, "distance": 200.5, "carrier": "UA"},
        {"dep_hour": 12, "distance": None, "carrier": "DL"},
        {"dep_hour": 19, "distance": 2475, "carrier": "B6"},
        {"dep_hour": 23, "distance": 733},
        {"dep_hour": 8, "distance": 0, "carrier": "Zephyr ✈"},
    ]
    status, answer, _ = post(f"{server.url}/v1/models/flights/versions/1:predict", {"instances": rows})
    assert status == 200
    expected = small.answer()
    assert [prediction["label"] for prediction in answer["predictions"]] == expected["label"].tolist()
    late = [prediction["probabilities"]["late"] for prediction in answer["predictions"]]
    assert_allclose(late, expected["probabilities"][:, 0], rtol=1e-5, atol=1e-5)


def test_a_model_with_one_input_and_one_output_takes_and_gives_bare_values(server: Any, small_models: Any) -> None:
    small = small_models["tabular"]
    rows = small.rows["features"].tolist()
    status, answer, _ = post(f"{server.url}/v1/models/tabular:predict", {"instances": rows})
    assert status == 200
    scores = [list(prediction.values()) for prediction in answer["predictions"]]
    assert list(answer["predictions"][0]) == ["benign", "malignant"]
    assert_allclose(scores, small.answer()["scores"], rtol=1e-5, atol=1e-5)


def test_an_image_may_leave_out_its_last_axis_of_one(server: Any, small_models: Any) -> None:
    small = small_models["images"]
    flat = [image[:, :, 0].tolist() for image in small.rows["image"]]
    answers = [
        post(f"{server.url}/v1/models/images:predict", {"instances": instances})[:2]
        for instances in (
            [{"image": image} for image in flat],
            [{"image": image.tolist()} for image in small.rows["image"]],
        )
    ]
    assert answers[0] == answers[1]
    assert [prediction["label"] for prediction in answers[0][1]["predictions"]] == small.answer()["label"].tolist()


def test_faults_of_the_client_are_400_and_name_row_column_value(server: Any) -> None:
    good = {"dep_hour": 7, "distance": 1.5, "carrier": "UA"}
    cases: list[tuple[Any, list[str]]] = [
        (b"{", ["not valid JSON"]),
        ([good], ["instances"]),
        ({"instances": {}}, ["must be a list"]),
        ({"instances": []}, ["no rows"]),
        ({"instances": [good, 5]}, ["row 1", "object of columns"]),
        ({"instances": [good, good | {"colour": "red"}]}, ["row 1", "'colour'", "dep_hour, distance, carrier"]),
        ({"instances": [good, {"distance": 1.5}]}, ["row 1", "'dep_hour'", "missing"]),
        ({"instances": [good | {"dep_hour": "seven"}]}, ["row 0", "'dep_hour'", "'seven'", "INT64"]),
        ({"instances": [good | {"dep_hour": 7.5}]}, ["'dep_hour'", "7.5"]),
        ({"instances": [good | {"dep_hour": 2**63}]}, ["'dep_hour'", "9223372036854775807"]),
        ({"instances": [good | {"dep_hour": True}]}, ["'dep_hour'", "True"]),
        ({"instances": [good | {"distance": "NaN"}]}, ["'distance'", "'NaN'"]),
        ({"instances": [good | {"distance": [1]}]}, ["'distance'", "[1]"]),
        ({"instances": [good | {"carrier": 5}]}, ["'carrier'", "text"]),
    ]
    for body, messages in cases:
        status, answer, _ = post(f"{server.url}/v1/models/flights:predict", body)
        assert status == 400, (body, answer)
        assert all(message in answer["error"] for message in messages), (body, answer)


def test_the_shape_of_an_image_must_fit(server: Any) -> None:
    image = [[0] * 28] * 27
    status, answer, _ = post(f"{server.url}/v1/models/images:predict", {"instances": [image]})
    assert status == 400
    assert "row 0, column 'image'" in answer["error"]
    assert "28 values, got 27" in answer["error"]


def test_models_and_their_state_are_listed(server: Any) -> None:
    with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
        assert json.load(answer) == {"models": ["flights", "images", "patient", "tabular"]}
    with urllib.request.urlopen(f"{server.url}/v1/models/flights") as answer:
        status = json.load(answer)
    assert (status["name"], status["ready"]) == ("flights", True)
    assert status["model_version_status"][0]["version"] == "1"
    assert status["model_version_status"][0]["state"] == "AVAILABLE"


def test_the_commands_the_server_prints_ask_for_predictions(server: Any, small_models: Any) -> None:
    """curl for a short row; for an image Python, which takes the row from the golden cases."""
    lines = server.log.read_text().partition("ready on")[2].splitlines()[1:]
    commands = [shlex.split(line) for line in lines if line.startswith("  ")]
    assert len(commands) == 4
    for command in commands:
        asked = next(name for name in small_models if any(f"/models/{name}" in word for word in command))
        words = [command[0], "-sf", *command[1:]] if command[0] == "curl" else command
        done = subprocess.run(words, capture_output=True, check=True)
        (answer,) = json.loads(done.stdout)["predictions"]
        if asked == "images":
            assert command[0] == sys.executable
            assert answer["label"] == small_models["images"].answer()["label"][0]
