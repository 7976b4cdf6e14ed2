"""How far long work is, on stderr: a bar where a terminal shows one, a line every few seconds where it does not.

A thread ticks beside the work, so that no step is silent for more than a few seconds even inside a library's call.
"""

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from modelyard.training.fit import FitProgress

QUIET_FOR_S = 4.0
ESTIMATE_FROM = 0.1
"""Share of a fit after which the time left is told."""


class Progress:
    """Steps of one job, one after the other. Use as a context manager; `step` and `detail` from one thread.

    With `enabled=False` nothing is printed.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._terminal = enabled and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._title = ""
        self._detail = ""
        self._started_s = self._step_s = self._printed_s = time.monotonic()

    def __enter__(self) -> Self:
        if self._enabled:
            threading.Thread(target=self._tick, daemon=True, name="progress").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if kind is None:
            self._close_step()
        elif self._terminal:
            click.echo(err=True)

    def step(self, title: str) -> None:
        """Begin a step; the one before is closed with its time."""
        self._close_step()
        with self._lock:
            self._title, self._detail = title, ""
            self._step_s = time.monotonic()
        self._print(f"{title} …")

    def detail(self, text: str) -> None:
        """Say how far the step is."""
        with self._lock:
            self._detail = text
        if self._terminal:
            self._print(f"{self._title}: {text}")

    def fit(self, state: "FitProgress") -> None:
        """Say how far a training loop is."""
        share = (state.epoch - 1 + state.batch / state.n_batches) / state.epochs
        best = "" if state.best_score is None else f", best score {state.best_score:.4f}"
        # The first batches are slow; what they foretell is worth nothing.
        left = f", {duration(state.remaining_s)} left" if ESTIMATE_FROM <= share < 1 else ""
        self.detail(f"{_bar(share)} epoch {state.epoch} of {state.epochs}, loss {state.loss:.4f}{best}{left}")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._enabled:
            with self._lock:
                click.echo(f"\r\033[K{text}" if self._terminal else text, err=True)

    def _close_step(self) -> None:
        with self._lock:
            title, self._title = self._title, ""
        if title and self._enabled:
            took = duration(time.monotonic() - self._step_s)
            detail = f": {self._detail}" if self._detail else ""
            self.note(f"✓ {title}{detail} ({took})")

    def _tick(self) -> None:
        while not self._stop.wait(0.5):
            with self._lock:
                title, detail = self._title, self._detail
            overdue = time.monotonic() - self._printed_s >= QUIET_FOR_S
            if title and (overdue or self._terminal):
                took = duration(time.monotonic() - self._step_s)
                self._print(f"{title}: {detail or 'working'} ({took})")

    def _print(self, text: str) -> None:
        if not self._enabled:
            return
        with self._lock:
            self._printed_s = time.monotonic()
            if self._terminal:
                # Cut to the window: a line that wraps cannot be taken back.
                width = shutil.get_terminal_size().columns - 3
                click.echo(f"\r\033[K  {text[:width]}", nl=False, err=True)
            else:
                click.echo(f"  {text}", err=True)


def duration(seconds: float) -> str:
    """Return "0.4 s", "12 s", "3 min 05 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar(share: float, width: int = 20) -> str:
    full = round(share * width)
    return "█" * full + "░" * (width - full)
