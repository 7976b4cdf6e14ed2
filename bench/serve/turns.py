"""Turns: contenders measured A B C, C B A, A B C, each time from a fresh start, with answers checked before anything is timed."""

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from .bars import Bar, ratios
from .contenders import OTHERS, Contender, Running
from .generators import NONE, Cores, GeneratorFailed, Patience, wrk
from .processes import ServerFailed
from .workloads import Workload


@dataclass(frozen=True)
class Pace:
    """How long things are measured, and how often.

    Attributes:
        n_turns: fresh starts of each contender.
        closed_s: one closed-loop measurement, whole seconds.
        probe_s: one open-loop measurement.
    """

    n_turns: int = 3
    closed_s: int = 2
    probe_s: float = 2


class Measured(Protocol):
    """What every measurement says about itself."""

    @property
    def cores(self) -> Cores: ...


M = TypeVar("M", bound=Measured)


@dataclass
class Run:
    """One run of the benchmark: what is measured, and all that was measured so far.

    `entries` hold every measurement as it was made, for the file of results.
    """

    ours: Contender
    pace: Pace
    patience: Patience
    with_others: bool = False
    entries: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, contender: str, workload: str, turn: int, measured: Any, **tags: Any) -> None:
        self.entries.append(
            {
                "contender": contender,
                "workload": workload,
                "turn": turn,
                **tags,
                type(measured).__name__: asdict(measured),
            }
        )

    def others(self, workload: Workload) -> Sequence[Contender]:
        """Return the further peers that take this workload, where they were asked for."""
        return [other for other in OTHERS if workload.name in other.asking] if self.with_others else []

    def turns(self, contenders: Sequence[Contender], workload: Workload) -> Iterator[tuple[int, Running]]:
        """Yield (turn, contender that is started, checked and warmed up) in turns.

        A contender that does not start, answers wrongly, or fails while it is measured is reported and left out of the turn.
        """
        for turn in range(self.pace.n_turns):
            # Every other round runs backwards, so that nobody always follows the same neighbour.
            for contender in contenders if turn % 2 == 0 else reversed(contenders):
                with contender.start(workload) as running:
                    try:
                        started_s = running.server.first_answer_s()
                        running.server.check()
                        wrk(running.server, 32, 1, NONE)
                    except (ServerFailed, GeneratorFailed) as error:
                        say(f"  {contender.name}, {workload.name}: {error}")
                        continue
                    say(f"  {contender.name}, {workload.name}, turn {turn + 1}: right answer after {started_s:.2f} s")
                    yield turn, running


@dataclass(frozen=True)
class Series:
    """One figure of one contender, by turn.

    Disturbed measurements are left out; where all were disturbed, all are here and `noisy` says so.
    """

    by_turn: Mapping[int, float]
    noisy: bool = False

    @property
    def middle(self) -> float:
        """The median; 0 where nothing was measured."""
        return statistics.median(self.by_turn.values()) if self.by_turn else 0.0


def series(measured: Mapping[int, M], figure: Callable[[M], float]) -> Series:
    """Return one figure of measurements that are given by turn."""
    quiet = {turn: one for turn, one in measured.items() if not one.cores.noisy}
    used = quiet or measured
    return Series({turn: figure(one) for turn, one in used.items()}, noisy=bool(measured) and not quiet)


def compare(
    what: str,
    ours: Series,
    peers: Mapping[str, Series],
    side: Literal["at least", "at most"],
    limit: float,
    write: Callable[[Iterable[float]], str],
) -> Bar:
    """Return the bar of ours over the best of `peers`, turn by turn. `write` words the figures."""
    measured = {name: one for name, one in peers.items() if one.by_turn}
    best = max if side == "at least" else min
    name = best(measured, key=lambda name: measured[name].middle, default="")
    theirs = measured.get(name, Series({}))
    return Bar(
        what,
        ratios(ours.by_turn, theirs.by_turn),
        side,
        limit,
        ours=write(ours.by_turn.values()),
        against=f"{name} {write(theirs.by_turn.values())}" if name else "-",
        noisy=ours.noisy or theirs.noisy,
    )


def say(text: str) -> None:
    """Print progress, to stderr so that the table is alone on stdout."""
    print(text, file=sys.stderr, flush=True)
