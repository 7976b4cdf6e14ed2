"""What a model's answers are worth: a score with its interval, and the paired difference of two models on the same rows.

On the ground floor, because training reports these figures and compression decides by them, and neither imports the other.
Differences are oriented so that more than 0 means that the first model, the child, is better, also where less is better.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import ConfigError, DataError
from modelyard.statistics import (
    Interval,
    allow_for_unseen,
    bootstrap_interval,
    delong_interval,
    delong_paired_difference,
    mean_interval,
    paired_mean_difference,
    paired_proportion_interval,
    wilson_interval,
)

Task = Literal["classification", "regression"]
Label = str | int

PROBABILITY_FLOOR = 1e-7
"""Log loss takes a probability below this as this: about float32's resolution, and alike for every model."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to n rows: labels or scores or both for classification, values for regression."""

    labels: NDArray[Any] | None = None
    """Class labels, shape (n,). Where absent, the class with the highest score."""
    scores: NDArray[Any] | None = None
    """Probabilities in the order of `classes`, shape (n, n_classes)."""
    values: NDArray[Any] | None = None
    """Predicted numbers, shape (n,)."""
    classes: tuple[Label, ...] = ()
    positive: Label | None = None
    """Which of two classes AUC and F1 look for; None is the last."""

    @property
    def positive_index(self) -> int:
        """Where the positive class stands in `classes`."""
        if self.positive is None:
            return len(self.classes) - 1
        if self.positive not in self.classes:
            raise ConfigError(f"positive must be one of the classes {_listed(self.classes)}, got {self.positive!r}")
        return self.classes.index(self.positive)


class Metric(Protocol):
    """One way to score answers. Stateless; safe to use from any thread."""

    @property
    def name(self) -> str:
        """As it is spelled in yard.toml and in a bundle's targets."""
        ...

    @property
    def label(self) -> str:
        """As a person reads it."""
        ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def task(self) -> Task: ...

    @property
    def method(self) -> str:
        """How `difference` arrives at its interval, for reports."""
        ...

    def score(self, truth: NDArray[Any], answers: Answers, confidence: float = 0.95) -> Interval:
        """Return the score on `truth`, shape (n,), with its two-sided interval.

        Raises:
            DataError: answers are missing, ill-shaped, not finite or of unknown classes, or too few rows to say anything.
        """
        ...

    def difference(
        self,
        truth: NDArray[Any],
        child: Answers,
        parent: Answers,
        confidence: float = 0.95,
        *,
        one_sided: bool = False,
    ) -> Interval:
        """Return by how much the child is better than the parent on the same rows; less than 0 means worse.

        With `one_sided`, `low` is the lower bound at `confidence` and `high` is infinite.
        """
        ...


@dataclass(frozen=True)
class PairedCounts:
    """On how many of `n` rows only the child, or only the parent, is right."""

    only_child: int
    only_parent: int
    n: int


def paired_counts(truth: NDArray[Any], child: Answers, parent: Answers) -> PairedCounts:
    """Count the rows on which exactly one of two classifiers is right."""
    expected = class_indices(truth, child.classes, "truth")
    _check_comparable(child, parent)
    child_right = predicted_classes(child, len(truth)) == expected
    parent_right = predicted_classes(parent, len(truth)) == expected
    return PairedCounts(int((child_right & ~parent_right).sum()), int((parent_right & ~child_right).sum()), len(truth))


def class_indices(labels: NDArray[Any], classes: Sequence[Label], what: str) -> NDArray[np.int64]:
    """Return the position of each label in `classes`, shape (n,); `what` names the labels in an error."""
    if labels.ndim != 1 or not len(labels):
        raise DataError(f"{what} must hold one class per row and at least one row, got shape {labels.shape}")
    if not classes:
        raise DataError(f"{what}: the classes are not named; give Answers.classes in the order of the scores")
    if all(isinstance(label, int) for label in classes) and labels.dtype.kind in "iubf":
        known, given = np.asarray(classes, dtype=np.int64), labels
    else:
        # Text out of a graph arrives as objects, and 3 and "3" are the same class on either side of a CSV file.
        known, given = np.asarray([str(label) for label in classes], dtype=np.str_), labels.astype(np.str_)
    order = np.argsort(known)
    at = order[np.minimum(np.searchsorted(known, given, sorter=order), len(known) - 1)]
    unknown = known[at] != given
    if unknown.any():
        row = int(np.argmax(unknown))
        found = labels[row : row + 1].tolist()[0]  # a plain str or int, without NumPy's name around it
        raise DataError(
            f"{what}: row {row} is {found!r}, which is none of the classes {_listed(classes)}; leave such rows out or "
            "name the class",
            row=row,
        )
    return at.astype(np.int64)


def predicted_classes(answers: Answers, n: int) -> NDArray[np.int64]:
    """Return the answered class of each of n rows as its position in `answers.classes`: the labels, else the best score."""
    if answers.labels is not None:
        if len(answers.labels) != n:
            raise DataError(f"labels must have one entry for each of {n} rows, got {len(answers.labels)}")
        return class_indices(answers.labels, answers.classes, "answered labels")
    best: NDArray[np.int64] = np.argmax(_scores(answers, n, "labels or scores"), axis=1)
    return best


def _scores(answers: Answers, n: int, needed: str = "scores") -> NDArray[Any]:
    scores = answers.scores
    if scores is None:
        raise DataError(
            f"this metric needs {needed}, and the model answers neither; choose another metric or add the output"
        )
    if scores.shape != (n, len(answers.classes)):
        raise DataError(f"scores must have shape {(n, len(answers.classes))} (rows, classes), got {scores.shape}")
    _check_finite(scores, "scores")
    return scores


def _values(truth: NDArray[Any], answers: Answers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return truth and predicted numbers, each of shape (n,)."""
    values = answers.values
    if values is None:
        raise DataError(
            "this metric needs predicted numbers, and the model answers none; choose a classification metric"
        )
    if truth.ndim != 1 or values.shape != truth.shape:
        raise DataError(
            f"values must have one number for each row of the truth {truth.shape}, got shape {values.shape}"
        )
    expected, answered = truth.astype(np.float64), values.astype(np.float64)
    _check_finite(expected, "truth")
    _check_finite(answered, "values")
    return expected, answered


def _check_finite(array: NDArray[Any], what: str) -> None:
    good = np.isfinite(array)
    if not good.all():
        row = int(np.argwhere(~good)[0][0])
        raise DataError(
            f"{what}: {int((~good).sum())} of {array.size} are not finite, first in row {row}; a model that answers NaN or "
            "infinity cannot be scored",
            row=row,
        )


def _check_comparable(child: Answers, parent: Answers) -> None:
    if child.classes != parent.classes or (child.classes and child.positive_index != parent.positive_index):
        raise DataError(
            f"both models must answer the same classes in the same order, got {_listed(child.classes)} and "
            f"{_listed(parent.classes)}; compare a model with its own parent"
        )


def _listed(classes: Sequence[Label]) -> str:
    shown = ", ".join(repr(label) for label in classes[:10])
    return f"{shown}, … ({len(classes)} in all)" if len(classes) > 10 else shown or "(none)"


def _as_asked(interval_at: Callable[[float], Interval], confidence: float, one_sided: bool) -> Interval:
    """Return the two-sided interval at `confidence`, or its lower half: a bound at 95 % is the end of an interval at 90 %."""
    if not one_sided:
        return interval_at(confidence)
    if not 0.5 < confidence < 1:
        raise ConfigError(f"the confidence of a bound must be between 0.5 and 1, got {confidence}; 0.95 is usual")
    return replace(interval_at(2 * confidence - 1), high=float("inf"), confidence=confidence)


@dataclass(frozen=True)
class _Accuracy:
    name: str = "accuracy"
    label: str = "accuracy"
    higher_is_better: bool = True
    task: Task = "classification"
    method: str = "Tango's score interval for paired proportions"

    def score(self, truth: NDArray[Any], answers: Answers, confidence: float = 0.95) -> Interval:
        expected = class_indices(truth, answers.classes, "truth")
        right = int((predicted_classes(answers, len(truth)) == expected).sum())
        return wilson_interval(right, len(truth), confidence)

    def difference(
        self, truth: NDArray[Any], child: Answers, parent: Answers, confidence: float = 0.95, *, one_sided: bool = False
    ) -> Interval:
        counts = paired_counts(truth, child, parent)
        return _as_asked(
            lambda level: paired_proportion_interval(counts.only_child, counts.only_parent, counts.n, level),
            confidence,
            one_sided,
        )


@dataclass(frozen=True)
class _Auc:
    """Of the positive class where there are two classes, else the mean over one-versus-rest curves, each class alike."""

    name: str = "auc"
    label: str = "AUC"
    higher_is_better: bool = True
    task: Task = "classification"
    method: str = "DeLong's interval for paired ROC curves"

    def score(self, truth: NDArray[Any], answers: Answers, confidence: float = 0.95) -> Interval:
        return delong_interval(*self._curves(truth, answers), confidence)

    def difference(
        self, truth: NDArray[Any], child: Answers, parent: Answers, confidence: float = 0.95, *, one_sided: bool = False
    ) -> Interval:
        _check_comparable(child, parent)
        child_scores, positive = self._curves(truth, child)
        parent_scores, _ = self._curves(truth, parent)
        return _as_asked(
            lambda level: delong_paired_difference(child_scores, parent_scores, positive, level), confidence, one_sided
        )

    def _curves(self, truth: NDArray[Any], answers: Answers) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return scores and truth, each of shape (n,) for two classes and (n, n_classes) for more."""
        if len(answers.classes) < 2:
            raise ConfigError(f"auc needs at least two classes, got {_listed(answers.classes)}; choose another metric")
        expected = class_indices(truth, answers.classes, "truth")
        scores = _scores(answers, len(truth))
        if len(answers.classes) == 2:
            return scores[:, answers.positive_index], expected == answers.positive_index
        return scores, expected[:, np.newaxis] == np.arange(len(answers.classes))


@dataclass(frozen=True)
class _F1:
    """Of the positive class where there are two classes, else the mean over the classes that occur in the truth."""

    name: str = "f1"
    label: str = "F1"
    higher_is_better: bool = True
    task: Task = "classification"
    method: str = "paired bootstrap (BCa)"

    def score(self, truth: NDArray[Any], answers: Answers, confidence: float = 0.95) -> Interval:
        expected = class_indices(truth, answers.classes, "truth")
        cells, counts = _cells(expected, predicted_classes(answers, len(truth)))
        score = _F1Score.over(cells[:, 0], cells[:, 1], answers)
        interval = bootstrap_interval(counts, score, confidence)
        # No resample of perfect answers has a mistake in it; the rows that were not seen may.
        n_wrong = int(counts[cells[:, 0] != cells[:, 1]].sum())
        widened = allow_for_unseen(interval, n_changed=n_wrong, n=score.rows_of_rarest(counts), cost=score.cost)
        return replace(widened, low=max(0.0, widened.low), high=min(1.0, widened.high))

    def difference(
        self, truth: NDArray[Any], child: Answers, parent: Answers, confidence: float = 0.95, *, one_sided: bool = False
    ) -> Interval:
        _check_comparable(child, parent)
        expected = class_indices(truth, child.classes, "truth")
        cells, counts = _cells(expected, predicted_classes(child, len(truth)), predicted_classes(parent, len(truth)))
        of_child = _F1Score.over(cells[:, 0], cells[:, 1], child)
        of_parent = _F1Score.over(cells[:, 0], cells[:, 2], parent)
        n_changed = int(counts[cells[:, 1] != cells[:, 2]].sum())

        def at(level: float) -> Interval:
            interval = bootstrap_interval(counts, lambda m: of_child(m) - of_parent(m), level)
            rarest = of_parent.rows_of_rarest(counts)
            return allow_for_unseen(interval, n_changed=n_changed, n=rarest, cost=of_parent.cost)

        return _as_asked(at, confidence, one_sided)


@dataclass(frozen=True)
class _F1Score:
    """F1 as a function of counts of shape (m, cells); a cell is a truth and an answer."""

    truth: NDArray[np.float64]
    """1 where a cell's truth is the class, shape (cells, classes looked at)."""
    answered: NDArray[np.float64]

    @classmethod
    def over(cls, truth: NDArray[np.int64], answered: NDArray[np.int64], answers: Answers) -> "_F1Score":
        looked_at = np.array([answers.positive_index]) if len(answers.classes) == 2 else np.unique(truth)
        return cls(
            (truth[:, np.newaxis] == looked_at).astype(np.float64),
            (answered[:, np.newaxis] == looked_at).astype(np.float64),
        )

    @property
    def cost(self) -> float:
        """What the loss of one whole class costs the mean over the classes."""
        return 1 / float(self.truth.shape[1])

    def rows_of_rarest(self, counts: NDArray[np.int64]) -> float:
        """Return the size of the smallest class looked at, the mean of its rows in truth and in the answers."""
        return float(np.min(counts @ (self.truth + self.answered))) / 2

    def __call__(self, counts: NDArray[Any]) -> NDArray[np.float64]:
        """Return F1 per row of `counts`, shape (m,); a class without a row in truth or answers is left out of the mean."""
        hits = counts @ (self.truth * self.answered)
        rows = counts @ (self.truth + self.answered)
        present = rows > 0
        f1 = np.divide(2 * hits, rows, out=np.zeros_like(hits), where=present)
        mean: NDArray[np.float64] = f1.sum(axis=1) / np.maximum(1, present.sum(axis=1))
        return mean


def _cells(*columns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct rows of the columns, shape (cells, n_columns), and how often each occurs, shape (cells,)."""
    cells, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
    return cells, counts.astype(np.int64)


@dataclass(frozen=True)
class _MeanLoss:
    """The mean of a loss that each row has by itself."""

    name: str
    label: str
    task: Task
    losses: Callable[[NDArray[Any], Answers], NDArray[np.float64]]
    """From truth and answers to the loss of each row, shape (n,)."""
    higher_is_better: bool = False
    method: str = "Student's interval of paired losses"

    def score(self, truth: NDArray[Any], answers: Answers, confidence: float = 0.95) -> Interval:
        interval = mean_interval(self.losses(truth, answers), confidence)
        return replace(interval, low=max(0.0, interval.low))

    def difference(
        self, truth: NDArray[Any], child: Answers, parent: Answers, confidence: float = 0.95, *, one_sided: bool = False
    ) -> Interval:
        _check_comparable(child, parent)
        of_child, of_parent = self.losses(truth, child), self.losses(truth, parent)
        return _as_asked(
            lambda level: allow_for_unseen(
                paired_mean_difference(of_parent, of_child, level),
                n_changed=int((of_parent != of_child).sum()),
                n=len(truth),
                cost=float(of_parent.mean()),  # a row that was missed is taken to lose as much again as the average row
            ),
            confidence,
            one_sided,
        )


def _log_losses(truth: NDArray[Any], answers: Answers) -> NDArray[np.float64]:
    expected = class_indices(truth, answers.classes, "truth")
    scores = _scores(answers, len(truth)).astype(np.float64)
    sums = scores.sum(axis=1)
    if (scores < 0).any() or (np.abs(sums - 1) > 0.01).any():
        row = int(np.argmax((scores < 0).any(axis=1) | (np.abs(sums - 1) > 0.01)))
        raise DataError(
            f"log_loss needs probabilities that sum to 1, got {scores[row].tolist()[:5]} in row {row}; put a softmax into the "
            "graph or choose another metric",
            row=row,
        )
    chosen = scores[np.arange(len(truth)), expected] / sums
    losses: NDArray[np.float64] = -np.log(np.clip(chosen, PROBABILITY_FLOOR, 1.0))
    return losses


def _absolute_errors(truth: NDArray[Any], answers: Answers) -> NDArray[np.float64]:
    expected, answered = _values(truth, answers)
    return np.abs(answered - expected)


@dataclass(frozen=True)
class _Rmse:
    name: str = "rmse"
    label: str = "RMSE"
    higher_is_better: bool = False
    task: Task = "regression"
    method: str = "Student's interval of paired squared errors, by the delta method"

    def score(self, truth: NDArray[Any], answers: Answers, confidence: float = 0.95) -> Interval:
        square = mean_interval(_absolute_errors(truth, answers) ** 2, confidence)
        low, value, high = np.sqrt(np.maximum(0.0, [square.low, square.value, square.high])).tolist()
        return Interval(value, low, high, confidence)

    def difference(
        self, truth: NDArray[Any], child: Answers, parent: Answers, confidence: float = 0.95, *, one_sided: bool = False
    ) -> Interval:
        of_child, of_parent = _absolute_errors(truth, child), _absolute_errors(truth, parent)
        child_rmse, parent_rmse = (float(np.sqrt(np.mean(errors**2))) for errors in (of_child, of_parent))

        def at(level: float) -> Interval:
            # d sqrt(m) = dm / (2 sqrt(m)): each row's part in the error of its model's RMSE. Errors of 0 have none.
            parts = [
                errors**2 / (2 * rmse) if rmse > 0 else np.zeros_like(errors)
                for errors, rmse in ((of_parent, parent_rmse), (of_child, child_rmse))
            ]
            spread = paired_mean_difference(parts[0], parts[1], level)
            half, value = spread.high - spread.value, parent_rmse - child_rmse
            n_changed = int((of_parent != of_child).sum())
            interval = Interval(value, value - half, value + half, level)
            return allow_for_unseen(interval, n_changed=n_changed, n=len(truth), cost=parent_rmse / 2)

        return _as_asked(at, confidence, one_sided)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _Accuracy(),
        _Auc(),
        _F1(),
        _MeanLoss("log_loss", "log loss", "classification", _log_losses),
        _Rmse(),
        _MeanLoss("mae", "MAE", "regression", _absolute_errors),
    )
}
"""By name, as spelled in yard.toml."""


def find_metric(name: str, task: str | None = None) -> Metric:
    """Return the metric called `name`; raises ConfigError where there is none or it is of another task."""
    fitting = [metric.name for metric in METRICS.values() if task in (None, metric.task)]
    if name not in fitting:
        of_task = f" for {task}" if task else ""
        known = ", ".join(fitting) or "none is known"
        raise ConfigError(f"metric must be one of those{of_task} ({known}), got {name!r}", field="metric")
    return METRICS[name]


def default_metric(task: str, classes: Sequence[Label] = ()) -> str:
    """Return the metric to use where nobody named one: AUC for two classes, accuracy for more, RMSE for numbers.

    AUC does not depend on a threshold nor on how rare the positive class is. With more than two classes accuracy is what
    people expect; where they are far from balanced, name f1.
    """
    if task == "regression":
        return "rmse"
    if task == "classification" and len(classes) >= 2:
        return "auc" if len(classes) == 2 else "accuracy"
    raise ConfigError(
        f"no metric fits the task {task!r} with {len(classes)} classes; classification needs two classes or more, "
        "regression none",
        field="metric",
    )
