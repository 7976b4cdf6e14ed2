"""A store that fails while the server runs: damaged versions, no store at all, a full disk. The old version keeps answering,
and the server says why."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest
from driver import PATIENCE_S, Client, post, under_load, workers_of

from modelyard.bundle.store import open_store
from modelyard.testing.bundles import late_bundle

pytestmark = pytest.mark.slow

PREDICT = post("/v1/models/late:predict", json.dumps({"instances": [{"delay": 10, "origin": "JFK"}]}).encode())
LOAD = post("/v2/repository/models/late/load", b"{}")
INDEX = post("/v2/repository/index", b"")
VERSIONS = b"GET /v2/models/late HTTP/1.1\r\nHost: x\r\n\r\n"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

Publish = Callable[[], Path]


@pytest.fixture
def publish_late(tmp_path: Path) -> Publish:
    """Publish another version of the model; return its folder in the store."""
    n_published = 0

    def published() -> Path:
        nonlocal n_published
        n_published += 1
        late_bundle(tmp_path / f"bundle-{n_published}", weight=0.01 * n_published)
        version = open_store(tmp_path / "store").publish(tmp_path / f"bundle-{n_published}")
        return tmp_path / "store" / "late" / str(version)

    return published


def ask(client: Client, request: bytes) -> tuple[int, Any]:
    status, _, body = client.ask(request)
    return status, json.loads(body)


def served(client: Client) -> list[str]:
    """Return the versions that the server has of the model."""
    versions: list[str] = ask(client, VERSIONS)[1]["versions"]
    return versions


def states(client: Client) -> dict[str, tuple[str, str]]:
    """Return state and reason by version."""
    entries = ask(client, INDEX)[1]
    return {entry["version"]: (entry["state"], entry.get("reason", "")) for entry in entries if entry["name"] == "late"}


def wait_for(condition: Callable[[], bool], server: Any) -> None:
    until_s = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < until_s, server.log.read_text()


def tear_graph(version: Path) -> None:
    graph = version / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])


def flip_a_bit(version: Path) -> None:
    raw = bytearray((version / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (version / "model.onnx").write_bytes(raw)


def lose_graph(version: Path) -> None:
    (version / "model.onnx").unlink()


def lose_manifest_text(version: Path) -> None:
    (version / "bundle.json").write_text("{}")


DAMAGES = [
    (tear_graph, "model.onnx"),
    (flip_a_bit, "model.onnx"),
    (lose_graph, "model.onnx"),
    (lose_manifest_text, "bundle.json"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_new_version_is_named_and_the_old_one_keeps_answering(
    tmp_path: Path, serve: Any, publish_late: Publish, damage: Callable[[Path], None], named: str
) -> None:
    publish_late()
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0") as server, Client(server.address) as client:
        _, before = ask(client, PREDICT)
        damage(publish_late())
        with under_load(server.address, [PREDICT], 2) as load:
            load.await_more(50)
            status, answer = ask(client, LOAD)
            assert 400 <= status < 600
            assert named in answer["error"]
            load.await_more(50)
        assert {outcome.status for outcome in load.stop()} == {200}
        assert ask(client, PREDICT) == (200, before)
        assert states(client)["1"] == ("READY", "")
        state, reason = states(client)["2"]
        assert state == "UNAVAILABLE"
        assert named in reason
        assert named in server.log.read_text()
        assert ask(client, b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
        # The next version is fine and takes over.
        publish_late()
        assert ask(client, LOAD)[0] == 200
        assert served(client) == ["3"]
        assert ask(client, PREDICT)[1] != before


def test_a_version_that_answers_wrongly_here_is_refused(
    tmp_path: Path, serve: Any, publish: Any, small_models: Any
) -> None:
    """Its golden cases say so."""
    publish(tmp_path / "store", small_models["tabular"])
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0.1") as server, Client(server.address) as client:
        publish(tmp_path / "store", small_models["tabular"], broken=True)

        def known() -> set[tuple[str, str]]:
            return {(entry["version"], entry["state"]) for entry in ask(client, INDEX)[1]}

        wait_for(lambda: known() == {("1", "READY"), ("2", "UNAVAILABLE")}, server)
        assert "golden case" in server.log.read_text()
        assert ask(client, post("/v1/models/tabular:predict", b'{"inputs": [%b]}' % b",".join([b"1"] * 30)))[0] == 200


def test_a_damaged_version_that_is_mended_is_taken_up_by_polling(
    tmp_path: Path, serve: Any, publish_late: Publish
) -> None:
    publish_late()
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0.1") as server, Client(server.address) as client:
        aside = tmp_path / "aside"
        version = publish_late()
        raw = (version / "model.onnx").read_bytes()
        tear_graph(version)
        wait_for(lambda: states(client).get("2", ("", ""))[0] in ("UNAVAILABLE", "READY"), server)
        version.rename(aside)
        (aside / "model.onnx").write_bytes(raw)
        aside.rename(version)
        wait_for(lambda: served(client) == ["2"], server)


def test_while_the_store_is_away_everything_goes_on_and_the_server_says_so(
    tmp_path: Path, serve: Any, publish_late: Publish
) -> None:
    publish_late()
    store, away = tmp_path / "store", tmp_path / "away"
    with serve(store, "--workers", "2", "--poll", "0.1") as server, Client(server.address) as client:
        with under_load(server.address, [PREDICT], 2) as load:
            store.rename(away)
            wait_for(lambda: "cannot be read" in server.log.read_text(), server)
            status, answer = ask(client, LOAD)
            assert status == 503
            assert "store" in answer["error"]
            assert served(client) == ["1"]
            load.await_more(100)
            away.rename(store)
            publish_late()
            wait_for(lambda: served(client) == ["2"], server)
            load.await_more(100)
        assert {outcome.status for outcome in load.stop()} == {200}
        assert "Traceback" not in server.log.read_text()


def test_a_disk_too_full_to_fetch_a_version_leaves_the_old_one_answering(
    tmp_path: Path, serve: Any, publish_late: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store behind a URL is fetched into a cache. Files that may not grow are as good as a disk that is full."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    publish_late()
    url = f"local://{tmp_path / 'store'}"
    with serve(url, "--workers", "2", "--poll", "0") as server, Client(server.address) as client:
        for worker in workers_of(server):
            worker.rlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        publish_late()
        status, answer = ask(client, LOAD)
        assert status in (400, 500, 503), answer
        assert "arge" in answer["error"] or "space" in answer["error"], answer
        assert ask(client, PREDICT)[0] == 200
        assert states(client)["1"] == ("READY", "")
        assert states(client)["2"][0] == "UNAVAILABLE"
        assert "arge" in states(client)["2"][1]
        assert not list((tmp_path / "home").rglob(".fetching-*")), "half a version stays behind"
        for worker in workers_of(server):
            worker.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert ask(client, LOAD)[0] == 200
        assert served(client) == ["2"]
        assert "Traceback" not in server.log.read_text()


def test_a_full_disk_costs_lines_of_the_access_log_and_no_answer(
    tmp_path: Path, serve: Any, publish_late: Publish
) -> None:
    publish_late()
    with serve(
        tmp_path / "store", "--workers", "2", "--access-log-file", "/dev/full"
    ) as server, Client(server.address) as client:  # fmt: skip
        for _ in range(300):
            assert ask(client, PREDICT)[0] == 200

        def n_dropped() -> float:
            text = client.ask(METRICS)[2].decode()
            return sum(
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("modelyard_access_log_dropped_total")
            )

        wait_for(lambda: n_dropped() >= 300, server)
        assert "Traceback" not in server.log.read_text()


def test_a_server_that_cannot_write_its_own_log_goes_on(tmp_path: Path, serve: Any, publish_late: Publish) -> None:
    """The disk under its stderr is full: what it has to say is lost; it answers, loads, and replaces workers as before."""
    publish_late()
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0", "--access-log") as server:
        processes = [psutil.Process(server.process.pid), *workers_of(server)]
        for process in processes:
            process.rlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with Client(server.address) as client:
            assert ask(client, PREDICT)[0] == 200
            tear_graph(publish_late())
            assert ask(client, LOAD)[0] >= 400
            publish_late()
            assert ask(client, LOAD)[0] == 200
            assert served(client) == ["3"]
        dead = workers_of(server)
        for worker in dead:
            worker.kill()
        wait_for(
            lambda: len({process.pid for process in workers_of(server)} - {worker.pid for worker in dead}) == 2, server
        )
        with Client(server.address) as client:
            assert ask(client, PREDICT)[0] == 200
            assert served(client) == ["3"]
        server.terminate()
        assert server.process.wait(PATIENCE_S) == 0
