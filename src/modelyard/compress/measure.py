"""What a parent and its child cost on this machine: timed in turns, so that a drift of the machine hits both alike."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays
from modelyard.bundle.format import PROFILE, Bundle
from modelyard.bundle.profile import Latency, Profile, add_profile, fingerprint
from modelyard.compress.verdict import CostComparison
from modelyard.inference.runtime import open_engine
from modelyard.statistics import ratio_interval

PROFILE_BATCHES = (1, 8, 32, 128)
N_PAIRS = 60
PAIR_BUDGET_S = 6.0
MIN_BLOCK_S = 0.002
"""A block of runs lasts at least this long, so that the clock's grain does not matter."""
QUIET_SPREAD = 0.25
"""Interquartile range over median of the parent's blocks; above it the machine is called noisy."""

Run = Callable[[Arrays], object]


def compare_cost(
    parent: Run,
    child: Run,
    rows: Arrays,
    *,
    parent_bytes: int,
    child_bytes: int,
    progress: Callable[[str], None] = lambda _: None,
) -> CostComparison:
    """Time both at batch 1 in interleaved blocks.

    Args:
        parent, child: engines' `run` on one thread each.
        rows: rows to cycle through, one at a time.
        parent_bytes, child_bytes: weight bytes.
    """
    singles = [{name: array[i : i + 1] for name, array in rows.items()} for i in range(_n_rows(rows))]
    for run in (parent, child):
        _block_s(run, singles, max(3, len(singles) // 4))
    n_runs = {run: _runs_per_block(run, singles) for run in (parent, child)}
    parent_s: list[float] = []
    child_s: list[float] = []
    started_s = time.perf_counter()
    while len(parent_s) < N_PAIRS and (len(parent_s) < 10 or time.perf_counter() - started_s < PAIR_BUDGET_S):
        # Who goes first alternates, so that neither always finds the other's caches.
        for run, into in ((parent, parent_s), (child, child_s))[:: 1 if len(parent_s) % 2 else -1]:
            into.append(_block_s(run, singles, n_runs[run]) / n_runs[run])
        progress(f"timed {len(parent_s)} of {N_PAIRS} pairs")
    low, median, high = np.quantile(parent_s, [0.25, 0.5, 0.75])
    return CostComparison(
        speedup=ratio_interval(np.array(parent_s), np.array(child_s)),
        parent_bytes=parent_bytes,
        child_bytes=child_bytes,
        quiet=bool((high - low) / median <= QUIET_SPREAD),
        n_pairs=len(parent_s),
    )


def measure_latency(run: Run, rows: Arrays, batch_size: int, *, n_threads: int, budget_s: float = 1.0) -> Latency:
    """Time single runs at one batch size for about `budget_s` seconds, at least 20 of them."""
    indices = np.resize(np.arange(_n_rows(rows)), batch_size * 8).reshape(8, batch_size)
    batches = [{name: array[index] for name, array in rows.items()} for index in indices]
    for batch in batches[:3]:
        run(batch)
    seconds: list[float] = []
    started_s = time.perf_counter()
    while len(seconds) < 20 or time.perf_counter() - started_s < budget_s:
        before_s = time.perf_counter()
        run(batches[len(seconds) % len(batches)])
        seconds.append(time.perf_counter() - before_s)
    times: NDArray[np.float64] = np.array(seconds)
    p50_s, p99_s = np.quantile(times, [0.5, 0.99]).tolist()
    return Latency(
        batch_size=batch_size,
        n_threads=n_threads,
        n_runs=len(times),
        p50_s=p50_s,
        p99_s=p99_s,
        mean_s=float(times.mean()),
    )


def _n_rows(rows: Arrays) -> int:
    return len(next(iter(rows.values())))


def _block_s(run: Run, singles: list[dict[str, NDArray[np.generic]]], n_runs: int) -> float:
    started_s = time.perf_counter()
    for i in range(n_runs):
        run(singles[i % len(singles)])
    return time.perf_counter() - started_s


def _runs_per_block(run: Run, singles: list[dict[str, NDArray[np.generic]]]) -> int:
    once_s = _block_s(run, singles, 5) / 5
    return max(1, round(MIN_BLOCK_S / once_s)) if once_s else 1


def profile_bundle(bundle: Bundle, *, progress: Callable[[str], None] = lambda _: None) -> Profile:
    """Measure the bundle on one thread at growing batch sizes and keep the result in its profile.json."""
    engine = open_engine(bundle, check=False)
    rows = bundle.cases().inputs
    latencies = []
    for batch_size in PROFILE_BATCHES if bundle.manifest.rows_independent else PROFILE_BATCHES[:1]:
        progress(f"batch {batch_size}")
        latencies.append(measure_latency(engine.run, rows, batch_size, n_threads=1))
    engine.close()
    profile = Profile(
        hardware=fingerprint(engine.name),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        latencies=tuple(latencies),
    )
    add_profile(bundle.path / PROFILE, profile)
    return profile
