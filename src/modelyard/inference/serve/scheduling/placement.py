"""How many processes, instances and threads a server gets: from what a row costs, the target and the cores. Pure.

A worker process answers requests on one event loop, which is one core's worth of reading and writing. Models of
microseconds need as many of those as there are cores. Models of milliseconds need the cores for themselves, and one queue for
all instances rather than one per process: of two queues one is empty while the other waits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

REQUEST_S = 120e-6
"""Twice what reading and answering one request takes; a worker's loop should not be busier than half with it."""


@dataclass(frozen=True)
class Placement:
    """What one model gets in one worker."""

    n_instances: int
    n_threads: int
    """Of one run."""


def workers_for(row_s: Mapping[str, float], n_cores: int) -> int:
    """Return how many worker processes suit models of which one row takes `row_s` seconds, by name, on one thread.

    The cheapest model decides: the one that could bring the most requests.
    """
    cheapest_s = min(row_s.values(), default=REQUEST_S)
    return max(1, min(n_cores, ceil(n_cores * REQUEST_S / max(cheapest_s, 1e-9))))


def placement_for(
    row_s: float,
    target_s: float,
    *,
    n_cores: int,
    n_workers: int,
    n_instances: int | None = None,
    n_threads: int | None = None,
) -> Placement:
    """Return what a model gets in each of `n_workers`, one row of which takes `row_s` on one thread; what is given is kept.

    One thread per run, since two runs side by side do more than one run on two threads, unless one alone would take more than
    half the target.
    """
    share = max(1, n_cores // n_workers)
    if n_threads is None:
        n_threads = min(share, max(1, ceil(2 * row_s / target_s)))
    if n_instances is None:
        n_instances = 1 if row_s * n_workers < REQUEST_S else max(1, share // max(1, n_threads))
    return Placement(n_instances, n_threads)
