"""What every importer hands back, and the samples it is given: rows as the original takes them, and as the graph does."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays, Run
from modelyard.bundle.manifest import BATCH, NUMPY_DTYPES, Datatype, Signature, TensorSpec
from modelyard.errors import DataError
from modelyard.training.column_names import require_distinct
from modelyard.training.columns import feature_column, to_float32

if TYPE_CHECKING:
    import pandas as pd

FEATURES = "features"
Task = Literal["classification", "regression", "other"]
_DATATYPES: dict[np.dtype[Any], Datatype] = {
    dtype: datatype  # type: ignore[misc]  # its keys are the literals
    for datatype, dtype in NUMPY_DTYPES.items()
    if datatype != "BYTES"
}


@dataclass(frozen=True)
class Samples:
    """The same rows twice: `given` for the original, `inputs` for the graph, with floats rounded and "" for missing text."""

    specs: tuple[TensorSpec, ...]
    given: Arrays
    inputs: Arrays


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere, drawn as a graph, beside the original to prove it against."""

    library: str
    """"sklearn", "lightgbm" or "torch"."""
    task: Task
    model: bytes
    signature: Signature
    original: Run
    """Answers rows, rounded or not, with outputs by the graph's names."""
    samples: Samples
    notes: tuple[str, ...] = ()


def frame_samples(table: "pd.DataFrame") -> Samples:
    """Return the columns of a table as inputs: text, whole numbers, floats (rounded to FP32) and booleans.

    Raises:
        DataError: no rows, a column name that is not text or stands twice, or a column of another kind.
    """
    names = list(table.columns)
    odd = [name for name in names if not (isinstance(name, str) and name)]
    if odd:
        raise DataError(
            f"samples: column name {odd[0]!r} is not text; name every column, e.g. table.rename(columns=str)"
        )
    require_distinct(names, "samples")
    _require_rows(len(table))
    inputs = {name: feature_column(table[name], name, max_categories=len(table)) for name in names}
    given = {name: table[name].to_numpy() for name in names}
    specs = tuple(_spec(name, array) for name, array in inputs.items())
    return Samples(specs, given, inputs)


def matrix_samples(matrix: Any) -> Samples:
    """Return a matrix of numbers, shape (n, n_features), as one input, rounded to FP32.

    Raises:
        DataError: it is no such matrix, or has no rows.
    """
    array = np.asarray(matrix)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise DataError(
            f"samples must be a DataFrame, or a matrix of numbers with one row per sample, got {type(matrix).__name__} of dtype "
            f"{array.dtype} and shape {array.shape}; give some rows that the model was trained on"
        )
    _require_rows(len(array))
    inputs = {FEATURES: to_float32(array, "samples")}
    return Samples((_spec(FEATURES, inputs[FEATURES]),), {FEATURES: array}, inputs)


def tensor_samples(array: NDArray[Any], floats: np.dtype[Any]) -> Samples:
    """Return a tensor, shape (n, ...), as one input; floats are cast to the datatype that the model computes in.

    Raises:
        DataError: its datatype is none that a graph takes, or it has no rows.
    """
    inputs = array.astype(floats) if array.dtype.kind == "f" else array
    if array.ndim == 0 or inputs.dtype not in _DATATYPES:
        raise DataError(
            f"samples must be an array of numbers with one row per sample, got dtype {array.dtype} and shape {array.shape}; give some "
            "rows that the model was trained on"
        )
    _require_rows(len(array))
    # A module computes in one datatype; it can be asked no digits beyond those.
    rows = {"input": np.ascontiguousarray(inputs)}
    return Samples((_spec("input", rows["input"]),), rows, rows)


def _require_rows(n_rows: int) -> None:
    if n_rows == 0:
        raise DataError("samples has no rows; give some rows that the model was trained on")


def _spec(name: str, array: NDArray[Any]) -> TensorSpec:
    is_text = array.dtype == object
    missing = (array == "") if is_text else np.isnan(array) if array.dtype.kind == "f" else np.False_
    return TensorSpec(
        name=name,
        datatype="BYTES" if is_text else _DATATYPES[array.dtype],
        shape=(BATCH, *array.shape[1:]),
        nullable=bool(np.any(missing)),
    )
