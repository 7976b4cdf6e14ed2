"""Intervals against published figures, independent references, and coverage on data whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelyard.errors import DataError
from modelyard.statistics import (
    Interval,
    allow_for_unseen,
    auc_components,
    bootstrap_interval,
    delong_interval,
    delong_paired_difference,
    mcnemar_p,
    mean_interval,
    normal_quantile,
    paired_mean_difference,
    paired_proportion_interval,
    paired_proportion_lower_bound,
    paired_proportion_z,
    quantile_interval,
    ratio_interval,
    unseen_share,
    wilson_interval,
)


def at_most(rate: float, n: int) -> float:
    """A rate that a simulation of n runs exceeds by chance once in a thousand times: three standard errors more."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / n)


class TestInterval:
    def test_text_shows_as_many_decimals_as_the_width_warrants(self) -> None:
        assert Interval(0.0312, 0.0272, 0.0352).text("AUC") == "0.031 AUC (0.027 to 0.035)"
        assert Interval(1234.5, 1100.0, 1400.0).text() == "1234 (1100 to 1400)"

    def test_json_has_no_infinity(self) -> None:
        assert Interval(1.5, 0.0, math.inf).to_json() == {"value": 1.5, "low": 0.0, "high": None, "confidence": 0.95}


class TestWilson:
    def test_agrees_with_scipy(self) -> None:
        from scipy.stats import binomtest

        for k, n in ((0, 10), (3, 10), (10, 10), (986, 1000), (1, 1)):
            expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
            found = wilson_interval(k, n)
            assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)

    @pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
    def test_counts_that_cannot_be_are_refused(self, k: int, n: int) -> None:
        with pytest.raises(DataError, match="successes"):
            wilson_interval(k, n)

    def test_confidence_outside_its_range_is_refused(self) -> None:
        with pytest.raises(DataError, match="confidence must be between 0 and 1"):
            wilson_interval(1, 2, confidence=95)


def tango_by_likelihood(n10: int, n01: int, n: int, delta: float) -> float:
    """The score statistic with the restricted estimate found by maximising the likelihood, not by Tango's formula."""
    from scipy.optimize import minimize_scalar

    def minus_log_likelihood(p01: float) -> float:
        p10 = p01 + delta
        terms = ((n10, p10), (n01, p01), (n - n10 - n01, 1 - p10 - p01))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    p01 = float(minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
    return float((n10 - n01 - n * delta) / math.sqrt(n * (2 * p01 + delta - delta**2)))


class TestTango:
    def test_published_example(self) -> None:
        """Tango (1998), the crossover trial of contact lens disinfection: 44 pairs, one discordant, 90 % interval."""
        found = paired_proportion_interval(0, 1, 44, confidence=0.90)
        assert (round(found.low, 3), round(found.high, 3)) == (-0.096, 0.037)

    @pytest.mark.parametrize(("n10", "n01", "n"), [(12, 2, 50), (3, 40, 100), (1, 0, 30), (7, 7, 1000), (20, 5, 25)])
    def test_ends_are_where_the_score_test_turns(self, n10: int, n01: int, n: int) -> None:
        found = paired_proportion_interval(n10, n01, n)
        for end, z in ((found.low, 1.959964), (found.high, -1.959964)):
            assert tango_by_likelihood(n10, n01, n, end) == pytest.approx(z, abs=1e-3)

    @pytest.mark.parametrize("delta", [-0.9, -0.3, -0.01, 0.0, 0.2, 0.7])
    def test_score_statistic_is_the_likelihoods(self, delta: float) -> None:
        assert paired_proportion_z(12, 2, 50, delta) == pytest.approx(tango_by_likelihood(12, 2, 50, delta), abs=1e-4)

    def test_an_identical_child_is_bounded_by_the_number_of_rows_alone(self) -> None:
        bound = paired_proportion_lower_bound(0, 0, 1000)
        assert bound == pytest.approx(-0.0027, abs=5e-5)
        assert bound == pytest.approx(-unseen_share(1000, 0.90), abs=1e-9)

    @pytest.mark.parametrize(
        ("n10", "n01", "n", "value"), [(0, 0, 1, 0.0), (1, 0, 1, 1.0), (0, 1, 1, -1.0), (5, 0, 5, 1.0), (0, 5, 5, -1.0)]
    )
    def test_smallest_tables_have_sound_ends(self, n10: int, n01: int, n: int, value: float) -> None:
        found = paired_proportion_interval(n10, n01, n)
        assert found.value == value
        assert -1 <= found.low <= value <= found.high <= 1
        assert found.high - found.low > 0.5

    @given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200), st.sampled_from([0.8, 0.95, 0.99]))
    def test_swapping_the_sides_mirrors_the_interval(self, n10: int, n01: int, rest: int, confidence: float) -> None:
        n = n10 + n01 + rest + 1
        one, other = (
            paired_proportion_interval(n10, n01, n, confidence),
            paired_proportion_interval(n01, n10, n, confidence),
        )
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
        assert one.low <= one.value <= one.high

    @pytest.mark.parametrize(
        ("p10", "p01", "n"),
        [(0.05, 0.05, 100), (0.1, 0.01, 200), (0.0, 0.01, 1000), (0.02, 0.03, 1000), (0.001, 0.011, 500)],
    )
    def test_one_sided_bound_is_missed_no_more_often_than_promised(self, p10: float, p01: float, n: int) -> None:
        """Balanced and skewed discordance alike: the truth lies below the bound in at most 5 % of samples."""
        counts = np.random.default_rng(7).multinomial(n, [p10, p01, 1 - p10 - p01], size=2000)
        missed = np.mean([paired_proportion_lower_bound(int(a), int(b), n) > p10 - p01 for a, b, _ in counts])
        assert (
            missed <= at_most(0.05, 2000) + 0.005
        )  # a score bound is approximate: half a point over is seen at small counts

    def test_impossible_counts_are_refused(self) -> None:
        with pytest.raises(DataError, match="n10 and n01"):
            paired_proportion_interval(3, 3, 5)
        with pytest.raises(DataError, match="n10 and n01"):
            paired_proportion_lower_bound(0, 0, 0)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    from scipy.stats import binomtest

    for n10, n01 in ((0, 0), (1, 0), (5, 5), (10, 20), (300, 340)):
        expected = binomtest(n10, n10 + n01).pvalue if n10 + n01 else 1.0
        assert mcnemar_p(n10, n01) == pytest.approx(expected, rel=1e-9)


def scored_rows(rng: np.random.Generator, n: int, shift: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    positive = rng.random(n) < 0.3
    scores: NDArray[np.float64] = rng.normal(size=n) + shift * positive
    return scores.round(2), positive  # rounding makes ties


class TestDeLong:
    def test_auc_is_scikit_learns_ties_included(self) -> None:
        from sklearn.metrics import roc_auc_score

        scores, positive = scored_rows(np.random.default_rng(0), 3000)
        assert delong_interval(scores, positive).value == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)

    def test_variance_is_the_bootstraps(self) -> None:
        rng = np.random.default_rng(1)
        scores, positive = scored_rows(rng, 400)
        _, parts = auc_components(scores, positive)
        draws = rng.integers(400, size=(2000, 400))
        resampled = [auc_components(scores[rows], positive[rows])[0] for rows in draws]
        assert np.sqrt(np.sum(parts**2)) == pytest.approx(np.std(resampled), rel=0.06)

    def test_variance_is_delongs_by_its_definition(self) -> None:
        """All pairs compared one by one, as the paper of 1988 writes it."""
        scores, positive = scored_rows(np.random.default_rng(2), 60)
        x, y = scores[positive][:, np.newaxis], scores[~positive][np.newaxis, :]
        psi = (x > y) + 0.5 * (x == y)
        expected = psi.mean(axis=1).var(ddof=1) / psi.shape[0] + psi.mean(axis=0).var(ddof=1) / psi.shape[1]
        auc, parts = auc_components(scores, positive)
        assert auc == pytest.approx(psi.mean(), abs=1e-12)
        assert np.sum(parts**2) == pytest.approx(expected, rel=1e-9)

    def test_intervals_cover_what_they_promise(self) -> None:
        """Normal scores one unit apart have AUC = Φ(1/√2); a second model with added noise has its own."""
        from scipy.stats import norm

        rng = np.random.default_rng(3)
        auc_a, auc_b = norm.cdf(1 / math.sqrt(2)), norm.cdf(1 / math.sqrt(2 * 1.25))
        single = paired = 0
        n_runs = 1000
        for _ in range(n_runs):
            positive = rng.random(300) < 0.3
            a = rng.normal(size=300) + positive
            b = a + rng.normal(scale=0.5, size=300)
            one, two = delong_interval(a, positive), delong_paired_difference(a, b, positive)
            single += not one.low <= auc_a <= one.high
            paired += not two.low <= auc_a - auc_b <= two.high
        assert single / n_runs <= at_most(0.05, n_runs)
        assert paired / n_runs <= at_most(0.05, n_runs)

    def test_perfect_and_inverted_rankings_keep_a_wide_end(self) -> None:
        positive = np.arange(40) < 20
        perfect = delong_interval(positive.astype(float), positive)
        inverted = delong_interval(-positive.astype(float), positive)
        assert perfect.value == perfect.high == 1
        assert 0.75 < perfect.low < 0.95
        assert (inverted.low, inverted.high) == pytest.approx((0.0, 1 - perfect.low), abs=1e-6)

    def test_a_child_that_changes_nothing_is_still_bounded_by_the_rows(self) -> None:
        scores, positive = scored_rows(np.random.default_rng(4), 1000)
        found = delong_paired_difference(scores, scores, positive)
        rarest = min(positive.sum(), (~positive).sum())
        assert found.value == 0
        assert found.high == -found.low == pytest.approx(0.5 * unseen_share(float(rarest)))

    def test_macro_average_is_the_mean_of_its_curves(self) -> None:
        rng = np.random.default_rng(5)
        truth = rng.integers(3, size=500)
        scores = rng.random((500, 3)) + np.eye(3)[truth] * 0.5
        positive = truth[:, np.newaxis] == np.arange(3)
        each = [delong_interval(scores[:, k], positive[:, k]).value for k in range(3)]
        found = delong_interval(scores, positive)
        assert found.value == pytest.approx(np.mean(each))
        assert found.low < found.value < found.high

    def test_rows_of_one_kind_are_refused(self) -> None:
        with pytest.raises(DataError, match="2 positive and 2 negative"):
            delong_interval(np.arange(5.0), np.ones(5, dtype=bool))


class TestMeans:
    def test_student_agrees_with_scipy(self) -> None:
        from scipy.stats import ttest_1samp, ttest_rel

        a, b = np.random.default_rng(6).normal(size=(2, 25))
        expected = ttest_1samp(a, 0).confidence_interval(0.95)
        found = mean_interval(a)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        pair = ttest_rel(a, b).confidence_interval(0.9)
        difference = paired_mean_difference(a, b, 0.9)
        assert (difference.low, difference.high) == pytest.approx((pair.low, pair.high))

    @pytest.mark.parametrize("values", [np.array([1.0]), np.array([1.0, math.nan]), np.ones((2, 2))])
    def test_what_has_no_interval_is_refused(self, values: NDArray[np.float64]) -> None:
        with pytest.raises(DataError, match="at least 2 finite numbers"):
            mean_interval(values)

    def test_pairs_of_unequal_length_are_refused(self) -> None:
        with pytest.raises(DataError, match="as many values"):
            paired_mean_difference(np.zeros(3), np.zeros(4))


class TestOrderStatistics:
    def test_median_of_ten_lies_between_the_second_and_the_ninth(self) -> None:
        """The textbook case: P(x(2) < median < x(9)) = 0.979."""
        found = quantile_interval(np.arange(1.0, 11.0), 0.5)
        assert (found.value, found.low, found.high) == (5.5, 2.0, 9.0)

    def test_a_tail_that_the_sample_cannot_reach_is_infinite(self) -> None:
        found = quantile_interval(np.arange(100.0), 0.99)
        assert found.high == math.inf
        assert 90 < found.low < 99

    @pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
    def test_covers_the_true_quantile_of_a_skewed_distribution(self, q: float) -> None:
        samples = np.random.default_rng(8).exponential(size=(1000, 500))
        intervals = [quantile_interval(sample, q) for sample in samples]
        missed = np.mean([not i.low <= -math.log(1 - q) <= i.high for i in intervals])
        assert missed <= at_most(0.05, 1000)

    @given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=60), st.floats(0.01, 0.99))
    def test_value_lies_inside(self, values: list[float], q: float) -> None:
        found = quantile_interval(np.array(values), q)
        assert found.low <= found.value * (1 + 1e-12)
        assert found.value <= found.high * (1 + 1e-12)

    def test_ratio_of_paired_times_ignores_what_slows_both(self) -> None:
        rng = np.random.default_rng(9)
        mood = rng.lognormal(sigma=1.0, size=60)
        found = ratio_interval(2.7 * mood * rng.normal(1, 0.02, 60), mood * rng.normal(1, 0.02, 60))
        assert 2.6 < found.low < 2.7 < found.high < 2.8

    def test_few_pairs_bound_nothing(self) -> None:
        found = ratio_interval(np.full(5, 2.0), np.full(5, 1.0))
        assert (found.value, found.low, found.high) == (2.0, 0.0, math.inf)

    @pytest.mark.parametrize("b", [np.array([1.0, 0.0]), np.array([1.0, -1.0]), np.array([1.0, math.nan]), np.ones(3)])
    def test_times_that_are_none_are_refused(self, b: NDArray[np.float64]) -> None:
        with pytest.raises(DataError):
            ratio_interval(np.ones(2), b)


class TestBootstrap:
    def test_agrees_with_the_score_interval_of_a_proportion(self) -> None:
        found = bootstrap_interval(np.array([80, 320]), lambda m: m[:, 0] / m.sum(axis=1))
        expected = wilson_interval(80, 400)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)

    def test_same_rows_give_the_same_interval(self) -> None:
        counts = np.array([5, 60, 3])
        first = bootstrap_interval(counts, lambda m: m[:, 0] / (m[:, 0] + m[:, 2]))
        assert first == bootstrap_interval(counts, lambda m: m[:, 0] / (m[:, 0] + m[:, 2]))

    def test_no_spread_gives_no_width(self) -> None:
        found = bootstrap_interval(np.array([50]), lambda m: m[:, 0] / m.sum(axis=1))
        assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_few_changed_rows_are_not_trusted_to_show_the_spread() -> None:
    narrow = Interval(0.0, -1e-6, 1e-6)
    widened = allow_for_unseen(narrow, n_changed=3, n=100, cost=1.0)
    assert widened.high == -widened.low == pytest.approx(unseen_share(100))
    assert allow_for_unseen(narrow, n_changed=30, n=100, cost=1.0) == narrow


def test_normal_quantiles_are_the_usual_ones() -> None:
    assert normal_quantile(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert normal_quantile(0.95, one_sided=True) == pytest.approx(1.644854, abs=1e-6)
