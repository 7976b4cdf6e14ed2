"""Checks of the extensions that Triton defines, each tried where the server lists it in its metadata.

What changes the server (unloading a model, settings) is tried only when the target allows it, and is put back.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelyard.testing.open_inference.check import (
    Failed,
    Skipped,
    check,
    expect,
    expect_count,
    expect_list,
    expect_object,
    expect_text,
    listed,
    shown,
)
from modelyard.testing.open_inference.inference import Answer, TensorMetadata
from modelyard.testing.open_inference.server import UNKNOWN, Server
from modelyard.testing.open_inference.tensors import Array, from_bfloat16

CLASSIFICATION = "extension_classification.md"
STATISTICS = "extension_statistics.md"
REPOSITORY = "extension_model_repository.md"
TRACE = "extension_trace.md"
LOGGING = "extension_logging.md"
INDEX = "/v2/repository/index"
COUNTED_WITHIN_S = 2.0
"""How long after its answer a request may be missing in the statistics."""
STATES = ("UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING")
DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


# Classification


@check(
    "classification.top",
    "MUST",
    "the n highest values of an output come as BYTES, value:index[:label], highest first",
    f"{CLASSIFICATION}; its examples say STRING, its text BYTES, which is followed",
    "classification",
)
def classification_top(server: Server) -> None:
    spec, values = _scores(server)
    n_classes = min(3, values.shape[-1])
    rows = values.reshape(-1, values.shape[-1])
    got = _classified(server, spec, n_classes)[spec.name]
    expect(got.datatype == "BYTES", f"the datatype is {got.datatype}, expected BYTES")
    for row, texts in zip(rows, got.array.reshape(len(rows), -1), strict=True):
        told, indices = _parsed([bytes(text).decode("utf-8", "replace") for text in texts])
        expect(len(set(indices)) == n_classes, f"the indices are {indices}, expected {n_classes} different ones")
        expected = sorted(row.astype(np.float64).tolist(), reverse=True)[:n_classes]
        close = all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in zip(told, expected, strict=True))
        expect(close, f"the values are {told}, expected {expected}")
        at_index = [float(row[index]) for index in indices]
        close = all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in zip(told, at_index, strict=True))
        expect(close, f"the values are {told}, at the indices {indices} the output has {at_index}")


@check(
    "classification.shape",
    "MUST",
    "the shape of a classified output is [rows, n], or [n] without rows",
    f"{CLASSIFICATION}: “type BYTES with shape [ batch-size, <count> ]”",
    "classification",
)
def classification_shape(server: Server) -> None:
    spec, values = _scores(server)
    shape = _classified(server, spec, 2)[spec.name].array.shape
    expected = (*values.shape[:1], 2) if spec.batched else (2,)
    expect(shape == expected, f"the shape is {list(shape)}, expected {list(expected)}")


@check(
    "classification.zero",
    "SHOULD",
    "classification of 0 or -1 is no classification, or refused as the client's fault",
    CLASSIFICATION,
    "classification",
)
def classification_zero(server: Server) -> None:
    spec, _ = _scores(server)
    for n_classes in (0, -1):
        call = server.call()
        call.body["outputs"] = [{"name": spec.name, "parameters": {"classification": n_classes}}]
        reply = server.post_call(call)
        expect(reply.status == 200 or 400 <= reply.status < 500, f"the status is {reply.status} for {n_classes}")


def _scores(server: Server) -> tuple[TensorMetadata, Array]:
    """Return an output of numbers with at least two values in its last axis, and its values."""
    answer = server.steady
    for spec in server.model.outputs:
        array = answer[spec.name].array
        if spec.datatype in ("BYTES", "BOOL") or array.ndim != len(spec.sized()) or not array.size:
            continue
        if array.ndim == (2 if spec.batched else 1) and array.shape[-1] >= 2:
            return spec, from_bfloat16(array) if spec.datatype == "BF16" else array
    raise Skipped("the model has no output of two or more numbers a row")


def _parsed(texts: list[str]) -> tuple[list[float], list[int]]:
    """Return the values and the indices of value:index[:label]."""
    try:
        parts = [text.split(":", 2) for text in texts]
        return [float(each[0]) for each in parts], [int(each[1]) for each in parts]
    except (ValueError, IndexError) as exc:
        raise Failed(f"got {shown(texts)}, expected value:index[:label]") from exc


def _classified(server: Server, spec: TensorMetadata, n_classes: int) -> Answer:
    call = server.call()
    call.body["outputs"] = [{"name": spec.name, "parameters": {"classification": n_classes}}]
    return server.infer(call)


# Statistics


@check(
    "statistics.model",
    "MUST",
    "GET /v2/models/NAME/stats gives counts and durations of each version",
    f"{STATISTICS}, Statistics Response JSON Object",
    "statistics",
)
def statistics_model(server: Server) -> None:
    for stats in _statistics(server, f"{server.model_path(server.name, '')}/stats"):
        expect(stats.get("name") == server.name, f"name is {shown(stats.get('name'))}")
        for key in ("last_inference", "inference_count", "execution_count"):
            expect_count(stats.get(key), key)
        durations = expect_object(stats.get("inference_stats"), "inference_stats")
        for key in DURATIONS:
            _expect_duration(durations.get(key), key)
        for batch in expect_list(stats.get("batch_stats"), "batch_stats"):
            expect_count(expect_object(batch, "an element of batch_stats").get("batch_size"), "batch_size")
            for key in ("compute_input", "compute_infer", "compute_output"):
                _expect_duration(batch.get(key), f"batch_stats {key}")


@check(
    "statistics.counts",
    "MUST",
    "a request that is answered adds one to the count of successes, and its inferences to inference_count",
    STATISTICS,
    "statistics",
)
def statistics_counts(server: Server) -> None:
    _ = server.base
    grown = _growth(server, 1)
    expect(grown == (1, 1), f"with one request of one row inference_count grew by {grown[0]}, success by {grown[1]}")


@check(
    "statistics.rows",
    "SHOULD",
    "inference_count grows by the rows of a request",
    f"{STATISTICS}: “each inference in a batched request is counted”; a first axis of any size may be no batch",
    "statistics",
)
def statistics_rows(server: Server) -> None:
    _ = server.base
    if not server.model.batched:
        raise Skipped("the first axis of some tensor has a fixed size")
    grown = _growth(server, 3)
    expect(grown == (3, 1), f"with one request of 3 rows inference_count grew by {grown[0]}, success by {grown[1]}")


@check(
    "statistics.failures",
    "SHOULD",
    "a request that is refused does not count as a success",
    STATISTICS,
    "statistics",
)
def statistics_failures(server: Server) -> None:
    _ = server.base
    before = _counts(server)
    call = server.call()
    del call.inputs[-1]
    if server.post_body(json.dumps(call.body).encode()).status == 200:
        raise Skipped("the server takes a request without its last input")
    after = _counts(server)
    expect(after == before, f"inference_count and success went from {before} to {after}")


@check("statistics.all", "MUST", "GET /v2/models/stats tells of all models", STATISTICS, "statistics")
def statistics_all(server: Server) -> None:
    names = {stats.get("name") for stats in _statistics(server, "/v2/models/stats")}
    expect(server.name in names, f"the models are {listed(sorted(map(str, names)))}")


@check("statistics.version", "MUST", "statistics of one version are of that version alone", STATISTICS, "statistics")
def statistics_version(server: Server) -> None:
    if not server.model.versions:
        raise Skipped("the model's metadata lists no versions")
    for version in server.model.versions:
        found = [s.get("version") for s in _statistics(server, f"{server.model_path(server.name, version)}/stats")]
        expect(found == [version], f"version {version}: the statistics are of {shown(found)}")


@check(
    "statistics.unknown-model", "MUST", "statistics of a model that is not there are an error", STATISTICS, "statistics"
)
def statistics_unknown(server: Server) -> None:
    server.get(f"{server.model_path(UNKNOWN)}/stats").expect_refusal()


def _statistics(server: Server, path: str) -> list[Mapping[str, Any]]:
    body = expect_object(server.get(path).expect(200).json(), "the body")
    stats = [
        expect_object(each, "an element of model_stats") for each in expect_list(body.get("model_stats"), "model_stats")
    ]
    expect(len(stats) > 0, "model_stats is empty")
    return list(stats)


def _growth(server: Server, n_rows: int) -> tuple[int, int]:
    """Return by how much inference_count and the count of successes grow with one request."""
    before = _counts(server)
    reply = server.post_call(server.call(server.arrays(n_rows)))
    if reply.status != 200:
        raise Skipped(f"the model does not take {n_rows} rows")
    after = _counts(server, other_than=before)
    return after[0] - before[0], after[1] - before[1]


def _counts(server: Server, *, other_than: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return inference_count and the count of successes, over all versions of the model, once they have settled.

    No text says that an answer is counted before it is sent: counts are asked for until two in a row agree, and until
    they are other than those given, as long as that may take.
    """
    until_s = time.monotonic() + min(server.target.timeout_s, COUNTED_WITHIN_S)
    found = _counts_now(server)
    while True:
        time.sleep(0.03)
        found, last = _counts_now(server), found
        if found == last and (found != other_than or time.monotonic() > until_s):
            return found


def _counts_now(server: Server) -> tuple[int, int]:
    stats = _statistics(server, f"{server.model_path(server.name, '')}/stats")
    try:
        inferences = sum(each["inference_count"] for each in stats)
        return inferences, sum(each["inference_stats"]["success"]["count"] for each in stats)
    except (KeyError, TypeError) as exc:
        raise Skipped(f"the statistics cannot be read ({exc!r}); see statistics.model") from exc


def _expect_duration(value: Any, what: str) -> None:
    duration = expect_object(value, what)
    expect_count(duration.get("count"), f"count of {what}")
    expect_count(duration.get("ns"), f"ns of {what}")


# The model repository


@check(
    "repository.index",
    "MUST",
    "POST /v2/repository/index gives an array of models with name and state",
    f"{REPOSITORY}, Index",
    "model_repository",
)
def repository_index(server: Server) -> None:
    for entry in _index(server, {}):
        expect_text(entry.get("name"), "name")
        for key in ("version", "reason"):
            value = entry.get(key, "")
            expect(isinstance(value, str), f"{key} of {entry.get('name')} must be a string, got {shown(value)}")


@check(
    "repository.state",
    "MUST",
    "the model under test is in the index, READY in some version",
    f"{REPOSITORY}, Index",
    "model_repository",
)
def repository_state(server: Server) -> None:
    found = [entry.get("state") for entry in _index(server, {}) if entry.get("name") == server.name]
    expect("READY" in found, f"the states of {server.name} are {shown(found)}")
    odd = {entry.get("state") for entry in _index(server, {})} - {None, "", *STATES}
    expect(not odd, f"there is no state {shown(sorted(map(str, odd)))}; there are {listed(STATES)}")


@check(
    "repository.ready-only",
    "MUST",
    'with {"ready": true} the index has ready models alone',
    f"{REPOSITORY}, Index",
    "model_repository",
)
def repository_ready(server: Server) -> None:
    found = _index(server, {"ready": True})
    odd = [entry.get("name") for entry in found if entry.get("state", "READY") != "READY"]
    expect(not odd, f"{listed(map(str, odd))} is in it and not READY")
    expect(server.name in [entry.get("name") for entry in found], f"{server.name} is not in it")


@check(
    "repository.empty-body",
    "SHOULD",
    "the index may be asked for with an empty body",
    "the clients of Triton send one; the text requires the object",
    "model_repository",
)
def repository_empty_body(server: Server) -> None:
    expect_list(server.ask("POST", INDEX).expect(200).json(), "the index")


@check(
    "repository.load-unknown",
    "MUST",
    "loading a model that is not there is an error",
    f"{REPOSITORY}, Load",
    "model_repository",
)
def repository_load_unknown(server: Server) -> None:
    server.need_changes()
    server.post(f"/v2/repository/models/{UNKNOWN}/load", {}).expect_refusal()


@check(
    "repository.load-unknown.status",
    "SHOULD",
    "loading a model that is not there is the client's fault: 4xx",
    f"{REPOSITORY}, Load: “typically 400”",
    "model_repository",
)
def repository_load_unknown_status(server: Server) -> None:
    server.need_changes()
    status = server.post(f"/v2/repository/models/{UNKNOWN}/load", {}).status
    if status < 400:
        raise Skipped(f"the status is {status}; see repository.load-unknown")
    expect(status < 500, f"the status is {status}, expected 4xx")


@check(
    "repository.unload-unknown",
    "SHOULD",
    "unloading a model that is not there is an error",
    f"{REPOSITORY}, Unload",
    "model_repository",
)
def repository_unload_unknown(server: Server) -> None:
    server.need_changes()
    server.post(f"/v2/repository/models/{UNKNOWN}/unload", {}).expect_refusal()


@check(
    "repository.reload",
    "MUST",
    "a model that is loaded may be loaded again, and goes on answering",
    f"{REPOSITORY}, Load",
    "model_repository",
)
def repository_reload(server: Server) -> None:
    server.need_changes()
    expected = server.steady
    server.post(f"/v2/repository/models/{server.name}/load", {}).expect(200)
    expected.expect_same(server.infer(server.call()), "the answer after loading again")


@check(
    "repository.unload-load",
    "MUST",
    "a model that is unloaded is not ready, does not answer, and comes back when it is loaded",
    f"{REPOSITORY}, Load and Unload",
    "model_repository",
)
def repository_unload_load(server: Server) -> None:
    server.need_changes()
    expected = server.steady
    if server.get(f"{server.model_path()}/ready").status != 200:
        raise Skipped("the model is not ready before it is unloaded; see health.model-ready")
    path = f"/v2/repository/models/{server.name}"
    server.post(f"{path}/unload", {}).expect(200)
    try:
        _wait_until_gone(server)
        ready = server.get(f"{server.model_path()}/ready").status
        expect(ready != 200, "the model is still ready after it was unloaded")
        server.post_call(server.call()).expect_refusal()
        states = [entry.get("state") for entry in _index(server, {}) if entry.get("name") == server.name]
        expect("READY" not in states, "the model is still READY in the index")
    finally:
        server.post(f"{path}/load", {}).expect(200)
    server.get(f"{server.model_path()}/ready").expect(200)
    expected.expect_same(server.infer(server.call()), "the answer after unloading and loading")


def _wait_until_gone(server: Server) -> None:
    """Unloading may go on behind its answer, until requests under way are done: ask until the model is not ready."""
    until_s = time.monotonic() + server.target.timeout_s
    while server.get(f"{server.model_path()}/ready").status == 200 and time.monotonic() < until_s:
        time.sleep(0.02)


def _index(server: Server, request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = expect_list(server.post(INDEX, request).expect(200).json(), "the index")
    return [expect_object(entry, "an entry of the index") for entry in entries]


# Model configuration


@check(
    "configuration.get",
    "MUST",
    "GET /v2/models/NAME/config gives an object with the model's name",
    "extension_model_configuration.md",
    "model_configuration",
)
def configuration_get(server: Server) -> None:
    body = expect_object(server.get(f"{server.model_path()}/config").expect(200).json(), "the configuration")
    expect(body.get("name") == server.name, f"name is {shown(body.get('name'))}")


@check(
    "configuration.unknown-model",
    "MUST",
    "the configuration of a model that is not there is an error",
    "extension_model_configuration.md",
    "model_configuration",
)
def configuration_unknown(server: Server) -> None:
    server.get(f"{server.model_path(UNKNOWN)}/config").expect_refusal()


# Settings of traces and logs


@check(
    "trace.get",
    "MUST",
    "GET /v2/trace/setting gives an object of strings and arrays of strings",
    f"{TRACE}; the path is that of Triton and its client, older texts have /v2/trace",
    "trace",
)
def trace_get(server: Server) -> None:
    for name, value in _settings(server, "/v2/trace/setting").items():
        strings = value if isinstance(value, list) else [value]
        expect(
            all(isinstance(each, str) for each in strings), f"{name} must be a string or strings, got {shown(value)}"
        )


@check("trace.model", "MUST", "a model has trace settings of its own", TRACE, "trace")
def trace_model(server: Server) -> None:
    _settings(server, f"{server.model_path(server.name, '')}/trace/setting")


@check("trace.unknown-model", "MUST", "trace settings of a model that is not there are an error", TRACE, "trace")
def trace_unknown_model(server: Server) -> None:
    server.get(f"{server.model_path(UNKNOWN)}/trace/setting").expect_refusal()


@check(
    "trace.unknown-setting", "SHOULD", "a trace setting that is not there is the client's fault: 4xx", TRACE, "trace"
)
def trace_unknown_setting(server: Server) -> None:
    server.need_changes()
    status = server.post("/v2/trace/setting", {"no_such_setting": "1"}).status
    expect(400 <= status < 500, f"the status is {status}, expected 4xx")


@check(
    "trace.update", "MUST", "POST changes the settings it names, leaves the others, and gives them all", TRACE, "trace"
)
def trace_update(server: Server) -> None:
    with _changing(server, "/v2/trace/setting", "trace_rate") as before:
        value = "500" if before["trace_rate"] != "500" else "600"
        after = server.post("/v2/trace/setting", {"trace_rate": value}).expect(200).json()
        expect(after == {**before, "trace_rate": value}, f"the settings are {shown(after)}")
        now = _settings(server, "/v2/trace/setting")
        expect(now == after, f"asked again, they are {shown(now)}")


@check("logging.get", "MUST", "GET /v2/logging gives an object of strings, flags and numbers", LOGGING, "logging")
def logging_get(server: Server) -> None:
    for name, value in _settings(server, "/v2/logging").items():
        expect(isinstance(value, str | bool | int), f"{name} must be a string, a flag or a number, got {shown(value)}")


@check(
    "logging.update",
    "MUST",
    "POST changes the settings it names, leaves the others, and gives them all",
    LOGGING,
    "logging",
)
def logging_update(server: Server) -> None:
    with _changing(server, "/v2/logging", "log_verbose_level") as before:
        value = 1 if before["log_verbose_level"] == 0 else 0
        after = server.post("/v2/logging", {"log_verbose_level": value}).expect(200).json()
        expect(after == {**before, "log_verbose_level": value}, f"the settings are {shown(after)}")
        now = _settings(server, "/v2/logging")
        expect(now == after, f"asked again, they are {shown(now)}")


@check(
    "logging.wrong-type",
    "SHOULD",
    "a log setting of the wrong type, or one that is not there, is the client's fault: 4xx",
    LOGGING,
    "logging",
)
def logging_wrong_type(server: Server) -> None:
    server.need_changes()
    for settings in ({"log_verbose_level": "much"}, {"log_info": "yes"}, {"no_such_setting": 1}):
        status = server.post("/v2/logging", settings).status
        expect(400 <= status < 500, f"the status is {status} for {shown(settings)}, expected 4xx")


def _settings(server: Server, path: str) -> dict[str, Any]:
    return expect_object(server.get(path).expect(200).json(), "the settings")


@contextmanager
def _changing(server: Server, path: str, name: str) -> Iterator[dict[str, Any]]:
    """Give the settings before, and put `name` back behind."""
    server.need_changes()
    before = _settings(server, path)
    if name not in before:
        raise Skipped(f"there is no setting {name}; there are {listed(before)}")
    try:
        yield before
    finally:
        server.post(path, {name: before[name]})


# Parameters of scheduling, sequences, shared memory


@check(
    "schedule.parameters",
    "MUST",
    "priority and timeout are taken as whole numbers",
    "extension_schedule_policy.md",
    "schedule_policy",
)
def schedule_parameters(server: Server) -> None:
    _ = server.base
    call = server.call()
    call.body["parameters"] = {"priority": 1, "timeout": 60_000_000}
    server.infer(call)


@check(
    "shared-memory.status",
    "MUST",
    "GET /v2/systemsharedmemory/status gives an array of regions",
    "extension_shared_memory.md",
    "system_shared_memory",
)
def shared_memory_status(server: Server) -> None:
    expect_list(server.get("/v2/systemsharedmemory/status").expect(200).json(), "the regions")


@check(
    "shared-memory.unknown-region",
    "MUST",
    "an input in a region that is not registered is refused",
    "extension_shared_memory.md",
    "system_shared_memory",
)
def shared_memory_unknown(server: Server) -> None:
    _ = server.base
    call = server.call()
    tensor = call.first_json_input
    if tensor is None:
        raise Skipped("no input travels in JSON")
    del tensor["data"]
    tensor["parameters"] = {"shared_memory_region": "no-such-region", "shared_memory_byte_size": 8}
    server.post_call(call).expect_refusal()


@check(
    "extensions.unlisted",
    "SHOULD",
    "an extension whose paths are answered is in the list",
    "inference_rest.md, Server Metadata: “The extensions supported by the server”",
)
def unlisted(server: Server) -> None:
    """A client reads the list to know what it may ask for; what is not in it is found by accident."""
    answered = [
        f"{path} ({extension})"
        for extension, path in (
            ("statistics", f"{server.model_path(server.name, '')}/stats"),
            ("trace", "/v2/trace/setting"),
            ("logging", "/v2/logging"),
            ("system_shared_memory", "/v2/systemsharedmemory/status"),
        )
        if extension not in server.extensions and server.get(path).status == 200
    ]
    if answered:
        raise Failed(f"{', '.join(answered)} is answered, although it is not listed")
