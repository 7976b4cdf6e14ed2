"""The verdict by simulation on pairs whose true loss is known, and the rule that makes an outcome of quality and cost."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.compress import verdict
from modelyard.compress.verdict import CostComparison, QualityTest, judge
from modelyard.errors import ConfigError, DataError
from modelyard.metrics import Answers
from modelyard.statistics import Interval

FASTER = CostComparison(Interval(2.7, 2.6, 2.8), parent_bytes=1_150_000, child_bytes=306_000, quiet=True, n_pairs=60)


def noisy(rate: float, n_runs: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / n_runs)


def classifiers(only_child: int, only_parent: int, both: int, neither: int) -> tuple[np.ndarray, Answers, Answers]:
    """Truth, parent and child with these many rows right; the true class is always 1."""
    counts = (only_child, only_parent, both, neither)
    child = np.repeat([1, 0, 1, 0], counts)
    parent = np.repeat([0, 1, 1, 0], counts)
    return (
        np.ones(sum(counts), dtype=np.int64),
        Answers(labels=parent, classes=(0, 1)),
        Answers(labels=child, classes=(0, 1)),
    )


def acceptance_of_accuracy(loss: float, n: int, *, gains: float, n_runs: int = 1000, keep: float = 0.99) -> float:
    """Share of simulated children found "not worse": parent right on 95 %, child on `loss` less, `gains` of rows won back."""
    p = [gains, gains + loss, 0.95 - gains - loss, 0.05 - gains]
    passed = 0
    for only_child, only_parent, both, neither in np.random.default_rng(42).multinomial(n, p, size=n_runs).tolist():
        truth, parent, child = classifiers(only_child, only_parent, both, neither)
        passed += verdict.test_quality(truth, parent, child, "accuracy", keep).decided == "not worse"
    return passed / n_runs


class TestBySimulation:
    @pytest.mark.parametrize("gains", [0.0, 0.005, 0.02])
    @pytest.mark.parametrize("beyond", [1.0, 1.05])
    def test_a_loss_at_or_just_beyond_the_margin_passes_at_most_once_in_twenty(
        self, gains: float, beyond: float
    ) -> None:
        rate = acceptance_of_accuracy(beyond * 0.01 * 0.95, n=1000, gains=gains)
        assert rate <= 0.05 + noisy(0.05, 1000)

    def test_a_loss_inside_the_margin_passes_with_enough_rows(self) -> None:
        assert acceptance_of_accuracy(0.007, n=20_000, gains=0.005) >= 0.80

    def test_too_few_rows_do_not_pass_the_same_child(self) -> None:
        assert acceptance_of_accuracy(0.007, n=500, gains=0.005) < 0.30

    def test_auc_at_the_margin_passes_at_most_once_in_twenty(self) -> None:
        """Normal scores: AUC is Φ(d/(s√2)); the child's noise s is such that it keeps exactly 0.98 of the parent's."""
        from scipy.stats import norm

        n_runs, rng = 400, np.random.default_rng(5)
        parent_auc = float(norm.cdf(1.5 / math.sqrt(2)))
        spread = 1.5 / math.sqrt(2) / float(norm.ppf(0.98 * parent_auc))
        passed = 0
        for _ in range(n_runs):
            positive = rng.random(1000) < 0.3
            score = rng.normal(size=1000) + 1.5 * positive
            noisier = score + rng.normal(scale=math.sqrt(spread**2 - 1), size=1000)
            parent, child = (Answers(scores=np.stack([-s, s], axis=1), classes=(0, 1)) for s in (score, noisier))
            passed += verdict.test_quality(positive.astype(int), parent, child, "auc", 0.98).decided == "not worse"
        assert passed / n_runs <= 0.05 + noisy(0.05, n_runs)

    def test_rmse_at_the_margin_passes_at_most_once_in_twenty(self) -> None:
        n_runs, rng, keep = 500, np.random.default_rng(6), 0.98
        truth, passed = np.zeros(1000), 0
        for _ in range(n_runs):
            error = rng.normal(size=1000)
            parent, child = (
                Answers(values=error),
                Answers(values=error + rng.normal(scale=math.sqrt(keep**-2 - 1), size=1000)),
            )
            passed += verdict.test_quality(truth, parent, child, "rmse", keep).decided == "not worse"
        assert passed / n_runs <= 0.05 + noisy(0.05, n_runs)


class TestQuality:
    def test_an_identical_child_passes_at_99_percent_on_1000_rows(self) -> None:
        truth, parent, child = classifiers(0, 0, 986, 14)
        found = verdict.test_quality(truth, parent, child, "accuracy", 0.99)
        assert found.decided == "not worse"
        assert found.lower_bound == pytest.approx(-0.0027, abs=5e-5)
        assert found.margin == pytest.approx(0.00986)
        assert found.mcnemar_p == 1.0

    def test_an_identical_child_on_few_rows_is_undecided(self) -> None:
        truth, parent, child = classifiers(0, 0, 95, 5)
        found = verdict.test_quality(truth, parent, child, "accuracy", 0.99)
        assert found.decided == "undecided"
        assert found.rows_needed is not None
        n = found.rows_needed
        enough = verdict.test_quality(*classifiers(0, 0, round(0.95 * n), n - round(0.95 * n)), "accuracy", 0.99)
        assert enough.decided == "not worse"

    @pytest.mark.parametrize("metric", ["auc", "log_loss"])
    def test_scores_that_do_not_move_do_not_pass_on_few_rows(self, metric: str) -> None:
        """Ten rows that rank alike show no variance; that is no evidence."""
        chance = np.linspace(0.05, 0.95, 10)
        answers = Answers(scores=np.stack([1 - chance, chance], axis=1), classes=(0, 1))
        truth = (chance + np.resize([0.2, -0.2], 10) > 0.5).astype(np.int64)
        assert verdict.test_quality(truth, answers, answers, metric, 0.99).decided == "undecided"

    def test_mcnemar_would_decide_the_other_way_round(self) -> None:
        """The example of docs/explanation/verdict.md: equality not rejected where a large loss is possible, and rejected where
        the loss is known to be small."""
        few = verdict.test_quality(*classifiers(8, 13, 975, 4), "accuracy", 0.99)
        assert few.decided == "undecided"
        assert few.mcnemar_p == pytest.approx(0.38, abs=0.005)
        assert few.lower_bound == pytest.approx(-0.0132, abs=5e-5)
        assert few.rows_needed == 2608
        many = verdict.test_quality(*classifiers(80, 130, 9750, 40), "accuracy", 0.99)
        assert many.decided == "not worse"
        assert many.mcnemar_p == pytest.approx(0.0007, abs=5e-5)
        assert many.lower_bound == pytest.approx(-0.0074, abs=5e-5)
        assert few.margin == many.margin == pytest.approx(0.0099, abs=5e-5)

    def test_a_plainly_worse_child_is_worse(self) -> None:
        found = verdict.test_quality(*classifiers(2, 60, 900, 38), "accuracy", 0.99)
        assert found.decided == "worse"
        assert found.rows_needed is None
        assert "worse than allowed" in found.text()

    def test_where_less_is_better_the_child_may_reach_the_parents_error_over_keep(self) -> None:
        rng = np.random.default_rng(1)
        truth, errors = np.zeros(5000), rng.normal(size=5000)
        slightly = verdict.test_quality(truth, Answers(values=errors), Answers(values=1.01 * errors), "rmse", 0.95)
        assert slightly.decided == "not worse"
        assert slightly.margin == pytest.approx(slightly.parent.value * (1 / 0.95 - 1))
        assert slightly.difference.value == pytest.approx(-0.01 * slightly.parent.value)
        clearly = verdict.test_quality(truth, Answers(values=errors), Answers(values=1.10 * errors), "rmse", 0.95)
        assert clearly.decided == "worse"

    def test_rows_needed_would_decide_a_numeric_metric(self) -> None:
        rng = np.random.default_rng(2)
        error, noise = rng.normal(size=400), rng.normal(size=400)
        found = verdict.test_quality(
            np.zeros(400), Answers(values=error), Answers(values=error + 0.1 * noise), "mae", 0.994
        )
        assert found.decided == "undecided"
        assert found.rows_needed is not None
        repeats = math.ceil(found.rows_needed / 400 * 1.1)
        parent, child = np.tile(error, repeats), np.tile(error + 0.1 * noise, repeats)
        more = verdict.test_quality(np.zeros(len(parent)), Answers(values=parent), Answers(values=child), "mae", 0.994)
        assert more.decided != "undecided"

    @pytest.mark.parametrize("keep", [0.0, 1.0, 1.01, -1.0])
    def test_keep_without_a_margin_is_refused(self, keep: float) -> None:
        with pytest.raises(ConfigError, match="keep must be greater than 0 and less than 1"):
            verdict.test_quality(*classifiers(0, 0, 9, 1), "accuracy", keep)

    def test_a_parent_with_nothing_to_keep_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="the parent's accuracy is 0"):
            verdict.test_quality(*classifiers(0, 0, 0, 10), "accuracy", 0.99)
        perfect = Answers(values=np.zeros(50))
        with pytest.raises(ConfigError, match="the parent's rmse is 0"):
            verdict.test_quality(np.zeros(50), perfect, perfect, "rmse", 0.99)

    def test_a_child_that_answers_nan_is_an_error(self) -> None:
        with pytest.raises(DataError, match="not finite"):
            verdict.test_quality(
                np.zeros(3), Answers(values=np.ones(3)), Answers(values=np.full(3, np.nan)), "rmse", 0.99
            )


def quality(decided: str = "not worse") -> QualityTest:
    """A quality test with this decision, from real answers."""
    counts = {"not worse": (0, 0, 986, 14), "worse": (2, 60, 900, 38), "undecided": (0, 0, 95, 5)}[decided]
    found = verdict.test_quality(*classifiers(*counts), "accuracy", 0.99)
    assert found.decided == decided
    return found


class TestJudge:
    def test_no_worse_and_faster_is_accepted_with_its_figures(self) -> None:
        found = judge(quality(), FASTER, rows_independent=True)
        assert found.accepted
        assert "not worse than allowed" in found.text()
        assert "2.70 × the parent's speed (2.60 to 2.80)" in found.text()
        assert "306,000 bytes against 1,150,000 (26.6%)" in found.text()

    def test_smaller_but_slower_is_refused_by_itself(self) -> None:
        found = judge(quality(), replace(FASTER, speedup=Interval(0.8, 0.78, 0.83)), rows_independent=True)
        assert found.outcome == "refused"
        assert any(reason.startswith("smaller but slower") for reason in found.reasons)

    def test_smaller_and_not_slower_is_accepted(self) -> None:
        found = judge(quality(), replace(FASTER, speedup=Interval(0.99, 0.97, 1.01)), rows_independent=True)
        assert found.accepted
        assert "not measurably slower" in found.text()

    def test_larger_but_faster_is_accepted(self) -> None:
        assert judge(quality(), replace(FASTER, child_bytes=2_000_000), rows_independent=True).accepted

    def test_neither_faster_nor_smaller_is_refused(self) -> None:
        same = replace(FASTER, speedup=Interval(1.0, 0.98, 1.02), child_bytes=FASTER.parent_bytes)
        found = judge(quality(), same, rows_independent=True)
        assert found.outcome == "refused"
        assert "neither faster nor smaller" in found.text()

    def test_answers_that_depend_on_their_batch_mates_are_refused(self) -> None:
        found = judge(quality(), FASTER, rows_independent=False)
        assert found.outcome == "refused"
        assert "batch" in found.text()

    def test_worse_than_allowed_is_refused_however_fast(self) -> None:
        assert judge(quality("worse"), FASTER, rows_independent=True).outcome == "refused"

    def test_undecided_names_the_rows_that_would_decide(self) -> None:
        found = judge(quality("undecided"), FASTER, rows_independent=True)
        assert found.outcome == "undecided"
        assert f"{found.quality.rows_needed:,} rows would decide" in found.text()

    def test_on_a_busy_machine_unseen_slowness_is_no_evidence_of_speed(self) -> None:
        unclear = replace(FASTER, speedup=Interval(1.0, 0.7, 1.4), quiet=False)
        assert judge(quality(), unclear, rows_independent=True).outcome == "undecided"
        assert judge(quality(), replace(FASTER, quiet=False), rows_independent=True).accepted

    def test_too_few_pairs_to_bound_the_speed_are_undecided(self) -> None:
        unbounded = replace(FASTER, speedup=Interval(2.0, 0.0, math.inf), n_pairs=4)
        found = judge(quality(), unbounded, rows_independent=True)
        assert found.outcome == "undecided"
        assert "4 timed pairs are too few" in found.text()

    @given(
        decided=st.sampled_from(["not worse", "worse", "undecided"]),
        speed=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
        sizes=st.tuples(st.integers(1, 100), st.integers(1, 100)),
        quiet=st.booleans(),
        independent=st.booleans(),
    )
    def test_accepted_always_means_no_worse_independent_and_cheaper(
        self, decided: str, speed: list[float], sizes: tuple[int, int], quiet: bool, independent: bool
    ) -> None:
        low, high = speed
        cost = CostComparison(Interval((low + high) / 2, low, high), sizes[0], sizes[1], quiet, 60)
        found = judge(quality(decided), cost, rows_independent=independent)
        cheaper = low > 1 or (sizes[1] < sizes[0] and high >= 1)
        if found.accepted:
            assert decided == "not worse"
            assert independent
            assert cheaper
        elif quiet and independent and cheaper:
            assert decided != "not worse"
        assert found.reasons

    def test_json_form_holds_every_figure_and_is_json(self) -> None:
        unbounded = replace(FASTER, speedup=Interval(2.0, 0.0, math.inf), n_pairs=4)
        found = json.loads(json.dumps(judge(quality(), unbounded, rows_independent=True).to_json(), allow_nan=False))
        assert found["outcome"] == "undecided"
        assert found["cost"]["speedup"]["high"] is None
        assert set(found["quality"]) == set(QualityTest.__dataclass_fields__)
        assert set(found["cost"]) == set(CostComparison.__dataclass_fields__)
