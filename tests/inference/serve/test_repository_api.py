"""The repository extension by an unmodified client, two workers behind it; and traffic by call."""

import asyncio
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from modelyard.bundle.format import write_bundle
from modelyard.bundle.store import LocalStore
from modelyard.errors import RequestError
from modelyard.inference.serve.app import App
from modelyard.inference.serve.front import Front
from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.models.polling import Library
from modelyard.inference.serve.models.repository import Json, Repository, choose, load, loader_pool
from modelyard.inference.serve.protocols import repository_api, tensorflow
from modelyard.inference.serve.transport.http import Connections, HttpLimits
from modelyard.testing.bundles import late_content


@dataclass
class Server:
    """Two repositories, of which the first has the socket."""

    port: int
    store: LocalStore
    repositories: tuple[Repository, Repository]
    loop: asyncio.AbstractEventLoop
    scratch: Path

    def publish(self, name: str = "late") -> int:
        version = max(self.store.versions(name), default=0) + 1
        write_bundle(self.scratch, late_content(name=name, weight=version / 16))
        try:
            return self.store.publish(self.scratch)
        finally:
            shutil.rmtree(self.scratch)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, json.load(exc), exc.headers

    def served(self) -> list[list[tuple[str, str]]]:
        return [
            [(one["version"], one["state"]) for one in repository.index(only_ready=True)]
            for repository in self.repositories
        ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    store = LocalStore(tmp_path / "store")
    up, stop = threading.Event(), asyncio.Event()
    found: list[Server] = []

    async def serve() -> None:
        repositories = tuple(Repository(choose(store), library=Library(store), log=lambda line: None) for _ in "ab")
        pools: list[ThreadPoolExecutor] = [loader_pool() for _ in repositories]
        for repository, pool in zip(repositories, pools, strict=True):
            await repository.load_all(lambda pick: load(store, pick), pool, lambda entry: None)

        async def broadcast(command: Json) -> list[tuple[int, Json]]:
            return list(enumerate(await asyncio.gather(*[one.apply(command) for one in repositories])))

        first, second = repositories
        front = Front(first, ServerMetrics(new_slabs()))
        app = App([*tensorflow.routes(front, first), *repository_api.routes(first, broadcast)])
        connections = Connections(app, HttpLimits())
        listening = await asyncio.get_running_loop().create_server(connections.new_connection, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        found.append(Server(port, store, (first, second), asyncio.get_running_loop(), tmp_path / "bundle"))
        up.set()
        await stop.wait()
        listening.close()
        connections.abort()
        for repository, pool in zip(repositories, pools, strict=True):
            repository.close()
            pool.shutdown()

    write_bundle(tmp_path / "bundle", late_content())
    store.publish(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle")
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert up.wait(60)
    yield found[0]
    found[0].loop.call_soon_threadsafe(stop.set)
    thread.join(60)


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def test_tritons_client_reads_the_index_and_loads_and_unloads(server: Server, client: Any) -> None:
    assert client.get_model_repository_index() == [{"name": "late", "version": "1", "state": "READY"}]
    server.publish()
    client.load_model("late")
    assert server.served() == [[("2", "READY")], [("2", "READY")]]
    client.unload_model("late")
    assert server.served() == [[], []]
    assert client.get_model_repository_index() == [
        {"name": "late", "version": "1", "state": "UNAVAILABLE", "reason": "is not served"},
        {"name": "late", "version": "2", "state": "UNAVAILABLE", "reason": "is not served"},
    ]
    assert server.ask("POST", "/v2/repository/index", {"ready": True})[1] == []
    assert server.ask("POST", "/v1/models/late:predict", {"instances": [{"delay": 1, "origin": "JFK"}]})[0] == 404
    client.unload_model("late")  # once more does no harm
    client.load_model("late")
    assert server.served() == [[("2", "READY")], [("2", "READY")]]


def test_a_version_policy_of_tritons_configuration_is_followed(server: Server, client: Any) -> None:
    server.publish()
    server.publish()
    for policy, versions in (
        ({"specific": {"versions": ["1", 3]}}, ["1", "3"]),
        ({"latest": {"num_versions": 2}}, ["2", "3"]),
        ({"all": {}}, ["1", "2", "3"]),
    ):
        client.load_model("late", config=json.dumps({"name": "late", "version_policy": policy}))
        assert [version for version, _ in server.served()[1]] == versions


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not valid JSON"),
        ([], "must be empty or an object"),
        ({"parameter": {}}, "unknown key 'parameter'"),
        ({"parameters": []}, "parameters must be an object"),
        ({"parameters": {"file:1/model.onnx": "AAAA"}}, "publish the bundle to the store"),
        ({"parameters": {"priority": 1}}, "unknown parameter 'priority'; load takes config"),
        ({"parameters": {"config": "{"}}, "a string that holds a JSON object"),
        ({"parameters": {"config": '{"max_batch_size": 8}'}}, "'max_batch_size' cannot be changed by a call"),
        ({"parameters": {"config": '{"version_policy": {"latest": {"num_versions": 0}}}'}}, "version_policy must be"),
        (
            {"parameters": {"config": '{"version_policy": {"specific": {"versions": [true]}}}'}},
            "version_policy must be",
        ),
        (
            {"parameters": {"config": '{"version_policy": {"specific": {"versions": [1, 9]}}}'}},
            "late has no version 9; there are versions 1;",
        ),
    ],
)
def test_a_load_that_cannot_be_followed_is_the_clients_fault(server: Server, body: Any, complaint: str) -> None:
    status, answer, _ = server.ask("POST", "/v2/repository/models/late/load", body)
    assert status == 400
    assert complaint in answer["error"]
    assert server.served() == [[("1", "READY")], [("1", "READY")]]
    assert server.ask("POST", "/v2/repository/models/late/load", {})[0] == 200  # the policy is what it was


def test_unknown_models_and_broken_versions_are_told(server: Server, client: Any) -> None:
    with pytest.raises(InferenceServerException, match="no model 'nobody' is in the store"):
        client.load_model("nobody")
    with pytest.raises(InferenceServerException, match="no model 'nobody' is served here"):
        client.unload_model("nobody")
    server.publish()
    (server.store.root / "late" / "2" / "model.onnx").write_bytes(b"")
    with pytest.raises(InferenceServerException, match=r"failed to load 'late': version 2.*version 1 keeps answering"):
        client.load_model("late")
    assert server.served() == [[("1", "READY")], [("1", "READY")]]
    (failed,) = [one for one in client.get_model_repository_index() if one["version"] == "2"]
    assert failed["state"] == "UNAVAILABLE"
    assert "fetch the bundle again" in failed["reason"]


def test_a_store_out_of_reach_is_503_and_the_old_version_answers(server: Server) -> None:
    server.store.root.rename(server.store.root.with_name("away"))
    status, answer, headers = server.ask("POST", "/v2/repository/models/late/load", {})
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "the store's folder is not there" in answer["error"]
    assert server.served() == [[("1", "READY")], [("1", "READY")]]


def test_traffic_is_set_and_counted_over_all_workers(server: Server) -> None:
    server.publish()
    path = "/v2/repository/models/late/traffic"
    status, answer, _ = server.ask("POST", path, {"split": {"1": 3, "2": 1}})
    assert (status, answer) == (
        200,
        {"traffic": {"split": {"1": 3.0, "2": 1.0}}, "split": {"1": 0, "2": 0}},
    )
    for repository in server.repositories:
        for _ in range(40):
            repository.pick("late")
    counts = server.ask("GET", path)[1]["split"]
    assert sum(counts.values()) == 80
    assert abs(counts["2"] - 20) <= 4
    status, answer, _ = server.ask("POST", path, {"shadow": 2, "shadow_share": 0.5})
    assert answer["shadow"]["version"] == 2
    assert answer["shadow"]["agreed"] == 0
    assert server.ask("POST", path, {})[1] == {"traffic": {}, "split": {}}
    assert server.ask("POST", path, {"split": {"9": 1}})[0] == 404
    assert server.ask("POST", path, {"split": {"1": -1}})[0] == 400
    assert server.ask("GET", "/v2/repository/models/nobody/traffic")[0] == 404


def test_what_went_wrong_in_one_worker_names_it() -> None:
    failure = repository_api.failure_of([(0, {}), (1, {"error": "no room", "status": 503}), (2, {})])
    assert failure == repository_api.Failure("worker 1: no room", 503)
    both = repository_api.failure_of([(0, {"error": "gone", "gone": True}), (1, {"error": "bad", "status": 400})])
    assert both == repository_api.Failure("gone", 503)
    assert repository_api.failure_of([(0, {})]) is None


def test_ready_must_be_a_boolean() -> None:
    with pytest.raises(RequestError, match="ready must be true or false, got 1"):
        repository_api.wants_ready_only({"ready": 1})
