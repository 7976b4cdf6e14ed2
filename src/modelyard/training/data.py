"""Labelled data in: CSV, Parquet, image folders, NumPy arrays or a callable → a checked, split, hashed `Dataset`.

The first step on a model's walk. From here on there are named arrays, first axis rows, in the datatypes that the bundle's
graph will take; both worlds see the same numbers because floats are rounded to FP32 once, here.
"""

import difflib
import hashlib
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta, field
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays, check_array
from modelyard.bundle.manifest import BATCH, DataLineage, Datatype, TensorSpec
from modelyard.errors import ConfigError, DataError, MissingExtra, SignatureMismatch
from modelyard.schema import Frozen
from modelyard.training.callables import call
from modelyard.training.split import Split, SplitConfig, split_rows

if TYPE_CHECKING:
    import pandas as pd

    from modelyard.training.checks import DataReport

Task = Literal["classification", "regression"]
Progress = Callable[[str], None]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
MAX_SLICE_VALUES = 20
"""A text or boolean input with at most this many values is offered for evaluation per slice."""
MAX_INTEGER_CLASSES = 100
"""An integer label with more distinct values than this is taken for a quantity."""
MAX_FLOAT_CLASSES = 20
"""As above for whole numbers in a float column."""
_MISSING_TEXTS = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None", "<NA>")
"""What a CSV file may write for a missing value, as pandas reads it."""
_DATATYPES: dict[str, Datatype] = {"b": "BOOL", "i": "INT64", "f": "FP32", "O": "BYTES", "u": "UINT8"}


class DataConfig(Frozen, frozen=True):
    """The [data] table of yard.toml."""

    path: str | None = None
    """.csv, .parquet, .npz, or an image folder with one sub-folder per class; relative to yard.toml.

    In CSV an empty field, NA, N/A, NaN, NULL and None are missing values.
    """
    callable: str | None = None
    """"module:function", importable from yard.toml's folder; returns a pandas DataFrame or a dict of arrays."""
    label: Annotated[str, Meta(min_length=1)] = "label"
    """Column of the table or name of the array; for an image folder the name that the folder names get."""
    task: Task | None = None
    """None: text, booleans and whole numbers with few distinct values are classes, everything else is a quantity."""
    features: tuple[str, ...] = ()
    """(): every column but the label, `drop` and the column the split is made by."""
    drop: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    max_categories: Annotated[int, Meta(ge=2)] = 1000
    image_mode: Literal["RGB", "L"] = "RGB"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.callable is None):
            found = "neither" if self.path is None else f"both ({self.path!r} and {self.callable!r})"
            raise ConfigError(f"[data] needs either path or callable, got {found}; name one of them")

    @property
    def source(self) -> str:
        """Where the rows come from, as written in the configuration."""
        return self.path or self.callable or ""


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
    label, task, note = _label(rows.label, data)
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
        columns: dict[str, Any] = _read_npz(path)
    elif path.suffix in (".csv", ".parquet"):
        text = [spec.name for spec in specs if spec.datatype == "BYTES"]
        table = _read_csv(path, text) if path.suffix == ".csv" else _read_parquet(path)
        columns = {str(name): table[name] for name in table.columns}
    else:
        raise DataError(f"{path}: rows are read from .csv, .parquet and .npz, got {path.suffix!r}; convert the file")
    return {spec.name: _fit(_pick(columns, spec.name, str(path)), spec, str(path)) for spec in specs}


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
            codes, distinct = _factorize(array)
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


# Below: from each kind of source to `_Rows`.


@dataclass(frozen=True)
class _Rows:
    inputs: dict[str, NDArray[Any]]
    label: Any
    """As read: a pandas Series or an array."""
    by: NDArray[Any] | None
    hashed: dict[str, NDArray[Any]]
    """What belongs to the data's digest beyond inputs and label."""


def _read_rows(data: DataConfig, split: SplitConfig, root: Path, progress: Progress) -> _Rows:
    if data.callable is not None:
        progress(f"calling {data.callable}")
        made = call(data.callable, root, field="[data] callable")
        if isinstance(made, Mapping):
            return _from_mapping({str(name): np.asarray(array) for name, array in made.items()}, data, split, progress)
        if isinstance(made, _pandas().DataFrame):
            return _from_table(made, data, split, progress)
        raise DataError(
            f"[data] callable {data.callable!r} returned a {type(made).__name__}; return a pandas DataFrame or a dict of arrays"
        )
    path = root / (data.path or "")
    if path.is_dir():
        return _from_image_folder(path, data, split, progress)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; correct path in [data], it is relative to {root}", path=str(path)
        )
    progress(f"reading {path.name}")
    if path.suffix == ".npz":
        return _from_mapping(_read_npz(path), data, split, progress)
    if path.suffix == ".csv":
        return _from_table(_read_csv(path), data, split, progress)
    if path.suffix == ".parquet":
        return _from_table(_read_parquet(path), data, split, progress)
    raise ConfigError(
        f"[data] path = {data.path!r}: tables are .csv or .parquet, arrays .npz, images a folder; convert the file or use callable"
    )


def _read_csv(path: Path, text: Sequence[str] = ()) -> "pd.DataFrame":
    """Return the table; columns named in `text` are not interpreted."""
    _pandas()
    try:
        import pyarrow as pa
        from pyarrow import csv
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", "reading CSV") from exc
    _require_distinct(_csv_header(path), path)
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


def _csv_header(path: Path) -> list[str]:
    import csv

    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            return next(csv.reader(stream), [])
    except csv.Error as exc:
        raise DataError(f"{path}: the first line is no CSV header ({exc}); correct the file") from exc


def _read_parquet(path: Path) -> "pd.DataFrame":
    pandas = _pandas()
    try:
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", "reading Parquet") from exc
    try:
        _require_distinct(parquet.read_schema(path).names, path)
        table: pd.DataFrame = pandas.read_parquet(path)
    except DataError:
        raise
    except (OSError, ValueError) as exc:  # pyarrow's errors are one or the other
        raise DataError(f"{path}: not readable as Parquet: {exc}; write the file again") from exc
    return table


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as exc:
        raise DataError(
            f"{path}: not an .npz archive of plain arrays ({exc}); write it with numpy.savez, with text as str arrays and "
            "no arrays of Python objects"
        ) from exc


def _from_table(table: "pd.DataFrame", data: DataConfig, split: SplitConfig, progress: Progress) -> _Rows:
    if any(name is not None for name in table.index.names):
        table = table.reset_index()  # a named index holds data
    names = [name for name in table.columns if isinstance(name, str) and name]
    if len(names) != table.shape[1]:
        odd = next(name for name in table.columns if not (isinstance(name, str) and name))
        raise DataError(
            f"{data.source}: column name {odd!r} is not text; name every column, e.g. table.rename(columns=str)"
        )
    _require_distinct(names, data.source)
    _require_rows(len(table), data)
    _require_known([data.label], names, "[data] label")
    _require_known(data.features, names, "[data] features")
    _require_known(data.drop, names, "[data] drop")
    _require_known([split.by] if split.by else [], names, "[split] by")
    features = _feature_names(names, data, split)
    _require_known(data.units, features, "[data] units")
    _require_known(data.descriptions, features, "[data] descriptions")
    inputs: dict[str, NDArray[Any]] = {}
    refused: list[str] = []
    for i, name in enumerate(features, 1):
        progress(f"converting columns {i}/{len(features)}: {name}")
        try:
            inputs[name] = _column(table[name], name, data.max_categories)
        except DataError as exc:
            refused.append(exc.message)  # all of them are told at once
    if refused:
        many = f"{len(refused)} columns cannot be used:\n  " if len(refused) > 1 else ""
        raise DataError(f"{data.source}: {many}" + "\n  ".join(refused), columns=tuple(refused))
    by = _split_column(table[split.by], split) if split.by else None
    return _Rows(inputs, table[data.label], by, {})


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


def _from_mapping(arrays: dict[str, NDArray[Any]], data: DataConfig, split: SplitConfig, progress: Progress) -> _Rows:
    """Arrays: one of images or features beside the label; or only columns, which make a table."""
    _require_known([data.label], arrays, "[data] label")
    _require_known([split.by] if split.by else [], arrays, "[split] by")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{data.source}: arrays have different numbers of rows {lengths}; give each one row per sample")
    _require_rows(lengths[data.label], data)
    others = [name for name in arrays if name not in {data.label, split.by, *data.drop}]
    if all(array.ndim == 1 for array in arrays.values()):
        return _from_table(_pandas().DataFrame(arrays), data, split, progress)
    if data.features:
        _require_known(data.features, others, "[data] features")
        others = list(data.features)
    if len(others) != 1:
        raise DataError(
            f"{data.source}: needs one array of images or features beside {data.label!r}, got {others}; put the others into [data] drop"
        )
    name, array = _tensor(arrays[others[0]], others[0])
    _require_known(data.units, [name], "[data] units")
    _require_known(data.descriptions, [name], "[data] descriptions")
    by = _split_column(_pandas().Series(arrays[split.by]), split) if split.by else None
    if arrays[data.label].ndim != 1:
        raise DataError(
            f"label {data.label!r} has shape {arrays[data.label].shape}; give one value per row, e.g. one_hot.argmax(axis=1)"
        )
    return _Rows({name: array}, arrays[data.label], by, {})


def _tensor(array: NDArray[Any], name: str) -> tuple[str, NDArray[Any]]:
    """Return the input's name and the array as UINT8 (n, H, W, C) or FP32 (n, F)."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"array {name!r} has dtype {array.dtype}; give numbers")
    if array.ndim == 2:
        return "features", _float32(array, f"array {name!r}")
    if array.ndim not in (3, 4) or array.dtype != np.uint8:
        raise DataError(
            f"array {name!r} has dtype {array.dtype} and shape {array.shape}; give images as uint8 [n, height, width] or "
            "[n, height, width, channels], anything else as [n, features]"
        )
    if array.ndim == 3:
        array = array[..., np.newaxis]
    if array.shape[3] not in (1, 3, 4):
        remedy = (
            "move them last: array.transpose(0, 2, 3, 1)" if array.shape[1] in (1, 3, 4) else "give 1, 3 or 4 channels"
        )
        raise DataError(f"array {name!r} has shape {array.shape}, channels belong on the last axis; {remedy}")
    return "image", np.ascontiguousarray(array)


def _from_image_folder(folder: Path, data: DataConfig, split: SplitConfig, progress: Progress) -> _Rows:
    if split.by is not None:
        raise ConfigError(
            f'[split] by = {split.by!r}: an image folder has no columns; set method = "random", or return arrays from a callable'
        )
    _require_known(data.units, ["image"], "[data] units")
    _require_known(data.descriptions, ["image"], "[data] descriptions")
    files: list[tuple[str, Path]] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise DataError(
                f"{class_folder}: holds no {', '.join(IMAGE_SUFFIXES)}; add images of this class or remove it"
            )
        files += [(class_folder.name, path) for path in images]
    if not files:
        raise DataError(f"{folder}: holds no sub-folder with images; make one per class, {folder.name}/CLASS/*.png")
    step = max(1, len(files) // 20)
    pixels: NDArray[np.uint8] | None = None
    for i, (_, path) in enumerate(files):
        if i % step == 0:
            progress(f"reading images {i}/{len(files)}")
        image = _read_image(path, data.image_mode)
        if pixels is None:
            pixels = np.empty((len(files), *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            first = files[0][1].relative_to(folder)
            raise DataError(
                f"{folder}: {first} is {_size(pixels[0])}, {path.relative_to(folder)} is {_size(image)}; resize all images to one "
                "size beforehand, since the bundle starts at decoded pixels of a fixed size"
            )
        pixels[i] = image
    assert pixels is not None  # there is a file
    paths = np.array([path.relative_to(folder).as_posix() for _, path in files], dtype=object)
    label = np.array([name for name, _ in files], dtype=object)
    return _Rows({"image": pixels}, label, None, {"path": paths})


def _read_image(path: Path, mode: str) -> NDArray[np.uint8]:
    """Return the decoded pixels (H, W, C) as stored in the file; orientation tags are not applied."""
    try:
        from PIL import Image
    except ImportError as exc:
        raise MissingExtra("pillow", "train", "reading images") from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
                pixels = np.asarray(image.convert(mode))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise DataError(f"{path}: {exc}; resize it beforehand") from exc
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as exc:  # what Pillow raises for damaged files
        raise DataError(f"{path}: not a readable image ({exc}); replace or remove it") from exc
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]} × {image.shape[0]}"


# Below: columns.


def _column(series: "pd.Series[Any]", name: str, max_categories: int) -> NDArray[Any]:
    """Return a table's column as BOOL, INT64, FP32 or text (n,); missing is NaN or ""."""
    series, kind = _kind(series, f"column {name!r}")
    if kind == "text":
        codes, distinct = _factorize(series)
        if len(distinct) > max_categories:
            raise DataError(
                f"column {name!r} has {len(distinct)} distinct texts, max_categories is {max_categories}; put it into [data] "
                "drop, group its values into fewer, or raise max_categories"
            )
        return _take_text(codes, distinct)
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
        return _int64(series, f"column {name!r}")
    return _float32(_float64(series), f"column {name!r}")


def _kind(series: "pd.Series[Any]", where: str) -> tuple["pd.Series[Any]", str]:
    """Return the column, categories unpacked, and boolean, integer, float, text, timestamp or duration.

    Raises:
        DataError: it holds several kinds, or one that is no value of a column.
    """
    pd = _pandas()
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


def _int64(series: "pd.Series[Any]", where: str) -> NDArray[np.int64]:
    values: NDArray[Any] = series.to_numpy()
    limits = np.iinfo(np.int64)
    if int(values.max()) > limits.max or int(values.min()) < limits.min:
        raise DataError(f"{where} holds integers that do not fit into 64 bits with sign; make it float or text")
    return values.astype(np.int64)


def _float64(series: "pd.Series[Any]") -> NDArray[np.float64]:
    if series.dtype == object:  # decimals, booleans and integers with None among them
        series = series.where(series.notna(), np.nan)
        return series.to_numpy(dtype=np.float64)
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


def _float32(values: NDArray[Any], where: str) -> NDArray[np.float32]:
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


def _split_column(series: "pd.Series[Any]", split: SplitConfig) -> NDArray[Any]:
    """Return groups as text or numbers, times as numbers or datetime64[ns] in UTC; missing is "", NaN or NaT."""
    pd = _pandas()
    where = f"[split] by = {split.by!r}: the column"
    series, kind = _kind(series, where)
    if kind == "timestamp" or (kind == "text" and split.method == "time"):
        try:
            moments = pd.to_datetime(series, utc=True, format="ISO8601" if kind == "text" else None)
        except (ValueError, TypeError) as exc:
            raise DataError(f"{where} does not read as times ({exc}); write them as 2013-01-31T05:15:00Z") from exc
        times: NDArray[Any] = moments.dt.tz_convert(None).to_numpy(dtype="datetime64[ns]")
        return times
    if kind == "text":
        return _take_text(*_factorize(series))
    if kind == "duration":
        series, kind = series.dt.total_seconds(), "float"
    return _int64(series, where) if kind == "integer" and not series.isna().any() else _float64(series)


def _label(values: Any, data: DataConfig) -> tuple[NDArray[Any], Task, str]:
    """Return the label, what it asks for, and a sentence where that was inferred in a way a person should know."""
    pd = _pandas()
    where = f"label {data.label!r}"
    series, kind = _kind(values if hasattr(values, "iloc") else pd.Series(values), where)
    if kind in ("timestamp", "duration"):
        raise DataError(f"{where} holds {kind}s; make it a number, a boolean or text")
    missing = series.isna().to_numpy() | ((series == "").to_numpy() if kind == "text" else False)
    n_missing = int(np.count_nonzero(missing))
    if n_missing:
        raise DataError(
            f"{where} is missing in {n_missing} of {len(series)} rows, first in row {int(np.argmax(missing))}; leave those rows "
            "out or fill the label in",
            n_missing=n_missing,
        )
    if kind == "text":
        if data.task == "regression":
            raise DataError(
                f'{where} is text, which cannot be regressed; set task = "classification" or make it a number'
            )
        return _take_text(*_factorize(series)), "classification", ""
    numbers = _float64(series)
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
        return numbers, task, note
    if not whole:
        row = int(np.argmax(numbers != np.floor(numbers)))
        raise DataError(
            f"{where}: {numbers[row]} in row {row} cannot name a class; use integers or text, or regression"
        )
    return (_int64(series, where) if kind == "integer" else numbers.astype(np.int64)), task, note


def _factorize(values: Any) -> tuple[NDArray[np.int64], list[str]]:
    """Return each row's place among the distinct texts, and those in order of first appearance; missing becomes ""."""
    codes, uniques = _pandas().factorize(values)
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


def _take_text(codes: NDArray[np.int64], distinct: Sequence[str]) -> NDArray[Any]:
    texts = np.empty(len(distinct), dtype=object)
    texts[:] = distinct
    taken: NDArray[Any] = texts[codes]
    return taken


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
            array = _take_text(*_factorize(values.astype(str).where(values.notna(), None)))
        elif values.isna().any() and np.dtype(spec.numpy_dtype).kind != "f":
            raise DataError(
                f"{where} is missing in {int(values.isna().sum())} rows, and {spec.datatype} has no missing value"
            )
        else:
            try:
                array = _float64(values) if spec.numpy_dtype.kind == "f" else values.to_numpy()
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


# Below: complaints about names.


def _pick(columns: Mapping[str, Any], name: str, source: str) -> Any:
    if name not in columns:
        raise DataError(f"{source}: no column {name!r}{_close(name, columns)}; it has {sorted(columns)[:30]}; add it")
    return columns[name]


def _require_known(wanted: Iterable[str], names: Iterable[str], where: str) -> None:
    names = list(names)
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"{where}: no column {name!r}{_close(name, names)}; the columns are {', '.join(names[:30])}"
                f"{' …' if len(names) > 30 else ''}; correct the name",
                column=name,
            )


def _close(name: str, names: Iterable[str]) -> str:
    lowered = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=3)
    return f" (did you mean {' or '.join(repr(lowered[other]) for other in close)}?)" if close else ""


def _require_distinct(names: Sequence[str], source: object) -> None:
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice:
        raise DataError(
            f"{source}: several columns are named {twice[0]!r}; give every column a name of its own", columns=twice
        )


def _require_rows(n_rows: int, data: DataConfig) -> None:
    if n_rows == 0:
        raise DataError(f"{data.source}: has no rows; bring labelled rows")


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


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as exc:
        raise MissingExtra("pandas", "train", "reading labelled data") from exc
    return pd
