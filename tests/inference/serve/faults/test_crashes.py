"""Workers that die under load: only what they were answering is lost, and soon there are as many as before."""

import json
import signal
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import pytest
from driver import PATIENCE_S, Client, Load, post, statuses, under_load, workers_of

pytestmark = pytest.mark.slow

PREDICT = post("/v1/models/tabular:predict", json.dumps({"instances": [[0.5] * 30]}).encode())
RECOVERY_S = 2.0
N_CLIENTS = 8


def await_workers(server: Any, n: int, *, but: set[int]) -> None:
    """Wait until `n` workers are there that are none of `but`."""
    until_s = monotonic() + PATIENCE_S
    while len({process.pid for process in workers_of(server)} - but) < n:
        assert monotonic() < until_s, server.log.read_text()
        with Client(server.address) as client:  # paces the loop
            client.ask(PREDICT)


def await_all_answering(load: Load, since_s: float) -> float:
    """Wait until every client has had a good answer to a request sent after `since_s`; return when that was so."""
    while True:
        first: dict[int, float] = {}
        for outcome in tuple(load.outcomes):
            if outcome.sent_s > since_s and outcome.status == 200:
                first.setdefault(outcome.client, outcome.ended_s)
        if len(first) == N_CLIENTS:
            return max(first.values())
        load.await_more(20)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_killed_worker_costs_its_requests_in_flight_and_nothing_else(store: Path, serve: Any, n_workers: int) -> None:
    """A client with its one connection to the victim fails at most once per kill: it connects again and is served."""
    with serve(store, "--workers", str(n_workers), "--model", "tabular") as server:
        with under_load(server.address, [PREDICT], N_CLIENTS) as load:
            load.await_more(500)
            for _ in range(4):
                before = {process.pid for process in workers_of(server)}
                victim = workers_of(server)[0]
                n_its_clients = len(victim.net_connections("tcp"))
                n_before = len(load.outcomes)
                killed_s = perf_counter()
                victim.send_signal(signal.SIGKILL)
                recovered_s = await_all_answering(load, killed_s)
                assert recovered_s - killed_s < RECOVERY_S
                await_workers(server, n_workers, but={victim.pid})
                load.await_more(200)
                failed = [outcome for outcome in load.outcomes[n_before:] if outcome.status != 200]
                assert {outcome.status for outcome in failed} <= {0}
                assert len(failed) == len({outcome.client for outcome in failed}) <= n_its_clients
                assert all(outcome.ended_s - killed_s < RECOVERY_S for outcome in failed)
                assert before - {victim.pid} <= {process.pid for process in workers_of(server)}, "the others live on"
        ended = statuses(load.stop())
        assert set(ended) <= {0, 200}
        log = server.log.read_text()
        assert log.count("killed") >= 4 or log.count("SIGKILL") >= 4, log
        assert "Traceback" not in log


def test_all_workers_killed_at_once_are_all_replaced(store: Path, serve: Any) -> None:
    with serve(store, "--workers", "2", "--model", "tabular") as server:
        with under_load(server.address, [PREDICT], N_CLIENTS) as load:
            load.await_more(200)
            dead = workers_of(server)
            killed_s = perf_counter()
            for victim in dead:
                victim.send_signal(signal.SIGKILL)
            assert await_all_answering(load, killed_s) - killed_s < RECOVERY_S
            await_workers(server, 2, but={process.pid for process in dead})
        failed = [outcome for outcome in load.stop() if outcome.status != 200]
        assert len(failed) <= N_CLIENTS
        assert server.process.poll() is None
