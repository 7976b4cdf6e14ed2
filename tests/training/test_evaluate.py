"""Scores, slices and comparisons on answers whose worth is known."""

import json

import numpy as np
import pytest

from modelyard.errors import ConfigError, DataError
from modelyard.metrics import Answers
from modelyard.training.evaluate import compare, evaluate


def carriers(n: int = 1200) -> tuple[np.ndarray, Answers, np.ndarray]:
    """A classifier that is right on 95 % of rows, but on 60 % of carrier B's; C has 20 rows."""
    rng = np.random.default_rng(0)
    carrier = np.array(["A"] * (n - 320) + ["B"] * 300 + ["C"] * 20)
    truth = np.where(rng.random(n) < 0.4, "late", "on time")
    wrong = rng.random(n) < np.where(carrier == "B", 0.4, 0.05)
    labels = np.where(wrong, np.where(truth == "late", "on time", "late"), truth)
    return truth, Answers(labels=labels, classes=("late", "on time")), carrier


class TestEvaluate:
    def test_scores_come_with_interval_and_rows(self) -> None:
        truth, answers, _ = carriers()
        found = evaluate(truth, answers, ["accuracy", "f1"])
        accuracy, f1 = found.scores
        assert (accuracy.metric, f1.metric) == ("accuracy", "f1")
        assert accuracy.value == np.mean(truth == answers.labels)
        assert accuracy.low < accuracy.value < accuracy.high
        assert accuracy.n_samples == found.n_samples == 1200

    def test_worst_slice_first_and_small_ones_counted(self) -> None:
        truth, answers, carrier = carriers()
        found = evaluate(truth, answers, ["accuracy"], {"carrier": carrier})
        assert [part.name for part in found.slices] == ["carrier = B", "carrier = A"]
        assert [part.worse for part in found.slices] == [True, False]
        assert found.slices[0].n_samples == 300
        assert found.n_small_slices == 1
        assert "! carrier = B" in found.text()
        assert "1 of fewer than 30 rows left out" in found.text()

    def test_where_less_is_better_the_worst_slice_is_the_highest(self) -> None:
        rng = np.random.default_rng(1)
        far = np.arange(400) % 2 == 0
        errors = rng.normal(size=400) * np.where(far, 3.0, 1.0)
        found = evaluate(np.zeros(400), Answers(values=errors), ["mae"], {"far": far})
        assert [(part.value, part.worse) for part in found.slices] == [("True", True), ("False", False)]
        assert found.confusion is None

    def test_numbers_of_many_values_are_cut_at_their_quartiles(self) -> None:
        distance = np.concatenate([np.arange(1, 401, dtype=float), np.full(40, np.nan)])
        found = evaluate(
            np.zeros(440), Answers(values=np.random.default_rng(2).normal(size=440)), ["rmse"], {"d": distance}
        )
        assert {(part.value, part.n_samples) for part in found.slices} == {
            ("below 100.75", 100),
            ("100.75 to 200.5", 100),
            ("200.5 to 300.25", 100),
            ("300.25 and above", 100),
            ("missing", 40),
        }

    def test_slices_on_which_a_metric_is_undefined_are_counted(self) -> None:
        truth = np.repeat([0, 1], 100)
        chance = np.random.default_rng(3).random(200)
        answers = Answers(scores=np.stack([1 - chance, chance], axis=1), classes=(0, 1))
        found = evaluate(truth, answers, ["auc"], {"same as truth": truth})
        assert found.slices == ()
        assert found.n_unscored_slices == 2

    def test_json_form_has_the_confusion_matrix(self) -> None:
        truth, answers, carrier = carriers()
        found = json.loads(
            json.dumps(evaluate(truth, answers, ["accuracy"], {"carrier": carrier}).to_json(), allow_nan=False)
        )
        counts = np.array(found["confusion"]["counts"])
        assert found["confusion"]["classes"] == ["late", "on time"]
        assert counts.sum() == 1200
        assert counts[0].sum() == np.sum(truth == "late")
        assert counts[:, 0].sum() == np.sum(answers.labels == "late")
        assert found["slices"][0]["value"] == "B"

    def test_wrong_requests_are_refused(self) -> None:
        truth, answers, carrier = carriers()
        with pytest.raises(ConfigError, match="at least one metric"):
            evaluate(truth, answers, [])
        with pytest.raises(DataError, match="'carrier' must have one value"):
            evaluate(truth, answers, ["accuracy"], {"carrier": carrier[:5]})


class TestCompare:
    def scores(self, noise: float, seed: int = 4) -> Answers:
        rng = np.random.default_rng(seed)
        chance = np.clip(self.truth + rng.normal(scale=noise, size=len(self.truth)), 0, 1)
        return Answers(scores=np.stack([1 - chance, chance], axis=1), classes=(0, 1))

    truth = (np.random.default_rng(5).random(4000) < 0.4).astype(np.int64)

    def test_a_better_model_beats_its_baseline_in_one_sentence(self) -> None:
        found = compare(self.truth, self.scores(0.5), self.scores(0.8, seed=6), "auc")
        assert found.beats
        assert found.difference.value == pytest.approx(found.model.value - found.baseline.value)
        assert found.text() == f"beats the linear baseline by {found.difference.text('AUC')}"

    def test_a_worse_one_says_so(self) -> None:
        found = compare(
            self.truth, self.scores(0.8), self.scores(0.5, seed=6), "auc", baseline_name="the majority class"
        )
        assert not found.beats
        assert found.text().startswith("is worse than the majority class by 0.")
        assert found.to_json()["beats"] is False

    def test_what_cannot_be_told_apart_is_not_called_better(self) -> None:
        found = compare(self.truth, self.scores(0.5), self.scores(0.5, seed=6), "auc")
        assert not found.beats
        assert found.text().startswith("cannot be told from the linear baseline")

    def test_less_error_beats_more(self) -> None:
        errors = np.random.default_rng(7).normal(size=500)
        found = compare(np.zeros(500), Answers(values=errors), Answers(values=1.5 * errors), "rmse")
        assert found.beats
        assert "RMSE" in found.text()
