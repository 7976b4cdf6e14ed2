"""The quick look while tuning: closed-loop throughput of ours beside a few others, in about a minute. It judges nothing."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from .contenders import Contender, without_target
from .generators import ClosedLoop, wrk
from .measures import CONNECTIONS
from .turns import Run
from .workloads import Workload


def look(run: Run, peers: Sequence[Contender], workload: Workload) -> None:
    """Print requests/s and p99 of ours and `peers` at each number of connections, each row as soon as it is known."""
    print(f"\n{workload.name}: requests/s (p99 ms) by connections; * something else used the machine")
    print(f"{'':<22}" + "".join(f"{n:>18}" for n in CONNECTIONS) + "   server / client cores at 64", flush=True)
    seen: dict[str, dict[int, list[ClosedLoop]]] = defaultdict(lambda: defaultdict(list))
    for turn, running in run.turns([without_target(run.ours), *peers], workload):
        mine = seen[running.name]
        for n in CONNECTIONS:
            mine[n].append(wrk(running.server, n, run.pace.closed_s, run.patience))
        if turn == run.pace.n_turns - 1:
            cells = "".join(f"{_cell(mine[n]):>18}" for n in CONNECTIONS)
            cores = mine[CONNECTIONS[-1]][-1].cores
            print(f"{running.name:<22}{cells}   {cores.server:.2f} / {cores.client:.2f}", flush=True)


def _cell(seen: Sequence[ClosedLoop]) -> str:
    rate_per_s = statistics.median(one.rate_per_s for one in seen)
    p99_ms = statistics.median(one.p99_s for one in seen) * 1000
    n_errors = sum(one.n_errors for one in seen)
    noisy = "*" if any(one.cores.noisy for one in seen) else ""
    return f"{rate_per_s:,.0f} ({p99_ms:.2f}){noisy}" + (f" {n_errors} errors" if n_errors else "")
