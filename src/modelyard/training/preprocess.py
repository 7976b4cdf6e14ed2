"""Columns and pixels → one float32 matrix, computed twice with the same arithmetic: by NumPy for training, by ONNX for serving.

Numbers: a missing one becomes the training mean, then (x - mean) / std; a nullable column adds an indicator of missing.
Text: one column per category of the training rows, a missing value counted as one; an unknown value sets none of them.
Pixels: divided by 255 and laid out in a row (networks for images take the pixels themselves instead).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays
from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import ExportError
from modelyard.training.onnx_graph import GraphBuilder

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class NumberTransform:
    """The numeric columns, all at once."""

    columns: tuple[str, ...]
    nullable: tuple[int, ...]
    """Positions in `columns` that get an indicator of missing."""
    floats: bool
    """Whether any column holds floats, which may be missing: integers never are."""
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    """Shape (columns,); 1 where a column is constant."""

    def apply(self, inputs: Arrays) -> Matrix:
        stacked = np.stack([inputs[name].astype(np.float32) for name in self.columns], axis=1)
        missing = np.isnan(stacked)
        filled = np.where(missing, self.mean, stacked)
        indicators = missing[:, list(self.nullable)].astype(np.float32)
        return np.concatenate([(filled - self.mean) / self.std, indicators], axis=1)

    def add_to(self, graph: GraphBuilder) -> str:
        axis = graph.constant(np.array([1], dtype=np.int64))
        floats = [graph.add("Unsqueeze", graph.add("Cast", name, to=1), axis) for name in self.columns]
        stacked = graph.add("Concat", *floats, axis=1)
        mean = graph.constant(self.mean)
        if not self.floats:
            return graph.add("Div", graph.add("Sub", stacked, mean), graph.constant(self.std))
        missing = graph.add("IsNaN", stacked)
        filled = graph.add("Where", missing, mean, stacked)
        scaled = graph.add("Div", graph.add("Sub", filled, mean), graph.constant(self.std))
        if not self.nullable:
            return scaled
        chosen = graph.add("Gather", missing, graph.constant(np.array(self.nullable, dtype=np.int64)), axis=1)
        return graph.add("Concat", scaled, graph.add("Cast", chosen, to=1), axis=1)


@dataclass(frozen=True)
class CategoryTransform:
    """One text column."""

    column: str
    values: tuple[str, ...]

    def apply(self, inputs: Arrays) -> Matrix:
        codes = {value: code for code, value in enumerate(self.values)}
        column = inputs[self.column]
        found = np.fromiter((codes.get(value, -1) for value in column), dtype=np.int64, count=len(column))
        one_hot = np.zeros((len(column), len(self.values)), dtype=np.float32)
        rows = np.flatnonzero(found >= 0)
        one_hot[rows, found[rows]] = 1
        return one_hot

    def add_to(self, graph: GraphBuilder) -> str:
        n_values = len(self.values)
        codes = graph.add(
            "LabelEncoder",
            self.column,
            domain="ai.onnx.ml",
            keys_strings=list(self.values),
            values_int64s=list(range(n_values)),
            default_int64=n_values,  # beyond the depth: OneHot then sets nothing
        )
        off_on = graph.constant(np.array([0, 1], dtype=np.float32))
        return graph.add("OneHot", codes, graph.constant(np.array([n_values], dtype=np.int64)), off_on, axis=-1)


@dataclass(frozen=True)
class MatrixTransform:
    """A tensor of floats per row, standardised per element; missing ones become the mean."""

    column: str
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def apply(self, inputs: Arrays) -> Matrix:
        values = inputs[self.column].reshape(-1, len(self.mean))
        return (np.where(np.isnan(values), self.mean, values) - self.mean) / self.std

    def add_to(self, graph: GraphBuilder) -> str:
        flat = graph.add("Reshape", self.column, graph.constant(np.array([-1, len(self.mean)], dtype=np.int64)))
        mean = graph.constant(self.mean)
        filled = graph.add("Where", graph.add("IsNaN", flat), mean, flat)
        return graph.add("Div", graph.add("Sub", filled, mean), graph.constant(self.std))


@dataclass(frozen=True)
class PixelTransform:
    """uint8 pixels [n, height, width, channels] laid out in a row between 0 and 1."""

    column: str
    n_values: int

    def apply(self, inputs: Arrays) -> Matrix:
        return inputs[self.column].reshape(-1, self.n_values).astype(np.float32) / np.float32(255)

    def add_to(self, graph: GraphBuilder) -> str:
        flat = graph.add("Reshape", self.column, graph.constant(np.array([-1, self.n_values], dtype=np.int64)))
        return graph.add("Div", graph.add("Cast", flat, to=1), graph.constant(np.array(255, dtype=np.float32)))


Transform = NumberTransform | CategoryTransform | MatrixTransform | PixelTransform


@dataclass(frozen=True)
class Preprocessor:
    """All transforms of a data set, side by side."""

    transforms: tuple[Transform, ...]

    def apply(self, inputs: Arrays) -> Matrix:
        """Return the features of n rows, shape (n, n_features)."""
        return np.ascontiguousarray(np.concatenate([transform.apply(inputs) for transform in self.transforms], axis=1))

    def add_to(self, graph: GraphBuilder) -> str:
        """Add the same computation to `graph`, whose inputs bear the columns' names; return the matrix's name."""
        parts = [transform.add_to(graph) for transform in self.transforms]
        return parts[0] if len(parts) == 1 else graph.add("Concat", *parts, axis=1)


def fit_preprocessor(specs: tuple[TensorSpec, ...], train: Arrays) -> Preprocessor:
    """Learn means, deviations and categories from training rows.

    Raises:
        ExportError: an input has a datatype or shape that no transform takes.
    """
    transforms: list[Transform] = []
    numbers = [spec for spec in specs if len(spec.shape) == 1 and spec.datatype != "BYTES"]
    if numbers:
        stacked = np.stack([train[spec.name].astype(np.float32) for spec in numbers], axis=1)
        mean, std = _moments(stacked)
        floats = any(spec.datatype.startswith("FP") for spec in numbers)
        nullable = tuple(i for i, spec in enumerate(numbers) if spec.nullable)
        transforms.append(NumberTransform(tuple(spec.name for spec in numbers), nullable, floats, mean, std))
    for spec in specs:
        if spec in numbers:
            continue
        if spec.datatype == "BYTES" and len(spec.shape) == 1:
            values = tuple(sorted(set(spec.categories or ()) | ({""} if spec.nullable else set())))
            transforms.append(CategoryTransform(spec.name, values))
        elif spec.datatype == "UINT8":
            transforms.append(PixelTransform(spec.name, _row_size(spec)))
        elif spec.datatype == "FP32":
            transforms.append(MatrixTransform(spec.name, *_moments(train[spec.name].reshape(-1, _row_size(spec)))))
        else:
            raise ExportError(
                f"input {spec.name!r}: {spec.datatype} {list(spec.shape)} has no transform; drop the column or cast it"
            )
    return Preprocessor(tuple(transforms))


def _row_size(spec: TensorSpec) -> int:
    return int(np.prod([int(axis) for axis in spec.row_shape]))


def _moments(values: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation per column without the missing values; 0 and 1 where there are none or no spread."""
    present = ~np.isnan(values)
    count = np.maximum(present.sum(axis=0), 1)
    mean = np.where(present, values, 0).sum(axis=0, dtype=np.float64) / count
    variance = (np.where(present, values - mean, 0) ** 2).sum(axis=0, dtype=np.float64) / count
    std = np.sqrt(variance).astype(np.float32)  # rounded first: what is 0 in float32 must not be divided by
    return mean.astype(np.float32), np.where(std > 0, std, np.float32(1))
