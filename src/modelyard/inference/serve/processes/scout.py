"""How many workers suit the models of a store: measured in a short-lived process, before the workers are forked.

The process that is to fork must have no threads and no sessions, so it cannot load a model itself.
"""

import os
from collections.abc import Callable, Sequence

import msgspec

from modelyard.errors import ModelyardError
from modelyard.inference.serve.models.loading import Pick, n_cores
from modelyard.inference.serve.scheduling.placement import workers_for

MAX_MEASURED = 8
"""Models that are measured; with more than these, some are likely to be light."""


def workers_by_measuring(picks: Sequence[Pick], measure: Callable[[Pick], float]) -> int:
    """Return how many workers suit `picks`; where nothing can be measured, one per core.

    Args:
        measure: loads a version and returns the seconds that one row takes; called in another process.
    """
    cores = n_cores()
    if cores == 1 or not picks:
        return cores
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        _measure_and_end(picks, measure, writable)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    row_s = msgspec.json.decode(told, type=dict[str, float]) if told else {}
    return workers_for(row_s, cores) if row_s else cores


def _measure_and_end(picks: Sequence[Pick], measure: Callable[[Pick], float], writable: int) -> None:
    """In the child: write what each model's row takes, and end. What cannot be loaded is said by the workers."""
    row_s = {}
    try:
        for pick in picks[:MAX_MEASURED]:
            try:
                row_s[pick.name] = measure(pick)
            except (ModelyardError, OSError):
                continue
        os.write(writable, msgspec.json.encode(row_s))
    finally:
        os._exit(0)
