"""What runs next, what waits and what is given up: the policy between admission and the engine. Pure decisions.

`executor.py` and the planner's simulation tell a `Scheduler` what happens and when (`arrive`, `finish`, `fail`, `cancel`,
each with `now_s`) and ask it to `decide`. It knows no clock, no thread and no socket; its one owner mutates it.

    l(b)   latency_model.py: a high quantile of the seconds that a batch of b rows takes
    lam    arrivals.py: smoothed arrival rate, rows per second, plus one standard deviation
    bmax   a full batch: the largest b with l(b) * (1 + 1/n) <= target, which leaves time to wait for one of n instances
    b*     rows worth waiting for: the smallest b that keeps the instances under 85 % busy at lam, if that many can be
           gathered in time; 1 with one instance, and where a full batch gains too little over rows run one by one
    admit  predicted start + l(b*) <= deadline, else the caller is told at once, and when to come back
    run    in order of deadline what fits before the first, when there are b* rows or waiting longer would be too late
    drop   the head that cannot make it any more, or whose rescue would cost a full batch behind it
    guard  too many misses: believe in longer times and smaller batches, and recover slowly
    fail   run the halves of a failed batch alone, until only the poisonous row's caller gets the error

Rows are counted, not jobs; a job's rows stay together. Each shape of rows ("bucket") has a queue, a rate and a latency of
its own, and they share the instances. bench/serve/simulation.py measures the policy against simpler ones.

Lineage: Clockwork (Gujarati et al., OSDI 2020), Nexus (Shen et al., SOSP 2019), Shepherd (Zhang et al., NSDI 2023),
Symphony (Chen et al., 2023).
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, Protocol

from msgspec import Struct

from modelyard.errors import ConfigError
from modelyard.inference.serve.scheduling.arrivals import ArrivalRate
from modelyard.inference.serve.scheduling.latency_model import LatencyModel

Reason = Literal["instance free", "reached b*", "latest start", "retry"]
RefusalCause = Literal["overload", "deadline", "queue_full"]
DropCause = Literal["expired", "hopeless"]

_NEVER = float("inf")
_MAX_BUCKETS = 64
"""Shapes whose latency and rate are remembered; beyond that the idle one that was quiet for longest is forgotten."""
_MAX_INFLATION = 2.0
_INFLATE = 1.1
_HICCUP = 2.0
"""A batch that took so many times what was expected tells the guard nothing: more caution would not have saved it."""
_NEARLY = 0.98
"""A batch that serves this part of the most rows per second there are is as good as the best."""
_PROBE_EVERY = 64
"""Where batching gains nothing, one batch in so many is a larger one, to notice when that has changed."""
_EXPIRY_SLACK_S = 1e-3
"""How late a job may be told that it expired in the queue while all instances are busy."""

_deadline_of = attrgetter("deadline_s")
_served_of = attrgetter("served")
_refresh_of = attrgetter("refresh_s")


class Job(Protocol):
    """One request's rows on their way to an engine. The scheduler writes `queued` and nothing else."""

    n_rows: int
    arrived_s: float
    deadline_s: float
    """When the answer must be out, the reply's own cost included."""
    priority: int
    """1 is the highest, as in Triton's schedule policy; 0 is the default level."""
    bucket: Hashable
    """The shape of its rows; None where all rows have one shape."""
    queued: bool
    """Whether it waits in the scheduler's queue; False before `arrive`."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a model is to be served like."""

    target_s: float
    """Seconds from arrival to answer that requests without a deadline of their own are given."""
    max_batch_size: int
    n_instances: int = 1
    max_queued_rows: int = 10_000
    reply_s: float = 0.0
    """What writing an answer costs after the computation; taken off every deadline."""
    utilization: float = 0.85
    """How busy instances may be before larger batches are waited for."""
    batching_gain: float = 1.1
    """Where a full batch is less than so many times faster than its rows one by one, batches stay as small as will do."""
    waiting_gain: float = 4.0
    """Where it is less than so many times faster, an instance never waits for more rows: what gathers while all are busy
    makes batches enough, and waiting would only add to the latency."""
    timer_slack_s: float = 0.0
    """How late the owner's timers may fire; waiting ends so much before the latest start."""
    miss_budget: float = 0.01
    """Fraction of answers that may come late in a guard window."""
    guard_window_s: float = 1.0
    rate_window_s: float = 0.1
    """Over which the arrival rate is smoothed."""
    allowed_sizes: tuple[int, ...] = ()
    """Row counts that the graph takes; a batch is padded to the next. Empty: any."""
    priority_weights: tuple[float, ...] = (1.0,)
    """Shares of the levels 1, 2, ... of a busy server; one level where all are equal."""
    default_priority: int = 1

    def __post_init__(self) -> None:
        for name in ("target_s", "utilization", "batching_gain", "waiting_gain", "guard_window_s", "rate_window_s"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_batch_size", "n_instances", "max_queued_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.reply_s < self.target_s:
            raise ConfigError(
                f"reply_s must be in [0, target_s), got {self.reply_s} with target_s {self.target_s}; raise target_s"
            )
        if self.allowed_sizes and (
            list(self.allowed_sizes) != sorted(set(self.allowed_sizes)) or self.allowed_sizes[-1] != self.max_batch_size
        ):
            raise ConfigError(
                f"allowed_sizes must rise and end at max_batch_size {self.max_batch_size}, got {self.allowed_sizes}"
            )
        if not self.priority_weights or min(self.priority_weights) <= 0.0:
            raise ConfigError(
                f"priority_weights must all be above 0, got {self.priority_weights}; leave a level out instead"
            )
        if not 1 <= self.default_priority <= len(self.priority_weights):
            raise ConfigError(
                f"default_priority must be in [1, {len(self.priority_weights)}], got {self.default_priority}; "
                "priority_weights has one weight a level"
            )


class Refusal(Struct, frozen=True):
    """Why a job was not admitted, and when another try may be worth it."""

    cause: RefusalCause
    retry_after_s: float
    """Until the same job would be admitted if nothing else came; for "deadline", what its rows alone take to compute."""


class Dropped(Struct, frozen=True):
    """A job given up after it was admitted."""

    job: Job
    cause: DropCause


class Batch(Struct, frozen=True, eq=False):
    """Jobs that run together; occupies an instance from `decide` to `finish` or `fail`."""

    jobs: Sequence[Job]
    n_rows: int
    """More than the largest batch only where one job has more; the executor then runs it in parts."""
    padded_to: int
    """Rows the engine is given: `n_rows`, or the next size it takes; of a job that runs in parts all parts together."""
    bucket: Hashable
    reason: Reason
    started_s: float
    expected_end_s: float
    deadline_s: float
    """The earliest of its jobs', reply cost taken off."""


class Decision(Struct, frozen=True):
    """What to do now."""

    batch: Batch | None
    dropped: Sequence[Dropped]
    wake_s: float | None
    """With no batch: when to ask again if nothing happens before."""


_NOTHING = Decision(None, (), None)


class _Level:
    """The jobs of one priority, earliest deadline first; equal deadlines in order of arrival."""

    __slots__ = ("jobs", "n_cancelled", "n_rows", "served", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.jobs: deque[Job] = deque()
        self.n_rows = 0
        self.n_cancelled = 0
        self.served = 0.0  # rows served per weight: the level that is furthest behind goes first


class _Lane:
    """One bucket: its queue, what is known of its latency and rate, and the numbers that follow from these."""

    __slots__ = (
        "arrivals",
        "b_max",
        "b_star",
        "best_rows_per_s",
        "bucket",
        "caution",
        "doubt_s",
        "head_s",
        "l_max_s",
        "l_s",
        "l_star_s",
        "latency",
        "levels",
        "limit",
        "load",
        "n_rows",
        "n_unprobed",
        "probe_limit",
        "quiet_rows",
        "quiet_until_s",
        "refresh_s",
        "revision",
        "served",
        "step",
        "wake_s",
    )

    def __init__(self, bucket: Hashable, latency: LatencyModel, policy: Policy, now_s: float) -> None:
        self.bucket = bucket
        self.latency = latency
        self.arrivals = ArrivalRate(policy.rate_window_s, now_s)
        self.levels = [_Level(weight) for weight in policy.priority_weights]
        self.n_rows = 0
        self.served = 0.0
        # Follow from the above; brought up to date every few milliseconds.
        self.l_s: list[float] = []  # l(b), inflated and padded, by b
        self.best_rows_per_s: list[float] = []  # of one instance with batches of at most b
        self.limit = self.probe_limit = policy.max_batch_size
        self.n_unprobed = 0
        self.b_max = self.b_star = 1
        self.l_max_s = self.l_star_s = 0.0
        self.caution = 1.0  # what l(b) is multiplied with before anybody is made to wait on purpose
        self.step = 1  # rows of a usual job
        self.load = 0.0  # instances its traffic keeps busy
        self.doubt_s = now_s
        self.head_s = _NEVER  # the earliest deadline in it, reply cost taken off
        self.revision = -1
        self.refresh_s = now_s
        # What the last look came to: nothing to do before `quiet_until_s` with fewer rows than `quiet_rows`.
        self.quiet_until_s = 0.0
        self.quiet_rows = 0.0
        self.wake_s = _NEVER


class Scheduler:
    """The queue and the instances of one model version. Fed by one owner; not thread-safe.

    After every event the owner calls `decide` until it returns no batch, and once more at `wake_s`.
    """

    def __init__(self, policy: Policy, latency: LatencyModel, now_s: float = 0.0) -> None:
        self.policy = policy
        self.batch_limit = policy.max_batch_size
        """The largest batch run at present; below `max_batch_size` while the guard holds it down."""
        self.inflation = 1.0
        """What the guard multiplies l(b) with."""
        self._latency = latency
        self._largest = policy.max_batch_size
        self._reply_s = policy.reply_s
        self._window_s = policy.target_s - policy.reply_s  # from arrival to the end of computing
        self._refresh_every_s = min(max(policy.target_s / 10.0, 2e-3), 20e-3)
        self._padded = _padded_sizes(policy)
        self._allowed_limit = policy.max_batch_size
        self._lanes: dict[Hashable, _Lane] = {}
        self._retries: deque[tuple[Hashable, Sequence[Job]]] = deque()
        self._n_rows = 0
        self._n_retry_rows = 0
        self._n_free = policy.n_instances
        self._running: set[Batch] = set()
        self._ends_s: list[float] = []  # expected ends of what runs, in order
        self._n_finished = self._n_missed = 0
        self._window_ends_s = now_s + policy.guard_window_s
        self._load = 0.0
        self._weigh_s = now_s

    # What happens.

    def arrive(self, job: Job, now_s: float) -> Refusal | None:
        """Queue `job`, or say why not."""
        lane = self._lanes.get(job.bucket)
        if lane is None:
            lane = self._open_lane(job.bucket, now_s)
        n_rows = job.n_rows
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1, got {n_rows}; a job without rows needs no engine")
        arrivals = lane.arrivals
        arrivals.n_rows += n_rows
        arrivals.n_requests += 1
        if now_s >= lane.refresh_s:
            self._refresh(lane, now_s)
        deadline_s = job.deadline_s
        levels = lane.levels
        level = levels[0] if len(levels) == 1 else levels[self._level_of(job.priority)]
        # An idle server needs no forecast.
        if (
            self._n_rows
            or not self._n_free
            or n_rows > self._largest
            or now_s + lane.l_s[n_rows] + self._reply_s > deadline_s
        ):
            refusal = self._refusal(lane, level, n_rows, deadline_s, now_s)
            if refusal is not None:
                return refusal
        jobs = level.jobs
        if not jobs or deadline_s >= jobs[-1].deadline_s:
            jobs.append(job)
            if len(jobs) == 1:
                lane.quiet_until_s = 0.0
                if len(levels) > 1:
                    level.served = max(level.served, lane.served)  # no credit for having had nothing to do
        else:
            jobs.insert(bisect_right(jobs, deadline_s, key=_deadline_of), job)
            lane.quiet_until_s = 0.0
        job.queued = True
        level.n_rows += n_rows
        lane.n_rows += n_rows
        self._n_rows += n_rows
        return None

    def would_refuse(
        self, n_rows: int, deadline_s: float, now_s: float, priority: int = 0, bucket: Hashable = None
    ) -> Refusal | None:
        """Return what `arrive` would say to such a job, for an edge that would rather not read a body in vain.

        A refusal counts as an arrival, since the job will not come again.
        """
        lane = self._lanes.get(bucket)
        if lane is None:
            return None  # a shape never seen: nothing is known against it
        if now_s >= lane.refresh_s:
            self._refresh(lane, now_s)
        refusal = self._refusal(lane, lane.levels[self._level_of(priority)], n_rows, deadline_s, now_s)
        if refusal is not None:
            lane.arrivals.n_rows += n_rows
            lane.arrivals.n_requests += 1
        return refusal

    def finish(self, batch: Batch, now_s: float, service_s: float) -> None:
        """Take note that `batch` is computed; `service_s` is how long it kept its instance, handing over included."""
        self._release(batch)
        lane = self._lanes.get(batch.bucket)
        if lane is not None:
            if batch.n_rows <= self._largest:
                lane.latency.observe(batch.padded_to, service_s)
            else:  # in parts: what a full part took
                share = lane.l_s[self._largest] / self._service_s(lane, batch.n_rows)
                lane.latency.observe(self._largest, service_s * share)
            if now_s >= lane.refresh_s:
                self._refresh(lane, now_s)
        self._n_finished += len(batch.jobs)
        if now_s > batch.deadline_s and now_s - batch.started_s < _HICCUP * (batch.expected_end_s - batch.started_s):
            computed_by_s = now_s + self._reply_s
            self._n_missed += sum(computed_by_s > job.deadline_s for job in batch.jobs)

    def fail(self, batch: Batch, now_s: float) -> Sequence[Job]:
        """Take note that `batch` failed; return the jobs that get the error.

        That is the job of a batch of one. The halves of a larger batch run next, each alone, so that in the end the error
        goes to those only whose rows cause it. `now_s` is here for symmetry: deadlines are looked at when a half starts.
        """
        self._release(batch)
        jobs = batch.jobs
        if len(jobs) == 1:
            return jobs
        half = len(jobs) // 2
        self._retries.appendleft((batch.bucket, jobs[half:]))
        self._retries.appendleft((batch.bucket, jobs[:half]))
        self._n_retry_rows += batch.n_rows
        return ()

    def cancel(self, job: Job) -> bool:
        """Take `job` out of the queue; return False where it is not in it, but runs or has its answer."""
        if not job.queued:
            return False
        job.queued = False
        lane = self._lanes[job.bucket]
        level = lane.levels[self._level_of(job.priority)]
        level.n_rows -= job.n_rows
        lane.n_rows -= job.n_rows
        self._n_rows -= job.n_rows
        # It leaves the deque when it comes to the front; where many do not, they are swept out.
        level.n_cancelled += 1
        if level.n_cancelled > 64 and 2 * level.n_cancelled > len(level.jobs):
            level.jobs = deque(other for other in level.jobs if other.queued)
            level.n_cancelled = 0
        return True

    # What to do.

    def decide(self, now_s: float) -> Decision:
        """Return the next batch to run, or no batch and when to ask again; and the jobs given up."""
        dropped: list[Dropped] = []
        while self._retries and self._n_free:
            lane, jobs = self._next_retry(now_s, dropped)
            if jobs:
                return Decision(self._start(lane, jobs, "retry", now_s), dropped, None)
        if not self._n_rows:
            return Decision(None, dropped, None) if dropped else _NOTHING
        ready: _Lane | None = None
        why: Reason = "instance free"
        wake_s = _NEVER
        for lane in self._lanes.values():
            if not lane.n_rows:
                continue
            if now_s >= lane.quiet_until_s or lane.n_rows >= lane.quiet_rows:
                reason = self._look(lane, now_s, dropped)
                if reason is not None:
                    if ready is None or lane.head_s < ready.head_s:
                        ready, why = lane, reason
                    continue
            if lane.wake_s < wake_s:
                wake_s = lane.wake_s
        if ready is not None:
            return Decision(self._start(ready, self._take(ready, now_s), why, now_s), dropped, None)
        return Decision(None, dropped, wake_s if wake_s < _NEVER else None)

    def _look(self, lane: _Lane, now_s: float, dropped: list[Dropped]) -> Reason | None:
        """Drop what is too late; return why to run a batch now, or None having noted when to look again."""
        if now_s >= lane.refresh_s:
            self._refresh(lane, now_s)
        hold_s = self._drop_late(lane, now_s, dropped)
        if not lane.n_rows:
            lane.wake_s = _NEVER
            return None
        head_s, l_s = lane.head_s, lane.l_s
        if not self._n_free:
            # Until an instance is free there is nothing to do but to give up what gets too late for a full batch.
            lane.quiet_until_s = head_s - lane.l_max_s
            lane.quiet_rows = _NEVER
            free_s = self._ends_s[0]
            expires_s = head_s - l_s[1] + _EXPIRY_SLACK_S
            lane.wake_s = expires_s if expires_s < free_s or free_s < now_s else _NEVER
            return None
        n_rows, b_star, limit = lane.n_rows, lane.b_star, lane.limit
        if n_rows >= b_star:
            return "reached b*" if b_star > 1 else "instance free"
        # Wait for one more request of the usual size, as long as a batch with it could still make it.
        step, caution = lane.step, lane.caution
        hold_s -= self.policy.timer_slack_s
        latest_s = hold_s - caution * l_s[min(n_rows + step, limit)]
        if now_s >= latest_s:
            return "latest start"
        # Each arrival makes the latest start a little earlier; a timer at the earliest of them need not be moved.
        soonest_s = hold_s - caution * l_s[min(b_star - 1 + step, limit)]
        if now_s < soonest_s:
            lane.wake_s = lane.quiet_until_s = soonest_s
            lane.quiet_rows = b_star
        else:
            lane.wake_s = lane.quiet_until_s = latest_s
            lane.quiet_rows = n_rows + 1
        # A rate that falls lowers b*: nobody waits on for a batch that no longer comes.
        if lane.refresh_s < lane.wake_s:
            lane.wake_s = lane.quiet_until_s = lane.refresh_s
        return None

    def _drop_late(self, lane: _Lane, now_s: float, dropped: list[Dropped]) -> float:
        """Give up heads that are too late; set the lane's `head_s` and return until when its heads may be held back.

        That is their deadline, but no longer than the target after arrival: patience of a client is no reason to wait.
        """
        reply_s, window_s, b_max, l_s = self._reply_s, self._window_s, lane.b_max, lane.l_s
        full_batch_s = now_s + lane.l_max_s
        head_s = hold_s = _NEVER
        rows_above = 0
        for level in lane.levels:
            jobs = level.jobs
            while jobs:
                job = jobs[0]
                if not job.queued:
                    jobs.popleft()
                    level.n_cancelled -= 1
                    continue
                n_rows = job.n_rows
                deadline_s = job.deadline_s - reply_s
                cause: DropCause
                if now_s + (l_s[n_rows] if n_rows <= self._largest else self._service_s(lane, n_rows)) > deadline_s:
                    cause = "expired"
                elif rows_above + level.n_rows > b_max and full_batch_s > deadline_s:
                    cause = "hopeless"  # a batch small enough for it would cost the many behind it
                else:
                    if deadline_s < head_s:
                        head_s = deadline_s
                    if deadline_s < hold_s:
                        hold_s = deadline_s
                    if job.arrived_s + window_s < hold_s:
                        hold_s = job.arrived_s + window_s
                    break
                jobs.popleft()
                job.queued = False
                level.n_rows -= n_rows
                lane.n_rows -= n_rows
                self._n_rows -= n_rows
                dropped.append(Dropped(job, cause))
            rows_above += level.n_rows
        lane.head_s = head_s
        return hold_s

    def _take(self, lane: _Lane, now_s: float) -> list[Job]:
        """Take the next batch out of the lane: in order of deadline what fits before the earliest of them."""
        limit = lane.limit
        if limit < lane.probe_limit and lane.n_rows > limit:
            lane.n_unprobed += 1
            if lane.n_unprobed >= _PROBE_EVERY:
                lane.n_unprobed = 0
                limit = lane.probe_limit
        limit = bisect_right(lane.l_s, lane.head_s - now_s, 1, limit + 1) - 1
        if self._n_free > 1 and lane.b_star == 1:  # nobody waits for company, so none is taken from idle instances
            limit = min(limit, -(-lane.n_rows // self._n_free))
        taken: list[Job] = []
        n_taken = 0
        levels = lane.levels
        level = levels[0]
        while n_taken < limit or not taken:
            if len(levels) > 1:
                behind = [other for other in levels if other.n_rows]
                if not behind:
                    break
                level = min(behind, key=_served_of)
            jobs = level.jobs
            if not level.n_rows:
                break
            job = jobs[0]
            if not job.queued:
                jobs.popleft()
                level.n_cancelled -= 1
                continue
            n_rows = job.n_rows
            if n_taken + n_rows > limit and taken:
                break
            jobs.popleft()
            job.queued = False
            taken.append(job)
            n_taken += n_rows
            level.n_rows -= n_rows
            if len(levels) > 1:
                lane.served = level.served
                level.served += n_rows / level.weight
        lane.n_rows -= n_taken
        self._n_rows -= n_taken
        lane.quiet_until_s = 0.0
        return taken

    def _start(self, lane: _Lane, jobs: Sequence[Job], reason: Reason, now_s: float) -> Batch:
        n_rows = jobs[0].n_rows
        deadline_s = jobs[0].deadline_s
        if len(jobs) > 1:
            n_rows = sum([job.n_rows for job in jobs])
            if len(lane.levels) > 1:
                deadline_s = min([job.deadline_s for job in jobs])
        largest = self._largest
        if n_rows <= largest:
            padded_to, service_s = self._padded[n_rows], lane.l_s[n_rows]
        else:
            padded_to, service_s = (
                n_rows // largest * largest + self._padded[n_rows % largest],
                self._service_s(lane, n_rows),
            )
        end_s = now_s + service_s
        batch = Batch(jobs, n_rows, padded_to, lane.bucket, reason, now_s, end_s, deadline_s - self._reply_s)
        self._n_free -= 1
        self._running.add(batch)
        insort(self._ends_s, end_s)
        return batch

    def _next_retry(self, now_s: float, dropped: list[Dropped]) -> tuple[_Lane, list[Job]]:
        """Return the next half of a failed batch without those of its jobs that can no longer make it."""
        bucket, jobs = self._retries.popleft()
        lane = self._lanes.get(bucket) or self._open_lane(bucket, now_s)
        n_rows = sum(job.n_rows for job in jobs)
        self._n_retry_rows -= n_rows
        done_s = now_s + self._service_s(lane, n_rows) + self._reply_s
        dropped += [Dropped(job, "expired") for job in jobs if done_s > job.deadline_s]
        return lane, [job for job in jobs if done_s <= job.deadline_s]

    # What it knows.

    def update(self, now_s: float) -> None:
        """Bring the rates up to date for somebody who looks; while jobs come and go that happens by itself."""
        for lane in self._lanes.values():
            self._refresh(lane, now_s)

    @property
    def queued_rows(self) -> int:
        return self._n_rows + self._n_retry_rows

    @property
    def n_free(self) -> int:
        """Instances with nothing to do."""
        return self._n_free

    @property
    def target_batch(self) -> int:
        """b*, of the shape with the largest."""
        return max((lane.b_star for lane in self._lanes.values()), default=1)

    @property
    def max_feasible_batch(self) -> int:
        """bmax, of the shape with the largest."""
        return max((lane.b_max for lane in self._lanes.values()), default=1)

    @property
    def arrival_rate_per_s(self) -> float:
        """Rows per second, smoothed, of all shapes; as of the last event."""
        return sum(lane.arrivals.rows_per_s for lane in self._lanes.values())

    def latency_of(self, bucket: Hashable = None) -> LatencyModel:
        """Return what has been learned for one shape of rows."""
        lane = self._lanes.get(bucket)
        return self._latency if lane is None else lane.latency

    # How it knows.

    def _release(self, batch: Batch) -> None:
        if batch not in self._running:
            raise ValueError("this batch does not run: finish or fail each batch of `decide` once")
        self._running.remove(batch)
        self._ends_s.remove(batch.expected_end_s)
        self._n_free += 1
        for lane in self._lanes.values():
            lane.quiet_until_s = 0.0

    def _refusal(self, lane: _Lane, level: _Level, n_rows: int, deadline_s: float, now_s: float) -> Refusal | None:
        """Return why a job should not be queued: full, impossible, or predicted to be late."""
        own_s = self._service_s(lane, n_rows)
        late_s = now_s + own_s + self._reply_s - deadline_s
        if late_s > 0.0:
            if not self._running and (
                deadline_s - now_s >= self._window_s
                or now_s + lane.latency.least_s(min(n_rows, self._largest)) + self._reply_s <= deadline_s
            ):
                self._doubt(lane, now_s)
            return Refusal("deadline", own_s)
        n_ahead = self._n_rows + self._n_retry_rows
        n = self.policy.n_instances
        if n_ahead + n_rows > self.policy.max_queued_rows and n_ahead:
            excess = n_ahead + n_rows - self.policy.max_queued_rows
            return Refusal("queue_full", lane.l_max_s * -(-excess // lane.b_max) / n)
        if self._n_free:
            start_s = now_s
        else:
            start_s = self._ends_s[0]
            if start_s < now_s:  # overdue; what is late stays late for about as long again
                later = bisect_left(self._ends_s, now_s)
                start_s = 2.0 * now_s - self._ends_s[later - 1]
                if later < len(self._ends_s) and self._ends_s[later] < start_s:
                    start_s = self._ends_s[later]
        if n_ahead:
            if len(self._lanes) == 1:
                # Its last row's place in the queue, less the batch it rides in itself.
                n_before = (self._rows_ahead(lane, level, deadline_s) + n_rows) / lane.b_max - 1.0
                if n_before > 0.0:
                    start_s += lane.l_max_s * n_before / n
            else:
                start_s += self._work_ahead_s(lane, level, n_rows, deadline_s) / n
            if lane.l_star_s > own_s:
                own_s = lane.l_star_s
        late_s = start_s + own_s + self._reply_s - deadline_s
        return Refusal("overload", late_s) if late_s > 0.0 else None

    def _work_ahead_s(self, lane: _Lane, level: _Level, n_rows: int, deadline_s: float) -> float:
        """Return the seconds that one instance needs for what is run before such a job, where there are several buckets."""
        ahead_s = 0.0
        at = lane.levels.index(level)
        for other in self._lanes.values():
            if other is lane:
                n_before = (self._rows_ahead(lane, level, deadline_s) + n_rows) / lane.b_max - 1.0
                ahead_s += lane.l_max_s * max(0.0, n_before)
            elif other.n_rows:
                ahead_s += other.l_max_s * self._rows_ahead(other, other.levels[at], deadline_s) / other.b_max
        return ahead_s

    def _rows_ahead(self, lane: _Lane, level: _Level, deadline_s: float) -> float:
        """Return how many rows of `lane` are run before a job with this deadline at this level."""
        jobs = level.jobs
        n_ahead: float = level.n_rows
        if jobs and deadline_s < jobs[-1].deadline_s:
            n_ahead *= bisect_right(jobs, deadline_s, key=_deadline_of) / len(jobs)
        if len(lane.levels) > 1:  # a level has its share at least, and all where the others are empty
            weights = sum([other.weight for other in lane.levels if other.n_rows and other is not level])
            n_ahead = min(n_ahead * (1.0 + weights / level.weight), n_ahead + lane.n_rows - level.n_rows)
        return n_ahead + self._n_retry_rows

    def _service_s(self, lane: _Lane, n_rows: int) -> float:
        """Return l(n_rows), of a job too large for one run the sum over its parts."""
        largest = self._largest
        if n_rows <= largest:
            return lane.l_s[n_rows]
        return (n_rows // largest) * lane.l_s[largest] + lane.l_s[n_rows % largest]

    def _level_of(self, priority: int) -> int:
        """Return the index of a job's level; a level that does not exist is the default one, as in Triton."""
        policy = self.policy
        return (priority if 1 <= priority <= len(policy.priority_weights) else policy.default_priority) - 1

    def _doubt(self, lane: _Lane, now_s: float) -> None:
        """Nothing runs, and yet a request is refused that has the whole target, or such a time as was enough before.

        What was learned may be out of date.
        """
        if now_s >= lane.doubt_s:
            lane.doubt_s = now_s + lane.l_s[1]  # as often as a run could have told
            lane.latency.relax()
            lane.refresh_s = now_s

    def _open_lane(self, bucket: Hashable, now_s: float) -> _Lane:
        lanes = self._lanes
        if len(lanes) >= _MAX_BUCKETS:
            idle = [lane for lane in lanes.values() if not lane.n_rows]
            if idle:
                del lanes[min(idle, key=_refresh_of).bucket]
        lane = _Lane(bucket, self._latency.fresh() if lanes else self._latency, self.policy, now_s)
        lanes[bucket] = lane
        self._refresh(lane, now_s)
        return lane

    def _refresh(self, lane: _Lane, now_s: float) -> None:
        """Bring a lane up to date with its rate, its latency and the guard; every few milliseconds."""
        if now_s >= self._window_ends_s:
            self._close_window(now_s)
        lane.refresh_s = now_s + self._refresh_every_s
        lane.quiet_until_s = 0.0
        lane.arrivals.update(now_s)
        if len(self._lanes) > 1 and now_s >= self._weigh_s:
            self._weigh_s = now_s + 10.0 * self._refresh_every_s
            self._weigh(now_s)
        latency = lane.latency
        latency.redraw()
        if lane.revision != latency.revision:
            lane.revision = latency.revision
            table_s = latency.high_table_s()
            lane.l_s = l_s = [self.inflation * table_s[size] for size in self._padded]
            best, lane.best_rows_per_s = 0.0, [0.0]
            for n_rows in range(1, self._largest + 1):
                best = max(best, n_rows / l_s[n_rows])
                lane.best_rows_per_s.append(best)
        self._aim(lane)

    def _aim(self, lane: _Lane) -> None:
        """Set bmax and b*."""
        policy, window_s, l_s, best = self.policy, self._window_s, lane.l_s, lane.best_rows_per_s
        n = policy.n_instances
        limit = lane.limit = lane.probe_limit = self._allowed_limit
        lane.step = step = max(1, round(lane.arrivals.rows_per_request))
        # bmax leaves the gathering of its rows, b / lam, out: at a low rate that would refuse a burst one batch can serve.
        b_max = max(1, bisect_right(l_s, window_s * n / (n + 1), 1, limit + 1) - 1)
        rate = lane.arrivals.high_rows_per_s
        share = lane.load / self._load if len(self._lanes) > 1 and lane.load > 0.0 else 1.0
        enough = bisect_left(best, rate / (policy.utilization * n * share), 1, b_max)
        # How many times faster the largest batch is than its rows one by one: of those known, or hoped where none is.
        smallest, largest = lane.latency.well_known(b_max)
        known = largest >= 2 * smallest > 0
        useful = largest if known else b_max
        gain = l_s[1] * useful / l_s[useful]
        b_star = 1
        if gain < policy.batching_gain:
            # The smallest batch that does the work, since company would only make it late; now and then a larger one.
            feasible = b_max
            b_max = lane.limit = min(enough, bisect_left(best, _NEARLY * best[useful], 1, useful))
            lane.probe_limit = min(2 * b_max, feasible)
            if not lane.latency.seen(lane.probe_limit):
                lane.n_unprobed = _PROBE_EVERY
        else:
            if b_max > step > 1:
                b_max -= b_max % step  # whole jobs
            # Only for what is known: whoever waits on a hope may never learn better.
            if n > 1 and enough > 1 and known and gain >= policy.waiting_gain:
                lane.caution = lane.latency.spread
                b_star = min(-(-enough // step) * step, self._gatherable(lane, b_max, rate))
        lane.b_max, lane.b_star = b_max, b_star
        lane.l_max_s, lane.l_star_s = l_s[b_max], l_s[b_star]

    def _gatherable(self, lane: _Lane, b_max: int, rate: float) -> int:
        """Return the largest b <= bmax that can be gathered, wait for an instance and be computed within the target."""
        window_s, l_s, step, n = self._window_s, lane.l_s, lane.step, self.policy.n_instances
        b = b_max
        while b > step and lane.caution * l_s[b] + max(b / rate, l_s[b] / n) > window_s:
            b -= step
        return b

    def _weigh(self, now_s: float) -> None:
        """Learn how many instances the traffic of each lane needs, which is how they share them."""
        self._load = 0.0
        for lane in self._lanes.values():
            lane.arrivals.update(now_s)
            lane.load = lane.arrivals.rows_per_s / lane.best_rows_per_s[lane.b_max] if lane.l_s else 0.0
            self._load += lane.load

    def _close_window(self, now_s: float) -> None:
        """The guard: after too many misses believe in longer times and smaller batches; else recover slowly."""
        largest = self._largest
        missed, allowed = self._n_missed, self.policy.miss_budget * self._n_finished
        self._n_finished = self._n_missed = 0
        self._window_ends_s = now_s + self.policy.guard_window_s
        before = self.inflation
        if missed > 1 and missed > allowed:  # one alone is no evidence
            self.inflation = min(_MAX_INFLATION, _INFLATE * before)
            self.batch_limit = max(1, min(self.batch_limit - 1, int(0.9 * self.batch_limit)))
        else:
            self.batch_limit = min(largest, self.batch_limit + 1)
            self.inflation = 1.0 + 0.9 * (before - 1.0) if before > 1.005 else 1.0
        sizes = self.policy.allowed_sizes
        self._allowed_limit = sizes[max(0, bisect_right(sizes, self.batch_limit) - 1)] if sizes else self.batch_limit
        for lane in self._lanes.values():
            lane.refresh_s = now_s
            if self.inflation != before:
                lane.revision = -1


def _padded_sizes(policy: Policy) -> list[int]:
    """Return for every number of rows up to the largest batch the size it runs at."""
    sizes = policy.allowed_sizes
    if not sizes:
        return list(range(policy.max_batch_size + 1))
    return [0] + [sizes[bisect_left(sizes, n_rows)] for n_rows in range(1, policy.max_batch_size + 1)]
