"""Shadow traffic: a share of the calls of one version repeated on another, the answers compared and thrown away.

    Front, after the reply → `Shadow.offer` → the mirror's thread → compare → counts → traffic's GET, metrics

It can neither delay nor fail the call it repeats: it begins when that is answered, on a thread of low priority, and is left
out as soon as calls wait.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.answers import label_output, score_output
from modelyard.bundle.manifest import Signature
from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.metrics.observe import ModelMetrics
from modelyard.inference.serve.models.loading import Loaded, give_way
from modelyard.inference.serve.models.traffic import Sampler

MAX_PENDING = 32
_MAX_ROWS = 1024
_TOLERANCE = 1e-3
"""Where a model names no classes, rows agree whose numbers do to within this, relative and absolute."""

Arrays = Mapping[str, NDArray[Any]]
Outcome = Literal["agreed", "differed", "failed", "skipped"]


@dataclass(frozen=True)
class Comparison:
    """How the answers of two versions to the same rows differ."""

    n_rows: int
    n_agreeing: int
    """Rows with the same label; where there are no labels, the same numbers."""
    max_abs_difference: float
    """Over all scores and values; infinite where one is not a number and the other is."""


def compare(ours: Arrays, theirs: Arrays, signature: Signature, n_rows: int) -> Comparison:
    """Return how `theirs` differ from `ours`, the answers of the version that `signature` belongs to."""
    largest = 0.0
    close = np.ones(n_rows, dtype=bool)
    for spec in signature.outputs:
        mine, other = ours[spec.name], theirs.get(spec.name)
        if other is None or other.shape != mine.shape:
            return Comparison(n_rows, 0, float("inf"))
        if mine.dtype.kind == "f":
            gaps = np.abs(other - mine)
            gaps[np.isnan(mine) & np.isnan(other)] = 0.0
            largest = max(largest, float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0)))
            same = np.isclose(other, mine, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        else:
            same = mine == other
        close &= same.reshape(n_rows, -1).all(axis=1) if spec.batched else bool(np.all(same))
    label, scores = label_output(signature), score_output(signature)
    if label is not None:
        close = np.asarray(ours[label.name] == theirs[label.name])
    elif scores is not None:
        close = ours[scores.name].argmax(axis=1) == theirs[scores.name].argmax(axis=1)
    return Comparison(n_rows, int(close.sum()), largest)


def same_inputs(one: Signature, other: Signature) -> bool:
    """Whether calls packed for one version can be given to the other."""
    return [(spec.name, spec.datatype, spec.shape) for spec in one.inputs] == [
        (spec.name, spec.datatype, spec.shape) for spec in other.inputs
    ]


class ShadowTotals:
    """What became of calls by the metrics of the version that answered, the shadow and the outcome, whatever the traffic was.

    Each key is written by one thread: those of "skipped" by the event loop, the others by the mirror's.
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[ModelMetrics, int, Outcome], int] = {}
        self._told: dict[tuple[ModelMetrics, int, Outcome], int] = {}

    def add(self, metrics: ModelMetrics | None, shadow: int, outcome: Outcome) -> None:
        if metrics is not None:
            key = (metrics, shadow, outcome)
            self._totals[key] = self._totals.get(key, 0) + 1

    def tell(self) -> None:
        """Bring the metrics up to the totals. On the event loop."""
        for key, total in tuple(self._totals.items()):
            metrics, shadow, outcome = key
            for _ in range(total - self._told.get(key, 0)):
                metrics.shadowed(str(shadow), outcome)
            self._told[key] = total


@dataclass(slots=True)
class ShadowCounts:
    """What became of the calls that were to be repeated. Written on the mirror's thread, but for `n_skipped`."""

    totals: ShadowTotals = field(default_factory=ShadowTotals)
    """Outlive these counts, which begin anew with each change of the traffic."""
    n_agreed: int = 0
    n_differed: int = 0
    n_failed: int = 0
    n_skipped: int = 0
    """Left out, since calls waited or too many were being repeated already."""
    n_rows: int = 0
    n_rows_agreed: int = 0
    max_abs_difference: float = 0.0
    last_error: str = ""

    def add(self, found: Comparison) -> Outcome:
        self.n_rows += found.n_rows
        self.n_rows_agreed += found.n_agreeing
        self.max_abs_difference = max(self.max_abs_difference, found.max_abs_difference)
        if found.n_agreeing == found.n_rows:
            self.n_agreed += 1
            return "agreed"
        self.n_differed += 1
        return "differed"


class Mirror:
    """The thread on which all shadows of a process compute. `start` comes with the first call."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Shadow, Call, Arrays] | None] = SimpleQueue()
        self._computing = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def is_full(self) -> bool:
        return self._jobs.qsize() >= MAX_PENDING

    def repeat(self, shadow: "Shadow", call: Call, answers: Arrays) -> None:
        """Have the call computed by the shadow's second version, sooner or later."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
            self._thread.start()
        self._jobs.put((shadow, call, answers))

    def wait(self) -> None:
        """Return when what is being computed now is done; what comes after has seen what the caller did before."""
        with self._computing:
            return

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        give_way()
        while (job := self._jobs.get()) is not None:
            shadow, call, answers = job
            with self._computing:
                shadow.compute(call, answers)


class Shadow:
    """Repeats a share of the calls of `first` on `second`, which takes the same inputs."""

    def __init__(self, first: Loaded, second: Loaded, share: float, counts: ShadowCounts, mirror: Mirror) -> None:
        self._scheduler = first.executor.scheduler
        self._signature = first.signature
        self._metrics = first.executor.metrics
        self._second = second
        self._share = share
        self._sampler = Sampler(share)
        self.counts = counts
        self._mirror = mirror

    def is_on(self, second: Loaded, share: float, counts: ShadowCounts) -> bool:
        """Whether it already does what a new one with these would."""
        return self._second is second and self._share == share and self.counts is counts

    def offer(self, call: Call) -> None:
        """Repeat an answered call, if it is its turn and nothing waits. On the event loop."""
        if not self._sampler.take():
            return
        if self._scheduler.queued_rows or self._mirror.is_full or call.n_rows > _MAX_ROWS:
            self.counts.n_skipped += 1
            self._note("skipped")
            return
        self._mirror.repeat(self, Call(call.inputs, call.n_rows, call.bucket), call.outputs())

    def compute(self, call: Call, answers: Arrays) -> None:
        """Compute, compare and count. On the mirror's thread."""
        run, packer = self._second.compute, self._second.packer
        if run is None or packer is None:
            return  # it has left memory since
        sizes = self._second.executor.scheduler.policy.allowed_sizes
        padded_to = next((size for size in sizes if size >= call.n_rows), 0)
        try:
            outputs = run(packer.join([call], call.n_rows, padded_to))
            if padded_to > call.n_rows:
                outputs = {name: array[: call.n_rows] for name, array in outputs.items()}
            self._note(self.counts.add(compare(answers, outputs, self._signature, call.n_rows)))
        except Exception as exc:  # noqa: BLE001  # a shadow may fail in any way and nobody is to notice but who looks
            self.counts.n_failed += 1
            self.counts.last_error = f"{type(exc).__name__}: {exc}"[:500]
            self._note("failed")

    def _note(self, outcome: Outcome) -> None:
        self.counts.totals.add(self._metrics, self._second.version, outcome)
