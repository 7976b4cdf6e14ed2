"""The edge between the scheduler, which decides, and the engine, which computes: clocks, threads and the event loop.

A version has n instances. A run so short that handing it over would cost more than computing it happens on the event loop,
at the end of the turn in which its requests were read; any other on an instance's thread. A thread that finishes takes the
next batch itself, so that the engine does not wait for the loop.
"""

import asyncio
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import DeadlineExceeded, NotReady, Overloaded, RequestError
from modelyard.inference.runtime import Engine
from modelyard.inference.serve.calls import Call, Run
from modelyard.inference.serve.metrics.observe import ModelMetrics
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.scheduling.scheduling import Batch, Refusal, Scheduler

INLINE_BELOW_S = 200e-6
"""Handing a run to a thread and its result back costs about this much, and wakes a second core."""

_STRAINED_S = 1.0
_REFUSALS = {
    "overload": "there is more work waiting than can be done in time",
    "queue_full": "the queue is full",
}


class _UsualTime:
    """What computing so many rows usually takes, hand-over and hiccups aside: a mean for each power of two."""

    __slots__ = ("_seconds",)

    def __init__(self, row_s: float) -> None:
        self._seconds: list[float] = [row_s]

    def seconds(self, n_rows: int) -> float:
        """Return it; in proportion to the rows beyond what was seen."""
        size = n_rows.bit_length() - 1
        known = self._seconds
        return known[size] if size < len(known) else known[-1] * (n_rows >> (len(known) - 1))

    def learn(self, n_rows: int, compute_s: float) -> None:
        size = n_rows.bit_length() - 1
        known = self._seconds
        while size >= len(known):
            known.append(known[-1] * 2)
        before_s = known[size]
        known[size] = before_s + 0.1 * (
            min(compute_s, 2 * before_s) - before_s
        )  # a hiccup counts for no more than double


class Executor:
    """Runs the calls of one version. Used from the event loop; `close` may be called from any thread, once."""

    def __init__(
        self,
        engine: Engine,
        packer: Packer,
        scheduler: Scheduler,
        *,
        name: str,
        max_batch_size: int,
        row_s: float = 1e-3,
        splittable: bool = True,
        inline_below_s: float = INLINE_BELOW_S,
    ) -> None:
        """
        Args:
            name: for messages and threads, e.g. "flights version 3".
            max_batch_size: rows of one run; a call of more is computed in several, where it is `splittable`.
            row_s: what one row usually takes to compute, to begin with.
        """
        self._engine = engine
        self._packer = packer
        self.scheduler = scheduler
        self._name = name
        self._max_batch_size = max_batch_size
        self._splittable = splittable
        self._inline_below_s = inline_below_s
        self._usual = _UsualTime(row_s)
        self.metrics: ModelMetrics | None = None
        """Where runs are counted; set before the first call."""
        self._lock = threading.Lock()  # held for the scheduler's decisions, by the loop and the instances' threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn_due = False
        self._strained_until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wake_s: float | None = None
        self._idle: list[SimpleQueue[Batch | None]] = []
        self._threads: list[threading.Thread] = []
        self._inboxes: list[SimpleQueue[Batch | None]] = []
        self._closed = False

    def refusal(self, n_rows: int, deadline_s: float, now_s: float) -> Exception | None:
        """Return why a call that is not read yet would be refused, None where it would not.

        Looks only while there is a reason to: when something was refused or dropped a moment ago.
        """
        if now_s > self._strained_until_s:
            return None
        with self._lock:
            refusal = self.scheduler.would_refuse(n_rows, deadline_s, now_s)
        if refusal is None:
            return None
        self._strained_until_s = now_s + _STRAINED_S
        return self._error(refusal)

    def submit(self, call: Call) -> None:
        """Queue a call; its `on_done` follows. On the event loop.

        Raises:
            Overloaded, DeadlineExceeded: it would not be done in time.
        """
        call.admitted_s = now_s = perf_counter()
        if self._closed:
            raise NotReady(f"{self._name} has just left memory; ask again", retry_after_s=0.1)
        with self._lock:
            refusal = self.scheduler.arrive(call, now_s)
        if refusal is not None:
            self._strained_until_s = now_s + _STRAINED_S
            raise self._error(refusal)
        if not self._turn_due:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def cancel(self, call: Call) -> None:
        """Nobody waits for it any more: it leaves the queue, or its answer is dropped."""
        call.cancelled = True
        with self._lock:
            self.scheduler.cancel(call)
        if self.metrics is not None:
            self.metrics.cancelled(call.adapter.protocol)

    def observe(self) -> None:
        """Show what the scheduler believes now in the metrics; called about once a second."""
        if self.metrics is None:
            return
        with self._lock:
            scheduler = self.scheduler
            scheduler.update(perf_counter())
            target = scheduler.target_batch
            latency = scheduler.latency_of()
            self.metrics.scheduling(
                queued_rows=scheduler.queued_rows,
                target_batch=target,
                feasible_batch=scheduler.max_feasible_batch,
                batch_limit=scheduler.batch_limit,
                learned_one_s=latency.high_s(1),
                learned_target_s=latency.high_s(target),
                arrival_rate_per_s=scheduler.arrival_rate_per_s,
                inflation=scheduler.inflation,
            )

    def close(self) -> None:
        """Finish what runs, then give the engine's memory back; nothing may be submitted any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for thread, inbox in zip(self._threads, self._inboxes, strict=True):
            inbox.put(None)
            thread.join()
        self._engine.close()

    # On the event loop.

    def _turn(self) -> None:
        """Start whatever can be started now."""
        self._turn_due = False
        while not self._closed:
            with self._lock:
                decision = self.scheduler.decide(perf_counter())
                batch = decision.batch
                inbox = None
                if batch is not None and not self._is_short(batch):
                    inbox = self._idle.pop() if self._idle else self._new_instance()
            if decision.dropped:
                self._drop(decision.dropped)
            if batch is None:
                self._wake_at(decision.wake_s)
                return
            if inbox is None:
                self._run_here(batch)
                if not self.scheduler.queued_rows:
                    return
            else:
                inbox.put(batch)

    def _on_timer(self) -> None:
        self._timer = None
        self._turn()

    def _is_short(self, batch: Batch) -> bool:
        """Whether handing the batch to a thread would cost more than computing it."""
        return self._usual.seconds(batch.n_rows) <= self._inline_below_s

    def _run_here(self, batch: Batch) -> None:
        outcome = self._compute(batch)
        failed: Sequence[Any] = ()
        with self._lock:
            if isinstance(outcome, Run):
                self.scheduler.finish(batch, outcome.computed_s, outcome.computed_s - batch.started_s)
            else:
                failed = self.scheduler.fail(batch, perf_counter())
        self._settle(batch, outcome, failed)

    def _settle(self, batch: Batch, outcome: "Run | Exception", failed: Sequence[Any]) -> None:
        """Tell the callers."""
        if isinstance(outcome, Run):
            self._usual.learn(outcome.n_rows, outcome.computed_s - outcome.started_s)
            first_row = 0
            for call in cast(Sequence[Call], batch.jobs):
                call.run = outcome
                call.first_row = first_row
                first_row += call.n_rows
                if not call.cancelled:
                    call.on_done(call)
            if self.metrics is not None:
                self._count(self.metrics, batch, outcome)
            return
        for call in failed:
            call.error = outcome
            if not call.cancelled:
                call.on_done(call)

    def _count(self, metrics: ModelMetrics, batch: Batch, run: Run) -> None:
        compute_s = run.computed_s - run.started_s
        metrics.batch(run.n_rows, run.n_calls, compute_s, run.reason)
        calls = cast(Sequence[Call], batch.jobs)
        tenant = calls[0].terms.tenant
        if len(calls) == 1 or all(call.terms.tenant == tenant for call in calls):
            metrics.compute(tenant, compute_s)
        else:  # each pays for its rows
            for call in calls:
                metrics.compute(call.terms.tenant, compute_s * call.n_rows / run.n_rows)

    def _settle_from_thread(
        self,
        batch: Batch,
        outcome: "Run | Exception",
        failed: Sequence[Any],
        dropped: Sequence[Any],
        wake_s: float | None,
    ) -> None:
        self._settle(batch, outcome, failed)
        if dropped:
            self._drop(dropped)
        if not isinstance(outcome, Run):
            self._turn()  # the halves
        else:
            self._wake_at(wake_s)

    def _drop(self, dropped: Sequence[Any]) -> None:
        now_s = perf_counter()
        self._strained_until_s = now_s + _STRAINED_S
        for one in dropped:
            call: Call = one.job
            waited_ms = (now_s - call.arrived_s) * 1e3
            call.error = DeadlineExceeded(
                f"{self._name}: dropped after {waited_ms:.1f} ms of waiting, since it could not be done by its deadline any more; "
                "try again later, or allow more time with the header Modelyard-Timeout-Ms",
                cause=one.cause,
                retry_after_s=1.0,
            )
            if not call.cancelled:
                call.on_done(call)

    def _wake_at(self, wake_s: float | None) -> None:
        if self._timer is not None:
            if wake_s == self._wake_s:
                return  # making a timer costs a tenth of what a request does
            self._timer.cancel()
            self._timer = None
        self._wake_s = wake_s
        if wake_s is not None and self._loop is not None and not self._closed:
            self._timer = self._loop.call_later(max(0.0, wake_s - perf_counter()), self._on_timer)

    def _error(self, refusal: Refusal) -> Exception:
        if refusal.cause == "deadline":
            return DeadlineExceeded(
                f"{self._name}: refused, since its deadline is sooner than a run takes, about {refusal.retry_after_s * 1e3:.3g} ms; allow "
                "more time with the header Modelyard-Timeout-Ms",
                cause=refusal.cause,
                retry_after_s=refusal.retry_after_s,
            )
        return Overloaded(
            f"{self._name}: refused, since {_REFUSALS.get(refusal.cause, refusal.cause)}; try again in {refusal.retry_after_s:.2g} s, or "
            "allow more time with the header Modelyard-Timeout-Ms",
            cause=refusal.cause,
            retry_after_s=refusal.retry_after_s,
        )

    # On an instance's thread, or on the loop for short runs.

    def _compute(self, batch: Batch) -> "Run | Exception":
        calls = cast(Sequence[Call], batch.jobs)
        n_rows = batch.n_rows
        try:
            started_s = perf_counter()
            inputs = self._packer.join(calls, n_rows, batch.padded_to)
            for call in calls:
                if call.unchecked:
                    if self._packer.holds_nan(inputs):
                        self._refuse_nan(calls)
                    break
            in_parts = n_rows > self._max_batch_size and self._splittable
            outputs = self._run_in_parts(inputs, n_rows) if in_parts else self._engine.run(inputs)
            if batch.padded_to > n_rows:
                outputs = {name: array[:n_rows] for name, array in outputs.items()}
            return Run(outputs, n_rows, len(calls), batch.reason, started_s, perf_counter())
        except Exception as exc:  # noqa: BLE001  # goes to the caller whose rows they are, and to the log if it is a bug
            return exc

    def _refuse_nan(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if len(calls) == 1:
                self._packer.check(call)
        raise RequestError("an input of this batch holds NaN")  # the batch is halved until the one is found

    def _run_in_parts(self, inputs: dict[str, NDArray[Any]], n_rows: int) -> dict[str, NDArray[Any]]:
        size = self._max_batch_size
        n_missing = -n_rows % size if self.scheduler.policy.allowed_sizes else 0
        if n_missing:  # the last part is padded too, where the graph takes certain sizes only
            inputs = {
                name: np.concatenate([array, np.repeat(array[-1:], n_missing, axis=0)])
                for name, array in inputs.items()
            }
        parts = [
            self._engine.run({name: array[i : i + size] for name, array in inputs.items()})
            for i in range(0, n_rows, size)
        ]
        return {name: np.concatenate([part[name] for part in parts])[:n_rows] for name in parts[0]}

    def _new_instance(self) -> "SimpleQueue[Batch | None]":
        inbox: SimpleQueue[Batch | None] = SimpleQueue()
        thread = threading.Thread(
            target=self._work, args=(inbox,), name=f"{self._name}-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        self._inboxes.append(inbox)
        thread.start()
        return inbox

    def _work(self, inbox: "SimpleQueue[Batch | None]") -> None:
        loop = self._loop
        assert loop is not None
        while (batch := inbox.get()) is not None:
            following: Batch | None = batch
            while following is not None:
                batch = following
                outcome = self._compute(batch)
                failed: Sequence[Any] = ()
                with self._lock:
                    now_s = perf_counter()
                    if isinstance(outcome, Run):
                        self.scheduler.finish(batch, now_s, now_s - batch.started_s)
                    else:
                        failed = self.scheduler.fail(batch, now_s)
                    decision = self.scheduler.decide(now_s)
                    following = decision.batch
                    if following is None:
                        self._idle.append(inbox)
                try:
                    loop.call_soon_threadsafe(
                        self._settle_from_thread, batch, outcome, failed, decision.dropped, decision.wake_s
                    )
                except RuntimeError:  # the loop has ended; nobody is left to answer
                    return
