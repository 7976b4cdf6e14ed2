"""The policy, rule by rule, on cases small enough to be worked by hand. Times are in milliseconds here."""

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from modelyard.bundle.profile import Latency
from modelyard.errors import ConfigError
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Batch, Decision, Policy, Refusal, Scheduler

MS = 1e-3


@dataclass(slots=True, eq=False)
class Call:
    n_rows: int
    arrived_s: float
    deadline_s: float
    priority: int = 0
    bucket: Hashable = None
    queued: bool = False


def batching_helps(n_rows: int) -> float:
    """5 ms a run and a quarter of a millisecond a row."""
    return (5 + 0.25 * n_rows) * MS


def batching_gains_nothing(n_rows: int) -> float:
    return 4 * n_rows * MS


class World:
    """A scheduler with a known latency and a clock that moves when told to."""

    def __init__(
        self,
        latency_s: Callable[[int], float] = batching_helps,
        *,
        target: float = 20,
        max_batch_size: int = 64,
        n_instances: int = 1,
        **policy: Any,
    ) -> None:
        sizes = sorted({1, 2, 4, 8, 16, 32, max_batch_size})
        profile = [
            Latency(size, 1, 100, latency_s(size), latency_s(size), latency_s(size))
            for size in sizes
            if size <= max_batch_size
        ]
        self.latency_s = latency_s
        self.target_s = target * MS
        self.now_s = 0.0
        self.scheduler = Scheduler(
            Policy(target * MS, max_batch_size, n_instances, **policy), LatencyModel(max_batch_size, profile)
        )

    def at(self, milliseconds: float) -> "World":
        self.now_s = milliseconds * MS
        return self

    def call(self, n_rows: int = 1, within: float | None = None, **kind: Any) -> Call:
        window_s = self.target_s if within is None else within * MS
        return Call(n_rows, self.now_s, self.now_s + window_s, **kind)

    def admit(self, n_rows: int = 1, within: float | None = None, **kind: Any) -> Call:
        call = self.call(n_rows, within, **kind)
        assert self.scheduler.arrive(call, self.now_s) is None
        return call

    def refused(self, n_rows: int = 1, within: float | None = None, **kind: Any) -> Refusal:
        refusal = self.scheduler.arrive(self.call(n_rows, within, **kind), self.now_s)
        assert refusal is not None
        return refusal

    def decide(self) -> Decision:
        return self.scheduler.decide(self.now_s)

    def batch(self) -> Batch:
        batch = self.decide().batch
        assert batch is not None
        return batch

    def nothing_runs(self) -> Decision:
        decision = self.decide()
        assert decision.batch is None
        return decision

    def finish(self, batch: Batch) -> None:
        self.scheduler.finish(batch, self.now_s, self.now_s - batch.started_s)

    def hum(self, per_ms: int, until: float, latency_s: Callable[[int], float] | None = None) -> None:
        """Let `per_ms` single rows arrive every millisecond until a moment, served as decided; then be idle at once."""
        latency_s = latency_s or self.latency_s
        running: list[tuple[float, Batch]] = []
        waiting: list[Call] = []
        start = round(self.now_s / MS)
        for step in range((round(until) - start) * per_ms):
            self.now_s = start * MS + step * MS / per_ms
            for due in [each for each in running if each[0] <= self.now_s]:
                running.remove(due)
                self.scheduler.finish(due[1], self.now_s, latency_s(due[1].padded_to))
            waiting.append(self.call())
            self.scheduler.arrive(waiting[-1], self.now_s)
            while (batch := self.decide().batch) is not None:
                running.append((self.now_s + latency_s(batch.padded_to), batch))
            waiting = [call for call in waiting if call.queued]
        for call in waiting:
            self.scheduler.cancel(call)
        for _, batch in running:
            self.scheduler.finish(batch, self.now_s, latency_s(batch.padded_to))


def test_an_idle_instance_takes_a_lone_job_at_once() -> None:
    world = World()
    call = world.admit()
    batch = world.batch()
    assert (batch.jobs, batch.n_rows, batch.reason) == ([call], 1, "instance free")
    assert batch.expected_end_s == pytest.approx(5.25 * MS)
    assert world.nothing_runs().wake_s is None


def test_what_arrives_while_the_instance_is_busy_makes_the_next_batch() -> None:
    world = World()
    world.admit()
    first = world.batch()
    calls = [world.at(at).admit() for at in (1, 2, 3)]
    world.nothing_runs()
    world.at(5.25).finish(first)
    assert world.batch().jobs == calls


def test_jobs_run_in_order_of_their_deadlines_and_of_arrival_among_equals() -> None:
    world = World(max_batch_size=1)
    world.admit()
    busy = world.batch()
    late, soon, later, also_soon = (world.admit(within=within) for within in (19, 17, 18, 17))
    order: list[Any] = []
    for end in (1, 2, 3, 4):
        world.at(end).finish(busy)
        busy = world.batch()
        order += busy.jobs
    assert order == [soon, also_soon, later, late]


def test_a_batch_holds_what_can_still_be_computed_before_its_first_deadline() -> None:
    world = World()
    world.admit()
    first = world.batch()
    for _ in range(15):
        world.at(2).admit(within=18)  # due at 20
    world.at(12).finish(first)  # 8 ms are left: l(12) = 8, so 12 fit
    assert world.batch().n_rows == 12


def test_no_batch_exceeds_the_largest_size() -> None:
    world = World(max_batch_size=8)
    world.admit()
    first = world.batch()
    for _ in range(12):
        world.admit()
    world.at(1).finish(first)
    assert world.batch().n_rows == 8


def test_rows_are_counted_and_those_of_a_job_stay_together() -> None:
    world = World(max_batch_size=8)
    world.admit()
    first = world.batch()
    five, two, four = world.admit(5), world.admit(2), world.admit(4)
    world.at(1).finish(first)
    second = world.batch()
    assert (second.jobs, second.n_rows) == ([five, two], 7)
    world.at(2).finish(second)
    assert world.batch().jobs == [four]


def test_a_job_of_more_rows_than_the_largest_batch_runs_alone() -> None:
    world = World(max_batch_size=8, target=100)
    world.admit()
    first = world.batch()
    huge, _ = world.admit(20), world.admit()
    world.at(1).finish(first)
    batch = world.batch()
    assert (batch.jobs, batch.n_rows, batch.padded_to) == ([huge], 20, 20)
    assert batch.expected_end_s - batch.started_s == pytest.approx((7 + 7 + 6) * MS)  # two of 8 and one of 4 rows


def test_batches_are_padded_to_the_sizes_a_graph_takes() -> None:
    world = World(max_batch_size=16, allowed_sizes=(1, 4, 16), target=100)
    world.admit(3)
    batch = world.batch()
    assert (batch.n_rows, batch.padded_to) == (3, 4)
    assert batch.expected_end_s == pytest.approx(6 * MS)  # what four rows take
    world.finish(batch)
    world.admit(18)
    assert world.batch().padded_to == 16 + 4


class TestAdmission:
    def test_a_deadline_shorter_than_one_run_is_refused_as_such(self) -> None:
        refusal = World().refused(within=5)
        assert refusal.cause == "deadline"
        assert refusal.retry_after_s == pytest.approx(5.25 * MS)

    def test_a_job_is_refused_when_the_work_ahead_would_make_it_late(self) -> None:
        world = World(batching_gains_nothing)  # 4 ms a row
        world.admit()
        world.batch()  # runs until 4
        for _ in range(4):
            world.admit()  # until 8, 12, 16, 20
        refusal = world.refused()
        assert refusal.cause == "overload"
        assert refusal.retry_after_s == pytest.approx(4 * MS)  # 24 instead of 20
        world.at(4)
        assert world.scheduler.would_refuse(1, world.now_s + world.target_s, world.now_s) is None

    def test_work_with_later_deadlines_is_not_ahead(self) -> None:
        world = World(batching_gains_nothing, target=100)
        world.admit()
        world.batch()
        for _ in range(8):
            world.admit()
        world.admit(within=9)
        assert world.refused(within=9).cause == "overload"

    def test_several_instances_share_what_is_ahead(self) -> None:
        world = World(batching_gains_nothing, n_instances=2)
        for _ in range(2):
            world.admit()
            world.batch()
        for _ in range(7):
            world.admit()
        assert world.refused().cause == "overload"

    def test_the_reply_is_taken_off_the_deadline(self) -> None:
        world = World(reply_s=4 * MS)
        assert world.refused(within=9).cause == "deadline"
        world.admit(within=9.5)
        assert world.batch().deadline_s == pytest.approx(5.5 * MS)

    def test_a_full_queue_says_so(self) -> None:
        world = World(max_queued_rows=3, target=1000)
        world.admit()
        world.batch()
        world.admit(2)
        assert world.refused(2).cause == "queue_full"
        world.admit()

    def test_a_job_larger_than_the_queue_is_admitted_to_an_empty_one(self) -> None:
        World(max_queued_rows=3, target=1000).admit(5)

    def test_asking_first_says_what_arriving_would_and_queues_nothing(self) -> None:
        world = World(batching_gains_nothing)
        for _ in range(5):
            world.admit()
            world.decide()
        deadline_s = world.now_s + world.target_s
        assert world.scheduler.would_refuse(1, deadline_s, world.now_s) == world.refused()
        assert world.scheduler.queued_rows == 4

    def test_a_run_that_is_overdue_is_expected_to_stay_late_for_as_long_again(self) -> None:
        world = World(batching_gains_nothing)
        world.admit()
        world.batch()  # expected at 4
        world.at(11).admit()  # expected at 18 now, then 4 ms: 22 of 31
        assert world.at(20).refused().cause == "overload"  # expected at 36, then two rows: 44 of 40

    def test_a_burst_after_silence_is_admitted_as_far_as_one_batch_carries_it(self) -> None:
        world = World(n_instances=8)
        for _ in range(40):
            world.admit()
        served = 0
        while (batch := world.decide().batch) is not None:
            served += batch.n_rows
        assert served == 40

    def test_a_job_without_rows_is_a_mistake(self) -> None:
        world = World()
        with pytest.raises(ValueError, match="n_rows must be at least 1, got 0"):
            world.scheduler.arrive(world.call(0), world.now_s)


def starts_after_s(within: float = 20, **policy: Any) -> float:
    """Return how long two calls wait for company after a busy time, the second due `within` milliseconds."""
    world = World(n_instances=8, **policy)
    world.hum(per_ms=10, until=400)
    since_s = world.now_s
    world.admit()
    world.admit(within=within)
    decision = world.nothing_runs()
    while decision.batch is None:
        assert decision.wake_s is not None
        world.now_s = decision.wake_s
        decision = world.decide()
    assert decision.batch.reason == "latest start"
    return world.now_s - since_s


class TestWaiting:
    def test_with_one_instance_nobody_waits_for_company(self) -> None:
        world = World(n_instances=1)
        world.hum(per_ms=2, until=300)
        assert world.scheduler.target_batch == 1

    def test_where_batching_gains_nothing_nobody_waits_and_rows_run_one_by_one(self) -> None:
        world = World(batching_gains_nothing, n_instances=2, target=50)
        world.hum(per_ms=1, until=300)
        assert (world.scheduler.target_batch, world.scheduler.max_feasible_batch) == (1, 1)

    def test_at_low_load_nobody_waits(self) -> None:
        world = World(n_instances=8)
        world.hum(per_ms=1, until=300)
        assert world.scheduler.target_batch == 1

    def test_under_load_the_smallest_batch_that_leaves_room_is_waited_for(self) -> None:
        world = World(n_instances=8)
        world.hum(per_ms=10, until=400)
        rate = 10_000 + (10_000 / 0.2) ** 0.5  # a standard deviation more, over 0.1 s
        b_star = world.scheduler.target_batch
        assert rate * batching_helps(b_star) / (8 * b_star) <= 0.85
        assert rate * batching_helps(b_star - 1) / (8 * (b_star - 1)) > 0.85

    def test_the_batch_starts_when_it_is_large_enough(self) -> None:
        world = World(n_instances=8)
        world.hum(per_ms=10, until=400)
        b_star = world.scheduler.target_batch
        for _ in range(b_star - 1):
            world.admit()
            assert world.nothing_runs().wake_s is not None
        world.admit()
        batch = world.batch()
        assert (batch.n_rows, batch.reason) == (b_star, "reached b*")

    def test_the_batch_starts_when_waiting_for_one_more_row_would_be_too_late(self) -> None:
        world = World(n_instances=8)
        world.hum(per_ms=10, until=400)
        arrived_s = world.now_s
        calls = [world.admit(), world.admit()]
        wake_s = world.nothing_runs().wake_s
        while wake_s is not None:
            assert wake_s > world.now_s
            world.now_s = wake_s
            decision = world.decide()
            wake_s = decision.wake_s
        assert decision.batch is not None
        assert (decision.batch.jobs, decision.batch.reason) == (calls, "latest start")
        assert world.now_s == pytest.approx(arrived_s + 20 * MS - batching_helps(3))

    def test_timers_that_fire_late_are_set_earlier(self) -> None:
        assert starts_after_s() - starts_after_s(timer_slack_s=1 * MS) == pytest.approx(1 * MS)

    def test_a_patient_client_waits_no_longer_than_the_target(self) -> None:
        world = World(n_instances=8)
        world.hum(per_ms=10, until=400)
        world.admit(within=10_000)
        wake_s = world.nothing_runs().wake_s
        assert wake_s is not None
        assert wake_s - world.now_s < 20 * MS

    def test_a_more_urgent_job_shortens_the_wait(self) -> None:
        assert starts_after_s() - starts_after_s(within=15) == pytest.approx(5 * MS)

    def test_batches_of_whole_jobs_are_waited_for(self) -> None:
        world = World(n_instances=8)
        for step in range(600):
            world.at(step)
            world.scheduler.arrive(world.call(16), world.now_s)
            while (batch := world.decide().batch) is not None:
                world.scheduler.finish(batch, world.now_s, batching_helps(batch.n_rows))
        assert world.scheduler.target_batch % 16 == 0


class TestDropping:
    def test_a_head_that_cannot_make_it_is_dropped(self) -> None:
        world = World()
        world.admit()
        first = world.batch()
        call = world.at(1).admit(within=15)  # due at 16, must start by 10.75
        world.at(10.8).finish(first)
        decision = world.nothing_runs()
        assert [(dropped.job, dropped.cause) for dropped in decision.dropped] == [(call, "expired")]
        assert not call.queued
        assert world.scheduler.queued_rows == 0

    def test_a_head_whose_rescue_would_cost_a_full_batch_is_dropped(self) -> None:
        world = World()  # a full batch: l(b) * 2 <= 20 ms, so b = 20 and l(20) = 10 ms
        world.admit()
        first = world.batch()
        urgent = world.at(1).admit(within=14)  # due at 15
        others = [world.at(4).admit() for _ in range(21)]  # due at 24
        world.at(6).finish(first)  # urgent could run in a batch of 16, and nobody then with all the others behind it
        decision = world.decide()
        assert [(dropped.job, dropped.cause) for dropped in decision.dropped] == [(urgent, "hopeless")]
        assert decision.batch is not None
        assert list(decision.batch.jobs) == others

    def test_a_short_queue_is_served_whatever_its_head_costs(self) -> None:
        world = World()
        world.admit()
        first = world.batch()
        urgent = world.at(1).admit(within=14)
        for _ in range(18):
            world.at(4).admit()
        world.at(6).finish(first)
        assert urgent in world.batch().jobs

    def test_jobs_that_expire_while_an_instance_hangs_are_dropped_on_time(self) -> None:
        world = World()
        world.admit()
        world.batch()
        world.at(3).admit()  # due at 23
        world.nothing_runs()
        world.at(14).admit(within=30)
        wake_s = world.nothing_runs().wake_s
        assert wake_s is not None
        world.now_s = wake_s
        assert world.now_s == pytest.approx((23 - 5.25 + 1) * MS)
        assert [dropped.cause for dropped in world.nothing_runs().dropped] == ["expired"]


class TestCancelling:
    def test_a_cancelled_job_neither_runs_nor_counts(self) -> None:
        world = World()
        world.admit()
        first = world.batch()
        gone, stays = world.admit(), world.admit()
        assert world.scheduler.cancel(gone)
        assert world.scheduler.queued_rows == 1
        world.at(1).finish(first)
        assert world.batch().jobs == [stays]

    def test_a_running_job_cannot_be_cancelled(self) -> None:
        world = World()
        call = world.admit()
        world.batch()
        assert not world.scheduler.cancel(call)
        assert not world.scheduler.cancel(call)

    def test_cancelled_jobs_are_swept_out_of_a_queue_that_does_not_move(self) -> None:
        world = World(target=1000)
        world.admit()
        world.batch()
        keeps = world.admit()
        for _ in range(1000):
            assert world.scheduler.cancel(world.admit(within=60_000))
        (lane,) = world.scheduler._lanes.values()
        assert len(lane.levels[0].jobs) < 140
        assert keeps in lane.levels[0].jobs


class TestFailing:
    def test_only_the_poisonous_row_gets_the_error(self) -> None:
        world = World(target=1000)
        world.admit()
        first = world.batch()
        calls = [world.admit() for _ in range(8)]
        poison = calls[5]
        world.at(1).finish(first)
        failed: list[Any] = []
        finished: list[Any] = []
        sizes = []
        while (batch := world.decide().batch) is not None:
            sizes.append(batch.n_rows)
            if poison in batch.jobs:
                failed += world.scheduler.fail(batch, world.now_s)
            else:
                world.finish(batch)
                finished += batch.jobs
        assert failed == [poison]
        assert finished == [call for call in calls if call is not poison]
        assert sizes == [8, 4, 4, 2, 1, 1, 2]

    def test_halves_run_ahead_of_the_queue_and_alone(self) -> None:
        world = World(target=1000)
        world.admit()
        first = world.batch()
        calls = [world.admit() for _ in range(4)]
        world.finish(first)
        batch = world.batch()
        waiting = world.admit()
        assert world.scheduler.fail(batch, world.now_s) == ()
        assert world.scheduler.queued_rows == 5
        halves: list[Sequence[Any]] = []
        for _ in range(3):
            half = world.batch()
            halves.append(half.jobs)
            world.finish(half)
        assert halves == [calls[:2], calls[2:], [waiting]]

    def test_a_half_that_comes_too_late_is_dropped(self) -> None:
        world = World()
        calls = [world.admit(), world.admit(within=500)]
        batch = world.batch()
        world.at(16)
        assert world.scheduler.fail(batch, world.now_s) == ()
        decision = world.decide()
        assert [(dropped.job, dropped.cause) for dropped in decision.dropped] == [(calls[0], "expired")]
        assert decision.batch is not None
        assert (decision.batch.jobs, decision.batch.reason) == ([calls[1]], "retry")

    def test_a_batch_ends_once(self) -> None:
        world = World()
        world.admit()
        batch = world.batch()
        world.finish(batch)
        with pytest.raises(ValueError, match="does not run"):
            world.finish(batch)
        with pytest.raises(ValueError, match="does not run"):
            world.scheduler.fail(batch, world.now_s)


class TestPriorities:
    def flood(self, weights: tuple[float, ...]) -> dict[int, int]:
        """Keep every level's queue full and return the rows served of each."""
        world = World(target=1000, max_batch_size=12, priority_weights=weights)
        served = dict.fromkeys(range(1, len(weights) + 1), 0)
        for step in range(100):
            world.at(step)
            for priority in served:
                for _ in range(12):
                    world.scheduler.arrive(world.call(priority=priority), world.now_s)
            batch = world.batch()
            for job in batch.jobs:
                served[job.priority] += 1
            world.finish(batch)
        return served

    def test_levels_share_a_busy_server_by_their_weights(self) -> None:
        served = self.flood((8, 3, 1))
        assert served == {1: 800, 2: 300, 3: 100}

    def test_a_level_below_its_share_is_served_first(self) -> None:
        world = World(max_batch_size=1, target=1000, priority_weights=(3, 1))
        world.admit(priority=2)
        busy = world.batch()
        low = [world.admit(priority=2) for _ in range(3)]
        high = world.admit(priority=1)
        order: list[Any] = []
        for end in range(1, 5):
            world.at(end).finish(busy)
            busy = world.batch()
            order += busy.jobs
        assert order == [high, *low]

    def test_idleness_earns_no_credit(self) -> None:
        world = World(max_batch_size=1, target=10_000, priority_weights=(1, 1))
        busy = None
        for step in range(50):  # only the first level has work
            world.at(step).admit(priority=1)
            if busy is not None:
                world.finish(busy)
            busy = world.batch()
        for _ in range(10):
            world.admit(priority=1)
            world.admit(priority=2)
        order = []
        for step in range(50, 60):
            assert busy is not None
            world.at(step).finish(busy)
            busy = world.batch()
            order.append(busy.jobs[0].priority)
        assert sorted(order) == [1] * 5 + [2] * 5

    def test_priorities_that_do_not_exist_are_the_default_level(self) -> None:
        world = World(max_batch_size=1, target=1000, priority_weights=(100, 1), default_priority=2)
        world.admit()
        busy = world.batch()
        unknown, default, high = world.admit(priority=7), world.admit(priority=0), world.admit(priority=1)
        order: list[Any] = []
        for end in (1, 2, 3):
            world.at(end).finish(busy)
            busy = world.batch()
            order += busy.jobs
        assert order == [high, unknown, default]

    def test_a_low_level_is_given_up_for_a_higher_one_and_not_the_other_way_round(self) -> None:
        world = World(priority_weights=(1, 1))  # a full batch is 20 rows and takes 10 ms
        world.admit(priority=1)
        first = world.batch()
        low = world.at(1).admit(within=14, priority=2)
        for _ in range(21):
            world.at(4).admit(priority=1)
        world.at(6).finish(first)
        assert [dropped.job for dropped in world.decide().dropped] == [low]

        world = World(priority_weights=(1, 1))
        world.admit(priority=1)
        first = world.batch()
        high = world.at(1).admit(within=14, priority=1)
        for _ in range(21):
            world.at(4).admit(priority=2)
        world.at(6).finish(first)
        assert high in world.batch().jobs


class TestBuckets:
    def test_rows_of_different_shapes_never_share_a_batch(self) -> None:
        world = World()
        world.admit(bucket="short")
        first = world.batch()
        short = [world.admit(bucket="short") for _ in range(2)]
        long = [world.admit(bucket="long", within=19) for _ in range(2)]
        world.at(1).finish(first)
        second = world.batch()
        assert (second.bucket, second.jobs) == ("long", long)  # the earlier deadline
        world.at(2).finish(second)
        assert world.batch().jobs == short

    def test_each_shape_learns_its_own_latency(self) -> None:
        world = World(target=1000)
        for step in range(200):
            for bucket, took in (("short", 5.25), ("long", 40)):
                world.at(step).admit(bucket=bucket)
                world.scheduler.finish(world.batch(), world.now_s, took * MS)
        assert world.scheduler.latency_of("short").high_s(1) == pytest.approx(5.25 * MS, rel=0.05)
        assert world.scheduler.latency_of("long").high_s(1) == pytest.approx(40 * MS, rel=0.05)

    def test_work_of_other_shapes_counts_at_admission(self) -> None:
        world = World(batching_gains_nothing)
        world.admit(bucket="a")
        world.batch()
        for _ in range(4):
            world.admit(bucket="b")
        assert world.refused(bucket="a").cause == "overload"

    def test_shapes_without_end_do_not_fill_the_memory(self) -> None:
        world = World()
        for shape in range(1000):
            world.at(shape).admit(bucket=(shape,))
            world.finish(world.batch())
        assert len(world.scheduler._lanes) <= 64


class TestGuard:
    def serve(self, world: World, until: float, took: float) -> None:
        """Serve a job every 10 ms that is due after 6 and takes `took`; of this the latency model is told 5.25."""
        while (at := round(world.now_s / MS / 10) * 10) < until:
            world.at(at)
            if world.scheduler.arrive(world.call(within=6), world.now_s) is None:
                batch = world.batch()
                world.scheduler.finish(batch, world.now_s + took * MS, 5.25 * MS)
            world.at(at + 10)

    def test_misses_make_it_careful_and_clean_windows_bring_it_back(self) -> None:
        world = World(guard_window_s=0.1)
        self.serve(world, 100, took=7)
        self.serve(world, 110, took=5.25)
        assert world.scheduler.inflation == pytest.approx(1.1)
        assert world.scheduler.batch_limit == 57
        self.serve(world, 220, took=5.25)
        assert world.scheduler.inflation == pytest.approx(1.09)
        assert world.scheduler.batch_limit == 58
        self.serve(world, 12_000, took=5.25)
        assert (world.scheduler.inflation, world.scheduler.batch_limit) == (1.0, 64)

    def test_a_few_misses_within_the_budget_change_nothing(self) -> None:
        world = World(guard_window_s=0.1, miss_budget=0.5)
        self.serve(world, 30, took=7)
        self.serve(world, 110, took=5.25)
        assert (world.scheduler.inflation, world.scheduler.batch_limit) == (1.0, 64)

    def test_hiccups_are_no_reason_for_caution(self) -> None:
        world = World(guard_window_s=0.1)
        for at in range(0, 200, 20):
            world.at(at).admit(within=6)
            world.scheduler.finish(world.batch(), world.now_s + 11 * MS, 5.25 * MS)  # twice of what was expected
        assert (world.scheduler.inflation, world.scheduler.batch_limit) == (1.0, 64)

    def test_a_batch_limit_below_an_allowed_size_means_the_next_smaller_one(self) -> None:
        world = World(guard_window_s=0.1, allowed_sizes=(1, 8, 64))
        self.serve(world, 110, took=7)
        world.at(200).admit(within=1000)
        first = world.batch()
        for _ in range(20):
            world.admit(within=1000)
        world.at(201).finish(first)
        assert world.batch().n_rows == 8


class TestLearning:
    def test_a_model_of_which_nothing_is_known_is_tried_and_learned(self) -> None:
        scheduler = Scheduler(Policy(20 * MS, 64, 8), LatencyModel(64))
        world = World()
        world.scheduler = scheduler
        world.hum(per_ms=10, until=1000, latency_s=batching_helps)
        for n_rows in (1, 4, 16, world.scheduler.target_batch):
            assert scheduler.latency_of().high_s(n_rows) == pytest.approx(batching_helps(n_rows), rel=0.25)

    def test_a_slow_first_run_does_not_make_clients_wait_for_company_for_good(self) -> None:
        """8 clients that ask again when they are answered, 2 instances, batching that gains nothing, and a slow first run."""
        scheduler = Scheduler(Policy(1.0, 64, 2), LatencyModel(64, guess_row_s=4 * MS))
        now_s, n_answered = 0.0, 0
        ends: list[tuple[float, int, Batch]] = []
        clients = [Call(1, 0.0, 1.0) for _ in range(8)]
        n_batches = 0
        while now_s < 2.0:
            for call in clients:
                assert scheduler.arrive(call, now_s) is None
            while (batch := (decision := scheduler.decide(now_s)).batch) is not None:
                took_s = 38 * MS if n_batches == 0 else batching_gains_nothing(batch.n_rows)
                n_batches += 1
                heapq.heappush(ends, (now_s + took_s, n_batches, batch))
            if decision.wake_s is not None and (not ends or decision.wake_s < ends[0][0]):
                now_s, clients = decision.wake_s, []
                continue
            now_s, _, batch = heapq.heappop(ends)
            scheduler.finish(batch, now_s, now_s - batch.started_s)
            n_answered += len(batch.jobs)
            clients = [Call(1, now_s, now_s + 1.0) for _ in batch.jobs]
        assert n_answered > 0.9 * 2 * 2.0 / (4 * MS)  # both instances, all the time

    def test_a_model_believed_too_slow_is_tried_again(self) -> None:
        world = World(lambda n_rows: 30 * MS)  # more than the target: so says the profile
        fates = []
        for step in range(0, 3000, 5):
            call = world.at(step).call()
            refusal = world.scheduler.arrive(call, world.now_s)
            fates.append(refusal is None)
            if refusal is None:
                world.scheduler.finish(world.batch(), world.now_s, 3 * MS)  # the machine is faster by now
        assert not fates[0]
        assert all(fates[-300:])

    def test_a_slow_spell_does_not_lock_out_clients_with_less_time_than_the_target(self) -> None:
        world = World(lambda n_rows: 3 * MS, target=300)
        for step in range(0, 32_000, 2000):
            call = world.at(step).admit(within=5000)
            world.scheduler.finish(world.batch(), world.at(step + 1100).now_s, 1100 * MS)
            assert not call.queued
        fates = []
        for step in range(40_000, 50_000, 100):
            refusal = world.at(step).scheduler.arrive(world.call(within=150), world.now_s)
            fates.append(refusal is None)
            if refusal is None:
                world.scheduler.finish(world.batch(), world.now_s, 3 * MS)
        assert not fates[0]
        assert all(fates[-20:])

    def test_a_client_in_a_hurry_does_not_make_it_believe_in_miracles(self) -> None:
        world = World()
        for step in range(0, 3000, 5):
            assert world.at(step).refused(within=1).cause == "deadline"
        assert world.scheduler.latency_of().high_s(1) == pytest.approx(5.25 * MS)

    def test_a_larger_batch_is_tried_now_and_then_where_batching_gained_nothing(self) -> None:
        world = World(batching_gains_nothing, target=50, max_batch_size=8)
        sizes = set()
        for step in range(500):
            world.at(10 * step)
            for _ in range(2):
                world.admit()
            while (batch := world.decide().batch) is not None:
                sizes.add(batch.n_rows)
                world.now_s = batch.expected_end_s
                world.finish(batch)
        assert sizes == {1, 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_s": 0.0}, "target_s must be above 0, got 0.0"),
        ({"n_instances": 0}, "n_instances must be at least 1, got 0"),
        ({"reply_s": 1.0}, r"reply_s must be in \[0, target_s\), got 1.0"),
        ({"allowed_sizes": (8, 4)}, "allowed_sizes must rise and end at max_batch_size 8"),
        ({"allowed_sizes": (1, 4)}, "allowed_sizes must rise and end at max_batch_size 8"),
        ({"priority_weights": (1.0, 0.0)}, "priority_weights must all be above 0"),
        ({"default_priority": 2}, r"default_priority must be in \[1, 1\], got 2"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy(**({"target_s": 0.5, "max_batch_size": 8} | wrong))
