"""Workers, instances and threads follow from what a row costs, the target and the cores."""

from hypothesis import given
from hypothesis import strategies as st

from modelyard.inference.serve.scheduling.placement import Placement, placement_for, workers_for

SECONDS = st.floats(1e-6, 10.0)
CORES = st.integers(1, 256)


def test_models_of_microseconds_get_a_worker_per_core() -> None:
    assert workers_for({"tiny": 7e-6}, n_cores=2) == 2
    assert workers_for({"tiny": 7e-6, "large": 0.5}, n_cores=8) == 8


def test_models_of_milliseconds_share_one_queue_and_get_an_instance_per_core() -> None:
    assert workers_for({"mid": 3.4e-3}, n_cores=2) == 1
    assert placement_for(3.4e-3, 0.05, n_cores=2, n_workers=1) == Placement(n_instances=2, n_threads=1)


def test_many_cores_get_more_workers_than_one_loop_could_feed() -> None:
    assert workers_for({"mid": 3.4e-3}, n_cores=64) == 3


def test_a_run_that_would_miss_the_target_alone_gets_threads() -> None:
    assert placement_for(0.08, 0.05, n_cores=8, n_workers=1) == Placement(n_instances=2, n_threads=4)


def test_what_is_given_is_kept() -> None:
    assert placement_for(3.4e-3, 0.05, n_cores=4, n_workers=2, n_instances=5, n_threads=3) == Placement(5, 3)
    assert placement_for(3.4e-3, 0.05, n_cores=4, n_workers=1, n_threads=2) == Placement(2, 2)


@given(row_s=SECONDS, target_s=SECONDS, n_cores=CORES)
def test_the_instances_threads_never_outnumber_the_cores(row_s: float, target_s: float, n_cores: int) -> None:
    n_workers = workers_for({"m": row_s}, n_cores)
    placed = placement_for(row_s, target_s, n_cores=n_cores, n_workers=n_workers)
    assert 1 <= n_workers <= n_cores
    assert placed.n_instances >= 1
    assert placed.n_threads >= 1
    assert n_workers * placed.n_instances * placed.n_threads <= n_cores
