"""Timing in turns. What is asserted is what must hold on any machine, not a speed."""

import numpy as np
from parents import Parent

from modelyard.bundle.cases import Arrays
from modelyard.bundle.profile import read_profiles
from modelyard.compress.measure import PROFILE_BATCHES, compare_cost, measure_latency, profile_bundle

ROWS = {"x": np.zeros((4, 2), np.float32)}


def spin(n: int) -> int:
    return sum(range(n))


def slow(_: Arrays) -> object:
    return spin(40_000)


def quick(_: Arrays) -> object:
    return spin(400)


def test_a_child_that_does_a_hundredth_of_the_work_is_found_faster() -> None:
    cost = compare_cost(slow, quick, ROWS, parent_bytes=10, child_bytes=5)

    assert cost.faster
    assert not cost.slower
    assert cost.smaller


def test_a_child_that_does_more_work_is_found_slower() -> None:
    cost = compare_cost(quick, slow, ROWS, parent_bytes=10, child_bytes=10)

    assert cost.slower
    assert not cost.smaller


def test_latency_counts_every_run_and_orders_its_quantiles() -> None:
    latency = measure_latency(quick, ROWS, 8, n_threads=1, budget_s=0.01)

    assert latency.n_runs >= 20
    assert latency.batch_size == 8
    assert 0 < latency.p50_s <= latency.p99_s


def test_a_profile_is_kept_in_the_bundle_and_leaves_its_identity_alone(parent: Parent) -> None:
    before = (parent.bundle.path / "bundle.json").read_bytes()

    profile = profile_bundle(parent.bundle)

    assert [latency.batch_size for latency in profile.latencies] == list(PROFILE_BATCHES)
    assert read_profiles(parent.bundle.path / "profile.json") == (profile,)
    assert (parent.bundle.path / "bundle.json").read_bytes() == before
