"""Statistics, configuration, logging and trace settings, asked by an unmodified Triton client and by hand."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from side_server import SideServer, ask, side_server

from modelyard.errors import RequestError
from modelyard.inference.serve.models.repository import Pick
from modelyard.inference.serve.protocols.statistics_api import LogControl, TraceControl, TraceSettings

MODELS = ("flights", "images", "patient", "tabular")


@pytest.fixture
def server(store: Path) -> Iterator[SideServer]:
    with side_server(store, [Pick(name, 1) for name in MODELS]) as running:
        yield running


@pytest.fixture
def client(server: SideServer) -> Iterator[Any]:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


def features(n_rows: int, *, wrong: bool = False) -> Any:
    tensor = triton.InferInput("features", [n_rows, 30], "FP64" if wrong else "FP32")
    return tensor.set_data_from_numpy(np.zeros((n_rows, 30), dtype=np.float64 if wrong else np.float32))


# Statistics.


def test_answers_rows_and_failures_are_counted(server: SideServer, client: Any) -> None:
    before_ms = time.time() * 1e3
    for n_rows in (1, 3):
        client.infer("tabular", [features(n_rows)])
    with pytest.raises(triton.InferenceServerException, match="datatype"):
        client.infer("tabular", [features(1, wrong=True)])
    server.metrics.refresh(time.time())  # as a worker does every second
    (found,) = client.get_inference_statistics("tabular")["model_stats"]
    assert (found["name"], found["version"]) == ("tabular", "1")
    assert found["inference_count"] == 4
    assert found["execution_count"] == 2
    assert before_ms - 1 <= found["last_inference"] <= time.time() * 1e3
    counts = {name: duration["count"] for name, duration in found["inference_stats"].items()}
    assert counts == dict.fromkeys(counts, 2) | {"fail": 1, "cache_hit": 0, "cache_miss": 0}
    ns = {name: duration["ns"] for name, duration in found["inference_stats"].items()}
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert ns["success"] == pytest.approx(sum(ns[part] for part in parts), abs=4000)  # each was cut to microseconds
    assert 0 < ns["compute_infer"] < ns["success"]


def test_statistics_of_all_models_of_one_and_of_one_version(server: SideServer, client: Any) -> None:
    everything = client.get_inference_statistics()["model_stats"]
    assert {one["name"] for one in everything} == set(MODELS)
    assert client.get_inference_statistics("flights", "1")["model_stats"][0]["inference_count"] == 0
    for path in ("/v2/models/nobody/stats", "/v2/models/flights/versions/9/stats"):
        assert ask(server.url + path)[0] == 404


# Configuration.


def test_a_batched_model_is_told_without_its_batch_axis(client: Any) -> None:
    config = client.get_model_config("images")
    assert config["name"] == "images"
    assert config["platform"] == "onnxruntime_onnx"
    assert config["max_batch_size"] == 64
    assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": [28, 28, 1]}]
    label, probabilities = config["output"]
    assert label == {"name": "label", "data_type": "TYPE_INT64", "dims": []}
    assert probabilities["dims"] == [10]
    assert config["instance_group"] == [{"name": "images", "kind": "KIND_CPU", "count": 1}]
    assert config["version_policy"] == {"specific": {"versions": [1]}}
    assert "dynamic_batching" in config


def test_columns_of_single_values_are_told_with_their_batch_axis(client: Any) -> None:
    config = client.get_model_config("flights", "1")
    assert config["max_batch_size"] == 0
    assert [(one["data_type"], one["dims"]) for one in config["input"]] == [
        ("TYPE_INT64", [-1]),
        ("TYPE_FP32", [-1]),
        ("TYPE_STRING", [-1]),
    ]


def test_a_model_that_cannot_be_batched_has_a_max_batch_size_of_0(client: Any) -> None:
    config = client.get_model_config("patient")
    assert config["max_batch_size"] == 0
    assert config["output"][0]["dims"] == [256, 256]
    assert "dynamic_batching" not in config


def test_a_model_that_failed_to_load_has_no_configuration(store: Path) -> None:
    def fails(pick: Pick) -> Any:
        raise OSError("the disk has gone")

    with side_server(store, [Pick("tabular", 1)], load_one=fails) as server:
        status, answer = ask(f"{server.url}/v2/models/tabular/config")
        assert status == 503
        assert "the disk has gone" in answer["error"]


# Logging.


def test_the_verbose_level_turns_the_access_log_on_and_off(server: SideServer, client: Any) -> None:
    assert client.get_log_settings()["log_verbose_level"] == 0
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    assert client.update_log_settings({"log_verbose_level": 1, "log_error": True})["log_error"] is True
    assert client.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0
    assert server.log_levels == [1, 0]
    assert server.commands[0]["changes"] == {"log_verbose_level": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_verbose": 1}, "unknown setting 'log_verbose'"),
        ({"log_verbose_level": -1}, "must be 0 for no access log"),
        ({"log_verbose_level": True}, "must be 0 for no access log"),
        ({"log_verbose_level": 1e300}, "must be 0 for no access log"),
        ({"log_verbose_level": []}, "must be 0 for no access log"),
        ({"log_error": False}, "log_error is True and cannot be changed"),
        ({"log_file": "/etc/passwd"}, "log_file is '' and cannot be changed"),
        ([1], "the body must be an object of settings"),
        (b"{", "not valid JSON"),
    ],
)
def test_log_settings_that_would_do_nothing_are_refused(server: SideServer, settings: Any, message: str) -> None:
    status, answer = ask(f"{server.url}/v2/logging", settings)
    assert status == 400
    assert message in answer["error"]
    assert server.commands == []


def test_a_worker_that_did_not_take_the_settings_is_named(server: SideServer) -> None:
    server.answers = [(0, {"log_verbose_level": 1}), (1, {"error": "it has ended", "gone": True})]
    status, answer = ask(f"{server.url}/v2/logging", {"log_verbose_level": 1})
    assert status == 503
    assert "worker 1: it has ended; ask what holds now" in answer["error"]


# Tracing.


def test_trace_settings_hold_for_all_models_or_for_one(server: SideServer, client: Any) -> None:
    assert client.get_trace_settings()["trace_rate"] == "1000"
    assert client.update_trace_settings(settings={"trace_rate": "10"})["trace_rate"] == "10"
    assert client.update_trace_settings("flights", {"trace_level": ["OFF"]})["trace_level"] == ["OFF"]
    assert client.get_trace_settings("flights")["trace_rate"] == "10"
    assert client.get_trace_settings("tabular")["trace_level"] == ["TIMESTAMPS"]
    assert server.traced == [(None, TraceSettings(rate=10)), ("flights", TraceSettings(on=False, rate=10))]


def test_null_brings_a_setting_back_to_where_it_was(server: SideServer, client: Any) -> None:
    client.update_trace_settings("flights", {"trace_rate": "5"})
    client.update_trace_settings(settings={"trace_rate": "10"})
    assert client.get_trace_settings("flights")["trace_rate"] == "5"
    assert client.update_trace_settings("flights", {"trace_rate": None})["trace_rate"] == "10"
    assert client.update_trace_settings(settings={"trace_rate": None})["trace_rate"] == "1000"
    assert server.traced[-1] == ("flights", TraceSettings(rate=1000))  # follows what holds for all


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace_rat": "1"}, "unknown setting 'trace_rat'"),
        ({"trace_rate": "0"}, "trace_rate must be a whole number from 1"),
        ({"trace_rate": "²"}, "trace_rate must be a whole number from 1"),
        ({"trace_rate": True}, "trace_rate must be a whole number from 1"),
        ({"trace_level": ["TENSORS"]}, "trace_level must be"),
        ({"trace_count": "5"}, "trace_count is '-1' and cannot be changed"),
        ({"trace_mode": "triton"}, "trace_mode is 'opentelemetry' and cannot be changed"),
    ],
)
def test_trace_settings_that_would_do_nothing_are_refused(server: SideServer, settings: Any, message: str) -> None:
    status, answer = ask(f"{server.url}/v2/trace/setting", settings)
    assert status == 400
    assert message in answer["error"]


def test_trace_settings_of_an_unknown_model_are_404(server: SideServer) -> None:
    assert ask(f"{server.url}/v2/models/nobody/trace/setting")[0] == 404
    assert ask(f"{server.url}/v2/models/nobody/trace/setting", {"trace_rate": "5"})[0] == 404


def test_without_a_place_to_send_traces_to_there_are_no_settings(store: Path) -> None:
    with side_server(store, [Pick("tabular", 1)], traces=None) as server:
        for path in ("/v2/trace/setting", "/v2/models/tabular/trace/setting"):
            for body in (None, {"trace_level": ["TIMESTAMPS"]}):
                status, answer = ask(server.url + path, body)
                assert status == 404
                assert "nowhere to send traces to; start it with --trace-sample" in answer["error"]


def test_tracing_is_listed_where_there_is_somewhere_to_send_traces_to() -> None:
    assert TraceControl(TraceSettings(), lambda model, settings: None).extensions == ("trace",)
    assert TraceControl(None, lambda model, settings: None).extensions == ()


def test_applying_twice_is_applying_once() -> None:
    """A replacement worker is told everything again."""
    levels: list[int] = []
    log = LogControl(levels.append)
    assert log.apply({"log_verbose_level": 2}) == log.apply({"log_verbose_level": 2.0})
    assert levels == [2]
    trace = TraceControl(TraceSettings(), lambda model, settings: None)
    assert trace.apply({"trace_rate": 7}, "m") == trace.apply({"trace_rate": "7"}, "m")
    with pytest.raises(RequestError):
        trace.apply({"trace_rate": "-7"}, "m")
    assert trace.of("m").rate == 7
