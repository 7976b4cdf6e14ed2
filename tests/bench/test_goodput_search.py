"""The search for the highest sustained rate, and how a bar is judged."""

import math

from hypothesis import given
from hypothesis import strategies as st
from serve.bars import Bar, ratios
from serve.goodput import Search


def searched(first_per_s: float, border_per_s: float, n_probes: int) -> tuple[float, int]:
    """Return what a search finds when every rate up to `border_per_s` is sustained, and in how many probes."""
    search, n_used = Search(first_per_s, n_probes), 0
    while (rate_per_s := search.rate_per_s) is not None:
        search.tell(rate_per_s <= border_per_s)
        n_used += 1
    return search.sustained_per_s, n_used


@given(st.floats(10, 1e5), st.floats(0.5, 2), st.integers(1, 12))
def test_a_search_never_claims_what_was_not_sustained(first_per_s: float, factor: float, n_probes: int) -> None:
    found_per_s, n_used = searched(first_per_s, first_per_s * factor, n_probes)
    assert found_per_s <= first_per_s * factor
    assert n_used <= n_probes


@given(st.floats(10, 1e5), st.floats(0.5, 2))
def test_a_search_comes_within_five_percent_in_ten_probes(first_per_s: float, factor: float) -> None:
    found_per_s, _ = searched(first_per_s, first_per_s * factor, 10)
    assert found_per_s >= 0.95 * first_per_s * factor


def test_a_search_ends_early_where_the_border_is_known_closely_enough() -> None:
    found_per_s, n_used = searched(100, 99, 50)
    assert n_used < 10
    assert 0.98 * 99 <= found_per_s <= 99


def test_a_server_that_sustains_nothing_is_said_to_sustain_nothing() -> None:
    assert searched(1000, 0, 6) == (0, 6)


def test_a_bar_that_was_not_measured_is_missed() -> None:
    assert not Bar("anything", (), "at least", 0).met
    assert not Bar("anything", (), "at most", math.inf).met


def test_the_median_is_judged() -> None:
    assert Bar("ratio", (0.5, 1.6, 1.7), "at least", 1.5).met
    assert not Bar("seconds", (0.5, 0.7, 0.8), "at most", 0.6).met


def test_ratios_are_taken_within_a_turn() -> None:
    assert ratios({0: 10, 1: 30}, {0: 5, 1: 10}) == (2, 3)


def test_without_a_shared_turn_the_median_of_the_others_serves() -> None:
    assert ratios({0: 10}, {1: 5, 2: 20, 3: 10}) == (1,)
    assert ratios({0: 10}, {}) == ()
