"""Requests that wait for a version to be loaded, each within its deadline; many may wait for one load.

Front → `Repository.when_ready` → `WaitingRoom` → the load's end (keeper.py), or the deadline, whichever comes first
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

from modelyard.errors import DeadlineExceeded, Overloaded
from modelyard.inference.serve.models.loading import Loaded
from modelyard.inference.serve.models.residency import Key

MAX_WAITING = 10_000
"""Over all models; each holds a request in memory."""

Then = Callable[[Loaded], None]
Otherwise = Callable[[Exception], None]


@dataclass(slots=True, eq=False)
class _Waiter:
    then: Then
    otherwise: Otherwise
    timer: asyncio.TimerHandle | None = None


class WaitingRoom:
    """Belongs to the event loop."""

    def __init__(self, expected_load_s: Callable[[Key], float]) -> None:
        """`expected_load_s`: how long a load usually takes, for who is told to come back."""
        self._expected_load_s = expected_load_s
        self._waiting: dict[Key, dict[_Waiter, None]] = {}
        self._n_waiting = 0

    def __len__(self) -> int:
        return self._n_waiting

    def enter(self, key: Key, deadline_s: float, then: Then, otherwise: Otherwise) -> Callable[[], object]:
        """Wait; return what ends the wait without calling either.

        Args:
            deadline_s: on the clock of time.perf_counter(); `otherwise` is then called with DeadlineExceeded.
            otherwise: called at once with Overloaded when too many wait already.
        """
        waiter = _Waiter(then, otherwise)
        if self._n_waiting >= MAX_WAITING:
            otherwise(
                Overloaded(
                    f"{key[0]}: refused, since {MAX_WAITING} requests wait for models to be loaded; try again later",
                    cause="queue_full",
                    retry_after_s=self._expected_load_s(key),
                )
            )
            return lambda: None
        loop = asyncio.get_running_loop()
        waiter.timer = loop.call_later(max(0.0, deadline_s - perf_counter()), self._give_up, key, waiter)
        self._waiting.setdefault(key, {})[waiter] = None
        self._n_waiting += 1
        return lambda: self._leave(key, waiter)

    def ready(self, key: Key, loaded: Loaded) -> None:
        """The version has been loaded: call everybody who waits for it."""
        for waiter in self._all(key):
            waiter.then(loaded)

    def failed(self, key: Key, error: Exception) -> None:
        """It cannot be loaded."""
        for waiter in self._all(key):
            waiter.otherwise(error)

    def _all(self, key: Key) -> Iterator[_Waiter]:
        """Yield who waits for a version and has not left meanwhile; they wait no more."""
        for waiter in tuple(self._waiting.get(key, ())):
            if self._leave(key, waiter):
                yield waiter

    def _give_up(self, key: Key, waiter: _Waiter) -> None:
        if self._leave(key, waiter):
            retry_after_s = self._expected_load_s(key)
            waiter.otherwise(
                DeadlineExceeded(
                    f"{key[0]} version {key[1]} is being loaded, which takes longer than this request may wait; try again in "
                    f"{retry_after_s:.2g} s, or allow more time with the header Modelyard-Timeout-Ms",
                    cause="loading",
                    retry_after_s=retry_after_s,
                )
            )

    def _leave(self, key: Key, waiter: _Waiter) -> bool:
        waiting = self._waiting.get(key, {})
        if waiter not in waiting:
            return False
        del waiting[waiter]
        self._n_waiting -= 1
        if waiter.timer is not None:
            waiter.timer.cancel()
        if not waiting:
            del self._waiting[key]
        return True
