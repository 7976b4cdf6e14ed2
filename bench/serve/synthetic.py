"""The real server over real sockets against the simulation of its policy, on an engine that sleeps.

The engine takes l(b) = 5 + 0.25 b ms for b rows, eight of them run at once, and answers must be out within 20 ms. It costs no
CPU, so what is lost against the simulation is lost to sockets, parsing, threads and clocks.
"""

from .bars import Bar, Findings, per_s
from .contenders import sleeping
from .overload import under_overload
from .simulation import SYNTHETIC, sustained_rows_per_s
from .turns import Run, say, series
from .workloads import SLEEP_ONE, SLEEP_SIXTEEN

OVER_SIMULATION = 0.85
KEPT = {1.5: 0.95, 3.0: 0.95}


def synthetic(run: Run) -> Findings:
    """Return what the server sustains over what the simulation does, and what it keeps under overload."""
    bars, tables = [], []
    sleeper = sleeping(SYNTHETIC.n_instances)
    for workload, limits in ((SLEEP_SIXTEEN, KEPT), (SLEEP_ONE, {1.5: KEPT[1.5]})):
        simulated_per_s = sustained_rows_per_s(
            SYNTHETIC.scheduler, SYNTHETIC, rows_per_request=workload.n_rows, n_requests=50_000
        )
        say(f"  {workload.name}: the simulation sustains {simulated_per_s:,.0f} rows/s")
        overloaded, table, seen = under_overload(
            run, sleeper, [], workload, limits, first_per_s=0.8 * simulated_per_s / workload.n_rows
        )
        good = series(seen.get(sleeper.name, {}), lambda one: one.good.rate_per_s)
        rows_per_s = [rate_per_s * workload.n_rows for rate_per_s in good.by_turn.values()]
        bars.append(
            Bar(
                f"{workload.name}, rows/s sustained over the policy's simulation",
                tuple(value / simulated_per_s for value in rows_per_s),
                "at least",
                OVER_SIMULATION,
                ours=per_s(rows_per_s),
                against=f"simulation {per_s([simulated_per_s])}",
                noisy=good.noisy,
            )
        )
        bars.extend(overloaded)
        tables.append(table)
    return Findings(tuple(bars), tuple(tables))
