"""l(b): what is believed before, after and despite what is measured. Times in milliseconds."""

import doctest
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.bundle.profile import Latency
from modelyard.errors import ConfigError
from modelyard.inference.serve.scheduling import arrivals, latency_model
from modelyard.inference.serve.scheduling.latency_model import LatencyModel

MS = 1e-3


def affine(n_rows: int) -> float:
    return (5 + 0.25 * n_rows) * MS


def profile(latency_s: Callable[[int], float] = affine, spread: float = 1.0) -> list[Latency]:
    return [
        Latency(size, 1, 100, latency_s(size), spread * latency_s(size), latency_s(size))
        for size in (1, 2, 4, 8, 16, 32, 64)
    ]


def learned(latency_s: Callable[[int], float], model: LatencyModel, n_runs: int = 500, seed: int = 1) -> LatencyModel:
    sizes = random.Random(seed)
    for _ in range(n_runs):
        n_rows = sizes.randint(1, model.max_batch_size)
        model.observe(n_rows, latency_s(n_rows))
        model.redraw()
    return model


@pytest.mark.parametrize("module", [latency_model, arrivals])
def test_the_examples_run(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]  # a module


class TestBeforeAnythingRan:
    def test_a_guess_grows_with_the_rows(self) -> None:
        model = LatencyModel(64, guess_row_s=1 * MS)
        assert model.mean_s(1) == pytest.approx(1 * MS)
        assert model.mean_s(64) == pytest.approx(32.5 * MS)
        assert not model.seen(1)

    def test_a_profile_is_believed_and_read_straight_between_its_sizes(self) -> None:
        model = LatencyModel(64, profile())
        for n_rows in range(1, 65):
            assert model.high_s(n_rows) == pytest.approx(affine(n_rows))
            assert model.mean_s(n_rows) == pytest.approx(affine(n_rows))

    def test_its_slow_runs_make_the_high_quantile(self) -> None:
        model = LatencyModel(64, profile(spread=1.5))
        assert model.high_s(8) == pytest.approx(1.5 * affine(8))
        assert model.mean_s(8) == pytest.approx(affine(8))

    def test_a_profile_that_caught_a_hiccup_is_not_taken_at_its_word(self) -> None:
        assert LatencyModel(64, profile(spread=30)).high_s(8) == pytest.approx(2 * affine(8))

    def test_sizes_beyond_the_largest_batch_are_left_out(self) -> None:
        model = LatencyModel(4, profile())
        assert len(model.high_table_s()) == 5

    def test_a_noisy_profile_is_made_monotone(self) -> None:
        falling = [Latency(1, 1, 9, 5 * MS, 5 * MS, 5 * MS), Latency(2, 1, 9, 3 * MS, 3 * MS, 3 * MS)]
        model = LatencyModel(2, falling)
        assert model.high_s(1) == model.high_s(2) == pytest.approx(5 * MS)


class TestLearning:
    def test_the_first_run_replaces_the_guess(self) -> None:
        model = LatencyModel(64)
        model.observe(1, 0.01 * MS)
        assert model.mean_s(1) == pytest.approx(0.01 * MS)

    def test_a_cold_first_run_is_forgotten_at_the_second(self) -> None:
        model = LatencyModel(64)
        model.observe(1, 80 * MS)
        model.observe(1, 3 * MS)
        assert model.mean_s(1) == pytest.approx(3 * MS)

    def test_the_curve_is_learned_from_nothing(self) -> None:
        model = learned(affine, LatencyModel(64))
        for n_rows in (1, 3, 10, 33, 64):
            assert model.high_s(n_rows) == pytest.approx(affine(n_rows), rel=0.06)

    def test_a_curve_that_is_no_line_is_learned_too(self) -> None:
        def steps(n_rows: int) -> float:
            return (2 + 3 * ((n_rows - 1) // 8)) * MS

        model = learned(steps, LatencyModel(32), n_runs=2000)
        for n_rows in (4, 8, 27, 32):
            assert model.mean_s(n_rows) == pytest.approx(steps(n_rows), rel=0.35)

    def test_larger_batches_than_any_seen_are_expected_to_pay_off_half(self) -> None:
        model = LatencyModel(64)
        for _ in range(10):
            model.observe(4, 8 * MS)
        assert model.seen(4)
        assert not model.seen(16)
        assert model.mean_s(8) == pytest.approx(12 * MS)
        assert model.mean_s(2) == pytest.approx(8 * MS)  # of smaller ones only that they take no longer

    def test_noise_widens_the_high_quantile_and_leaves_the_mean(self) -> None:
        noise = random.Random(3)
        model = learned(lambda n_rows: affine(n_rows) * noise.lognormvariate(0, 0.1), LatencyModel(64), 3000)
        for n_rows in (1, 8, 50):
            assert model.mean_s(n_rows) == pytest.approx(affine(n_rows), rel=0.1)
            assert 1.04 < model.high_s(n_rows) / affine(n_rows) < 1.35

    @given(outlier=st.floats(1, 1e6), n_rows=st.integers(1, 64))
    def test_one_outlier_changes_little(self, outlier: float, n_rows: int) -> None:
        model = learned(affine, LatencyModel(64, profile()))
        before_s = model.high_table_s()
        model.observe(n_rows, outlier * affine(n_rows))
        model._n_undrawn = 1000  # draw it now
        for before, after in zip(before_s[1:], model.high_table_s()[1:], strict=True):
            assert after <= 1.25 * before  # a tenth, or a quarter at a size that was not seen for long

    def test_a_few_hiccups_do_not_make_a_high_quantile(self) -> None:
        chance = random.Random(5)
        model = LatencyModel(64, profile())
        highest_s = 0.0
        for _ in range(5000):  # one run in a hundred takes 50 ms longer
            model.observe(1, affine(1) + 50 * MS * (chance.random() < 0.01))
            highest_s = max(highest_s, model.high_s(1))
        assert highest_s < 2 * affine(1)

    def test_a_slower_machine_is_noticed_within_a_few_runs(self) -> None:
        model = learned(affine, LatencyModel(64, profile()))
        for _ in range(10):
            model.observe(8, 3 * affine(8))
        assert model.high_s(8) > 2.5 * affine(8)
        assert model.high_s(32) > 1.4 * affine(32)  # before one of that size ran

    def test_it_does_not_overshoot_when_the_machine_stays_slow(self) -> None:
        model = learned(affine, LatencyModel(64, profile()))
        for _ in range(200):
            model.observe(8, 3 * affine(8))
            assert model.high_s(8) < 3.2 * affine(8)
        assert model.mean_s(8) == pytest.approx(3 * affine(8), rel=0.05)

    def test_a_faster_machine_is_believed_after_a_while(self) -> None:
        model = learned(affine, LatencyModel(64, profile()))
        for _ in range(6):
            model.observe(8, affine(8) / 3)
        assert model.high_s(8) > 0.6 * affine(8)  # it might be luck
        for _ in range(150):
            model.observe(8, affine(8) / 3)
        assert model.high_s(8) == pytest.approx(affine(8) / 3, rel=0.1)

    def test_what_was_last_seen_long_ago_does_not_hold_down_what_is_seen_now(self) -> None:
        model = learned(affine, LatencyModel(64, profile()))
        for _ in range(400):
            model.observe(1, 40 * MS)
        assert model.high_s(1) == pytest.approx(40 * MS, rel=0.05)
        assert model.high_s(64) >= 0.95 * 40 * MS

    def test_the_revision_tells_when_to_look_again(self) -> None:
        model = learned(affine, LatencyModel(64, profile()))
        model.redraw()
        revision, high_s = model.revision, model.high_s(8)
        model.observe(8, affine(8))
        assert (model.revision, model.high_s(8)) == (revision, high_s)
        for _ in range(64):
            model.observe(8, affine(8))
        model.redraw()
        assert model.revision > revision


def test_relaxing_forgets_hiccups_first_and_then_gives_way() -> None:
    model = LatencyModel(8, profile(lambda _: 5 * MS))
    for _ in range(12):
        model.observe(1, 50 * MS)
    assert model.high_s(1) > 40 * MS
    for _ in range(12):
        model.relax()
    before_s = model.high_s(1)
    assert before_s < 45 * MS
    for _ in range(40):
        model.relax()
    assert model.high_s(1) < 0.5 * before_s


def test_another_shape_starts_from_what_is_known_and_goes_its_own_way() -> None:
    known = learned(affine, LatencyModel(64, profile()))
    other = known.fresh()
    assert other.high_table_s() == pytest.approx(known.high_table_s())
    for _ in range(100):
        other.observe(1, 0.5 * MS)
    assert other.high_s(1) == pytest.approx(0.5 * MS, rel=0.1)
    assert known.high_s(1) == pytest.approx(affine(1), rel=0.06)


@given(
    max_batch_size=st.integers(1, 200),
    runs=st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1e3)), max_size=200),
    relaxed=st.integers(0, 3),
)
def test_l_never_falls_and_is_never_nothing(max_batch_size: int, runs: list[tuple[int, float]], relaxed: int) -> None:
    model = LatencyModel(max_batch_size)
    for n_rows, seconds in runs:
        model.observe(min(n_rows, max_batch_size), seconds)
    for _ in range(relaxed):
        model.relax()
    table_s = model.high_table_s()
    assert len(table_s) == max_batch_size + 1
    assert table_s[0] == 0.0
    assert table_s[1] > 0.0
    assert table_s == sorted(table_s)
    assert [model.high_s(n_rows) for n_rows in range(1, max_batch_size + 1)] == table_s[1:]
    assert all(model.mean_s(n_rows) <= model.high_s(n_rows) for n_rows in range(1, max_batch_size + 1))


def test_sizes_and_guesses_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="max_batch_size must be at least 1, got 0"):
        LatencyModel(0)
    with pytest.raises(ConfigError, match=r"guess_row_s must be above 0, got 0\.0"):
        LatencyModel(1, guess_row_s=0.0)
