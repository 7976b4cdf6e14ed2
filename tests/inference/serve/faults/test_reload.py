"""New versions while the server is busy: a hundred thousand requests and not one of them fails."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from driver import PATIENCE_S, Client, Load, Outcome, post, statuses, under_load

from modelyard.bundle.store import open_store
from modelyard.testing.bundles import AIRPORT_WEIGHTS, late_bundle

pytestmark = pytest.mark.slow

N_REQUESTS = 100_000
DELAYS = [0.0, 10.0, -25.0, 90.0]
ROWS = [
    post("/v1/models/late:predict", json.dumps({"instances": [{"delay": delay, "origin": "JFK"}]}).encode())
    for delay in DELAYS
]
LOAD = post("/v2/repository/models/late/load", b"{}")
READY = b"GET /v2/models/late HTTP/1.1\r\nHost: x\r\n\r\n"


def weight_of(version: int) -> float:
    return 0.01 * version


@pytest.fixture
def publish_next(tmp_path: Path) -> Callable[[], int]:
    """Publish another version, which answers otherwise than all before it."""
    store = open_store(tmp_path / "store")
    n_published = 0

    def publish() -> int:
        nonlocal n_published
        n_published += 1
        late_bundle(tmp_path / f"bundle-{n_published}", weight=weight_of(n_published))
        return store.publish(tmp_path / f"bundle-{n_published}")

    return publish


def versions_of(outcomes: list[Outcome], n_versions: int) -> set[int]:
    """Return which versions answered; every answer must be one of theirs."""
    import math

    expected = {
        round(1 / (1 + math.exp(-(delay * weight_of(version) + AIRPORT_WEIGHTS["JFK"]))), 4): version
        for version in range(1, n_versions + 1)
        for delay in DELAYS
        if delay
    }
    found = set()
    for outcome in outcomes:
        (prediction,) = json.loads(outcome.body)["predictions"]
        probability = round(prediction["probability"], 4)
        if probability != round(1 / (1 + math.exp(-AIRPORT_WEIGHTS["JFK"])), 4):  # a delay of 0 says nothing
            found.add(expected[probability])
    return found


def test_a_hundred_thousand_requests_over_rolling_reloads_all_succeed(
    tmp_path: Path, serve: Any, publish_next: Callable[[], int]
) -> None:
    publish_next()
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0") as server:
        load = Load(server.address, ROWS, 8, N_REQUESTS)
        load.start()
        n_versions = 1
        with Client(server.address) as caller:
            while len(load.outcomes) < 0.9 * N_REQUESTS:
                load.await_more(1000)
                n_versions = publish_next()
                status, _, body = caller.ask(LOAD)
                assert status == 200, body
        outcomes = load.join()
        assert statuses(outcomes) == {200: N_REQUESTS}
        assert n_versions >= 10
        assert versions_of(outcomes, n_versions) == set(range(1, n_versions + 1))
        last = sorted(outcomes, key=lambda outcome: outcome.sent_s)[-100:]
        assert versions_of(last, n_versions) == {n_versions}
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("how", ["poll", "SIGHUP"])
def test_versions_that_are_found_replace_the_old_without_a_failure(
    tmp_path: Path, serve: Any, publish_next: Callable[[], int], how: str
) -> None:
    publish_next()
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0.1" if how == "poll" else "0") as server:
        with under_load(server.address, ROWS, 4) as load, Client(server.address) as caller:
            for _ in range(5):
                load.await_more(200)
                version = publish_next()
                if how == "SIGHUP":
                    server.process.send_signal(signal.SIGHUP)
                until_s = monotonic() + PATIENCE_S
                while json.loads(caller.ask(READY)[2])["versions"] != [str(version)]:
                    assert monotonic() < until_s, server.log.read_text()
            load.await_more(200)
        outcomes = load.stop()
        assert set(statuses(outcomes)) == {200}
        assert versions_of(outcomes, 6) == {1, 2, 3, 4, 5, 6}


def test_reloads_and_killed_workers_at_once_lose_only_what_was_in_flight(
    tmp_path: Path, serve: Any, publish_next: Callable[[], int]
) -> None:
    from driver import workers_of

    publish_next()
    with serve(tmp_path / "store", "--workers", "2", "--poll", "0") as server:
        with under_load(server.address, ROWS, 4) as load:
            version = 1
            for _ in range(4):
                load.await_more(200)
                version = publish_next()
                workers_of(server)[0].send_signal(signal.SIGKILL)
                with Client(server.address) as caller:
                    until_s = monotonic() + PATIENCE_S
                    while True:  # the call itself may meet the dying worker
                        try:
                            if caller.ask(LOAD)[0] == 200:
                                break
                        except OSError:
                            assert monotonic() < until_s
                load.await_more(200)
            n_before = len(load.outcomes)
            load.await_more(400)
        outcomes = load.stop()
        assert set(statuses(outcomes)) <= {0, 200}
        assert statuses(outcomes).get(0, 0) <= 4 * 4
        assert versions_of(outcomes[n_before + 8 :], version) == {version}, "also in the workers that came later"
