"""How soon the server is of use, and how much memory it takes: two workers with one model, and with two hundred."""

from collections.abc import Sequence
from dataclasses import dataclass

from modelyard.bundle.store import LocalStore

from .bars import Bar, Findings, number
from .contenders import Contender, publish, without_target
from .generators import NONE, wrk
from .places import STORES
from .processes import Memory, ServerFailed
from .turns import Run, say
from .workloads import SMALL, SMALL_JSON, TINY_JSON, Workload

READY_S = 0.6
PSS_MIB = 130
MODEL_MIB = 2
N_SMALL = 200
_N_STARTS = 5
_MIB = 2**20


@dataclass(frozen=True)
class Footprint:
    """One fresh start: seconds to the first right answer, and memory after a second of load."""

    ready_s: float
    memory: Memory

    @property
    def pss_mib(self) -> float:
        return self.memory.pss_bytes / _MIB


def footprint(run: Run) -> Findings:
    """Return start-up time, memory with the small benchmark model, and what each of two hundred small models adds.

    PSS is that of the whole process tree, workers and supervisor, shared pages counted once.
    """
    one, many = STORES / "one-small", STORES / f"{N_SMALL}-small"
    names = [f"{SMALL.name}-{i}" for i in range(2, N_SMALL + 1)]
    publish(SMALL.path, SMALL.name, one)
    publish(SMALL.path, SMALL.name, many)
    for name in names:
        if not (many / name).exists():
            LocalStore(many).publish(many / SMALL.name / "1", name)

    ours = without_target(run.ours).with_arguments("--workers", "2")
    starts = [seen for turn in range(_N_STARTS) if (seen := _start(run, ours, TINY_JSON, turn)) is not None]
    each_mib: list[float] = []
    for turn in range(run.pace.n_turns):
        few = _start(run, ours.serving(one), SMALL_JSON, turn)
        lots = _start(run, ours.serving(many), SMALL_JSON, turn, names)
        if few and lots:
            each_mib.append((lots.pss_mib - few.pss_mib) / (N_SMALL - 1))
    processes = f"{starts[0].memory.n_processes} processes" if starts else "-"
    return Findings(
        (
            Bar(
                "start to the first right answer, 2 workers",
                tuple(one.ready_s for one in starts),
                "at most",
                READY_S,
                unit="s",
            ),
            Bar(
                "memory serving tiny, 2 workers, PSS after a second of load",
                tuple(one.pss_mib for one in starts),
                "at most",
                PSS_MIB,
                unit="MiB",
                ours=processes,
            ),
            Bar(
                f"memory for each of {N_SMALL} small models in one server, 2 workers, PSS",
                tuple(each_mib),
                "at most",
                MODEL_MIB,
                unit="MiB",
            ),
        )
    )


def _start(
    run: Run, contender: Contender, workload: Workload, turn: int, names: Sequence[str] = ()
) -> Footprint | None:
    """Measure a fresh start; each of the further models in `names` is asked too, so that none is there by name only."""
    with contender.start(workload) as running:
        try:
            ready_s = running.server.first_answer_s()
            running.server.check(names)
        except ServerFailed as error:
            say(f"  {contender.name}, {workload.name}: {error}")
            return None
        wrk(running.server, 64, 1, NONE)
        seen = Footprint(ready_s, running.server.memory())
    say(f"  {contender.name}, {workload.name}: right answer after {ready_s:.2f} s, {number(seen.pss_mib)} MiB")
    run.keep(contender.name, workload.name, turn, seen, n_models=1 + len(names))
    return seen
