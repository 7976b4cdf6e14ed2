"""The load generators, as functions that return what they measured: wrk, our open loop, perf_analyzer.

The machine is shared, so each measurement says how many cores anything else used meanwhile. One with `NOISY` foreign cores
or more is done again as long as there is patience; after that it says so of itself (`Cores.noisy`).
"""

import csv
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .places import HERE, OPEN_LOOP, PERF, SCRATCH
from .processes import Server, machine_cpu_s

NOISY = 0.15  # cores
_LOOK_S = 0.5
N_CONNECTIONS = 128  # of the open loop, unless told otherwise
T = TypeVar("T")


@dataclass(frozen=True)
class Cores:
    """CPU seconds per second during a measurement: the generator's, the server's, everything else's."""

    client: float
    server: float
    foreign: float

    @property
    def noisy(self) -> bool:
        return self.foreign >= NOISY


@dataclass(frozen=True)
class ClosedLoop:
    """What wrk saw. Only answers with status 200 are throughput."""

    n_connections: int
    seconds: float
    n_answers: int
    n_errors: int
    p50_s: float
    p99_s: float
    cores: Cores

    @property
    def rate_per_s(self) -> float:
        return max(0, self.n_answers - self.n_errors) / self.seconds


@dataclass(frozen=True)
class OpenLoop:
    """What the open loop saw; see open_loop.c for what each figure means."""

    offered_per_s: float
    seconds: float
    n_sent: int
    n_ok: int
    n_in_time: int
    n_refused: int
    n_failed: int
    n_unanswered: int
    p50_s: float
    p99_s: float
    p999_s: float
    most_s: float
    n_connections: int
    n_held_back: int
    lag_most_s: float
    cores: Cores

    @property
    def share_in_time(self) -> float:
        return self.n_in_time / max(1, self.n_sent)

    @property
    def in_time_per_s(self) -> float:
        return self.n_in_time / self.seconds


@dataclass(frozen=True)
class PerfAnalyzer:
    """What Triton's own generator saw. It takes about five times wrk's CPU per request."""

    protocol: str
    concurrency: int
    rate_per_s: float
    p50_s: float
    p99_s: float
    cores: Cores


class Patience:
    """How long a run may wait for the machine to be quiet, to measure again what something else on it disturbed.

    Owned by a run; one measurement is tried four times at most. `left_s` falls while it is used.
    """

    def __init__(self, left_s: float) -> None:
        self.left_s = left_s
        self._n_tries = 0

    def tried(self, cores: Cores, took_s: float) -> bool:
        """Say whether a measurement counts; where it is to be done again, once the machine is quiet."""
        self._n_tries += 1
        if not cores.noisy or self._n_tries == 4 or self.left_s <= 0:
            self._n_tries = 0
            return True
        print(f"    something else used {cores.foreign:.2f} cores; once more", file=sys.stderr, flush=True)
        self.left_s -= took_s
        while self.left_s > 0:
            used_s = machine_cpu_s()
            time.sleep(_LOOK_S)
            self.left_s -= _LOOK_S
            if machine_cpu_s() - used_s < NOISY * _LOOK_S:  # the server under test has nothing to do meanwhile
                break
        return False


NONE = Patience(0)
"""Takes every measurement as it comes."""


class GeneratorFailed(RuntimeError):
    """A load generator did not give a result; its output says why."""


def wrk(server: Server, n_connections: int, seconds: float, patience: Patience) -> ClosedLoop:
    """Return the closed-loop throughput of `server` on one fixed row."""
    post = server.post()
    body = SCRATCH / "wrk_body"
    body.write_bytes(post.body)
    headers = "\n".join(f"{name}: {value}" for name, value in post.headers.items())
    command = [
        "wrk", "-t1", f"-c{n_connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s",
        "-s", str(HERE / "wrk_report.lua"), f"http://127.0.0.1:{server.port}{post.path}",
    ]  # fmt: skip

    def read(output: str, cores: Cores) -> ClosedLoop:
        if not (line := re.search(r"^JSON (.*)$", output, re.M)):
            raise GeneratorFailed(f"wrk said: {output[-500:]}")
        return ClosedLoop(**json.loads(line[1]), n_connections=n_connections, cores=cores)

    return _measured(server, command, read, patience, {"WRK_BODY": str(body), "WRK_HEADERS": headers})


def open_loop(
    server: Server,
    rate_per_s: float,
    seconds: float,
    seed: int,
    patience: Patience,
    *,
    n_connections: int = N_CONNECTIONS,
    most_connections: int | None = None,
    target_s: float | None = None,
    latencies: Path | None = None,
) -> OpenLoop:
    """Return how `server` answers Poisson arrivals; the same seed and rate give the same arrivals.

    Args:
        n_connections: that it starts with.
        most_connections: that it may open rather than hold an arrival back; as many as it starts with by default.
        target_s: latency within which an answer is in time; the workload's own by default.
        latencies: receives (sent at, latency) of every answer, see open_loop.c.
    """
    request = SCRATCH / "request"
    request.write_bytes(server.post().raw())
    command = [
        str(OPEN_LOOP), str(server.port), str(request), f"{rate_per_s:.3f}", str(seconds), str(n_connections),
        str(most_connections or n_connections), str(target_s or server.workload.target_s), str(seed),
        *([] if latencies is None else [str(latencies)]),
    ]  # fmt: skip

    def read(output: str, cores: Cores) -> OpenLoop:
        if not output.startswith("{"):
            raise GeneratorFailed(f"open_loop said: {output[-500:]}")
        return OpenLoop(**json.loads(output), cores=cores)

    return _measured(server, command, read, patience)


def perf_analyzer(
    server: Server, port: int, protocol: str, concurrency: int, seconds: float, patience: Patience
) -> PerfAnalyzer:
    """Return what perf_analyzer gets over `protocol`, http or grpc, at `port`."""
    data, table = SCRATCH / "perf_input.json", SCRATCH / "perf.csv"
    model = server.workload.model
    row = {model.input: {"content": server.x[0].ravel().tolist(), "shape": list(model.shape)}}
    data.write_text(json.dumps({"data": [row]}))
    table.unlink(missing_ok=True)
    command = [
        str(next(PERF.rglob("perf_analyzer"))), "-m", model.name, "-u", f"127.0.0.1:{port}", "-i", protocol,
        "--concurrency-range", str(concurrency), "--measurement-interval", str(round(seconds * 1000)),
        "--stability-percentage", "999", "--input-data", str(data), "--async", "-f", str(table),
    ]  # fmt: skip

    def read(output: str, cores: Cores) -> PerfAnalyzer:
        if not table.exists():
            raise GeneratorFailed(f"perf_analyzer said: {output[-600:]}")
        with table.open() as lines:
            row = next(csv.DictReader(lines))
        p50_s, p99_s = (float(row[f"p{p} latency"]) / 1e6 for p in (50, 99))
        return PerfAnalyzer(protocol, concurrency, float(row["Inferences/Second"]), p50_s, p99_s, cores)

    libraries = ":".join(str(found.parent) for found in PERF.rglob("libcudart.so*"))
    return _measured(server, command, read, patience, {"LD_LIBRARY_PATH": libraries}, timeout_s=120)


def _measured(
    server: Server,
    command: Sequence[str],
    read: Callable[[str, Cores], T],
    patience: Patience,
    env: Mapping[str, str] | None = None,
    *,
    timeout_s: float = 60,
) -> T:
    """Run a generator, again while the machine is noisy, and return what `read` makes of its output."""
    while True:
        machine_s, server_s, client_s = machine_cpu_s(), server.cpu_s(), children_cpu_s()
        before_s = time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout_s
        )
        wall_s = time.perf_counter() - before_s
        client, served = (children_cpu_s() - client_s) / wall_s, (server.cpu_s() - server_s) / wall_s
        foreign = (machine_cpu_s() - machine_s) / wall_s - client - served
        cores = Cores(round(client, 2), round(served, 2), round(foreign, 2))
        if patience.tried(cores, wall_s):
            break
    return read(done.stdout + done.stderr, cores)


def children_cpu_s() -> float:
    """CPU seconds of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
