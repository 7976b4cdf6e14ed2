"""Whether a graph answers each row alike whatever shares its batch.

Dynamic quantization, for one, takes its ranges from the whole batch, so that an outlier changes its neighbours' answers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays

TOLERANCE = 1e-3


def rows_independent(run: Callable[[Arrays], Arrays], rows: Arrays) -> bool:
    """Return whether every row is answered alike alone, in a batch, in another order, and beside an outlier.

    Args:
        run: the engine's own `run`, not wrapped.
        rows: a few dozen rows, e.g. the golden cases.
    """
    n_rows = len(next(iter(rows.values())))
    alone = [run({name: array[i : i + 1] for name, array in rows.items()}) for i in range(n_rows)]
    wanted = {name: np.concatenate([answer[name] for answer in alone]) for name in alone[0]}
    backwards = np.arange(n_rows)[::-1]
    reversed_rows = run({name: array[backwards] for name, array in rows.items()})
    batches = [run(rows), {name: answer[backwards] for name, answer in reversed_rows.items()}]
    for extreme in (_largest, _smallest):
        beside = run({name: np.concatenate([array, extreme(array)]) for name, array in rows.items()})
        batches.append({name: answer[:n_rows] for name, answer in beside.items()})
    return all(_same(wanted[name], answer[name]) for answer in batches for name in wanted)


def _largest(array: NDArray[Any]) -> NDArray[Any]:
    """One row far outside of the others; integers stay within what was seen, since they may be positions in a table."""
    if array.dtype.kind == "f":
        return np.full_like(array[:1], 10 * max(1.0, float(np.nanmax(np.abs(array), initial=0))))
    if array.dtype.kind in "iu":
        return np.full_like(array[:1], np.iinfo(array.dtype).max if array.dtype.itemsize == 1 else array.max())
    return array[:1]


def _smallest(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "f":
        return -_largest(array)
    if array.dtype.kind in "iu":
        return np.full_like(array[:1], np.iinfo(array.dtype).min if array.dtype.itemsize == 1 else array.min())
    return array[:1]


def _same(wanted: NDArray[Any], got: NDArray[Any]) -> bool:
    if wanted.dtype.kind == "f":
        tolerance = TOLERANCE
        return bool(np.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True))
    return bool((wanted == got).all())
