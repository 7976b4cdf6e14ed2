"""Labelled data in: CSV, Parquet, image folders, NumPy arrays or a callable → a checked, split, hashed `Dataset`.

The first step on a model's walk. From here on there are named arrays, first axis rows, in the datatypes that the bundle's
graph will take; both worlds see the same numbers because floats are rounded to FP32 once, here. tables.py, arrays.py and
images.py read a kind of source each; columns.py holds the rules for values.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays, check_array
from modelyard.bundle.manifest import BATCH, DataLineage, Datatype, TensorSpec
from modelyard.errors import ConfigError, DataError, SignatureMismatch
from modelyard.training.arrays import read_npz, rows_of_arrays
from modelyard.training.callables import call
from modelyard.training.column_names import pick
from modelyard.training.columns import SourceRows, factorize, import_pandas, label_column, take_text, to_float64
from modelyard.training.data_config import DataConfig, Progress, Task
from modelyard.training.images import rows_of_image_folder
from modelyard.training.split import Split, SplitConfig, split_rows
from modelyard.training.tables import read_csv, read_parquet, rows_of_table

if TYPE_CHECKING:
    from modelyard.training.data_report import DataReport

__all__ = ["DataConfig", "Dataset", "data_digest", "load_dataset", "rows_for"]

MAX_SLICE_VALUES = 20
"""A text or boolean input with at most this many values is offered for evaluation per slice."""
_DATATYPES: dict[str, Datatype] = {"b": "BOOL", "i": "INT64", "f": "FP32", "O": "BYTES", "u": "UINT8"}


@dataclass(frozen=True)
class Dataset:
    """Labelled rows, split. All arrays have the rows on their first axis."""

    inputs: Arrays
    """FP32, INT64, BOOL, object arrays of str ("" = missing), UINT8 images (n, H, W, C), or FP32 features (n, F)."""
    specs: tuple[TensorSpec, ...]
    """In the order of `inputs`; `nullable` and `categories` are read off the training rows alone."""
    label: NDArray[Any]
    """Object array of str or int64 for classification, float64 for regression; shape (n,)."""
    label_name: str
    task: Task
    classes: tuple[str | int, ...]
    """Sorted; () for regression."""
    split: Split
    lineage: DataLineage
    slices: Mapping[str, NDArray[Any]]
    """Columns with few values, by which scores are broken down; shape (n,)."""

    @property
    def n_samples(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.int64]) -> Arrays:
        """Return the inputs of these rows, by name."""
        return {name: array[rows] for name, array in self.inputs.items()}


def load_dataset(
    data: DataConfig, split: SplitConfig, *, root: Path, progress: Progress
) -> tuple[Dataset, "DataReport"]:
    """Return the data set and what was found in it.

    Data that no model could be made of is refused here. The report may still hold findings of severity "error": show it,
    then call its `raise_for_errors`.

    Args:
        root: the folder of yard.toml; paths and modules are looked up from it.
        progress: is told, in a few words, what is being worked on.

    Raises:
        ConfigError: a name in the configuration fits nothing in the data; suggests close ones.
        DataError: file, columns, labels or split are unusable; names them and the remedy.
        MissingExtra: pandas, pyarrow, Pillow or scikit-learn is not installed.
    """
    from modelyard.training.checks import check_dataset

    rows = _read_rows(data, split, root, progress)
    label, task, note = label_column(rows.label, data)
    classes: tuple[Any, ...] = ()
    if task == "classification":
        classes = tuple(sorted(set(label.tolist())))
        if len(classes) < 2:
            raise DataError(
                f"label {data.label!r}: every row has the class {classes[0]!r}; bring rows of a second class"
            )
    progress(f"splitting {len(label)} rows: {_how_split(split, task, data.label)}")
    parts = split_rows(split, label, stratify=task == "classification", by=rows.by)
    specs = tuple(_spec(name, array, parts.train, data) for name, array in rows.inputs.items())
    progress("hashing the data")
    lineage = DataLineage(
        source=data.source,
        digest=data_digest([*rows.inputs.items(), (data.label, label), *rows.hashed.items()]),
        n_samples=len(label),
        split=_how_split(split, task, data.label),
        split_digest=parts.digest,
        n_train=len(parts.train),
        n_validation=len(parts.validation),
        n_test=len(parts.test),
    )
    slices = {name: array for name, array in rows.inputs.items() if _is_slice(array)}
    dataset = Dataset(rows.inputs, specs, label, data.label, task, classes, parts, lineage, slices)
    return dataset, check_dataset(dataset, progress=progress, notes=(note,) if note else ())


def rows_for(path: Path, specs: Sequence[TensorSpec]) -> Arrays:
    """Return unlabelled rows of a .csv, .parquet or .npz file as the arrays that `specs` describe; other columns are ignored.

    Raises:
        DataError: the file is unusable, a column is absent, has missing values where `specs` has none, or does not fit.
    """
    if path.suffix == ".npz":
        columns: dict[str, Any] = read_npz(path)
    elif path.suffix in (".csv", ".parquet"):
        text = [spec.name for spec in specs if spec.datatype == "BYTES"]
        table = read_csv(path, text) if path.suffix == ".csv" else read_parquet(path)
        columns = {str(name): table[name] for name in table.columns}
    else:
        raise DataError(f"{path}: rows are read from .csv, .parquet and .npz, got {path.suffix!r}; convert the file")
    return {spec.name: _fit(pick(columns, spec.name, str(path)), spec, str(path)) for spec in specs}


def data_digest(columns: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """Return the SHA-256 of named columns in their order; row order counts.

    For each column: its name; its dtype ("f4", "i8", "b1", "u1", "f8" or "text"); its shape; its values. Names, dtypes and
    texts are UTF-8 behind their byte count; counts and axes are little-endian int64, a shape behind its number of axes.
    Numbers are little-endian in C order, with every NaN as the quiet NaN without payload. Text is written as the number of
    distinct values, these values in order of first appearance, and each row's place among them as little-endian int32.
    """
    digest = hashlib.sha256()
    for name, array in columns:
        _update_text(digest, name)
        _update_text(digest, "text" if array.dtype == object else array.dtype.str[1:])
        digest.update(struct.pack(f"<{1 + array.ndim}q", array.ndim, *array.shape))
        if array.dtype == object:
            codes, distinct = factorize(array)
            digest.update(struct.pack("<q", len(distinct)))
            for value in distinct:
                _update_text(digest, value)
            digest.update(codes.astype("<i4").tobytes())
        else:
            if array.dtype.kind == "f" and np.isnan(array).any():
                array = np.where(np.isnan(array), np.array(np.nan, dtype=array.dtype), array)
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


def _read_rows(data: DataConfig, split: SplitConfig, root: Path, progress: Progress) -> SourceRows:
    if data.callable is not None:
        progress(f"calling {data.callable}")
        made = call(data.callable, root, field="[data] callable")
        if isinstance(made, Mapping):
            return rows_of_arrays({str(name): np.asarray(array) for name, array in made.items()}, data, split, progress)
        if isinstance(made, import_pandas().DataFrame):
            return rows_of_table(made, data, split, progress)
        raise DataError(
            f"[data] callable {data.callable!r} returned a {type(made).__name__}; return a pandas DataFrame or a dict of arrays"
        )
    path = root / (data.path or "")
    if path.is_dir():
        return rows_of_image_folder(path, data, split, progress)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; correct path in [data], it is relative to {root}", path=str(path)
        )
    progress(f"reading {path.name}")
    if path.suffix == ".npz":
        return rows_of_arrays(read_npz(path), data, split, progress)
    if path.suffix == ".csv":
        return rows_of_table(read_csv(path), data, split, progress)
    if path.suffix == ".parquet":
        return rows_of_table(read_parquet(path), data, split, progress)
    raise ConfigError(
        f"[data] path = {data.path!r}: tables are .csv or .parquet, arrays .npz, images a folder; convert the file or use callable"
    )


def _spec(name: str, array: NDArray[Any], train: NDArray[np.int64], data: DataConfig) -> TensorSpec:
    trained = array[train] if array.dtype != np.uint8 else array[:0]
    is_text = array.dtype == object
    return TensorSpec(
        name=name,
        datatype=_DATATYPES[array.dtype.kind],
        shape=(BATCH, *array.shape[1:]),
        nullable=bool((trained == "").any() if is_text else trained.dtype.kind == "f" and np.isnan(trained).any()),
        categories=tuple(sorted(set(trained.tolist()) - {""})) if is_text else None,
        unit=data.units.get(name),
        description=data.descriptions.get(name),
    )


def _is_slice(array: NDArray[Any]) -> bool:
    return array.dtype == np.bool_ or (array.dtype == object and len(set(array.tolist())) <= MAX_SLICE_VALUES)


def _fit(values: Any, spec: TensorSpec, source: str) -> NDArray[Any]:
    """Return one file column or array as the array that `spec` describes."""
    where = f"{source}: {spec.name!r}"
    if hasattr(values, "iloc"):
        if spec.datatype == "BYTES":
            array = take_text(*factorize(values.astype(str).where(values.notna(), None)))
        elif values.isna().any() and np.dtype(spec.numpy_dtype).kind != "f":
            raise DataError(
                f"{where} is missing in {int(values.isna().sum())} rows, and {spec.datatype} has no missing value"
            )
        else:
            try:
                array = to_float64(values) if spec.numpy_dtype.kind == "f" else values.to_numpy()
            except (ValueError, TypeError) as exc:
                raise DataError(f"{where} does not read as {spec.datatype} ({exc}); correct the column") from exc
    else:
        array = values.astype(object) if values.dtype.kind in "US" and spec.datatype == "BYTES" else values
    if len(spec.shape) == 2 and spec.shape[1] == 1 and array.ndim == 1:
        array = array[:, np.newaxis]
    numbers = array.dtype.kind in "biuf" and spec.numpy_dtype.kind in "biuf"
    if numbers and array.dtype != spec.numpy_dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(spec.numpy_dtype)
        if spec.numpy_dtype.kind != "f" and not np.array_equal(cast.astype(array.dtype), array):
            raise DataError(f"{where} holds values that {spec.datatype} cannot hold; correct the column")
        array = cast
    try:
        check_array(array, spec, where)
    except SignatureMismatch as exc:
        raise DataError(f"{exc}; correct the file") from exc
    return array


def _how_split(split: SplitConfig, task: Task, label: str) -> str:
    sizes = f"validation {split.validation:g}, test {split.test:g}"
    if split.method == "time":
        return f"time by {split.by}, {sizes}"
    how = f"group by {split.by}" if split.method == "group" else "random"
    stratified = f" stratified by {label}" if split.method == "random" and task == "classification" else ""
    return f"{how}{stratified}, {sizes}, seed {split.seed}"


def _update_text(digest: "hashlib._Hash", text: str) -> None:
    encoded = text.encode("utf-8", "surrogatepass")
    digest.update(struct.pack("<q", len(encoded)))
    digest.update(encoded)
