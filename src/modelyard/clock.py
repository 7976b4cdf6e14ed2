"""Time as an argument, so that tests and simulations can jump."""

import os
import time
from typing import Protocol


class Clock(Protocol):
    """Where seconds come from. Implementations are safe to call from any thread."""

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start; never goes back."""
        ...

    def cpu_s(self) -> float:
        """Return CPU seconds used by this process, its finished children included."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def cpu_s(self) -> float:
        spent = os.times()
        return spent.user + spent.system + spent.children_user + spent.children_system


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s
        self.used_s = 0.0

    def advance(self, seconds: float, *, cpu_s: float = 0.0) -> None:
        self.now_s += seconds
        self.used_s += cpu_s

    def monotonic_s(self) -> float:
        return self.now_s

    def cpu_s(self) -> float:
        return self.used_s
