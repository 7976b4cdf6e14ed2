"""Real servers of two workers, their clients and their store: versions move while everybody is answered."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.bundle.format import write_bundle
from modelyard.bundle.store import LocalStore
from modelyard.testing.bundles import late_content

TWO_WORKERS = ("--workers", "2", "--poll", "0.05")
PATIENT_S = 60.0
ROW = json.dumps({"instances": [{"delay": 16.0, "origin": "elsewhere"}]})


@dataclass
class Shelf:
    """Version n of a model answers ROW with the logit n."""

    store: LocalStore
    scratch: Path

    def publish(self, name: str = "late") -> int:
        version = max(self.store.versions(name), default=0) + 1
        write_bundle(self.scratch, late_content(name=name, weight=version / 16))
        try:
            return self.store.publish(self.scratch)
        finally:
            shutil.rmtree(self.scratch)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(LocalStore(tmp_path / "store"), tmp_path / "scratch")


def connected(server: Any) -> "closing[http.client.HTTPConnection]":
    host, port = server.address
    return closing(http.client.HTTPConnection(host, port, timeout=PATIENT_S))


def ask(connection: http.client.HTTPConnection, name: str = "late", headers: Any = None) -> tuple[int, Any]:
    """Return the status, and the version that answered or the error."""
    connection.request("POST", f"/v1/models/{name}:predict", ROW, headers or {})
    response = connection.getresponse()
    answer = json.load(response)
    if response.status != 200:
        return response.status, answer["error"]
    probability = answer["predictions"][0]["probability"]
    return 200, round(float(np.log(probability / (1 - probability))))


def post(server: Any, path: str, body: Any = None) -> tuple[int, Any]:
    with connected(server) as connection:
        connection.request("POST", path, json.dumps(body or {}))
        response = connection.getresponse()
        return response.status, json.load(response)


def eventually(is_so: Callable[[], bool], within_s: float = PATIENT_S) -> None:
    give_up_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


@dataclass
class Client:
    """Asks on one connection, which stays with one worker, until it is told to stop."""

    server: Any
    stop: threading.Event
    answers: list[tuple[int, Any]] = field(default_factory=list)

    def run(self) -> None:
        with connected(self.server) as connection:
            while not self.stop.is_set():
                self.answers.append(ask(connection))

    @property
    def newest(self) -> Any:
        return self.answers[-1][1] if self.answers else 0


@contextmanager
def clients(server: Any, n: int) -> Iterator[list[Client]]:
    stop = threading.Event()
    them = [Client(server, stop) for _ in range(n)]
    threads = [threading.Thread(target=one.run) for one in them]
    for thread in threads:
        thread.start()
    try:
        yield them
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENT_S)


def check_rolling(shelf: Shelf, serve: Any, n_versions: int, n_requests: int) -> None:
    shelf.publish()
    with serve(shelf.store.root, *TWO_WORKERS) as server:
        with clients(server, 8) as them:
            for version in range(2, n_versions + 1):
                shelf.publish()
                eventually(lambda version=version: all(one.newest == version for one in them))  # type: ignore[misc]
            eventually(lambda: sum(len(one.answers) for one in them) >= n_requests, within_s=10 * PATIENT_S)
        answers = [answer for one in them for answer in one.answers]
        assert {status for status, _ in answers} == {200}
        for one in them:
            versions = [version for _, version in one.answers]
            assert versions == sorted(versions)  # each switch is one step and never goes back


def test_no_request_fails_while_version_follows_version(shelf: Shelf, serve: Any) -> None:
    check_rolling(shelf, serve, 4, 500)


@pytest.mark.slow
def test_no_request_of_a_hundred_thousand_fails_while_version_follows_version(shelf: Shelf, serve: Any) -> None:
    check_rolling(shelf, serve, 20, 100_000)


def test_a_corrupt_champion_is_logged_and_the_old_one_answers(shelf: Shelf, serve: Any) -> None:
    shelf.publish()
    with serve(shelf.store.root, *TWO_WORKERS) as server, clients(server, 4) as them:
        home = shelf.store.root / "late"
        beside = shutil.copytree(home / "1", home / ".beside")
        sound = (beside / "model.onnx").read_bytes()
        (beside / "model.onnx").write_bytes(b"not what the manifest says")
        beside.rename(home / "2")
        eventually(lambda: server.log.read_text().count("; version 1 keeps answering") >= 2)
        assert "late version 2: cannot be loaded" in server.log.read_text()
        status, index = post(server, "/v2/repository/index")
        assert status == 200
        assert [(one["version"], one["state"]) for one in index] == [("1", "READY"), ("2", "UNAVAILABLE")]
        assert "fetch the bundle again" in index[1]["reason"]
        (home / "2" / "model.onnx").write_bytes(sound)
        eventually(lambda: post(server, "/v2/repository/index", {"ready": True})[1][-1]["version"] == "2")
    assert {status for one in them for status, _ in one.answers} == {200}


def workers_of(server: Any) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_a_worker_that_replaces_a_dead_one_serves_what_the_others_do(shelf: Shelf, serve: Any) -> None:
    for name in ("late", "early"):
        shelf.publish(name)
        shelf.publish(name)
    with serve(shelf.store.root, "--workers", "2", "--poll", "0") as server:
        assert post(server, "/v2/repository/models/early/unload")[0] == 200
        status, _ = post(server, "/v2/repository/models/late/traffic", {"split": {"1": 1}})
        assert status == 200
        before = workers_of(server)
        assert len(before) == 2
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(set(workers_of(server)) - set(before)) == 2)

        def answers() -> tuple[Any, Any]:
            with connected(server) as connection:
                return ask(connection), ask(connection, "early")[0]

        eventually(lambda: answers()[0][0] == 200)
        for _ in range(4):  # connections take turns between the workers
            assert answers() == ((200, 1), 404)


def test_a_cold_model_is_loaded_while_its_requests_wait(shelf: Shelf, serve: Any) -> None:
    for name in ("late", "early"):
        shelf.publish(name)
    with serve(shelf.store.root, "--workers", "2", "--load", "lazy") as server:
        assert {model["state"] for model in server.models} == {"unloaded"}
        for name in ("late", "early", "late"):
            with connected(server) as connection:
                assert ask(connection, name) == (200, 1)
                assert ask(connection, name) == (200, 1)
        with connected(server) as connection:
            connection.request("GET", "/v2/health/ready")
            assert connection.getresponse().status == 200


def test_keys_stay_with_their_version_on_every_worker(shelf: Shelf, serve: Any) -> None:
    shelf.publish()
    shelf.publish()
    with serve(shelf.store.root, "--workers", "2") as server:
        path = "/v2/repository/models/late/traffic"
        assert post(server, path, {"split": {"1": 0.5, "2": 0.5}})[0] == 200
        met: dict[str, set[Any]] = {f"user-{i}": set() for i in range(20)}
        for _ in range(4):
            with connected(server) as connection:
                for key, versions in met.items():
                    versions.add(ask(connection, headers={"Modelyard-Key": key})[1])
        assert all(len(versions) == 1 for versions in met.values())
        assert set.union(*met.values()) == {1, 2}
        with connected(server) as connection:
            connection.request("GET", path)
            counts = json.load(connection.getresponse())["split"]
        assert sum(counts.values()) == 80
