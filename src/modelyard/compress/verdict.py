"""Accept or reject: is the child no worse than allowed, and does it cost less here? The last step of every compression.

Two questions, each answered with an interval. `test_quality` asks whether the child's loss on held-out rows stays within a
margin (a one-sided non-inferiority test on paired answers); `judge` adds the cost measured on this machine and gives the
outcome. Pure functions; the rows must be ones that neither training nor the choice between candidates has seen.
docs/explanation/verdict.md says what is assumed and where it ends.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from modelyard.errors import ConfigError
from modelyard.metrics import METRICS, Answers, Metric, PairedCounts, find_metric, paired_counts
from modelyard.statistics import Interval, mcnemar_p, normal_quantile, paired_proportion_z

Outcome = Literal["accepted", "refused", "undecided"]
Decision = Literal["not worse", "worse", "undecided"]

MAX_ROWS_NEEDED = 10**9
"""Beyond this the number of rows is not worth naming: the difference lies on the margin."""


@dataclass(frozen=True)
class QualityTest:
    """What held-out rows say of the child's quality. Differences are child against parent; more than 0 is better."""

    metric: str
    method: str
    parent: Interval
    child: Interval
    difference: Interval
    """Two-sided."""
    lower_bound: float
    """One-sided, at the same confidence: the difference is above it."""
    margin: float
    """The loss allowed, in the metric's own units, more than 0."""
    keep: float
    """The share of the parent's score to keep, from which the margin follows."""
    n_samples: int
    decided: Decision
    rows_needed: int | None
    """How many rows would decide if the difference stayed as seen; None when decided, or when no number would."""
    mcnemar_p: float | None = None
    """For accuracy: p-value of "both are right equally often". Printed, never decided by."""
    confidence: float = 0.95

    def text(self) -> str:
        """Return one sentence with the figures it rests on."""
        places = max(self.difference.decimals, _places(self.margin))
        level = f"{self.confidence:.3g}"
        figures = (
            f"{METRICS[self.metric].label} {self.child.value:.{places}f} against the parent's {self.parent.value:.{places}f} on "
            f"{self.n_samples:,} rows"
        )
        allowed = f"a loss of {self.margin:.{places}f} is allowed ({self.keep:.4g} of the parent's score kept)"
        aside = "" if self.mcnemar_p is None else f"; McNemar's p, for information: {self.mcnemar_p:.2g}"
        if self.decided == "not worse":
            bound = (
                f"at confidence {level} it loses less than {-self.lower_bound:.{places}f}"
                if self.lower_bound < 0
                else f"at confidence {level} it gains at least {self.lower_bound:.{places}f}"
            )
            return f"not worse than allowed: {figures}; {bound}, and {allowed}{aside}"
        if self.decided == "worse":
            return (
                f"worse than allowed: {figures}; at confidence {level} it loses at least {-self.difference.high:.{places}f}, "
                f"and {allowed}{aside}"
            )
        more = (
            f"; about {self.rows_needed:,} rows would decide if the difference stayed as seen"
            if self.rows_needed
            else ""
        )
        return (
            f"these rows cannot decide: {figures}; at confidence {level} the loss may be as large as "
            f"{-self.lower_bound:.{places}f}, and {allowed}{more}{aside}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return every field as plain JSON values."""
        return {
            "metric": self.metric,
            "method": self.method,
            "parent": self.parent.to_json(),
            "child": self.child.to_json(),
            "difference": self.difference.to_json(),
            "lower_bound": self.lower_bound,
            "margin": self.margin,
            "keep": self.keep,
            "n_samples": self.n_samples,
            "decided": self.decided,
            "rows_needed": self.rows_needed,
            "mcnemar_p": self.mcnemar_p,
            "confidence": self.confidence,
        }


@dataclass(frozen=True)
class CostComparison:
    """Parent and child timed in turns on this machine."""

    speedup: Interval
    """Parent's time over child's time, from interleaved pairs; more than 1 means that the child is faster."""
    parent_bytes: int
    child_bytes: int
    quiet: bool
    """Whether the machine was quiet enough to notice a difference."""
    n_pairs: int

    @property
    def faster(self) -> bool:
        return self.speedup.low > 1

    @property
    def slower(self) -> bool:
        return self.speedup.high < 1

    @property
    def smaller(self) -> bool:
        return self.child_bytes < self.parent_bytes

    def to_json(self) -> dict[str, Any]:
        """Return every field as plain JSON values."""
        return {
            "speedup": self.speedup.to_json(),
            "parent_bytes": self.parent_bytes,
            "child_bytes": self.child_bytes,
            "quiet": self.quiet,
            "n_pairs": self.n_pairs,
        }


@dataclass(frozen=True)
class Verdict:
    """The outcome, and why in plain sentences. Only "accepted" lets a child take its parent's place."""

    outcome: Outcome
    reasons: tuple[str, ...]
    quality: QualityTest
    cost: CostComparison

    @property
    def accepted(self) -> bool:
        return self.outcome == "accepted"

    def text(self) -> str:
        """Return the outcome and one line per reason."""
        return "\n".join([self.outcome, *(f"  - {reason}" for reason in self.reasons)])

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "outcome": self.outcome,
            "reasons": list(self.reasons),
            "quality": self.quality.to_json(),
            "cost": self.cost.to_json(),
        }


def test_quality(
    truth: NDArray[Any],
    parent: Answers,
    child: Answers,
    metric: str,
    keep: float,
    confidence: float = 0.95,  # noqa: PT028 - not a test for pytest, which only collects from tests/
) -> QualityTest:
    """Test whether the child keeps `keep` of its parent's score on the same held-out rows.

    The null hypothesis is that the loss is the margin or more; it is rejected, and the child is not worse, when the one-sided
    lower bound of the difference lies above -margin. A child whose true loss is the margin passes with probability
    1 - confidence.

    Args:
        truth: shape (n,).
        keep: share of the parent's score, in (0, 1). Where less is better the child may reach parent / keep.

    Raises:
        ConfigError: keep or metric are out of range, or the parent's score leaves no margin.
        DataError: answers that cannot be scored.
    """
    scored = find_metric(metric)
    parent_score = scored.score(truth, parent, confidence)
    margin = quality_margin(scored, parent_score.value, keep)
    difference = scored.difference(truth, child, parent, confidence)
    lower_bound = scored.difference(truth, child, parent, confidence, one_sided=True).low
    counts = paired_counts(truth, child, parent) if metric == "accuracy" else None
    decided = _decide(lower_bound, difference, margin)
    return QualityTest(
        metric=metric,
        method=scored.method,
        parent=parent_score,
        child=scored.score(truth, child, confidence),
        difference=difference,
        lower_bound=lower_bound,
        margin=margin,
        keep=keep,
        n_samples=len(truth),
        decided=decided,
        rows_needed=_rows_needed(len(truth), difference, lower_bound, margin, counts)
        if decided == "undecided"
        else None,
        mcnemar_p=None if counts is None else mcnemar_p(counts.only_child, counts.only_parent),
        confidence=confidence,
    )


def quality_margin(metric: Metric, parent_score: float, keep: float) -> float:
    """Return the loss allowed: what separates the parent's score from the worst score that keeps `keep` of it.

    Raises:
        ConfigError: keep is not inside (0, 1), or the score is 0 or less, of which no share can be kept.
    """
    if not 0 < keep < 1:
        raise ConfigError(
            f"keep must be greater than 0 and less than 1, got {keep}: with no loss allowed no number of rows can show that "
            "there is none; 0.99 or 0.999 is usual",
            field="keep",
        )
    if not (math.isfinite(parent_score) and parent_score > 0):
        raise ConfigError(
            f"the parent's {metric.name} is {parent_score:.4g}, and a share of it leaves no margin to test against; choose "
            "another metric",
            field="metric",
        )
    return (1 - keep) * parent_score if metric.higher_is_better else (1 / keep - 1) * parent_score


def _decide(lower_bound: float, difference: Interval, margin: float) -> Decision:
    if lower_bound > -margin:
        return "not worse"
    return "worse" if difference.high <= -margin else "undecided"


def _rows_needed(
    n: int, difference: Interval, lower_bound: float, margin: float, counts: PairedCounts | None
) -> int | None:
    """Return the rows at which a bound would clear the margin, the difference and its spread staying as they are."""
    room = difference.value + margin
    if room == 0 or not math.isfinite(lower_bound):
        return None
    if counts is not None:
        return _rows_by_tango(counts, margin, difference.confidence)
    # The half-width shrinks with the square root of the rows.
    half = difference.value - lower_bound if room > 0 else difference.high - difference.value
    needed = math.ceil(n * (half / room) ** 2)
    return max(n + 1, needed) if needed <= MAX_ROWS_NEEDED else None


def _rows_by_tango(counts: PairedCounts, margin: float, confidence: float) -> int | None:
    """Return the rows at which Tango's bound clears the margin, by bisection; it does not shrink quite as a square root."""

    passes, fails = normal_quantile(confidence, one_sided=True), -normal_quantile(confidence)

    def decides(n: int) -> bool:
        z = paired_proportion_z(counts.only_child * n / counts.n, counts.only_parent * n / counts.n, n, -margin)
        return z > passes or z <= fails

    short, enough = counts.n, MAX_ROWS_NEEDED
    if not decides(enough):
        return None
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if decides(middle) else (middle, enough)
    return enough


def judge(quality: QualityTest, cost: CostComparison, *, rows_independent: bool) -> Verdict:
    """Return the verdict.

    Refused, whatever else holds: worse than allowed; answers that depend on their batch mates; slower, smaller or not;
    neither faster nor smaller. Undecided: too few rows, too few timed pairs, or a busy machine on which a slower child would
    not have been noticed. Accepted: not worse, and faster, or smaller and not slower.
    """
    against = _against(quality, cost, rows_independent)
    if against:
        return Verdict("refused", against, quality, cost)
    open_questions = _open_questions(quality, cost)
    if open_questions:
        return Verdict("undecided", open_questions, quality, cost)
    gains = tuple(text for holds, text in ((cost.faster, _speed(cost)), (cost.smaller, _size(cost))) if holds)
    unharmed = () if cost.faster else (f"not measurably slower: {_times(cost)}",)
    return Verdict("accepted", (quality.text(), *gains, *unharmed), quality, cost)


def _against(quality: QualityTest, cost: CostComparison, rows_independent: bool) -> tuple[str, ...]:
    reasons = []
    if quality.decided == "worse":
        reasons.append(quality.text())
    if not rows_independent:
        reasons.append(
            "its answer to a row depends on which rows share the batch, so no test of single rows speaks for it"
        )
    if cost.slower:
        kind = "smaller but slower" if cost.smaller else "slower"
        reasons.append(f"{kind}: {_times(cost)}; {_size(cost)}")
    elif not cost.faster and not cost.smaller and cost.quiet and math.isfinite(cost.speedup.high):
        reasons.append(f"neither faster nor smaller: {_times(cost)}; {_size(cost)}")
    return tuple(reasons)


def _open_questions(quality: QualityTest, cost: CostComparison) -> tuple[str, ...]:
    reasons = []
    if quality.decided == "undecided":
        reasons.append(quality.text())
    if not cost.faster and not math.isfinite(cost.speedup.high):
        reasons.append(f"{cost.n_pairs} timed pairs are too few to bound the speed; time more of them")
    elif not cost.faster and not cost.quiet:
        reasons.append(
            f"the machine was too busy to notice a slower child: {_times(cost)}; measure again when it is quiet"
        )
    return tuple(reasons)


def _speed(cost: CostComparison) -> str:
    busy = "" if cost.quiet else "; the machine was busy, so take this as a ratio and not as a time"
    return f"faster: {_times(cost)}{busy}"


def _times(cost: CostComparison) -> str:
    speed = cost.speedup.text("× the parent's speed")
    return f"{speed} over {cost.n_pairs} interleaved pairs"


def _size(cost: CostComparison) -> str:
    share = f" ({cost.child_bytes / cost.parent_bytes:.1%})" if cost.parent_bytes else ""
    word = "smaller" if cost.smaller else "not smaller"
    return f"{word}: {cost.child_bytes:,} bytes against {cost.parent_bytes:,}{share}"


def _places(figure: float) -> int:
    """Decimals that show two digits of a figure, at most 8."""
    return min(8, max(0, 1 - math.floor(math.log10(figure)))) if figure > 0 else 4
