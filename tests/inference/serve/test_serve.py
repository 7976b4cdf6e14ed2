"""A server's life: what is served, what is refused, how it ends. Real processes and signals."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

from modelyard.bundle.store import open_store


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def written(folder: Path, text: str) -> str:
    """Return the path of a serve.toml that says so."""
    path = folder / f"{zlib.crc32(text.encode())}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def serve_to_the_end(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a server that is expected to end by itself."""
    command = [sys.executable, "-m", "modelyard", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def patient_request(n_steps: int, *headers: bytes) -> bytes:
    tensor = {"name": "n_steps", "shape": [1], "datatype": "INT64", "data": [n_steps]}
    wanted = {"name": "value", "parameters": {"binary_data": True}}
    body = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    lines = [b"POST /v2/models/patient/infer HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def idle_connection(server: Any) -> socket.socket:
    """Return a connection the server knows, with nothing left to read."""
    idle = socket.create_connection(server.address, timeout=60)
    idle.sendall(LIVE)
    answer = b""
    while not answer.endswith(b'{"live":true}'):
        answer += idle.recv(1000)
    return idle


def test_the_champion_is_served_else_the_latest(tmp_path: Path, publish: Any, small_models: Any, serve: Any) -> None:
    store = tmp_path / "store"
    for name in ("with-champion", "without"):
        for _ in range(3):
            publish(store, small_models["tabular"], name)
    open_store(store).tag("with-champion", "champion", 2)
    with serve(store) as server:
        assert {model["name"]: model["version"] for model in server.models} == {"with-champion": 2, "without": 3}
        status, answer = get(f"{server.url}/v2/models/without/versions/2")
        assert status == 404
        assert "the store has it: tag it champion" in answer["error"]
        assert "--model without=2" in answer["error"]
        assert "the store has it" not in get(f"{server.url}/v2/models/without/versions/4")[1]["error"]


def test_the_printed_examples_ask_each_version(tmp_path: Path, publish: Any, small_models: Any, serve: Any) -> None:
    for _ in range(2):
        publish(tmp_path / "store", small_models["tabular"], "late")
    config = written(tmp_path, "[models.late]\nversions = [1, 2]")
    with serve(tmp_path / "store", "--config", config) as server:
        lines = server.log.read_text().partition("ready on")[2].splitlines()[1:3]
        assert [line.split()[1].removeprefix(server.url) for line in lines] == [
            "/v1/models/late:predict",
            "/v1/models/late/versions/2:predict",
        ]
        for line in lines:
            assert "predictions" in subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout


def test_a_model_that_waits_for_its_first_request_says_so(store: Path, serve: Any) -> None:
    with serve(store, "--model", "tabular", "--load", "lazy") as server:
        assert "tabular version 1: unloaded: is loaded with its first request\n" in server.log.read_text()


def test_serve_toml_says_how_the_server_runs_and_options_override_it(tmp_path: Path, store: Path, serve: Any) -> None:
    log = tmp_path / "access.jsonl"
    config = written(
        tmp_path,
        f"""[server]
        access_log_file = {json.dumps(str(log))}
        access_log_sample = 0
        idle_timeout_s = 0.2
        triton_metrics = true
        """,
    )
    with serve(store, "--model", "tabular", "--config", config, "--access-log-sample", "1") as server:
        get(f"{server.url}/v2/health/live")
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            assert b"nv_inference_count" in answer.read()
        with idle_connection(server) as idle:
            assert idle.recv(1) == b""  # closed for being silent
        server.terminate()
        assert server.process.wait(timeout=60) == 0
    assert json.loads(log.read_text().splitlines()[0])["path"] == "/v2/health/live"


def test_model_options_choose_models_versions_and_tags(
    tmp_path: Path, publish: Any, small_models: Any, serve: Any
) -> None:
    store = tmp_path / "store"
    for name in ("a", "b", "c"):
        publish(store, small_models["tabular"], name)
        publish(store, small_models["tabular"], name)
    open_store(store).tag("b", "canary", 1)
    with serve(store, "--model", "a=1", "--model", "a=2", "--model", "b=canary") as server:
        assert [(model["name"], model["version"]) for model in server.models] == [("a", 1), ("a", 2), ("b", 1)]
        assert get(f"{server.url}/v2/models/a")[1]["versions"] == ["1", "2"]
        assert get(f"{server.url}/v2/models/c")[0] == 404


def test_a_model_that_fails_its_golden_cases_is_reported_and_the_others_serve(
    tmp_path: Path, publish: Any, small_models: Any, serve: Any
) -> None:
    store = tmp_path / "store"
    publish(store, small_models["tabular"], "good")
    publish(store, small_models["tabular"], "wrong", broken=True)
    publish(store, small_models["tabular"], "torn")
    graph = store / "torn" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with serve(store) as server:
        states = {model["name"]: (model["state"], model["reason"]) for model in server.models}
        assert states["good"] == ("ready", "")
        assert states["wrong"][0] == states["torn"][0] == "failed"
        assert "golden case" in states["wrong"][1]
        assert "model.onnx" in states["torn"][1]
        assert "wrong version 1: failed" in server.log.read_text()
        assert get(f"{server.url}/v2/health/ready") == (200, {"ready": True})
        status, answer = get(f"{server.url}/v2/models/wrong/ready")
        assert (status, answer["ready"]) == (503, False)
        assert "golden case" in answer["error"]
        status, answer = get(f"{server.url}/v2/models/wrong")
        assert status == 503
        assert get(f"{server.url}/v1/models/wrong")[1]["model_version_status"][0]["state"] == "END"
        assert get(f"{server.url}/v2/models/good/ready")[0] == 200


def test_when_no_model_can_be_loaded_the_server_ends_with_2(tmp_path: Path, publish: Any, small_models: Any) -> None:
    publish(tmp_path, small_models["tabular"], "wrong", broken=True)
    ended = serve_to_the_end(str(tmp_path), "--port", "0")
    assert ended.returncode == 2
    assert "golden case" in ended.stderr
    assert "error: no model could be loaded" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, store: Path) -> None:
    demo = tmp_path / "demo"
    empty = tmp_path / "empty"
    demo.mkdir()
    empty.mkdir()
    (demo / "store").symlink_to(store)
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "no such store folder"),
        ([str(empty)], f"error: {empty}: there is no model in the store; publish one"),
        ([str(demo)], f"no model in the store; give {demo / 'store'}, which is a store with models"),
        (
            [str(store), "--config", written(tmp_path, "[models.tabular]\nversions = [1, 9]")],
            "tabular has no version 9",
        ),
        ([str(store), "--config", written(tmp_path, "[models.tabula]")], "no model 'tabula'"),
        ([str(store), "--config", written(tmp_path, "[server]\nall_models = false")], "nothing to serve"),
        ([str(store), "--config", written(tmp_path, "[models.tabular.traffic]\nsplit = { 9 = 1 }")], "no version 9"),
        ([str(store), "--access-log-file", "/nowhere/a.jsonl"], "--access-log-file /nowhere/a.jsonl: cannot be opened"),
        ([str(store / "tabular" / "1")], "is a bundle"),
        ([str(store), "--model", "nobody"], "nobody"),
        ([str(store), "--model", "tabular=9"], "no version 9"),
        ([str(store), "--model", "tabular=canary"], "'canary'"),
        ([str(store), "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ]:
        ended = serve_to_the_end(*arguments, "--port", "0")
        assert ended.returncode == 2, arguments
        assert ended.stderr.startswith("error: "), ended.stderr
        assert message in ended.stderr, ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr


def test_a_port_in_use_is_named(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = serve_to_the_end(str(store), "--port", str(port))
    assert ended.returncode == 2
    assert f"--port {port}" in ended.stderr
    assert "in use" in ended.stderr


def test_sigterm_answers_what_is_being_computed_and_ends_with_0(store: Path, serve: Any) -> None:
    """The first of two pipelined requests is answered: then the second has been read too, and is being computed."""
    with serve(store, "--model", "patient") as server, socket.create_connection(server.address, timeout=60) as client:
        client.sendall(LIVE + patient_request(3000))
        stream = client.makefile("rb")
        while b"live" not in stream.readline():
            if stream.peek(13).startswith(b'{"live":true}'):
                stream.read(13)
                break
        server.terminate()
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        rest = stream.read()
        assert b"\r\nConnection: close\r\n" in rest
        assert len(rest) > 256 * 256 * 4
        assert server.process.wait(timeout=60) == 0


def test_sigterm_waits_for_a_request_that_is_still_arriving(store: Path, serve: Any) -> None:
    with serve(store, "--model", "patient") as server, socket.create_connection(server.address, timeout=60) as client:
        request = patient_request(1, b"Expect: 100-continue")
        head, _, body = request.partition(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        stream = client.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 100 Continue\r\n"
        stream.readline()
        with idle_connection(server) as idle:
            server.terminate()
            assert idle.recv(1) == b""  # closed: the drain has begun
        client.sendall(body)
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        assert b"\r\nConnection: close\r\n" in stream.read()
        assert server.process.wait(timeout=60) == 0


def test_sigterm_closes_idle_connections_and_ends_with_0(store: Path, serve: Any) -> None:
    with serve(store, "--model", "tabular") as server, idle_connection(server) as idle:
        server.terminate()
        assert idle.recv(1) == b""
        assert server.process.wait(timeout=60) == 0


def test_the_drain_timeout_cuts_off_what_does_not_end(store: Path, serve: Any) -> None:
    with serve(
        store, "--model", "patient", "--drain-timeout", "0"
    ) as server:  # the log is read after the client has gone
        with socket.create_connection(server.address, timeout=60) as client:
            client.sendall(LIVE + patient_request(10**9))
            assert client.recv(5) == b"HTTP/"
            server.terminate()
            assert server.process.wait(timeout=60) == 1
        assert "1 connections unanswered" in server.log.read_text()


def test_a_second_signal_ends_the_drain(store: Path, serve: Any) -> None:
    with (
        serve(store, "--model", "patient", "--drain-timeout", "600") as server,
        socket.create_connection(server.address, timeout=60) as client,
    ):
        client.sendall(LIVE + patient_request(10**9))
        assert client.recv(5) == b"HTTP/"
        with idle_connection(server) as idle:
            server.terminate()
            assert idle.recv(1) == b""  # closed: the first signal has been heard
        server.terminate()
        assert server.process.wait(timeout=60) == 1


def test_the_access_log_has_a_json_line_per_request(store: Path, serve: Any) -> None:
    with serve(store, "--model", "tabular", "--access-log") as server:
        get(f"{server.url}/v2/health/live")
        get(f"{server.url}/nowhere")
        server.terminate()
        assert server.process.wait(timeout=60) == 0
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert {(line["method"], line["path"], line["status"]) for line in lines} == {  # of several workers, in any order
        ("GET", "/v2/health/live", 200),
        ("GET", "/nowhere", 404),
    }
    assert all(line["request_id"] and line["duration_s"] >= 0 for line in lines)


def test_the_printed_example_of_an_image_copes_with_any_path(
    tmp_path: Path, publish: Any, small_models: Any, serve: Any
) -> None:
    store = tmp_path / 'it\'s "a" störe $HOME'
    publish(store, small_models["images"], "images")
    with serve(store) as server:
        command = server.log.read_text().partition("ready on")[2].splitlines()[1]
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    (answer,) = json.loads(done.stdout)["predictions"]
    assert answer["label"] == small_models["images"].answer()["label"][0]
