"""A call's inputs between the protocols and the engine: packed bytes on the way in, one array per input for a whole batch.

Packing makes a batch cheap: the rows of all calls are joined in one step, whichever protocol they came by.
"""

import struct
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.calls import Call, Part
from modelyard.inference.values import bfloat16_values

_CODES = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))


class Packer:
    """Packs and joins the inputs of one signature."""

    def __init__(self, signature: Signature) -> None:
        self._specs = signature.inputs
        self._varies = any(isinstance(axis, str) for spec in signature.inputs for axis in spec.row_shape)
        self.takes_raw = not self._varies and not any(spec.datatype in ("BYTES", "BOOL") for spec in signature.inputs)
        """Whether binary tensors of the right size can go in as they are."""
        self._may_not_be_nan = [spec.datatype in _FLOATS and not spec.nullable for spec in signature.inputs]

    def pack(self, arrays: Mapping[str, NDArray[Any]], n_rows: int, *, unchecked: bool = False) -> Call:
        """Return the call for one array per input, each of n_rows rows."""
        parts = tuple([_packed(arrays[spec.name]) for spec in self._specs])
        bucket: Hashable = None
        if self._varies:
            bucket = tuple([arrays[spec.name].shape[spec.batched :] for spec in self._specs])
        return Call(parts, n_rows, bucket, unchecked=unchecked)

    def call(self, parts: Mapping[str, memoryview], n_rows: int) -> Call:
        """Return the call for binary tensors of the right sizes, for a signature that `takes_raw`."""
        return Call(tuple([parts[spec.name] for spec in self._specs]), n_rows, unchecked=True)

    def join(self, calls: Sequence[Call], n_rows: int, padded_to: int = 0) -> dict[str, NDArray[Any]]:
        """Return one array per input with the rows of all calls, the last one repeated up to `padded_to` rows."""
        bucket = calls[0].bucket
        joined = {}
        for i, spec in enumerate(self._specs):
            row_shape: Any = bucket[i] if bucket is not None else spec.row_shape  # type: ignore[index]  # a tuple of shapes
            array = _joined([call.inputs[i] for call in calls], spec)
            if spec.batched:
                array = array.reshape(n_rows, *row_shape)
                if padded_to > n_rows:
                    array = np.concatenate([array, np.repeat(array[-1:], padded_to - n_rows, axis=0)])
            else:
                array = array.reshape(row_shape)
            joined[spec.name] = array
        return joined

    def holds_nan(self, joined: Mapping[str, NDArray[Any]]) -> bool:
        """Whether a number is missing where the model takes none."""
        return any(
            _has_nan(joined[spec.name], spec)
            for spec, forbidden in zip(self._specs, self._may_not_be_nan, strict=True)
            if forbidden
        )

    def check(self, call: Call) -> None:
        """Raise RequestError when the call has NaN in an input that takes none."""
        for spec, forbidden, part in zip(self._specs, self._may_not_be_nan, call.inputs, strict=True):
            if forbidden and _has_nan(_joined([part], spec), spec):
                raise RequestError(
                    f"input {spec.name!r} holds NaN, and this model takes no missing values; send numbers"
                )


def value_packer(spec: TensorSpec, n_values: int) -> struct.Struct | None:
    """Return what packs `n_values` Python numbers that fit the datatype and raises struct.error or OverflowError for others.

    None for BYTES and BF16, which have none.
    """
    code = _CODES.get(spec.datatype)
    return None if code is None else struct.Struct(f"<{n_values}{code}")


def _packed(array: NDArray[Any]) -> Part:
    if array.dtype == object:
        texts: list[str] = array.reshape(-1).tolist()
        return texts
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _joined(parts: list[Part], spec: TensorSpec) -> NDArray[Any]:
    """Return the values of all parts, flat."""
    if spec.datatype == "BYTES":
        texts: list[str] = []
        for part in parts:
            texts += part  # type: ignore[arg-type]  # parts of BYTES are lists of texts
        array = np.empty(len(texts), dtype=object)
        array[:] = texts
        return array
    return np.frombuffer(b"".join(parts), dtype=spec.numpy_dtype)  # type: ignore[arg-type]  # and of numbers bytes


def _has_nan(array: NDArray[Any], spec: TensorSpec) -> bool:
    numbers = bfloat16_values(array) if spec.datatype == "BF16" else array
    return bool(np.isnan(numbers).any())
