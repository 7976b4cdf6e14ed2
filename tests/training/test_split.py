"""Laws of the three splits, and what they refuse."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from modelyard.errors import ConfigError, DataError
from modelyard.schema import convert
from modelyard.training.split import Split, SplitConfig, split_digest, split_rows

SHARES = st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4))
SEEDS = st.integers(0, 2**32)


def _labels(sizes: list[int], order_seed: int) -> NDArray[Any]:
    label = np.array([f"class {i}" for i, size in enumerate(sizes) for _ in range(size)], dtype=object)
    return np.random.default_rng(order_seed).permutation(label)


def _is_partition(split: Split, n_rows: int) -> bool:
    together = np.concatenate([split.train, split.validation, split.test])
    return np.array_equal(np.sort(together), np.arange(n_rows)) and all(
        rows.dtype == np.int64 and np.array_equal(rows, np.sort(rows)) and len(rows) > 0
        for rows in split.parts.values()
    )


@given(sizes=st.lists(st.integers(3, 60), min_size=1, max_size=6), shares=SHARES, seed=SEEDS)
def test_a_random_split_is_a_partition_stratified_within_one_row(
    sizes: list[int], shares: tuple[float, float], seed: int
) -> None:
    config = SplitConfig(validation=shares[0], test=shares[1], seed=seed)
    label = _labels(sizes, order_seed=seed)
    split = split_rows(config, label, stratify=True)
    assert _is_partition(split, len(label))
    for name in set(label.tolist()):
        n_rows = int((label == name).sum())
        for share, rows in zip(config.shares, split.parts.values(), strict=True):
            in_part = int((label[rows] == name).sum())
            assert in_part >= 1
            if n_rows * min(config.shares) >= 1:  # no part had to be given its one row
                assert abs(in_part - n_rows * share) < 1 + 1e-6


@given(n_rows=st.integers(3, 300), shares=SHARES, seed=SEEDS)
def test_a_random_split_for_regression_has_the_sizes_asked_for(
    n_rows: int, shares: tuple[float, float], seed: int
) -> None:
    config = SplitConfig(validation=shares[0], test=shares[1], seed=seed)
    split = split_rows(config, np.linspace(0, 1, n_rows), stratify=False)
    assert _is_partition(split, n_rows)
    if n_rows * min(config.shares) >= 1:
        assert abs(len(split.test) - n_rows * config.test) < 1 + 1e-6


@given(groups=arrays(np.int64, st.integers(3, 200), elements=st.integers(0, 30)), shares=SHARES, seed=SEEDS)
def test_no_group_is_in_two_parts(groups: NDArray[np.int64], shares: tuple[float, float], seed: int) -> None:
    config = SplitConfig(method="group", by="patient", validation=shares[0], test=shares[1], seed=seed)
    label = np.zeros(len(groups))
    if len(np.unique(groups)) < 3:
        with pytest.raises(DataError, match="distinct groups"):
            split_rows(config, label, stratify=False, by=groups)
        return
    split = split_rows(config, label, stratify=False, by=groups)
    assert _is_partition(split, len(groups))
    seen = [set(groups[rows].tolist()) for rows in split.parts.values()]
    assert not (seen[0] & seen[1])
    assert not (seen[0] & seen[2])
    assert not (seen[1] & seen[2])


@given(seed=SEEDS, size=st.integers(1, 5))
def test_group_sizes_come_close_when_no_group_is_large(seed: int, size: int) -> None:
    groups = np.repeat(np.arange(100), size)
    split = split_rows(SplitConfig(method="group", by="g", seed=seed), np.zeros(len(groups)), stratify=False, by=groups)
    for rows, share in zip(split.parts.values(), (0.7, 0.1, 0.2), strict=True):
        assert abs(len(rows) - len(groups) * share) <= size


@given(times=arrays(np.int64, st.integers(3, 200), elements=st.integers(0, 30)), shares=SHARES)
def test_a_time_split_never_looks_ahead_and_never_cuts_through_a_moment(
    times: NDArray[np.int64], shares: tuple[float, float]
) -> None:
    config = SplitConfig(method="time", by="at", validation=shares[0], test=shares[1])
    label = np.zeros(len(times))
    if len(np.unique(times)) < 3:
        with pytest.raises(DataError, match="distinct times"):
            split_rows(config, label, stratify=False, by=times)
        return
    split = split_rows(config, label, stratify=False, by=times)
    assert _is_partition(split, len(times))
    assert times[split.train].max() < times[split.validation].min()
    assert times[split.validation].max() < times[split.test].min()


@given(n_rows=st.integers(10, 400), shares=SHARES)
def test_a_time_split_of_distinct_moments_has_the_sizes_asked_for(n_rows: int, shares: tuple[float, float]) -> None:
    moments = np.datetime64("2013-01-01", "ns") + np.arange(n_rows) * np.timedelta64(1, "h")
    config = SplitConfig(method="time", by="at", validation=shares[0], test=shares[1])
    split = split_rows(config, np.zeros(n_rows), stratify=False, by=moments)
    assert abs(len(split.train) - n_rows * config.shares[0]) <= 1
    assert abs(len(split.test) - n_rows * config.test) <= 1


@given(seed=SEEDS)
def test_the_same_seed_gives_the_same_split_and_digest(seed: int) -> None:
    label = _labels([30, 20], order_seed=1)
    first, second = (split_rows(SplitConfig(seed=seed), label, stratify=True) for _ in range(2))
    other = split_rows(SplitConfig(seed=seed + 1), label, stratify=True)
    assert first.digest == second.digest
    assert np.array_equal(first.test, second.test)
    assert first.digest != other.digest


def test_a_split_is_the_same_on_every_machine() -> None:
    """Known answers: a change here is a change of everybody's splits."""
    split = split_rows(SplitConfig(seed=7), np.array(["a", "b"] * 10, dtype=object), stratify=True)
    grouped = split_rows(
        SplitConfig(method="group", by="g", seed=7), np.zeros(12), stratify=False, by=np.repeat(np.arange(6), 2)
    )
    assert (split.validation.tolist(), split.test.tolist()) == ([12, 13], [2, 5, 15, 16])
    assert (grouped.validation.tolist(), grouped.test.tolist()) == ([8, 9], [6, 7])


def test_a_column_drawn_with_the_seed_of_the_split_does_not_decide_it() -> None:
    column = np.random.default_rng(0).random(2000)
    split = split_rows(SplitConfig(seed=0), np.zeros(2000), stratify=False)
    assert abs(column[split.test].mean() - 0.5) < 0.05


def test_the_digest_tells_which_part_a_row_is_in() -> None:
    one, two, both = np.array([0]), np.array([1]), np.array([0, 1])
    assert len({split_digest(one, two), split_digest(two, one), split_digest(both, np.array([], np.int64))}) == 3


def test_classes_too_small_to_split_are_named_with_their_counts() -> None:
    label = np.array(["cat"] * 20 + ["dog"] * 2 + ["emu"], dtype=object)
    with pytest.raises(DataError, match=r"2 of 3 classes have fewer than 3 rows.*'dog': 2, 'emu': 1.*merge") as caught:
        split_rows(SplitConfig(), label, stratify=True)
    assert caught.value.classes == {"dog": 2, "emu": 1}


def test_a_class_that_is_never_in_train_is_named() -> None:
    label = np.array(["old"] * 80 + ["new"] * 20, dtype=object)
    with pytest.raises(DataError, match=r"time split by 'day' leaves no training row of 'new': 20"):
        split_rows(SplitConfig(method="time", by="day"), label, stratify=True, by=np.arange(100))


@pytest.mark.parametrize(
    "by",
    [
        np.array(["a", "", "b", "c"], dtype=object),
        np.array([1.0, np.nan, 2.0, 3.0]),
        np.array(["2013-01-01", "NaT", "2013-01-02", "2013-01-03"], dtype="datetime64[ns]"),
    ],
    ids=["text", "number", "time"],
)
def test_a_missing_group_or_time_is_counted_and_located(by: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=r"missing in 1 of 4 rows, first in row 1"):
        split_rows(SplitConfig(method="group", by="g"), np.zeros(4), stratify=False, by=by)


def test_two_rows_cannot_be_split() -> None:
    with pytest.raises(DataError, match="2 rows cannot be split"):
        split_rows(SplitConfig(), np.array([0.5, 1.5]), stratify=False)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"validation": 0.5, "test": 0.5}, "must be below 1"),
        ({"method": "time"}, 'needs by = "COLUMN"'),
        ({"by": "day"}, "has no meaning"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SplitConfig(**settings)
    with pytest.raises(ConfigError, match=complaint):
        convert(settings, SplitConfig, source="yard.toml", error=ConfigError)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"yard.toml: test"):
        convert({"test": 0.0}, SplitConfig, source="yard.toml", error=ConfigError)
