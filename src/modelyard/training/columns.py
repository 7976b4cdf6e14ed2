"""A column of a table or an array → an array in one of the datatypes a graph takes; the rules, and what breaks them.

Below tables.py, arrays.py and images.py, which find the columns in a kind of source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import DataError, MissingExtra
from modelyard.training.data_config import DataConfig, Task
from modelyard.training.split import SplitConfig

if TYPE_CHECKING:
    import pandas as pd

MAX_INTEGER_CLASSES = 100
"""An integer label with more distinct values than this is taken for a quantity."""
MAX_FLOAT_CLASSES = 20
"""As above for whole numbers in a float column."""


@dataclass(frozen=True)
class SourceRows:
    """What a kind of source was read into: converted inputs, the label as it stands there."""

    inputs: dict[str, NDArray[Any]]
    label: Any
    """As read: a pandas Series or an array."""
    by: NDArray[Any] | None
    hashed: dict[str, NDArray[Any]]
    """What belongs to the data's digest beyond inputs and label."""


def feature_column(series: "pd.Series[Any]", name: str, max_categories: int) -> NDArray[Any]:
    """Return a table's column as BOOL, INT64, FP32 or text (n,); missing is NaN or ""."""
    series, kind = kind_of(series, f"column {name!r}")
    if kind == "text":
        codes, distinct = factorize(series)
        if len(distinct) > max_categories:
            raise DataError(
                f"column {name!r} has {len(distinct)} distinct texts, max_categories is {max_categories}; put it into [data] "
                "drop, group its values into fewer, or raise max_categories"
            )
        return take_text(codes, distinct)
    if kind == "timestamp":
        raise DataError(
            f"column {name!r} holds timestamps, and the bundle's graph starts at numbers; derive numeric columns (hour, "
            "weekday), split by it ([split] by), or put it into [data] drop"
        )
    if kind == "duration":
        raise DataError(f"column {name!r} holds durations; make them numbers, e.g. column.dt.total_seconds()")
    missing = series.isna().to_numpy()
    if kind == "boolean" and not missing.any():
        return series.to_numpy(dtype=np.bool_)
    if kind == "integer" and not missing.any():
        return to_int64(series, f"column {name!r}")
    return to_float32(to_float64(series), f"column {name!r}")


def split_column(series: "pd.Series[Any]", split: SplitConfig) -> NDArray[Any]:
    """Return groups as text or numbers, times as numbers or datetime64[ns] in UTC; missing is "", NaN or NaT."""
    pd = import_pandas()
    where = f"[split] by = {split.by!r}: the column"
    series, kind = kind_of(series, where)
    if kind == "timestamp" or (kind == "text" and split.method == "time"):
        try:
            moments = pd.to_datetime(series, utc=True, format="ISO8601" if kind == "text" else None)
        except (ValueError, TypeError) as exc:
            raise DataError(f"{where} does not read as times ({exc}); write them as 2013-01-31T05:15:00Z") from exc
        times: NDArray[Any] = moments.dt.tz_convert(None).to_numpy(dtype="datetime64[ns]")
        return times
    if kind == "text":
        return take_text(*factorize(series))
    if kind == "duration":
        series, kind = series.dt.total_seconds(), "float"
    return to_int64(series, where) if kind == "integer" and not series.isna().any() else to_float64(series)


def label_column(values: Any, data: DataConfig) -> tuple[NDArray[Any], Task, str]:
    """Return the label, what it asks for, and a sentence where that was inferred in a way a person should know."""
    pd = import_pandas()
    where = f"label {data.label!r}"
    series, kind = kind_of(values if hasattr(values, "iloc") else pd.Series(values), where)
    if kind in ("timestamp", "duration"):
        raise DataError(f"{where} holds {kind}s; make it a number, a boolean or text")
    missing = series.isna().to_numpy() | ((series == "").to_numpy() if kind == "text" else False)
    n_missing = int(np.count_nonzero(missing))
    if n_missing:
        is_csv = data.path is not None and data.path.endswith(".csv")
        texts = "; in CSV an empty field, NA, N/A, NaN, NULL and None are missing: call such a class otherwise"
        raise DataError(
            f"{where} is missing in {n_missing} of {len(series)} rows, first in row {int(np.argmax(missing))}; leave those rows "
            f"out or fill the label in{texts if is_csv else ''}",
            n_missing=n_missing,
        )
    if kind == "text":
        if data.task == "regression":
            raise DataError(
                f'{where} is text, which cannot be regressed; set task = "classification" or make it a number'
            )
        return take_text(*factorize(series)), "classification", ""
    numbers = to_float64(series)
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers)))
        raise DataError(f"{where}: {numbers[row]} in row {row} is not finite; leave the row out or correct it")
    if kind == "boolean" and data.task != "regression":
        return numbers.astype(np.int64), "classification", f"{where} is boolean; its classes are 0 (false) and 1 (true)"
    whole = kind in ("integer", "boolean") or bool((numbers == np.floor(numbers)).all())
    n_distinct = len(np.unique(numbers))
    task, note = data.task, ""
    if task is None:
        limit = MAX_INTEGER_CLASSES if kind == "integer" else MAX_FLOAT_CLASSES
        task = "classification" if whole and n_distinct <= limit else "regression"
        shape = f"{n_distinct} distinct {'whole ' if whole else ''}numbers"
        other = "regression" if task == "classification" else "classification"
        note = f'{where} holds {shape}, taken as {task}; set task = "{other}" in [data] if that is wrong'
    if task == "regression":
        if n_distinct < 2:
            raise DataError(f"{where}: every row has the value {numbers[0]}; there is nothing to predict")
        row = int(np.argmax(np.abs(numbers)))
        if abs(numbers[row]) > np.finfo(np.float32).max:
            raise DataError(
                f"{where}: {numbers[row]} in row {row} is too large for 32 bits, in which the bundle answers; change the label's "
                "unit, or predict its logarithm"
            )
        return numbers, task, note
    if not whole:
        row = int(np.argmax(numbers != np.floor(numbers)))
        raise DataError(
            f"{where}: {numbers[row]} in row {row} cannot name a class; use integers or text, or regression"
        )
    return (to_int64(series, where) if kind == "integer" else numbers.astype(np.int64)), task, note


def kind_of(series: "pd.Series[Any]", where: str) -> tuple["pd.Series[Any]", str]:
    """Return the column, categories unpacked, and boolean, integer, float, text, timestamp or duration.

    Raises:
        DataError: it holds several kinds, or one that is no value of a column.
    """
    pd = import_pandas()
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype if not series.isna().any() else object)
    inferred = pd.api.types.infer_dtype(series, skipna=True)
    kinds = {
        "boolean": "boolean",
        "integer": "integer",
        "integer-na": "integer",
        "floating": "float",
        "mixed-integer-float": "float",
        "decimal": "float",
        "empty": "float",
        "string": "text",
        "datetime64": "timestamp",
        "datetime": "timestamp",
        "date": "timestamp",
        "period": "timestamp",
        "time": "timestamp",
        "timedelta64": "duration",
        "timedelta": "duration",
    }
    if inferred in kinds:
        return series, kinds[inferred]
    present = series.dropna()
    first = present.iloc[0]
    other = next((value for value in present if _family(value) != _family(first)), None)
    if other is None:
        raise DataError(f"{where} holds values of type {type(first).__name__}; make them numbers, booleans or text")
    raise DataError(
        f"{where} mixes kinds: {first!r} ({type(first).__name__}) and {other!r} ({type(other).__name__}); make them one "
        "kind, or text with column.astype(str)"
    )


def _family(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "boolean"
    if isinstance(value, complex):
        return "complex"
    return "number" if isinstance(value, int | float | np.number) else type(value).__name__


def to_int64(series: "pd.Series[Any]", where: str) -> NDArray[np.int64]:
    values: NDArray[Any] = series.to_numpy()
    limits = np.iinfo(np.int64)
    if int(values.max()) > limits.max or int(values.min()) < limits.min:
        raise DataError(f"{where} holds integers that do not fit into 64 bits with sign; make it float or text")
    return values.astype(np.int64)


def to_float64(series: "pd.Series[Any]") -> NDArray[np.float64]:
    if series.dtype == object:  # decimals, booleans and integers with None among them
        series = series.where(series.notna(), np.nan)
        return series.to_numpy(dtype=np.float64)
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


def to_float32(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # too large becomes infinite, and is told below
        rounded = values.astype(np.float32)
    infinite = np.isinf(rounded)
    if infinite.any():
        row, *column = np.argwhere(infinite)[0].tolist()
        place = f"row {row}, column {column[0]}" if column else f"row {row}"
        raise DataError(
            f"{where}: {values[(row, *column)]} in {place} is not finite in 32 bits ({int(infinite.sum())} such values); make it "
            "missing, or scale or clip the values"
        )
    return rounded


def factorize(values: Any) -> tuple[NDArray[np.int64], list[str]]:
    """Return each row's place among the distinct texts, and those in order of first appearance; missing becomes ""."""
    codes, uniques = import_pandas().factorize(values)
    distinct = [str(value) for value in uniques]
    if (codes < 0).any():
        empty = distinct.index("") if "" in distinct else len(distinct)
        distinct += [""] if empty == len(distinct) else []
        codes = np.where(codes < 0, empty, codes)
        # "" may have come late: number the values by first appearance again.
        _, first = np.unique(codes, return_index=True)
        order = np.argsort(first, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return place[codes].astype(np.int64), [distinct[i] for i in order]
    return codes.astype(np.int64), distinct


def take_text(codes: NDArray[np.int64], distinct: Sequence[str]) -> NDArray[Any]:
    texts = np.empty(len(distinct), dtype=object)
    texts[:] = distinct
    taken: NDArray[Any] = texts[codes]
    return taken


def import_pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as exc:
        raise MissingExtra("pandas", "train", "reading labelled data") from exc
    return pd
