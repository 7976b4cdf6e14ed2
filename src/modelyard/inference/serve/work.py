"""How a request's arrays reach the engine: on the event loop when computing is shorter than handing over, else on the
instance's own thread.
"""

import asyncio
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from numpy.typing import NDArray

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.manifest import Signature
from modelyard.inference.runtime import Engine

Outputs = Mapping[str, NDArray[Any]]

INLINE_BELOW_S = 200e-6
"""Handing a run to a thread and its result back costs about this much, and wakes a second core."""


def place(n_rows: int, row_s: float, *, inline_below_s: float = INLINE_BELOW_S) -> Literal["loop", "thread"]:
    """Say where to run `n_rows` rows of which one alone takes `row_s` seconds.

    Assumes the worst for a batch, that it costs as much as its rows one by one.
    """
    return "loop" if n_rows * row_s <= inline_below_s else "thread"


def measure_row_s(engine: Engine, cases: CaseSet, signature: Signature, n_runs: int = 5) -> float:
    """Return the median seconds the first golden case takes alone; infinite where rows may be of any size."""
    if any(isinstance(axis, str) for spec in signature.inputs for axis in spec.row_shape):
        return float("inf")
    row = {
        spec.name: cases.inputs[spec.name][:1] if spec.batched else cases.inputs[spec.name] for spec in signature.inputs
    }
    times_s = []
    for _ in range(n_runs):
        start_s = time.perf_counter()
        engine.run(row)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


class Instance:
    """One engine with one thread of its own. Owned by the event loop."""

    def __init__(self, engine: Engine, row_s: float, name: str) -> None:
        self._engine = engine
        self._row_s = row_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)  # the thread starts with the first use

    def submit(self, inputs: Outputs, n_rows: int) -> Outputs | asyncio.Future[Outputs]:
        """Return the outputs, or a future of them; cancelling it drops a run that has not begun.

        Raises:
            RequestError: the engine cannot compute this input (also by way of the future).
        """
        if place(n_rows, self._row_s) == "loop":
            return self._engine.run(inputs)
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, self._engine.run, inputs)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
