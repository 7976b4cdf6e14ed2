"""The policy of modelyard.inference.serve.scheduling.scheduling, simulated on synthetic engines, beside the two usual ways to batch.

A discrete-event simulation that drives the very scheduler that serves: Poisson arrivals, n instances that take l(b), and
nothing else, so that what is measured is the policy alone. What a real server sustains is judged by `sustained_rows_per_s`.

    python -m bench.serve.simulation            # all tables, about two minutes
    python -m bench.serve.simulation --quick    # shorter runs, rougher figures
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.profile import Latency
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Batch, Decision, Job, Policy, Refusal, Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # machine.py
from machine import bar, heading

_NEVER = float("inf")
IN_TIME = 0.99
"""A rate is sustained when so many of all requests, refused ones included, are answered within the target."""
N_REQUESTS = 100_000


@dataclass(frozen=True)
class Engine:
    """What is served: a latency that depends on the rows of a batch alone."""

    name: str
    latency_s: Callable[[int], float]
    n_instances: int
    target_s: float
    max_batch_size: int

    def profile(self) -> list[Latency]:
        sizes = [2**power for power in range(self.max_batch_size.bit_length())]
        times_s = [(size, self.latency_s(size)) for size in sizes]
        return [Latency(size, 1, 100, took_s, took_s, took_s) for size, took_s in times_s]

    def scheduler(self, *, known: bool = True) -> Scheduler:
        """Return a scheduler for it, that knows its latency or has to learn it."""
        latency = LatencyModel(self.max_batch_size, self.profile() if known else ())
        return Scheduler(Policy(self.target_s, self.max_batch_size, self.n_instances), latency)


SYNTHETIC = Engine("l(b) = 5 + 0.25 b ms, 8 instances", lambda n_rows: (5 + 0.25 * n_rows) * 1e-3, 8, 0.020, 64)
MID_1 = Engine("l(b) = 3.4 b ms, 1 instance", lambda n_rows: 3.4e-3 * n_rows, 1, 0.050, 32)
MID_2 = Engine("l(b) = 3.4 b ms, 2 instances", lambda n_rows: 3.4e-3 * n_rows, 2, 0.050, 32)


@dataclass(slots=True)
class Request:
    """A job and its fate."""

    n_rows: int
    arrived_s: float
    deadline_s: float
    priority: int = 0
    bucket: Hashable = None
    queued: bool = False
    answered_s: float = _NEVER


class Server(Protocol):
    """What is simulated: the scheduler, or one of the simple batchers below."""

    def arrive(self, job: Job, now_s: float, /) -> Refusal | None: ...
    def decide(self, now_s: float, /) -> Decision: ...
    def finish(self, batch: Batch, now_s: float, service_s: float, /) -> None: ...


class SimpleBatcher:
    """First come, first served, up to so many rows: when an instance is free, or once the oldest has waited `window_s`."""

    def __init__(self, engine: Engine, *, window_s: float = 0.0, max_batch_size: int | None = None) -> None:
        self._window_s = window_s
        self._n_free = engine.n_instances
        self._max_batch_size = max_batch_size or engine.max_batch_size
        self._jobs: deque[Job] = deque()
        self._n_rows = 0

    def arrive(self, job: Job, now_s: float, /) -> Refusal | None:
        self._jobs.append(job)
        self._n_rows += job.n_rows
        return None

    def decide(self, now_s: float, /) -> Decision:
        jobs = self._jobs
        if not jobs or not self._n_free:
            return Decision(None, (), None)
        ready_s = jobs[0].arrived_s + self._window_s
        if now_s < ready_s and self._n_rows < self._max_batch_size:
            return Decision(None, (), ready_s)
        taken = [jobs.popleft()]
        n_rows = taken[0].n_rows
        while jobs and n_rows + jobs[0].n_rows <= self._max_batch_size:
            n_rows += jobs[0].n_rows
            taken.append(jobs.popleft())
        self._n_rows -= n_rows
        self._n_free -= 1
        return Decision(Batch(taken, n_rows, n_rows, None, "instance free", now_s, now_s, _NEVER), (), None)

    def finish(self, batch: Batch, now_s: float, service_s: float, /) -> None:
        self._n_free += 1


@dataclass(frozen=True)
class Outcome:
    """What became of the requests of a run, those of the first tenth left out."""

    in_time: float
    goodput_rows_per_s: float
    """Rows answered in time."""
    p50_s: float
    """Of the answered."""
    p99_s: float
    requests_per_s: float
    """Requests simulated per second of processor time."""


def simulate(
    server: Server, engine: Engine, rows_per_s: float, *, rows_per_request: int = 1, n_requests: int = N_REQUESTS
) -> Outcome:
    """Serve Poisson arrivals, the same ones for every server."""
    rate_per_s = rows_per_s / rows_per_request
    arrivals_s = np.cumsum(np.random.default_rng(1).exponential(1.0 / rate_per_s, n_requests))
    requests = [Request(rows_per_request, at_s, at_s + engine.target_s) for at_s in arrivals_s.tolist()]
    largest = max(engine.max_batch_size, rows_per_request)
    times_s = [engine.latency_s(n_rows) for n_rows in range(largest + 1)]
    started_s = time.process_time()
    _serve(server, requests, times_s)
    took_s = time.process_time() - started_s
    kept = requests[n_requests // 10 :]
    latencies_s = np.array([each.answered_s - each.arrived_s for each in kept])
    n_in_time = int(np.count_nonzero(latencies_s <= engine.target_s + 1e-9))
    p50_s, p99_s = _quantiles_s(latencies_s)
    goodput = n_in_time * rows_per_request / (kept[-1].arrived_s - kept[0].arrived_s)
    return Outcome(n_in_time / len(kept), goodput, p50_s, p99_s, n_requests / took_s)


def _serve(server: Server, requests: list[Request], times_s: list[float]) -> None:
    """Jump from event to event: an arrival, the end of a batch, or the moment at which the server wants to be asked."""
    arrive, decide, finish = server.arrive, server.decide, server.finish
    running: list[tuple[float, int, Batch]] = []
    next_end_s = wake_s = _NEVER
    n_batches = 0
    upcoming = iter(requests)
    request = next(upcoming, None)
    while request is not None or running or wake_s < _NEVER:
        arrived_s = request.arrived_s if request is not None else _NEVER
        if request is not None and arrived_s <= next_end_s and arrived_s <= wake_s:
            now_s = arrived_s
            arrive(request, now_s)
            request = next(upcoming, None)
        elif next_end_s <= wake_s:
            now_s, _, batch = heappop(running)
            next_end_s = running[0][0] if running else _NEVER
            for job in batch.jobs:
                job.answered_s = now_s  # type: ignore[attr-defined]  # a Request of ours
            finish(batch, now_s, now_s - batch.started_s)
        else:
            now_s = wake_s
        decision = decide(now_s)
        while (started := decision.batch) is not None:
            n_batches += 1
            heappush(running, (now_s + times_s[started.padded_to], n_batches, started))
            next_end_s = running[0][0]
            decision = decide(now_s)
        wake_s = _NEVER if decision.wake_s is None else decision.wake_s


def _quantiles_s(latencies_s: NDArray[np.float64]) -> tuple[float, float]:
    answered_s = latencies_s[np.isfinite(latencies_s)]
    if not len(answered_s):
        return _NEVER, _NEVER
    p50_s, p99_s = np.quantile(answered_s, [0.5, 0.99])
    return float(p50_s), float(p99_s)


def sustained_rows_per_s(
    make: Callable[[], Server], engine: Engine, *, rows_per_request: int = 1, n_requests: int = N_REQUESTS
) -> float:
    """Return the highest rate, within half a percent, of which 99 % of the requests are answered in time."""
    most = max(n_rows / engine.latency_s(n_rows) for n_rows in range(1, engine.max_batch_size + 1))
    low, high = 0.02 * engine.n_instances * most, 1.1 * engine.n_instances * most
    while high / low > 1.005:
        rate = (low * high) ** 0.5
        outcome = simulate(make(), engine, rate, rows_per_request=rows_per_request, n_requests=n_requests)
        if outcome.in_time >= IN_TIME:
            low = rate
        else:
            high = rate
    return low


def compare(
    engine: Engine, servers: dict[str, Callable[[], Server]], rows_per_request: int, n_requests: int
) -> dict[str, float]:
    """Print one table and return what each server sustains."""
    rows = f"{rows_per_request} rows a request" if rows_per_request > 1 else "single rows"
    print(f"\n{engine.name}, target {engine.target_s * 1e3:g} ms, {rows}")
    print(
        "                            sustained   p50, ms, at           goodput, rows/s, offered this, of the policy's sustained"
    )
    print("                               rows/s   5 %     50 %    90 %   1 x      1.3 x    1.5 x    3 x")
    sustained: dict[str, float] = {}
    base = 0.0
    for name, make in servers.items():
        sustained[name] = sustained_rows_per_s(make, engine, rows_per_request=rows_per_request, n_requests=n_requests)
        base = base or sustained[name]

        def at(part: float, make: Callable[[], Server] = make, base: float = base) -> Outcome:
            return simulate(make(), engine, part * base, rows_per_request=rows_per_request, n_requests=n_requests)

        light = "".join(f"{_limited(at(part).p50_s * 1e3):>8}" for part in (0.05, 0.5, 0.9))
        heavy = "".join(f"{at(part).goodput_rows_per_s:9,.0f}" for part in (1.0, 1.3, 1.5, 3.0))
        print(f"  {name:26} {sustained[name]:8,.0f}{light}{heavy}")
    return sustained


def _limited(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 1000 else "> 1 s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the requests")
    n_requests = N_REQUESTS // 5 if parser.parse_args().quick else N_REQUESTS
    heading("the batching policy, simulated")
    ours = "the policy"

    def servers(engine: Engine, *others: tuple[str, Callable[[], Server]]) -> dict[str, Callable[[], Server]]:
        return {
            ours: engine.scheduler,
            f"{ours}, nothing known": lambda: engine.scheduler(known=False),
            **dict(others),
        }

    batchers = (
        ("eager", lambda: SimpleBatcher(SYNTHETIC)),
        ("a fixed window of 5 ms", lambda: SimpleBatcher(SYNTHETIC, window_s=0.005)),
    )
    single = compare(SYNTHETIC, servers(SYNTHETIC, *batchers), 1, n_requests)
    by_16 = compare(SYNTHETIC, servers(SYNTHETIC, *batchers), 16, n_requests)
    for engine in (MID_1, MID_2):
        compare(
            engine,
            servers(
                engine,
                ("row by row", lambda engine=engine: SimpleBatcher(engine, max_batch_size=1)),  # type: ignore[misc]
                ("eager", lambda engine=engine: SimpleBatcher(engine)),  # type: ignore[misc]
                ("a fixed window of 5 ms", lambda engine=engine: SimpleBatcher(engine, window_s=0.005)),  # type: ignore[misc]
            ),
            1,
            n_requests // 2,
        )
    print("\nbars")
    met = bar(f"single rows: {single[ours]:,.0f} rows/s sustained; 21,500 or more", single[ours] >= 21_500)
    met &= bar(f"16 rows a request: {by_16[ours]:,.0f} rows/s sustained; 15,800 or more", by_16[ours] >= 15_800)
    for name, sustained in single.items():
        if name != ours and not name.startswith(ours):
            met &= bar(
                f"{single[ours] / sustained:.1f} x what {name} sustains; 2 or more", single[ours] >= 2 * sustained
            )
    peak = max(
        simulate(SYNTHETIC.scheduler(), SYNTHETIC, part * single[ours]).goodput_rows_per_s for part in (1.0, 1.05)
    )
    for part in (1.3, 1.5, 3.0):
        kept = simulate(SYNTHETIC.scheduler(), SYNTHETIC, part * single[ours]).goodput_rows_per_s / peak
        met &= bar(f"goodput at {part:g} x the sustained rate: {kept:.1%} of its peak; 97 % or more", kept >= 0.97)
    for rows_per_s in (2_000, 10_000, 22_000, 66_000):
        speed = simulate(SYNTHETIC.scheduler(), SYNTHETIC, rows_per_s, n_requests=n_requests).requests_per_s
        print(f"  simulated at {rows_per_s:6,} rows/s: {speed:,.0f} requests per second of one core")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
