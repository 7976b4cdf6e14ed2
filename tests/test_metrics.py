"""Scores against scikit-learn, paired differences on answers whose true difference is known, and answers that are none."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from modelyard.errors import ConfigError, DataError
from modelyard.metrics import (
    METRICS,
    Answers,
    class_indices,
    default_metric,
    find_metric,
    paired_counts,
    predicted_classes,
)

N = 600


def three_classes(seed: int = 0) -> tuple[NDArray[np.int64], Answers]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=N)
    raw = rng.random((N, 3)) + 0.6 * np.eye(3)[truth]
    return truth, Answers(scores=raw / raw.sum(axis=1, keepdims=True), classes=(0, 1, 2))


def two_classes(seed: int = 0) -> tuple[NDArray[np.str_], Answers]:
    rng = np.random.default_rng(seed)
    late = rng.random(N) < 0.3
    chance = 1 / (1 + np.exp(-(rng.normal(size=N) + 2 * late - 1)))
    return np.where(late, "late", "on time"), Answers(
        scores=np.stack([chance, 1 - chance], axis=1), classes=("late", "on time")
    )


def numbers(seed: int = 0) -> tuple[NDArray[np.float64], Answers]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=N)
    return truth, Answers(values=truth + rng.normal(scale=0.5, size=N))


class TestScoresAreScikitLearns:
    def test_of_three_classes(self) -> None:
        from sklearn import metrics

        truth, answers = three_classes()
        assert answers.scores is not None
        labels = answers.scores.argmax(axis=1)
        expected = {
            "accuracy": metrics.accuracy_score(truth, labels),
            "auc": metrics.roc_auc_score(truth, answers.scores, multi_class="ovr"),
            "f1": metrics.f1_score(truth, labels, average="macro"),
            "log_loss": metrics.log_loss(truth, answers.scores),
        }
        for name, value in expected.items():
            assert METRICS[name].score(truth, answers).value == pytest.approx(value, abs=1e-12), name

    def test_of_two_classes_the_last_is_positive_unless_named(self) -> None:
        from sklearn import metrics

        truth, answers = two_classes()
        assert answers.scores is not None
        labels = np.array(answers.classes)[answers.scores.argmax(axis=1)]
        for positive, column in ((None, 1), ("late", 0)):
            asked = Answers(scores=answers.scores, classes=answers.classes, positive=positive)
            name = answers.classes[column]
            auc = metrics.roc_auc_score(truth == name, answers.scores[:, column])
            assert METRICS["auc"].score(truth, asked).value == pytest.approx(auc)
            f1 = metrics.f1_score(truth, labels, pos_label=name)
            assert METRICS["f1"].score(truth, asked).value == pytest.approx(f1)

    def test_of_numbers(self) -> None:
        from sklearn import metrics

        truth, answers = numbers()
        assert METRICS["rmse"].score(truth, answers).value == pytest.approx(
            metrics.root_mean_squared_error(truth, answers.values)
        )
        assert METRICS["mae"].score(truth, answers).value == pytest.approx(
            metrics.mean_absolute_error(truth, answers.values)
        )


@pytest.mark.parametrize("name", list(METRICS))
class TestEveryMetric:
    def worse_and_better(self, name: str) -> tuple[NDArray[np.generic], Answers, Answers]:
        """A truth, answers to it, and the same answers half drowned in noise."""
        rng = np.random.default_rng(11)
        if METRICS[name].task == "regression":
            truth, good = numbers()
            assert good.values is not None
            return truth, Answers(values=good.values + rng.normal(size=N)), good
        labels, good = three_classes()
        assert good.scores is not None
        noise = rng.dirichlet([1, 1, 1], size=N)
        return labels, Answers(scores=0.5 * good.scores + 0.5 * noise, classes=good.classes), good

    def test_score_lies_inside_its_interval(self, name: str) -> None:
        truth, _, good = self.worse_and_better(name)
        found = METRICS[name].score(truth, good)
        assert found.low < found.value < found.high
        assert found.confidence == 0.95

    def test_difference_is_positive_when_the_child_is_better(self, name: str) -> None:
        truth, worse, good = self.worse_and_better(name)
        metric = METRICS[name]
        found = metric.difference(truth, good, worse)
        gap = metric.score(truth, good).value - metric.score(truth, worse).value
        assert found.value == pytest.approx(gap if metric.higher_is_better else -gap)
        assert 0 < found.low < found.value < found.high
        mirrored = metric.difference(truth, worse, good)
        assert mirrored.high < 0

    def test_one_sided_bound_is_the_end_of_the_interval_at_twice_the_error(self, name: str) -> None:
        truth, worse, good = self.worse_and_better(name)
        bound = METRICS[name].difference(truth, worse, good, 0.95, one_sided=True)
        assert bound.low == pytest.approx(METRICS[name].difference(truth, worse, good, 0.90).low)
        assert bound.high == math.inf
        assert bound.confidence == 0.95

    def test_identical_answers_differ_by_nothing_but_not_for_certain(self, name: str) -> None:
        truth, _, good = self.worse_and_better(name)
        found = METRICS[name].difference(truth, good, good)
        assert found.value == 0
        assert found.low < 0 < found.high
        few = METRICS[name].difference(truth[:60], head(good, 60), head(good, 60))
        assert few.low < found.low

    def test_answers_of_another_kind_are_refused(self, name: str) -> None:
        truth, _, good = self.worse_and_better(name)
        other = Answers(values=np.zeros(N)) if good.scores is not None else Answers(labels=np.zeros(N), classes=(0, 1))
        with pytest.raises((DataError, ConfigError)):
            METRICS[name].score(truth, other)

    def test_answers_that_are_not_numbers_are_refused(self, name: str) -> None:
        truth, _, good = self.worse_and_better(name)
        values = None if good.values is None else np.where(np.arange(N) == 7, math.nan, good.values)
        scores = None if good.scores is None else np.where(np.arange(N)[:, np.newaxis] == 7, math.nan, good.scores)
        with pytest.raises(DataError, match="row 7"):
            METRICS[name].score(truth, Answers(scores=scores, values=values, classes=good.classes))

    def test_answers_of_another_length_are_refused(self, name: str) -> None:
        truth, _, good = self.worse_and_better(name)
        with pytest.raises(DataError, match="shape"):
            METRICS[name].score(truth, head(good, N - 1))


def head(answers: Answers, n: int) -> Answers:
    return Answers(
        scores=None if answers.scores is None else answers.scores[:n],
        values=None if answers.values is None else answers.values[:n],
        classes=answers.classes,
    )


def simulated_coverage(name: str, n_runs: int, n: int = 300) -> float:
    """How often the two-sided interval of the difference misses the true one, child and parent both imperfect."""
    rng = np.random.default_rng(21)
    missed = 0
    for _ in range(n_runs):
        if name in ("rmse", "mae"):
            truth = np.zeros(n)
            parent_error = rng.normal(size=n)
            child_error = parent_error + rng.normal(scale=0.5, size=n)
            parent, child = Answers(values=parent_error), Answers(values=child_error)
            scale = 1.0 if name == "rmse" else math.sqrt(2 / math.pi)
            expected = scale * (1 - math.sqrt(1.25))
        else:
            # Positive 30 %; the parent errs on 10 % of rows, the child on 20 %, independently.
            positive = rng.random(n) < 0.3
            truth = positive.astype(np.float64)
            parent = Answers(labels=positive ^ (rng.random(n) < 0.1), classes=(0, 1))
            child = Answers(labels=positive ^ (rng.random(n) < 0.2), classes=(0, 1))
            # F1 = 2 tp / (positives + answered positives)
            expected = 2 * 0.24 / (0.3 + 0.24 + 0.14) - 2 * 0.27 / (0.3 + 0.27 + 0.07)
        found = METRICS[name].difference(truth, child, parent)
        missed += not found.low <= expected <= found.high
    return missed / n_runs


@pytest.mark.parametrize(("name", "n_runs"), [("rmse", 1000), ("mae", 1000), ("f1", 300)])
def test_interval_of_the_difference_covers_as_promised(name: str, n_runs: int) -> None:
    assert simulated_coverage(name, n_runs) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_runs)


def test_labels_win_over_scores() -> None:
    """A bundle may decide by a threshold of its own; its labels are what a client acts on."""
    scores = np.array([[0.6, 0.4], [0.7, 0.3]])
    answers = Answers(labels=np.array([1, 0]), scores=scores, classes=(0, 1))
    assert predicted_classes(answers, 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array(["b", "a"], dtype=object), ("a", "b")),
        (np.array([7, 3]), (3, 7)),
        (np.array([7.0, 3.0]), (3, 7)),
        (np.array(["7", "3"]), (3, 7)),
        (np.array([True, False]), (0, 1)),
        (np.array([1, 2]), ("2", "1")),
    ],
)
def test_labels_are_found_whatever_carries_them(labels: NDArray[np.generic], classes: tuple[str | int, ...]) -> None:
    assert class_indices(labels, classes, "truth").tolist() == [1, 0]


def test_unknown_label_names_its_row() -> None:
    with pytest.raises(DataError, match="truth: row 1 is 'c', which is none of the classes 'a', 'b'"):
        METRICS["accuracy"].score(np.array(["a", "c"]), Answers(labels=np.array(["a", "a"]), classes=("a", "b")))


def test_paired_counts_are_of_rows_on_which_one_is_right() -> None:
    truth = np.array([0, 0, 1, 1, 1])
    child = Answers(labels=np.array([0, 1, 1, 1, 0]), classes=(0, 1))
    parent = Answers(labels=np.array([0, 0, 0, 0, 0]), classes=(0, 1))
    counts = paired_counts(truth, child, parent)
    assert (counts.only_child, counts.only_parent, counts.n) == (2, 1, 5)


def test_models_of_other_classes_are_not_compared() -> None:
    one, other = Answers(labels=np.array([0]), classes=(0, 1)), Answers(labels=np.array([0]), classes=(1, 0))
    with pytest.raises(DataError, match="same classes"):
        METRICS["accuracy"].difference(np.array([0]), one, other)


def test_log_loss_wants_probabilities() -> None:
    with pytest.raises(DataError, match="probabilities that sum to 1"):
        METRICS["log_loss"].score(np.array([0, 1]), Answers(scores=np.array([[2.0, -1.0], [0.5, 0.5]]), classes=(0, 1)))


def test_log_loss_of_a_certain_mistake_is_finite() -> None:
    found = METRICS["log_loss"].score(
        np.array([0, 1]), Answers(scores=np.array([[0.0, 1.0], [0.0, 1.0]]), classes=(0, 1))
    )
    assert found.value == pytest.approx(-math.log(1e-7) / 2)


def test_auc_of_rows_of_one_class_is_refused() -> None:
    _, answers = two_classes()
    with pytest.raises(DataError, match="2 positive and 2 negative"):
        METRICS["auc"].score(np.full(N, "late"), answers)


def test_positive_class_must_exist() -> None:
    truth, answers = two_classes()
    with pytest.raises(ConfigError, match="positive must be one of"):
        METRICS["auc"].score(truth, Answers(scores=answers.scores, classes=answers.classes, positive="early"))


def test_unknown_metrics_and_metrics_of_another_task_are_refused() -> None:
    with pytest.raises(ConfigError, match="accuracy, auc, f1, log_loss, rmse, mae"):
        find_metric("f2")
    with pytest.raises(ConfigError, match="rmse, mae"):
        find_metric("accuracy", "regression")
    assert find_metric("mae", "regression") is METRICS["mae"]


def test_default_metrics() -> None:
    assert default_metric("regression") == "rmse"
    assert default_metric("classification", ("late", "on time")) == "auc"
    assert default_metric("classification", tuple(range(10))) == "accuracy"
    with pytest.raises(ConfigError, match="no metric fits"):
        default_metric("other")
    with pytest.raises(ConfigError, match="1 classes"):
        default_metric("classification", ("only",))
