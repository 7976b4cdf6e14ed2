"""More offered than can be answered: what of the peak is still answered in time, ours and the peers side by side.

The client never holds an arrival back: it opens another connection whenever all are busy, thousands if need be. With a
fixed number of connections the client itself would queue what the server cannot take, and hide the overload from it.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .bars import Bar, Findings, Table, number, per_s, spread
from .contenders import MOSEC, MOSEC_MID, TRITON, Contender
from .generators import Cores, OpenLoop, open_loop, wrk
from .goodput import Goodput
from .measures import Good
from .turns import Run, Series, series
from .workloads import MID_BINARY, TINY_JSON, Workload

MOST_CONNECTIONS = 8192


@dataclass(frozen=True)
class Overloaded:
    """One start of a server, from its goodput up."""

    good: Goodput
    under: Mapping[float, OpenLoop]

    @property
    def cores(self) -> Cores:
        return max((self.good.cores, *(one.cores for one in self.under.values())), key=lambda cores: cores.foreign)

    @property
    def peak_per_s(self) -> float:
        """The most that was ever answered in time, at whichever rate."""
        return max(one.in_time_per_s for one in (*self.good.probes, *self.under.values()))

    def kept(self, factor: float) -> float:
        """Return the share of the peak that is answered in time at `factor` times the goodput.

        Of what was offered, where that was less than the peak: a search on a busy machine may find a goodput far too low.
        """
        under = self.under[factor]
        return under.in_time_per_s / (min(self.peak_per_s, under.n_sent / under.seconds) or 1)


def overload(run: Run) -> Findings:
    """Return what is left of the peak at 1.5 and 3 times the rate that a server sustains."""
    bars: list[Bar] = []
    tables: list[Table] = []
    for workload, limits, peers in (
        (MID_BINARY, {1.5: 0.95, 3.0: 0.95}, (MOSEC_MID, TRITON)),
        (TINY_JSON, {1.5: 0.60}, (MOSEC[-1],)),
    ):
        found, table, _ = under_overload(run, run.ours, peers, workload, limits)
        bars.extend(found)
        tables.append(table)
    return Findings(tuple(bars), tuple(tables))


def under_overload(
    run: Run,
    ours: Contender,
    peers: Sequence[Contender],
    workload: Workload,
    limits: Mapping[float, float],
    first_per_s: float | None = None,
) -> tuple[tuple[Bar, ...], Table, dict[str, dict[int, Overloaded]]]:
    """Measure each contender at its goodput and at multiples of it; return the bars of `ours`, everyone's table, and all of it.

    Args:
        limits: multiple of the goodput → share of the peak that ours must keep.
        first_per_s: where the search of the goodput begins; below the closed loop's rate by default.
    """
    good = Good(run, workload.name)
    seen: dict[str, dict[int, Overloaded]] = defaultdict(dict)
    for turn, running in run.turns([ours, *peers], workload):
        begin_per_s = first_per_s or 0.8 * wrk(running.server, 64, run.pace.closed_s, run.patience).rate_per_s
        found = good.measure(turn, running, begin_per_s, MOST_CONNECTIONS)
        under: dict[float, OpenLoop] = {}
        for factor in limits:
            time.sleep(1)  # whatever the last probe left behind
            under[factor] = open_loop(
                running.server,
                factor * (found.rate_per_s or begin_per_s),
                2 * run.pace.probe_s,
                turn,
                run.patience,
                most_connections=MOST_CONNECTIONS,
            )
            run.keep(running.name, workload.name, turn, under[factor], factor=factor)
        seen[running.name][turn] = Overloaded(found, under)

    bars = []
    for factor, limit in limits.items():
        kept = {name: series(each, partial(Overloaded.kept, factor=factor)) for name, each in seen.items()}
        mine = kept.pop(ours.name, Series({}))
        bars.append(
            Bar(
                f"{workload.name}: in time at {factor:g} × the sustained rate, over the peak",
                tuple(mine.by_turn.values()),
                "at least",
                limit,
                ours=per_s(one.under[factor].in_time_per_s for one in seen.get(ours.name, {}).values()),
                against=", ".join(f"{name} keeps {number(one.middle)}" for name, one in kept.items()) or "-",
                noisy=mine.noisy,
            )
        )
    return tuple(bars), _table(workload, seen, tuple(limits)), seen


def _table(workload: Workload, seen: Mapping[str, Mapping[int, Overloaded]], factors: tuple[float, ...]) -> Table:
    rows = []
    for name, by_turn in seen.items():
        each = by_turn.values()
        rows.append(
            (
                name,
                "1",
                per_s(one.good.rate_per_s for one in each),
                per_s(one.peak_per_s for one in each),
                "1",
                "-",
                "-",
            )
        )
        for factor in factors:
            under = [one.under[factor] for one in each]
            rows.append(
                (
                    name,
                    f"{factor:g}",
                    per_s(one.offered_per_s for one in under),
                    per_s(one.in_time_per_s for one in under),
                    spread(one.kept(factor) for one in each),
                    f"{spread(one.n_refused / one.n_sent for one in under)}",
                    f"{max(one.n_connections for one in under):,} / {max(one.n_held_back for one in under):,}",
                )
            )
    return Table(
        f"{workload.name}: offered more than is sustained, in time within {workload.target_s * 1000:.0f} ms",
        (
            "server",
            "times the sustained rate",
            "offered",
            "in time",
            "of its peak",
            "refused",
            "connections / held back",
        ),
        tuple(rows),
        note="The client opens a connection whenever all are busy, so that it holds nothing back.",
    )
