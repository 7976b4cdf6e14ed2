"""Files of rows ↔ batches, for `modelyard predict` and `import`: CSV, JSON, JSON lines, NumPy arrays, Parquet in; CSV, JSON lines out.

CSV, JSON lines and Parquet are read a batch at a time, .npy through a memory map, so that memory stays flat however long
the file is. An error names the line, the column and the value. Where a model takes one matrix, a table with as many columns
is taken as its rows.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import orjson
from msgspec import structs
from numpy.typing import NDArray

from modelyard.bundle.cases import check_array
from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import DataError, MissingExtra
from modelyard.inference.rows import rows_to_arrays

Batch = dict[str, NDArray[Any]]
Placed = tuple[str, Any]
"""Where a row stands, e.g. "line 7", and the row."""

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass
class RowFile:
    """A file to be read once. `ignored` fills up with the columns the model does not take."""

    path: Path
    signature: Signature
    batch_size: int = 1000
    limit: int | None = None
    """Read no more rows than this."""
    ignored: dict[str, None] = field(default_factory=dict)
    _in_order: tuple[str, ...] | None = field(default=None, init=False)
    """The file's columns where they are, in this order, the one matrix the model takes."""

    def batches(self) -> Iterator[Batch]:
        """Yield named arrays of up to `batch_size` rows.

        Raises:
            DataError: the file is not what its name says, or lacks a column.
            RequestError: a value does not fit its column.
        """
        readers: dict[str, Callable[[], Iterable[Placed]]] = {
            ".csv": self._csv, ".json": self._json, ".jsonl": self._jsonl, ".ndjson": self._jsonl, ".parquet": self._parquet
        }  # fmt: skip
        suffix = self.path.suffix.lower()
        known = ", ".join([*readers, ".npy", ".npz"])
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; give one file of rows, one of {known}{self._how_to_stack()}")
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; give a file of rows")
        if suffix in (".npy", ".npz"):
            yield from self._arrays(suffix)
        elif suffix in readers:
            yield from self._row_batches(itertools.islice(readers[suffix](), self.limit))
        elif suffix in _IMAGES:
            raise DataError(f"{self.path}: is an image; give one file of rows, one of {known}{self._how_to_stack()}")
        else:
            raise DataError(f"{self.path}: unknown kind of file {suffix!r}; give one of {known}")

    def _how_to_stack(self) -> str:
        """Say how pictures become an array, for a model that takes images of one size."""
        shape = self.signature.inputs[0].row_shape
        if len(self.signature.inputs) > 1 or len(shape) not in (2, 3) or any(isinstance(axis, str) for axis in shape):
            return ""
        height, width, *channels = shape
        code = f'Image.open(path).convert("{"RGB" if channels == [3] else "L"}").resize(({width}, {height}))'
        return (
            f". An .npy of shape (rows, {', '.join(map(str, shape))}) is made of images by: import numpy; from PIL import Image; "
            f'numpy.save("images.npy", numpy.stack([numpy.asarray({code}) for path in paths]))'
        )

    def _row_batches(self, rows: Iterable[Placed]) -> Iterator[Batch]:
        iterator = iter(rows)
        size = self.batch_size if all(spec.batched for spec in self.signature.inputs) else 1
        while batch := list(itertools.islice(iterator, size)):
            places = [place for place, _ in batch]
            known = [self._known(place, row) for place, row in batch]
            yield rows_to_arrays(known, self.signature, place=lambda i, places=places: f"{self.path}: {places[i]}")  # type: ignore[misc]

    def _known(self, place: str, row: Any) -> Any:
        """Leave out columns the model does not take, such as the answer that is to be predicted."""
        if not isinstance(row, Mapping):
            return row
        if self._in_order is None:
            self._in_order = self._matrix_columns(list(row))
        if self._in_order:
            if set(row) != set(self._in_order):
                raise DataError(
                    f"{self.path}: {place}: has the columns {', '.join(map(str, row))}, the first row {', '.join(self._in_order)}; "
                    "give every row the same"
                )
            return {self.signature.inputs[0].name: [row[name] for name in self._in_order]}
        names = {spec.name for spec in self.signature.inputs}
        self.ignored |= dict.fromkeys(str(name) for name in row if name not in names)
        return {name: value for name, value in row.items() if name in names}

    def _matrix_columns(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Return the columns that are the model's one matrix, with a note; none where columns are inputs by name.

        Raises:
            DataError: the model takes one matrix, and the file has another number of columns.
        """
        spec = self.signature.inputs[0]
        width = spec.row_shape[0] if len(spec.row_shape) == 1 else None
        if len(self.signature.inputs) > 1 or not spec.batched or not isinstance(width, int) or spec.name in columns:
            return ()
        if len(columns) != width:
            raise DataError(
                f"{self.path}: this model takes one matrix of {_count(width, 'number')} per row ({spec.name!r}); the file has "
                f"{_count(len(columns), 'column')}: {', '.join(map(str, columns))}; give {_count(width, 'numeric column')} or a .npy of "
                f"shape (rows, {width})"
            )
        click.echo(f"note: {spec.name!r} is made of the columns in their order: {', '.join(columns)}", err=True)
        return tuple(columns)

    def _csv(self) -> Iterator[Placed]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream)
                header = next(reader, None)
                if header is None:
                    raise DataError(f"{self.path}: is empty; the first line must name the columns")
                specs = self._specs(header)
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        raise DataError(
                            f"{self.path}: line {reader.line_num}: has {len(cells)} cells, the header {len(header)}; correct the line"
                        )
                    yield (
                        f"line {reader.line_num}",
                        {name: _cell(text, spec) for name, spec, text in zip(header, specs, cells, strict=True)},
                    )
        except (csv.Error, UnicodeDecodeError) as exc:
            raise DataError(f"{self.path}: not a CSV file in UTF-8 ({exc}); save it as one") from exc

    def _specs(self, header: Sequence[str]) -> list[TensorSpec | None]:
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{self.path}: column {twice!r} stands twice in the header; rename one")
        self._in_order = self._matrix_columns(header)
        if self._in_order:
            cell = structs.replace(self.signature.inputs[0], shape=("batch",))
            return [cell] * len(header)
        by_name = {spec.name: spec for spec in self.signature.inputs}
        missing = [spec.name for spec in self.signature.inputs if spec.name not in header and not spec.nullable]
        if missing:
            raise DataError(
                f"{self.path}: no column {missing[0]!r}; the model takes {', '.join(by_name)}, the file has {', '.join(header)}"
            )
        return [by_name.get(name) for name in header]

    def _json(self) -> Iterator[Placed]:
        data = self._parsed(self.path.read_bytes(), "")
        rows = data.get("instances") if isinstance(data, dict) else data
        if not isinstance(rows, list):
            raise DataError(f'{self.path}: must hold a list of rows or {{"instances": [row, ...]}}')
        return ((f"row {i}", row) for i, row in enumerate(rows))

    def _jsonl(self) -> Iterator[Placed]:
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"line {number}", self._parsed(line, f"line {number}: ")

    def _parsed(self, raw: bytes, where: str) -> Any:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError as exc:
            raise DataError(f"{self.path}: {where}not valid JSON ({exc}); correct it") from exc

    def _parquet(self) -> Iterator[Placed]:
        try:
            import pyarrow.parquet as pq
        except ImportError as exc:
            raise MissingExtra("pyarrow", "train", "reading Parquet", alone=True) from exc
        number = itertools.count()
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=self.batch_size):
            yield from ((f"row {next(number)}", row) for row in batch.to_pylist())

    def _arrays(self, suffix: str) -> Iterator[Batch]:
        specs = self.signature.inputs
        try:
            loaded = np.load(self.path, mmap_mode="r" if suffix == ".npy" else None, allow_pickle=False)
            arrays = {specs[0].name: loaded} if suffix == ".npy" else {name: loaded[name] for name in loaded.files}
        except (ValueError, OSError, EOFError) as exc:
            raise DataError(f"{self.path}: not an array file without pickles ({exc}); save it with numpy.save") from exc
        if len(specs) == len(arrays) == 1:
            arrays = {specs[0].name: next(iter(arrays.values()))}
        missing = [spec.name for spec in specs if spec.name not in arrays]
        if missing:
            raise DataError(f"{self.path}: no array {missing[0]!r}; the model takes {', '.join(s.name for s in specs)}")
        self.ignored |= dict.fromkeys(name for name in arrays if name not in {spec.name for spec in specs})
        if not all(spec.batched for spec in specs):
            yield {spec.name: self._fitting(arrays[spec.name], spec) for spec in specs}
            return
        lengths = {spec.name: len(arrays[spec.name]) if arrays[spec.name].ndim else 0 for spec in specs}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{self.path}: the arrays must have the same number of rows, got {lengths}")
        n_rows = min(next(iter(lengths.values())), self.limit if self.limit is not None else 2**63)
        for start in range(0, n_rows, self.batch_size):
            rows = slice(start, min(start + self.batch_size, n_rows))
            yield {spec.name: self._fitting(arrays[spec.name][rows], spec) for spec in specs}

    def _fitting(self, array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
        """Return `array` in the datatype of `spec`: floats of another width are converted, nothing else is."""
        if spec.datatype == "BYTES" and array.dtype.kind == "U":
            array = array.astype(object)
        elif array.dtype.kind == "f" and spec.numpy_dtype.kind == "f":
            array = array.astype(spec.numpy_dtype)
        left_out = spec.shape[array.ndim :]
        if left_out and all(axis == 1 for axis in left_out):  # as over HTTP: grey images without their channel axis
            array = array.reshape(*array.shape, *left_out)
        check_array(array, spec, f"{self.path}: {spec.name}")
        return np.ascontiguousarray(array) if array.ndim else array


def _cell(text: str, spec: TensorSpec | None) -> Any:
    """Return the value a CSV cell stands for; text that is none of the column's kind stays text and is refused later."""
    if spec is None or text == "":
        return None
    if text[0] == "[" and spec.row_shape:
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
    if spec.datatype == "BYTES":
        return text
    if spec.datatype == "BOOL":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    if "_" in text:  # Python would read 1_000
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class JsonLinesWriter:
    """One JSON object per line."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._stream.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows).decode())


class CsvWriter:
    """A header, then one line per row; a score per label is a column of its own, "probabilities.late", a tensor is JSON."""

    def __init__(self, stream: IO[str]) -> None:
        self._writer = csv.writer(stream, lineterminator="\n")
        self._began = False

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        flat = [_flat(row) for row in rows]
        if not self._began and flat:
            self._writer.writerow(flat[0])
            self._began = True
        self._writer.writerows(row.values() for row in flat)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            cells |= {f"{name}.{label}": score for label, score in value.items()}
        else:
            cells[name] = json.dumps(value) if isinstance(value, list) else value
    return cells
