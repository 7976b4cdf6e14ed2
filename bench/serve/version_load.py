"""A new version of a 100 MB model is loaded while another model answers: what that does to the other's tail.

The server has its default target, so that it refuses nothing. Windows without and with a load take turns in one server, under
the same arrivals. The tail with a load is that of the requests sent between the call to load and its return, all loads of a
turn together: the strict reading, since a window of seconds would dilute it.
"""

import http.client
import json
import shutil
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.store import LocalStore

from . import models
from .bars import Bar, Findings, Table, ms, spread
from .contenders import publish, without_target
from .generators import NONE, Cores, GeneratorFailed, OpenLoop, open_loop
from .places import SCRATCH, STORES
from .processes import Server
from .turns import Run, say, series
from .workloads import MID_BINARY, TINY_JSON, Workload

LIMIT = 1.2
RATES_PER_S = {TINY_JSON.name: 5_000.0, MID_BINARY.name: 150.0}  # about a quarter of what two cores answer
_N_WINDOWS = 4  # of each kind in a turn
_WINDOW_S = 3.0
_LOAD_AFTER_S = 0.5
_LARGE = "large"


@dataclass(frozen=True)
class Tails:
    """p99 in one turn: without a load, during the loads, and of the whole windows that held one."""

    without_s: float
    during_s: float
    windows_s: float
    load_s: tuple[float, ...]
    n_during: int
    cores: Cores

    @property
    def ratio(self) -> float:
        return self.during_s / self.without_s


@dataclass
class Load:
    """Asks a server to load the model's latest version; a thread, so that the open loop goes on."""

    port: int
    began_s: float = 0.0
    ended_s: float = 0.0
    error: str = ""
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        time.sleep(_LOAD_AFTER_S)
        self.began_s = time.monotonic()
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
                connection.request("POST", f"/v2/repository/models/{_LARGE}/load", json.dumps({}))
                response = connection.getresponse()
                body = response.read()
            if response.status != 200:
                self.error = f"loading {_LARGE} answered {response.status}: {body[:200]!r}"
        except OSError as error:
            self.error = f"loading {_LARGE}: {error}"
        self.ended_s = time.monotonic()


def version_load(run: Run) -> Findings:
    """Return the other model's p99 during loads over its p99 without, for the small model and the mid one."""
    bars, rows = [], []
    for workload in (TINY_JSON, MID_BINARY):
        store = STORES / f"{workload.model.name}-and-{_LARGE}"
        publish(workload.model.path, workload.model.name, store)
        publish(models.large(), _LARGE, store)
        _forget_versions(store)
        # It looks at the store when it is told to, not by itself.
        server = without_target(run.ours).serving(store).with_arguments("--poll", "0")
        tails: dict[int, Tails] = {}
        for turn, running in run.turns([server], workload):
            try:
                tails[turn] = _turn(running.server, workload, store, turn)
                run.keep(running.name, workload.name, turn, tails[turn])
            except GeneratorFailed as error:
                say(f"  {running.name}, {workload.name}: {error}")
            _forget_versions(store)
        ratio = series(tails, lambda one: one.ratio)
        each = tails.values()
        bars.append(
            Bar(
                f"{workload.model.name} at {RATES_PER_S[workload.name]:,.0f}/s: p99 while a version of 100 MB loads, over p99 without",
                tuple(ratio.by_turn.values()),
                "at most",
                LIMIT,
                ours=ms(one.during_s for one in each),
                against=ms(one.without_s for one in each),
                noisy=ratio.noisy,
            )
        )
        rows.append(
            (
                workload.model.name,
                ms(one.without_s for one in each),
                ms(one.during_s for one in each),
                ms(one.windows_s for one in each),
                spread(load_s for one in each for load_s in one.load_s),
                str(sum(one.n_during for one in each)),
            )
        )
    title = "A version of 100 MB loads beside another model"
    head = (
        "model",
        "p99 without",
        "p99 during loads",
        f"p99 of {_WINDOW_S:g} s with one load",
        "a load, s",
        "requests during loads",
    )
    return Findings(tuple(bars), (Table(title, head, tuple(rows)),))


def _turn(server: Server, workload: Workload, store: Path, turn: int) -> Tails:
    file = SCRATCH / "latencies"
    rate_per_s = RATES_PER_S[workload.name]
    without, during, windows, load_s, seen = [], [], [], [], []
    for i in range(_N_WINDOWS):
        seen.append(_window(server, rate_per_s, file, seed=100 * turn + i))
        without.append(_latencies(file)[1])
        LocalStore(store).publish(store / _LARGE / "1", _LARGE)
        time.sleep(0.5)  # what copying 100 MB left behind
        load = Load(server.port)
        seen.append(_window(server, rate_per_s, file, seed=100 * turn + i))
        load.thread.join()
        if load.error:
            raise GeneratorFailed(load.error)
        sent_s, latency_s = _latencies(file)
        windows.append(latency_s)
        during.append(latency_s[(sent_s >= load.began_s) & (sent_s <= load.ended_s)])
        load_s.append(load.ended_s - load.began_s)
    in_loads = np.concatenate(during)
    if not len(in_loads):
        raise GeneratorFailed("no request was sent while a version loaded")
    return Tails(
        without_s=_p99(np.concatenate(without)),
        during_s=_p99(in_loads),
        windows_s=_p99(np.concatenate(windows)),
        load_s=tuple(load_s),
        n_during=len(in_loads),
        cores=max((one.cores for one in seen), key=lambda cores: cores.foreign),
    )


def _window(server: Server, rate_per_s: float, latencies: Path, seed: int) -> OpenLoop:
    """Measure one window; never twice, since a load happens once. Raises GeneratorFailed where a request was not answered."""
    seen = open_loop(server, rate_per_s, _WINDOW_S, seed, NONE, latencies=latencies)
    if seen.n_ok < seen.n_sent:
        raise GeneratorFailed(f"{seen.n_sent - seen.n_ok} of {seen.n_sent} requests were not answered")
    return seen


def _latencies(file: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return when each answered request was sent, in seconds of the monotonic clock, and its latency in seconds."""
    sent_s, latency_s = np.fromfile(file).reshape(-1, 2).T
    return sent_s, latency_s


def _p99(latency_s: NDArray[np.float64]) -> float:
    return float(np.quantile(latency_s, 0.99))


def _forget_versions(store: Path) -> None:
    """Leave nothing but the large model's first version."""
    for folder in (store / _LARGE).iterdir():
        if folder.name.isdigit() and folder.name != "1":
            shutil.rmtree(folder)
