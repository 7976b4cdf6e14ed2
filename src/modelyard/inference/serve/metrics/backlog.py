"""What the event loop leaves for a thread to do: lines to write, traces to send. Bounded, so that a slow disk costs lines and
not memory, and gathered, so that the thread wakes a few times a second and not for every request.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_TURN_S = 1e-4


class Backlog(Generic[Item]):
    """Items put on the event loop and worked off on a thread. One thread puts, `close` may be called from any."""

    def __init__(
        self, name: str, work: "Callable[[Backlog[Item]], None]", *, max_pending: int, gather_s: float, hurry_at: int
    ) -> None:
        """
        Args:
            name: of the thread.
            work: takes everything that is pending, by `take`, and returns; called on the thread.
            max_pending: items that may wait; later ones are dropped.
            gather_s: how long the first item waits for others.
            hurry_at: the number of items that ends the wait.
        """
        self._name = name
        self._work = work
        self._max_pending = max_pending
        self._gather_s = gather_s
        self._hurry_at = hurry_at
        self._pending: deque[Item] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self.closing = False
        """Somebody waits for the thread to end."""
        self.n_dropped = 0

    def __len__(self) -> int:
        return len(self._pending)

    def start(self) -> None:
        """Start the thread; after the fork, since threads do not survive one."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        pending = self._pending
        if len(pending) >= self._max_pending:
            self.n_dropped += 1
            return
        pending.append(item)
        if len(pending) == 1:
            self._wake.set()
        elif len(pending) == self._hurry_at:
            self._hurry.set()

    def take(self, turn: int) -> Iterator[Item]:
        """Yield what is pending; after each `turn` items the event loop gets the interpreter back.

        A thread that computes keeps the interpreter for 5 ms at a time, and every request would wait for it.
        """
        while self._pending:
            for _ in range(min(turn, len(self._pending))):
                yield self._pending.popleft()
            time.sleep(_TURN_S)

    def wake(self) -> None:
        """Let the work be done now, whether or not anything is pending."""
        self._wake.set()
        self._hurry.set()

    def close(self, timeout_s: float) -> bool:
        """Work off what is pending, for as long as `timeout_s`; say whether it was done by then."""
        self.closing = True
        self.wake()
        if self._thread is None:
            return not self._pending
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        last = False
        while not last:
            self._wake.wait()
            self._wake.clear()
            if not self.closing:
                self._hurry.wait(self._gather_s)
                self._hurry.clear()
            last = self.closing  # asked before the work, which then takes all that was put before
            self._work(self)
