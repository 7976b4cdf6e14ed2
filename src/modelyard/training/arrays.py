"""Arrays: an .npz archive or a mapping of arrays → one tensor of images or features, or columns."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import DataError
from modelyard.training.column_names import require_known
from modelyard.training.columns import SourceRows, import_pandas, split_column, to_float32
from modelyard.training.data_config import DataConfig, Progress
from modelyard.training.split import SplitConfig
from modelyard.training.tables import require_rows, rows_of_table


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as exc:
        raise DataError(
            f"{path}: not an .npz archive of plain arrays ({exc}); write it with numpy.savez, with text as str arrays and "
            "no arrays of Python objects"
        ) from exc


def rows_of_arrays(
    arrays: dict[str, NDArray[Any]], data: DataConfig, split: SplitConfig, progress: Progress
) -> SourceRows:
    """Arrays: one of images or features beside the label; or only columns, which make a table."""
    require_known([data.label], arrays, "[data] label")
    require_known([split.by] if split.by else [], arrays, "[split] by")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{data.source}: arrays have different numbers of rows {lengths}; give each one row per sample")
    require_rows(lengths[data.label], data)
    others = [name for name in arrays if name not in {data.label, split.by, *data.drop}]
    if all(array.ndim == 1 for array in arrays.values()):
        return rows_of_table(import_pandas().DataFrame(arrays), data, split, progress)
    if data.features:
        require_known(data.features, others, "[data] features")
        others = list(data.features)
    if len(others) != 1:
        raise DataError(
            f"{data.source}: needs one array of images or features beside {data.label!r}, got {others}; put the others into [data] drop"
        )
    name, array = _tensor(arrays[others[0]], others[0])
    require_known(data.units, [name], "[data] units")
    require_known(data.descriptions, [name], "[data] descriptions")
    by = split_column(import_pandas().Series(arrays[split.by]), split) if split.by else None
    if arrays[data.label].ndim != 1:
        raise DataError(
            f"label {data.label!r} has shape {arrays[data.label].shape}; give one value per row, e.g. one_hot.argmax(axis=1)"
        )
    return SourceRows({name: array}, arrays[data.label], by, {})


def _tensor(array: NDArray[Any], name: str) -> tuple[str, NDArray[Any]]:
    """Return the input's name and the array as UINT8 (n, H, W, C) or FP32 (n, F)."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"array {name!r} has dtype {array.dtype}; give numbers")
    if array.ndim == 2:
        return "features", to_float32(array, f"array {name!r}")
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
