"""The arrival rate, on arrivals whose rate is known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.inference.serve.scheduling.arrivals import ArrivalRate


def fed(rate: ArrivalRate, per_update: int, n_rows: int, n_updates: int, every_s: float = 0.001) -> ArrivalRate:
    for step in range(1, n_updates + 1):
        rate.n_requests += per_update
        rate.n_rows += per_update * n_rows
        rate.update(step * every_s)
    return rate


def test_nothing_arrived_is_a_rate_of_nothing() -> None:
    rate = ArrivalRate(0.1)
    assert (rate.rows_per_s, rate.high_rows_per_s, rate.rows_per_request) == (0.0, 0.0, 1.0)
    rate.update(5.0)
    assert (rate.rows_per_s, rate.high_rows_per_s) == (0.0, 0.0)


def test_a_steady_rate_is_right_from_the_first_milliseconds_on() -> None:
    for n_updates in (1, 10, 1000):
        rate = fed(ArrivalRate(0.1), per_update=2, n_rows=3, n_updates=n_updates)
        assert rate.rows_per_s == pytest.approx(6000)
        assert rate.rows_per_request == pytest.approx(3)


def test_the_high_rate_is_a_standard_deviation_above_what_poisson_arrivals_give() -> None:
    """The estimate's spread over many moments is the one that is claimed, for single rows and for sixteen together."""
    chance = random.Random(1)
    for n_rows in (1, 16):
        rate = ArrivalRate(0.1)
        now_s, due_s = 0.0, 0.0
        seen, claimed = [], []
        while now_s < 400:
            now_s += 0.05
            while due_s < now_s:
                rate.n_rows += n_rows
                rate.n_requests += 1
                due_s += chance.expovariate(500)
            rate.update(now_s)
            if now_s > 2:
                seen.append(rate.rows_per_s)
                claimed.append(rate.high_rows_per_s - rate.rows_per_s)
        mean = sum(seen) / len(seen)
        deviation = (sum((one - mean) ** 2 for one in seen) / len(seen)) ** 0.5
        assert mean == pytest.approx(500 * n_rows, rel=0.03)
        assert sum(claimed) / len(claimed) == pytest.approx(deviation, rel=0.25)


def test_silence_is_forgetting() -> None:
    rate = fed(ArrivalRate(0.1), per_update=5, n_rows=1, n_updates=1000)
    rate.update(1.1)
    assert rate.rows_per_s == pytest.approx(5000 / 2.718, rel=0.01)
    rate.update(3.0)
    assert rate.rows_per_s < 1


def test_time_that_stands_still_loses_nothing() -> None:
    rate = ArrivalRate(0.1)
    rate.n_rows = rate.n_requests = 7
    rate.update(0.0)
    assert rate.n_rows == 7
    rate.update(0.01)
    assert rate.rows_per_s == pytest.approx(700)


@given(steps=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1000)), max_size=50))
def test_the_rate_lies_between_the_lowest_and_the_highest_seen(steps: list[tuple[float, int]]) -> None:
    rate = ArrivalRate(0.1)
    now_s, last_s, counted = 0.0, 0.0, 0
    rates = [0.0]
    for after_s, n_rows in steps:
        now_s += after_s
        rate.n_rows += n_rows
        rate.n_requests += n_rows
        counted += n_rows
        if now_s > last_s:
            rates.append(counted / (now_s - last_s))
            last_s, counted = now_s, 0
        rate.update(now_s)
        assert min(rates) * 0.999 <= rate.rows_per_s <= max(rates) * 1.001
