"""Statistics of the training data, per input and per output: what drift is later measured against.

A scalar column gives one feature. A column of text gives counts per value. A tensor of up to 64 numbers a row gives one
feature per number; a larger one (an image) gives its row mean and row standard deviation. Values are of training rows, and
of the model's answers to held-out rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.bundle.manifest import Signature
from modelyard.bundle.npz import read_npz, write_npz
from modelyard.errors import UnsafeArchive

QUANTILES = np.arange(1, 10) / 10
"""The nine cut points kept per numeric feature."""
MAX_COLUMNS = 64
MAX_CATEGORIES = 1000


@dataclass(frozen=True)
class NumericReference:
    """A numeric feature over `n_samples` rows, missing ones left out of all figures but their count."""

    n_samples: int
    n_missing: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: NDArray[np.float64]
    """At `QUANTILES`, shape (9,)."""


@dataclass(frozen=True)
class CategoryReference:
    """Counts per value, most frequent first; values beyond the first thousand are summed in `n_other`."""

    n_samples: int
    n_missing: int
    values: tuple[str, ...]
    counts: NDArray[np.int64]
    n_other: int


Feature = NumericReference | CategoryReference
Reference = Mapping[str, Feature]
"""Feature name → its statistics; names are "input:carrier", "input:pixels:mean", "output:probabilities:late"."""


def summarise(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]], signature: Signature
) -> Reference:
    """Return the statistics of arrays that fit `signature`, first axis rows; a bare scalar is one row."""
    reference: dict[str, Feature] = {}
    for role, specs, arrays in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
        for spec in specs:
            labels = [str(label) for label in spec.labels or ()]
            for suffix, column in _columns(arrays[spec.name], labels):
                discrete = column.dtype.kind in "OU" or (role == "output" and column.dtype.kind in "iub")
                feature = _categories(column) if discrete else _numbers(column)
                reference[f"{role}:{spec.name}{suffix}"] = feature
    return reference


def _columns(array: NDArray[Any], labels: list[str]) -> list[tuple[str, NDArray[Any]]]:
    array = np.atleast_1d(array)
    n_columns = math.prod(array.shape[1:])
    rows = array.reshape(len(array), n_columns)
    if array.ndim == 1 or n_columns == 1:
        return [("", rows[:, 0])]
    if n_columns <= MAX_COLUMNS or array.dtype.kind in "OU":
        names = labels if len(labels) == n_columns else [str(i) for i in range(n_columns)]
        return [(f":{names[i]}", rows[:, i]) for i in range(n_columns)]
    flat = rows.astype(np.float64, copy=False)
    return [(":mean", flat.mean(axis=1)), (":std", flat.std(axis=1))]


def _numbers(column: NDArray[Any]) -> NumericReference:
    values = column.astype(np.float64)
    present = values[np.isfinite(values)]
    if not present.size:
        nan = math.nan
        return NumericReference(len(values), len(values), nan, nan, nan, nan, np.full(len(QUANTILES), nan))
    return NumericReference(
        n_samples=len(values),
        n_missing=len(values) - len(present),
        mean=float(present.mean()),
        std=float(present.std()),
        minimum=float(present.min()),
        maximum=float(present.max()),
        quantiles=np.quantile(present, QUANTILES),
    )


def _categories(column: NDArray[Any]) -> CategoryReference:
    text = column.astype(np.str_)
    values, counts = np.unique(text[text != ""], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept, other = order[:MAX_CATEGORIES], order[MAX_CATEGORIES:]
    return CategoryReference(
        n_samples=len(text),
        n_missing=int((text == "").sum()),
        values=tuple(str(value) for value in values[kept]),
        counts=counts[kept].astype(np.int64),
        n_other=int(counts[other].sum()),
    )


def write_reference(path: Path, reference: Reference) -> None:
    """Write one group of arrays per feature, by position; the names are an array of their own."""
    arrays: dict[str, NDArray[Any]] = {"names": np.array(list(reference), dtype=np.str_)}
    for i, feature in enumerate(reference.values()):
        if isinstance(feature, NumericReference):
            arrays[f"{i}.counts"] = np.array([feature.n_samples, feature.n_missing], dtype=np.int64)
            arrays[f"{i}.moments"] = np.array([feature.mean, feature.std, feature.minimum, feature.maximum])
            arrays[f"{i}.quantiles"] = feature.quantiles
        else:
            arrays[f"{i}.counts"] = np.array([feature.n_samples, feature.n_missing, feature.n_other], dtype=np.int64)
            arrays[f"{i}.values"] = np.array(feature.values, dtype=np.str_)
            arrays[f"{i}.value_counts"] = feature.counts
    write_npz(path, arrays)


def read_reference(path: Path, limits: Limits = DEFAULT_LIMITS) -> Reference:
    """Return the statistics in `path`; raises UnsafeArchive when arrays are missing or of the wrong length."""
    arrays = read_npz(path, limits)
    reference: dict[str, Feature] = {}
    try:
        if arrays["names"].dtype.kind != "U":
            raise TypeError("names are not text")
        for i, name in enumerate(arrays["names"].tolist()):
            counts = [int(count) for count in arrays[f"{i}.counts"]]
            if f"{i}.moments" in arrays:
                mean, std, minimum, maximum = arrays[f"{i}.moments"].astype(np.float64).tolist()
                quantiles = arrays[f"{i}.quantiles"].astype(np.float64).reshape(len(QUANTILES))
                n_samples, n_missing = counts
                reference[name] = NumericReference(n_samples, n_missing, mean, std, minimum, maximum, quantiles)
            else:
                n_samples, n_missing, n_other = counts
                values = tuple(arrays[f"{i}.values"].astype(np.str_).tolist())
                value_counts = arrays[f"{i}.value_counts"].astype(np.int64, casting="safe").reshape(len(values))
                reference[name] = CategoryReference(n_samples, n_missing, values, value_counts, n_other)
    except (KeyError, ValueError, TypeError, OverflowError) as exc:
        raise UnsafeArchive(f"{path}: not reference statistics ({exc}); write the bundle again") from exc
    return reference
