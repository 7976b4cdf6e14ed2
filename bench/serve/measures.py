"""What sections measure alike, collected by contender and turn, and the tables it fills."""

from collections import defaultdict
from collections.abc import Iterable

from .bars import Table, ms, per_s, spread
from .contenders import Running
from .generators import ClosedLoop, wrk
from .goodput import Goodput, goodput
from .turns import Run, Series, series

CONNECTIONS = (1, 8, 32, 64)


class Closed:
    """Closed-loop throughput at each number of connections."""

    def __init__(self, run: Run, workload: str, connections: Iterable[int] = CONNECTIONS) -> None:
        self.connections = tuple(connections)
        self._run, self._workload = run, workload
        self._seen: dict[str, dict[int, dict[int, ClosedLoop]]] = defaultdict(lambda: defaultdict(dict))

    def measure(self, turn: int, running: Running) -> float:
        """Measure one started contender; return the most requests/s it answered."""
        pace = self._run.pace
        for n in self.connections:
            seen = wrk(running.server, n, pace.closed_s, self._run.patience)
            self._seen[running.name][n][turn] = seen
            self._run.keep(running.name, self._workload, turn, seen)
        return max(self._seen[running.name][n][turn].rate_per_s for n in self.connections)

    def rates(self, name: str, n_connections: int) -> Series:
        return series(self._seen[name][n_connections], lambda one: one.rate_per_s)

    def table(self, title: str) -> Table:
        rows = []
        for name, by_connections in self._seen.items():
            most = by_connections[self.connections[-1]]
            cores = [
                f"{series(most, side).middle:.2f}"
                for side in (lambda one: one.cores.server, lambda one: one.cores.client)
            ]
            n_errors = sum(one.n_errors for seen in by_connections.values() for one in seen.values())
            cells = [
                f"{spread(self.rates(name, n).by_turn.values())} [{ms([series(by_connections[n], lambda one: one.p99_s).middle])}]"
                for n in self.connections
            ]
            rows.append((name, *cells, " / ".join(cores), str(n_errors)))
        head = (
            "server",
            *(f"{n} conn." for n in self.connections),
            f"cores server / client at {self.connections[-1]}",
            "errors",
        )
        return Table(title, head, tuple(rows), note="requests/s, median (least–most) of the turns, and [p99]")


class Good:
    """Goodput of each contender."""

    def __init__(self, run: Run, workload: str, n_probes: int = 7) -> None:
        self._run, self._workload, self._n_probes = run, workload, n_probes
        self._found: dict[str, dict[int, Goodput]] = defaultdict(dict)

    def measure(self, turn: int, running: Running, first_per_s: float, most_connections: int | None = None) -> Goodput:
        pace = self._run.pace
        found = goodput(
            running.server,
            first_per_s,
            pace.probe_s,
            self._run.patience,
            n_probes=self._n_probes,
            seed=1000 * turn,
            most_connections=most_connections,
        )
        self._found[running.name][turn] = found
        self._run.keep(running.name, self._workload, turn, found)
        return found

    def rates(self, name: str) -> Series:
        return series(self._found[name], lambda one: one.rate_per_s)

    def table(self, title: str) -> Table:
        rows = []
        for name, found in self._found.items():
            at = [one.at for one in found.values() if one.at]
            rows.append(
                (
                    name,
                    per_s(self.rates(name).by_turn.values()),
                    ms(probe.p50_s for probe in at),
                    ms(probe.p99_s for probe in at),
                )
            )
        return Table(title, ("server", "goodput", "p50 there", "p99 there"), tuple(rows))
