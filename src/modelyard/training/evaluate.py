"""How good a trained model is: scores with intervals, by slice, and against a baseline on the same rows.

Comes after fit and before export. Intervals are at 95 % and over independent rows; see `modelyard.statistics`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.answers import score_of
from modelyard.bundle.manifest import Score
from modelyard.errors import ConfigError, DataError
from modelyard.metrics import METRICS, Answers, Label, class_indices, find_metric, predicted_classes
from modelyard.statistics import Interval

MIN_SLICE_ROWS = 30
"""A slice of fewer rows says too little to be listed; it is counted instead."""
MAX_NUMERIC_VALUES = 20
"""A numeric column with more distinct values is cut at its quartiles."""
MAX_SLICES_SHOWN = 10


@dataclass(frozen=True)
class SliceScore:
    """The scores of the rows that share one value of one column."""

    column: str
    value: str
    n_samples: int
    scores: tuple[Score, ...]
    worse: bool
    """The whole interval of the first metric lies on the worse side of the overall score. Of many slices that are no worse a
    few are marked all the same."""

    @property
    def name(self) -> str:
        return f"{self.column} = {self.value}"


@dataclass(frozen=True)
class Confusion:
    """Rows by true class and answered class."""

    classes: tuple[Label, ...]
    counts: NDArray[np.int64]
    """Shape (true classes, answered classes), both in the order of `classes`."""


@dataclass(frozen=True)
class Evaluation:
    """What a model's answers to held-out rows are worth."""

    n_samples: int
    scores: tuple[Score, ...]
    slices: tuple[SliceScore, ...]
    """Worst first, by the first metric."""
    n_small_slices: int
    """Slices left out because they have fewer than `MIN_SLICE_ROWS` rows."""
    n_unscored_slices: int
    """Slices left out because a metric is undefined on them, as AUC is where every row is of one class."""
    confusion: Confusion | None

    def text(self) -> str:
        """Return a table for a terminal: the scores, then the worst slices."""
        lines = [f"{METRICS[score.metric].label:<12} {_interval(score).text()}" for score in self.scores]
        lines.append(f"{'rows':<12} {self.n_samples:,}")
        if self.slices:
            first = self.scores[0].metric
            lines += ["", f"worst slices by {METRICS[first].label} (! is worse than the whole, beyond chance)"]
            shown = self.slices[:MAX_SLICES_SHOWN]
            width = max(len(part.name) for part in shown)
            for part in shown:
                mark = "!" if part.worse else " "
                lines.append(
                    f"{mark} {part.name:<{width}}  {_interval(part.scores[0]).text()}  {part.n_samples:,} rows"
                )
            if len(self.slices) > len(shown):
                lines.append(f"  and {len(self.slices) - len(shown)} better ones")
        if self.n_small_slices:
            lines.append(f"  {self.n_small_slices} of fewer than {MIN_SLICE_ROWS} rows left out")
        if self.n_unscored_slices:
            lines.append(f"  {self.n_unscored_slices} left out on which a metric is undefined")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values, the confusion matrix included."""
        return {
            "n_samples": self.n_samples,
            "scores": [_score_json(score) for score in self.scores],
            "slices": [
                {
                    "column": part.column,
                    "value": part.value,
                    "n_samples": part.n_samples,
                    "scores": [_score_json(score) for score in part.scores],
                    "worse": part.worse,
                }
                for part in self.slices
            ],
            "n_small_slices": self.n_small_slices,
            "n_unscored_slices": self.n_unscored_slices,
            "confusion": None
            if self.confusion is None
            else {"classes": list(self.confusion.classes), "counts": self.confusion.counts.tolist()},
        }


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline on the same rows; a difference above 0 means that the model is better."""

    metric: str
    method: str
    baseline_name: str
    model: Score
    baseline: Score
    difference: Interval

    @property
    def beats(self) -> bool:
        """Whether the interval of the difference lies wholly above 0."""
        return self.difference.low > 0

    def text(self) -> str:
        """Return "beats the linear baseline by 0.031 AUC (0.027 to 0.035)", or that it does not."""
        label = METRICS[self.metric].label
        d = self.difference
        if self.beats:
            return f"beats {self.baseline_name} by {d.text(label)}"
        if d.high < 0:
            behind = Interval(-d.value, -d.high, -d.low, d.confidence)
            return f"is worse than {self.baseline_name} by {behind.text(label)}"
        return f"cannot be told from {self.baseline_name}: the difference is {d.text(label)}, more than 0 being better"

    def to_json(self) -> dict[str, Any]:
        """Return every field as plain JSON values."""
        return {
            "metric": self.metric,
            "method": self.method,
            "baseline_name": self.baseline_name,
            "model": _score_json(self.model),
            "baseline": _score_json(self.baseline),
            "difference": self.difference.to_json(),
            "beats": self.beats,
            "text": self.text(),
        }


def evaluate(
    truth: NDArray[Any],
    answers: Answers,
    metric_names: Sequence[str],
    slices: Mapping[str, NDArray[Any]] | None = None,
) -> Evaluation:
    """Score answers to held-out rows, as a whole and by slice.

    Args:
        truth: class labels or numbers, shape (n,).
        metric_names: at least one; slices are ordered by the first.
        slices: column name → its value in each row, shape (n,). Text and small counts give one slice per value; numbers of
            many values are cut at their quartiles.

    Raises:
        ConfigError: an unknown metric, or none.
        DataError: answers that cannot be scored, or a column of the wrong length.
    """
    if not metric_names:
        raise ConfigError(
            "metrics must name at least one metric, got none; accuracy, auc or rmse is a start", field="metrics"
        )
    scores = tuple(score_of(name, truth, answers) for name in metric_names)
    higher_is_better = find_metric(metric_names[0]).higher_is_better
    scored: list[SliceScore] = []
    n_small = n_unscored = 0
    for column, value, rows in _slices(slices or {}, len(truth)):
        if rows.sum() < MIN_SLICE_ROWS:
            n_small += bool(rows.any())
            continue
        try:
            parts = tuple(score_of(name, truth[rows], _subset(answers, rows)) for name in metric_names)
        except DataError:
            # The whole could be scored, so the answers are sound; the metric is undefined on these rows alone.
            n_unscored += 1
            continue
        worse = parts[0].high < scores[0].value if higher_is_better else parts[0].low > scores[0].value
        scored.append(SliceScore(column, value, int(rows.sum()), parts, worse))
    scored.sort(key=lambda part: part.scores[0].value, reverse=not higher_is_better)
    return Evaluation(
        n_samples=len(truth),
        scores=scores,
        slices=tuple(scored),
        n_small_slices=n_small,
        n_unscored_slices=n_unscored,
        confusion=_confusion(truth, answers) if answers.classes else None,
    )


def compare(
    truth: NDArray[Any],
    model: Answers,
    baseline: Answers,
    metric: str,
    *,
    baseline_name: str = "the linear baseline",
) -> Comparison:
    """Return by how much a model beats a baseline on the same rows, with the two-sided 95 % interval of the difference."""
    scored = find_metric(metric)
    return Comparison(
        metric=metric,
        method=scored.method,
        baseline_name=baseline_name,
        model=score_of(metric, truth, model),
        baseline=score_of(metric, truth, baseline),
        difference=scored.difference(truth, model, baseline),
    )


def _interval(score: Score) -> Interval:
    return Interval(score.value, score.low, score.high)


def _score_json(score: Score) -> dict[str, Any]:
    return {"metric": score.metric, **_interval(score).to_json(), "n_samples": score.n_samples}


def _subset(answers: Answers, rows: NDArray[np.bool_]) -> Answers:
    return Answers(
        labels=None if answers.labels is None else answers.labels[rows],
        scores=None if answers.scores is None else answers.scores[rows],
        values=None if answers.values is None else answers.values[rows],
        classes=answers.classes,
        positive=answers.positive,
    )


def _confusion(truth: NDArray[Any], answers: Answers) -> Confusion:
    n = len(answers.classes)
    pairs = class_indices(truth, answers.classes, "truth") * n + predicted_classes(answers, len(truth))
    return Confusion(answers.classes, np.bincount(pairs, minlength=n * n).reshape(n, n).astype(np.int64))


def _slices(columns: Mapping[str, NDArray[Any]], n: int) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield column, value and the rows that have it, shape (n,)."""
    for column, values in columns.items():
        if values.shape != (n,):
            raise DataError(
                f"slice column {column!r} must have one value for each of {n} rows, got shape {values.shape}"
            )
        if values.dtype.kind in "iuf" and len(np.unique(values[values == values])) > MAX_NUMERIC_VALUES:
            for value, rows in _quartiles(values.astype(np.float64)):
                yield column, value, rows
            continue
        distinct, inverse = np.unique(
            values if values.dtype.kind in "iufb" else values.astype(np.str_), return_inverse=True
        )
        for i, value in enumerate(distinct.tolist()):
            yield column, "missing" if value == "" or value != value else f"{value}", inverse == i


def _quartiles(values: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield the quarters of a numeric column, each from its lower end up to but not including its upper, then what is missing."""
    missing = ~np.isfinite(values)
    known = values[~missing]
    inner = np.unique(np.quantile(known, [0.25, 0.5, 0.75])).tolist()
    edges = [-np.inf, *inner, np.inf]
    for low, high in pairwise(edges):
        if low == -np.inf:
            name = f"below {high:g}"
        elif high == np.inf:
            name = f"{low:g} and above"
        else:
            name = f"{low:g} to {high:g}"
        yield name, ~missing & (values >= low) & (values < high)
    if missing.any():
        yield "missing", missing
