"""Rows with named columns ↔ named arrays, by a bundle's signature: `bytes → rows → arrays → engine → arrays → rows`.

A row is an object, {"dep_hour": 7, "carrier": "UA"}; a model with one input also takes the bare value. In a row

- null, or a column left out, is a missing value, allowed where the signature says nullable;
- a value never seen in training is fine where the column has categories: the graph answers it as "unknown";
- a tensor is nested lists of exactly its shape; trailing axes of size 1 may be left out, so that an image of
  [28, 28, 1] may be given as [28, 28], and a column of [1] as a number.

In an answer, a score output with class labels is {label: score}, everything else is the value itself (nested lists for a
tensor, the number for a tensor of one); NaN, infinities and missing text are null.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.values import bfloat16_values, expected, short, to_array, to_values


def _row(i: int) -> str:
    return f"row {i}"


def rows_to_arrays(
    rows: Sequence[Any], signature: Signature, *, place: Callable[[int], str] = _row
) -> dict[str, NDArray[Any]]:
    """Return one array per input, shape (len(rows), *row shape), or without the first axis where an input takes no batches.

    Args:
        place: names the i-th row for a message, e.g. "line 7"; by default rows are counted from 0.

    Raises:
        RequestError: no rows, an unknown column, a value that does not fit; names row, column, value and what fits.
    """
    if not isinstance(rows, list | tuple):
        raise RequestError(f"the rows must be a list, got {short(rows)}; give a list of objects, one per row")
    if not rows:
        raise RequestError("there are no rows; give at least one")
    if len(rows) > 1 and not all(spec.batched for spec in signature.inputs):
        raise RequestError(f"this model takes one row at a time, got {len(rows)}; send them one by one", rows=len(rows))
    named = [_named(i, row, signature, place) for i, row in enumerate(rows)]
    return {spec.name: _column([row.get(spec.name) for row in named], spec, place) for spec in signature.inputs}


def arrays_to_rows(outputs: Mapping[str, NDArray[Any]], signature: Signature) -> list[dict[str, Any]]:
    """Return one {output: value} per row of the outputs, which fit `signature`."""
    return _rows(outputs, signature.outputs)


def predictions(outputs: Mapping[str, NDArray[Any]], signature: Signature) -> list[Any]:
    """Return the rows as they are answered over HTTP: as above, or the bare value where the model has one output."""
    rows = arrays_to_rows(outputs, signature)
    if len(signature.outputs) > 1:
        return rows
    return [row[signature.outputs[0].name] for row in rows]


def example_row(inputs: Mapping[str, NDArray[Any]], signature: Signature) -> dict[str, Any]:
    """Return the first row of arrays that fit the inputs of `signature`, such as golden cases, the way a client would send it."""
    first = {spec.name: inputs[spec.name][:1] if spec.batched else inputs[spec.name] for spec in signature.inputs}
    return _rows(first, signature.inputs)[0]


def _rows(arrays: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    batched = [spec for spec in specs if spec.batched]
    n_rows = len(arrays[batched[0].name]) if batched else 1
    columns = {spec.name: _answers(arrays[spec.name], spec, n_rows) for spec in specs}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _named(index: int, row: Any, signature: Signature, place: Callable[[int], str]) -> Mapping[str, Any]:
    names = [spec.name for spec in signature.inputs]
    if not isinstance(row, Mapping):
        if len(names) == 1:
            return {names[0]: row}
        raise RequestError(
            f"{place(index)} must be an object of columns, got {short(row)}; the columns are {', '.join(names)}",
            row=index,
        )
    unknown = [name for name in row if name not in names]
    if unknown:
        raise RequestError(
            f"{place(index)}: unknown column {short(unknown[0])}; the columns are {', '.join(names)}",
            row=index,
            column=unknown[0],
        )
    return row


def _column(values: list[Any], spec: TensorSpec, place: Callable[[int], str]) -> NDArray[Any]:
    flat, shape = _flatten(values, spec, place)
    row_size = len(flat) // len(values)

    def value_place(i: int) -> str:
        index = np.unravel_index(i % row_size, shape[1:]) if row_size > 1 else ()
        return f"{place(i // row_size)}, column {spec.name!r}{''.join(f'[{k}]' for k in index)}"

    array = to_array(flat, spec, value_place).reshape(shape)
    return array if spec.batched else array[0]


def _flatten(values: list[Any], spec: TensorSpec, place: Callable[[int], str]) -> tuple[list[Any], tuple[int, ...]]:
    """Unpack nested lists level by level; return the innermost values and the shape (len(values), *row shape)."""
    level, shape = values, [len(values)]
    for depth, axis in enumerate(spec.row_shape):
        rest = spec.row_shape[depth:]
        is_list = [isinstance(value, list | tuple) for value in level]
        if all(size == 1 for size in rest):  # any of these may be left out
            level = [_unwrapped(value, len(rest)) for value in level] if any(is_list) else level
            shape += [1] * len(rest)
            break
        size = axis if isinstance(axis, int) else next(map(len, itertools.compress(level, is_list)), 0)
        for i, value in enumerate(level):
            if not is_list[i] or len(value) != size:
                got = f"{len(value)} values" if is_list[i] else short(value)
                row = i * len(values) // len(level)
                raise RequestError(
                    f"{place(row)}, column {spec.name!r} must be lists of shape {list(spec.row_shape)} of {expected(spec)}: "
                    f"axis {depth} takes {size if isinstance(axis, int) else 'equally many'} values, got {got}",
                    row=row,
                    column=spec.name,
                )
        level = list(itertools.chain.from_iterable(level))
        shape.append(size)
        if not level:
            shape += [size if isinstance(size, int) else 0 for size in rest[1:]]
            break
    return level, tuple(shape)


def _unwrapped(value: Any, depth: int) -> Any:
    """Return the value within up to `depth` lists of one."""
    for _ in range(depth):
        if not isinstance(value, list | tuple) or len(value) != 1:
            break
        value = value[0]
    return value


def _answers(array: NDArray[Any], spec: TensorSpec, n_rows: int) -> list[Any]:
    """Return the value of one output for each row."""
    if spec.datatype == "BF16":
        array = bfloat16_values(array)
    if not spec.batched:
        return [to_values(array)] * n_rows
    labels = spec.labels or ()
    is_text = array.dtype.kind in "OUS"
    if labels and not is_text and array.shape[1:] == (len(labels),):
        names = [str(label) for label in labels]
        return [dict(zip(names, scores, strict=True)) for scores in to_values(array)]
    if array.shape[1:] == (1,):
        array = array.reshape(n_rows)
    values: list[Any] = to_values(array)
    if is_text and spec.nullable and array.ndim == 1:
        return [value or None for value in values]
    return values
