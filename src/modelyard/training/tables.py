"""Tables: CSV, Parquet and DataFrames → columns."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from modelyard.errors import ConfigError, DataError, MissingExtra
from modelyard.training.column_names import require_distinct, require_known
from modelyard.training.columns import SourceRows, feature_column, import_pandas, split_column
from modelyard.training.data_config import DataConfig, Progress
from modelyard.training.split import SplitConfig

if TYPE_CHECKING:
    import pandas as pd

_MISSING_TEXTS = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None", "<NA>")
"""What a CSV file may write for a missing value, as pandas reads it."""


def read_csv(path: Path, text: Sequence[str] = ()) -> "pd.DataFrame":
    """Return the table; columns named in `text` are not interpreted."""
    import_pandas()
    try:
        import pyarrow as pa
        from pyarrow import csv
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", "reading CSV") from exc
    require_distinct(_csv_header(path), path)
    try:
        # pyarrow rather than pandas' own parser: strict about ragged rows, recognises dates, reads on all cores.
        read = csv.read_csv(
            path,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                null_values=_MISSING_TEXTS,
                strings_can_be_null=True,
                column_types={name: pa.string() for name in text},
            ),
        )
    except ValueError as exc:  # pyarrow's errors are ValueErrors
        if "Empty CSV file" in str(exc):
            raise DataError(f"{path}: the file is empty; bring a header and rows") from exc
        raise DataError(f"{path}: not readable as CSV: {exc}; correct the file") from exc
    for column in read.schema:
        if pa.types.is_binary(column.type):
            raise DataError(f"{path}: column {column.name!r} is not text in UTF-8; save the file in this encoding")
    table: pd.DataFrame = read.to_pandas()
    return table


def read_parquet(path: Path) -> "pd.DataFrame":
    pandas = import_pandas()
    try:
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", "reading Parquet") from exc
    try:
        require_distinct(parquet.read_schema(path).names, path)
        table: pd.DataFrame = pandas.read_parquet(path)
    except DataError:
        raise
    except (OSError, ValueError) as exc:  # pyarrow's errors are one or the other
        raise DataError(f"{path}: not readable as Parquet: {exc}; write the file again") from exc
    return table


def rows_of_table(table: "pd.DataFrame", data: DataConfig, split: SplitConfig, progress: Progress) -> SourceRows:
    if any(name is not None for name in table.index.names):
        table = table.reset_index()  # a named index holds data
    names = [name for name in table.columns if isinstance(name, str) and name]
    if len(names) != table.shape[1]:
        odd = next(name for name in table.columns if not (isinstance(name, str) and name))
        raise DataError(
            f"{data.source}: column name {odd!r} is not text; name every column, e.g. table.rename(columns=str)"
        )
    require_distinct(names, data.source)
    _require_commas(names, data)
    require_rows(len(table), data)
    require_known([data.label], names, "[data] label")
    require_known(data.features, names, "[data] features")
    require_known(data.drop, names, "[data] drop")
    require_known([split.by] if split.by else [], names, "[split] by")
    features = _feature_names(names, data, split)
    require_known(data.units, features, "[data] units")
    require_known(data.descriptions, features, "[data] descriptions")
    inputs: dict[str, NDArray[Any]] = {}
    refused: list[str] = []
    for i, name in enumerate(features, 1):
        progress(f"converting columns {i}/{len(features)}: {name}")
        try:
            inputs[name] = feature_column(table[name], name, data.max_categories)
        except DataError as exc:
            refused.append(exc.message)  # all of them are told at once
    if refused:
        many = f"{len(refused)} columns cannot be used:\n  " if len(refused) > 1 else ""
        raise DataError(f"{data.source}: {many}" + "\n  ".join(refused), columns=tuple(refused))
    by = split_column(table[split.by], split) if split.by else None
    return SourceRows(inputs, table[data.label], by, {})


def _feature_names(names: Sequence[str], data: DataConfig, split: SplitConfig) -> list[str]:
    both = sorted(set(data.features) & {*data.drop, data.label})
    if both:
        raise ConfigError(f"[data] features: {both[0]!r} is also the label or in drop; take it out of one of them")
    if split.by in data.features and not split.keep:
        raise ConfigError(
            f"[data] features: {split.by!r} is what the split is made by; take it out or set [split] keep = true"
        )
    left_out = {data.label, *data.drop} | ({split.by} if not split.keep else set())
    features = list(dict.fromkeys(data.features)) or [name for name in names if name not in left_out]
    if not features:
        raise DataError(f"{data.source}: no column is left to predict {data.label!r} from; shorten [data] drop")
    return features


def _require_commas(names: Sequence[str], data: DataConfig) -> None:
    """Raise when the label is not found because the whole header was read as one column."""
    if len(names) != 1 or data.label in names or not (data.path or "").endswith(".csv"):
        return
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if separator in names[0]:
            raise DataError(
                f"{data.source}: no column {data.label!r}: the file seems to be separated by {called}; write it with commas, or "
                f"read it in a function of your own ([data] callable) with pandas.read_csv(…, sep={separator!r})"
            )


def require_rows(n_rows: int, data: DataConfig) -> None:
    if n_rows == 0:
        raise DataError(f"{data.source}: has no rows; bring labelled rows")


def _csv_header(path: Path) -> list[str]:
    import csv

    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            return next(csv.reader(stream), [])
    except csv.Error as exc:
        raise DataError(f"{path}: the first line is no CSV header ({exc}); correct the file") from exc
