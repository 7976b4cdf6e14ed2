"""What holds for the scheduler whatever happens: a random history, driven event by event, every law checked at every step."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.bundle.profile import Latency
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Batch, Policy, Scheduler


@dataclass(slots=True, eq=False)
class Call:
    n_rows: int
    arrived_s: float
    deadline_s: float
    priority: int
    bucket: Hashable
    poisonous: bool
    queued: bool = False
    fates: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """What happens so long after the one before."""

    after_s: float
    n_calls: int
    n_rows: int
    within_s: float
    priority: int
    bucket: int
    poisonous: bool
    cancels: int | None
    """Which of the calls so far is cancelled instead of others arriving."""
    slowness: float
    """How many times longer than expected the batches started now will take."""


events = st.lists(
    st.builds(
        Event,
        after_s=st.sampled_from([0.0, 0.0, 1e-4, 1e-3, 5e-3, 0.05]),
        n_calls=st.sampled_from([1, 1, 3, 12]),
        n_rows=st.sampled_from([1, 1, 1, 2, 5, 40]),
        within_s=st.sampled_from([0.004, 0.02, 0.02, 0.02, 0.06, 1.0]),
        priority=st.integers(0, 4),
        bucket=st.integers(0, 1),
        poisonous=st.sampled_from([False] * 19 + [True]),
        cancels=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 100)),
        slowness=st.sampled_from([0.5, 1.0, 1.0, 1.0, 1.3, 10.0]),
    ),
    min_size=5,
    max_size=100,
)
policies = st.builds(
    Policy,
    target_s=st.just(0.02),
    max_batch_size=st.just(16),
    n_instances=st.integers(1, 4),
    max_queued_rows=st.sampled_from([8, 10_000]),
    reply_s=st.sampled_from([0.0, 0.001]),
    waiting_gain=st.sampled_from([1.1, 4.0]),
    guard_window_s=st.just(0.05),
    rate_window_s=st.just(0.01),
    allowed_sizes=st.sampled_from([(), (1, 2, 4, 8, 16), (4, 16)]),
    priority_weights=st.sampled_from([(1.0,), (4.0, 2.0, 1.0)]),
)
latencies = st.tuples(st.sampled_from([1e-5, 1e-3, 5e-3]), st.sampled_from([1e-6, 2.5e-4, 3e-3]), st.booleans())


class History:
    """Drives a scheduler through events and keeps an account of every call."""

    def __init__(self, policy: Policy, fixed_s: float, row_s: float, *, known: bool) -> None:
        def latency(size: int) -> Latency:
            return Latency(size, 1, 100, fixed_s + size * row_s, fixed_s + size * row_s, fixed_s + size * row_s)

        self.policy = policy
        self.fixed_s, self.row_s = fixed_s, row_s
        profile = [latency(size) for size in (1, 2, 4, 8, 16)] if known else []
        self.scheduler = Scheduler(policy, LatencyModel(16, profile))
        self.calls: list[Call] = []
        self.running: list[tuple[float, int, Batch]] = []
        self.n_batches = 0
        self.now_s = 0.0
        self.slowness = 1.0

    def live(self, events: list[Event]) -> None:
        for event in events:
            self.run_until(self.now_s + event.after_s)
            self.slowness = event.slowness
            if event.cancels is not None and self.calls:
                self.cancel(self.calls[event.cancels % len(self.calls)])
            else:
                for _ in range(event.n_calls):
                    self.arrive(event)
            self.decide()
        self.run_until(float("inf"))

    def arrive(self, event: Event) -> None:
        bucket = event.bucket if event.bucket else None
        call = Call(event.n_rows, self.now_s, self.now_s + event.within_s, event.priority, bucket, event.poisonous)
        self.calls.append(call)
        foreseen = self.scheduler.would_refuse(call.n_rows, call.deadline_s, self.now_s, call.priority, call.bucket)
        refusal = self.scheduler.arrive(call, self.now_s)
        assert (refusal is None) == call.queued
        if refusal is not None:
            assert refusal.retry_after_s > 0.0
            call.fates.append("refused")
        if foreseen is not None and foreseen.cause != "deadline":  # of which some are doubted, see `_doubt`
            assert refusal is not None

    def cancel(self, call: Call) -> None:
        waited = call.queued
        assert self.scheduler.cancel(call) == waited
        if waited:
            call.fates.append("cancelled")

    def decide(self) -> float | None:
        while True:
            decision = self.scheduler.decide(self.now_s)
            for dropped in decision.dropped:
                job: Any = dropped.job
                assert not job.queued
                job.fates.append(dropped.cause)
            if decision.batch is None:
                break
            self.check(decision.batch)
            self.n_batches += 1
            took_s = self.slowness * (self.fixed_s + self.row_s * decision.batch.padded_to)
            heappush(self.running, (self.now_s + took_s, self.n_batches, decision.batch))
        wake_s = decision.wake_s
        if wake_s is not None:
            assert wake_s > self.now_s
        waiting = [call for call in self.calls if call.queued]
        assert self.scheduler.queued_rows >= sum(call.n_rows for call in waiting)
        if waiting and len(self.running) < self.policy.n_instances:
            assert wake_s is not None  # nobody is forgotten
        return wake_s

    def check(self, batch: Batch) -> None:
        policy = self.policy
        calls: list[Any] = list(batch.jobs)
        assert len(self.running) < policy.n_instances
        assert calls
        assert batch.n_rows == sum(call.n_rows for call in calls)
        assert batch.n_rows <= policy.max_batch_size or len(calls) == 1
        assert batch.padded_to >= batch.n_rows
        if policy.allowed_sizes:
            assert batch.padded_to % policy.max_batch_size in (0, *policy.allowed_sizes)
        assert {call.bucket for call in calls} == {batch.bucket}
        one_s = self.scheduler._lanes[batch.bucket].l_s[1]
        assert all(self.now_s + one_s <= call.deadline_s - policy.reply_s + 1e-12 for call in calls)
        assert batch.deadline_s == min(call.deadline_s for call in calls) - policy.reply_s
        for level in {call.priority if 1 <= call.priority <= len(policy.priority_weights) else 1 for call in calls}:
            members = [call.deadline_s for call in calls if self.level(call) == level]
            assert members == sorted(members)
            if batch.reason != "retry":
                left = [
                    call.deadline_s
                    for call in self.calls
                    if call.queued and call.bucket == batch.bucket and self.level(call) == level
                ]
                assert not left or members[-1] <= min(left)

    def level(self, call: Call) -> int:
        return call.priority if 1 <= call.priority <= len(self.policy.priority_weights) else 1

    def run_until(self, until_s: float) -> None:
        """Let batches end and timers fire up to a moment; for ever, if need be."""
        while True:
            wake_s = self.decide()
            end_s = self.running[0][0] if self.running else float("inf")
            next_s = min(end_s, float("inf") if wake_s is None else wake_s)
            if next_s > until_s or next_s == float("inf"):
                break
            self.now_s = next_s
            if next_s == end_s:
                self.end(heappop(self.running)[2])
        if until_s < float("inf"):
            self.now_s = until_s

    def end(self, batch: Batch) -> None:
        calls: list[Any] = list(batch.jobs)
        if any(call.poisonous for call in calls):
            failed: list[Any] = list(self.scheduler.fail(batch, self.now_s))
            assert len(failed) == (1 if len(calls) == 1 else 0)
            for call in failed:
                assert call.poisonous
                call.fates.append("failed")
        else:
            self.scheduler.finish(batch, self.now_s, self.now_s - batch.started_s)
            for call in calls:
                call.fates.append("answered")


@settings(max_examples=300, deadline=None)
@given(policy=policies, latency=latencies, events=events)
def test_every_call_has_exactly_one_fate_and_no_law_is_broken(
    policy: Policy, latency: tuple[float, float, bool], events: list[Event]
) -> None:
    fixed_s, row_s, known = latency
    history = History(policy, fixed_s, row_s, known=known)
    history.live(events)
    assert all(len(call.fates) == 1 for call in history.calls), [call for call in history.calls if len(call.fates) != 1]
    assert not any(call.queued for call in history.calls)
    scheduler = history.scheduler
    assert (scheduler.queued_rows, scheduler.n_free) == (0, policy.n_instances)
    assert 1 <= scheduler.batch_limit <= policy.max_batch_size
    assert 1.0 <= scheduler.inflation <= 2.0
    assert scheduler.target_batch <= scheduler.max_feasible_batch <= policy.max_batch_size


@settings(max_examples=50, deadline=None)
@given(policy=policies, latency=latencies, events=events)
def test_the_same_history_has_the_same_end(
    policy: Policy, latency: tuple[float, float, bool], events: list[Event]
) -> None:
    fixed_s, row_s, known = latency
    ends = []
    for _ in range(2):
        history = History(policy, fixed_s, row_s, known=known)
        history.live(events)
        ends.append((history.now_s, [call.fates for call in history.calls]))
    assert ends[0] == ends[1]
