"""Requests shared between versions: in proportion, sticky by key, the same in every process."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import ConfigError
from modelyard.inference.serve.models.traffic import Sampler, Split, Traffic
from modelyard.schema import convert

KEYS = [f"user-{i}".encode() for i in range(4000)]


def test_every_stretch_of_requests_without_a_key_is_split_as_the_weights_say() -> None:
    split = Split("m", {1: 0.9, 2: 0.1})
    chosen = [split.choose() for _ in range(10_000)]
    for length in (50, 100, 1000, 10_000):
        for start in range(0, 10_000, length):
            share = chosen[start : start + length].count(2)
            assert abs(share - 0.1 * length) <= 3


@given(st.dictionaries(st.integers(1, 9), st.floats(0.01, 1.0), min_size=1, max_size=4))
def test_no_version_strays_from_its_share(weights: dict[int, float]) -> None:
    total = sum(weights.values())
    split = Split("m", {version: weight / total for version, weight in weights.items()})
    counts = Counter(split.choose() for _ in range(500))
    for version, weight in weights.items():
        assert abs(counts[version] - 500 * weight / total) <= 8


def test_a_key_meets_the_same_version_whatever_comes_between() -> None:
    split, other = Split("m", {1: 0.5, 2: 0.5}), Split("m", {1: 0.5, 2: 0.5})
    first = {key: split.choose(key) for key in KEYS}
    for key in reversed(KEYS):
        other.choose()
        assert other.choose(key) == first[key]


def test_keys_are_split_as_the_weights_say() -> None:
    split = Split("m", {1: 0.9, 2: 0.08, 3: 0.02})
    counts = Counter(split.choose(key) for key in KEYS)
    for version, weight in ((1, 0.9), (2, 0.08), (3, 0.02)):
        spread = (len(KEYS) * weight * (1 - weight)) ** 0.5
        assert abs(counts[version] - len(KEYS) * weight) < 4 * spread


def test_another_process_chooses_alike() -> None:
    code = (
        "from modelyard.inference.serve.models.traffic import Split; split = Split('m', {1: 0.3, 2: 0.7}); "
        "print([split.choose(b'user-%d' % i) for i in range(50)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    split = Split("m", {1: 0.3, 2: 0.7})
    assert found.strip() == str([split.choose(key) for key in KEYS[:50]])


def test_more_weight_takes_keys_from_others_and_moves_none_between_them() -> None:
    before, after = Split("m", {1: 0.45, 2: 0.45, 3: 0.1}), Split("m", {1: 0.25, 2: 0.25, 3: 0.5})
    moves = Counter((before.choose(key), after.choose(key)) for key in KEYS)
    assert set(moves) <= {(1, 1), (2, 2), (3, 3), (1, 3), (2, 3)}


def test_the_keys_of_one_model_are_not_those_of_another() -> None:
    one, other = Split("one", {1: 0.5, 2: 0.5}), Split("other", {1: 0.5, 2: 0.5})
    alike = sum(one.choose(key) == other.choose(key) for key in KEYS)
    assert abs(alike - len(KEYS) / 2) < 4 * (len(KEYS) / 4) ** 0.5


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_a_share_of_a_stream_is_spread_evenly(share: float) -> None:
    sampler = Sampler(share)
    taken = [sampler.take() for _ in range(2000)]
    for start in range(0, 2000, 200):
        assert abs(sum(taken[start : start + 200]) - 200 * share) <= 2


def test_weights_need_not_add_up_to_one() -> None:
    assert Traffic(split={"1": 3, "2": 1, "4": 0}).weights == {1: 0.75, 2: 0.25}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"split": {"0": 1.0}}, "split"),
        ({"split": {"champion": 1.0}}, "split"),
        ({"split": {"1": -0.5}}, "at least 0"),
        ({"split": {"1": 0.0}}, "above 0"),
        ({"shadow": 0}, "shadow"),
        ({"shadow": 2, "shadow_share": 1.5}, "at most 1"),
        ({"split": {"2": 1.0}, "shadow": 2}, "another version"),
        ({"mirror": 2}, "unknown key"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        convert(fields, Traffic, source="traffic", error=ConfigError)
