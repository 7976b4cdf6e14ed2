"""Tensors on the wire of the Open Inference Protocol ↔ arrays: JSON data, and the binary tensor extension.

Binary tensors are little-endian and row-major; an element of BYTES is a 32-bit length and its bytes, BOOL is one byte.
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/extension_binary_data.md
"""

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.values import bfloat16_values, short, to_array

_LENGTH = struct.Struct("<I")


def check_shape(shape: Any, spec: TensorSpec) -> tuple[int, ...]:
    """Return `shape` as a tuple when a tensor of `spec` may have it; raises RequestError."""
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and size >= 0 for size in shape)
        or len(shape) != len(spec.shape)
        or not all(isinstance(axis, str) or axis == size for axis, size in zip(spec.shape, shape, strict=True))
    ):
        raise RequestError(
            f"input {spec.name!r} must have the shape {wire_shape(spec)} (-1 is any size), got {short(shape)}"
        )
    if spec.batched and shape[0] == 0:
        raise RequestError(f"input {spec.name!r} has no rows (shape {shape}); send at least one")
    return tuple(shape)


def wire_shape(spec: TensorSpec) -> list[int]:
    """Return the shape as the protocol's metadata gives it: -1 for an axis of any size."""
    return [axis if isinstance(axis, int) else -1 for axis in spec.shape]


def array_from_json(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return row-major `data`, flat or nested like `shape`, as an array; raises RequestError."""
    if not isinstance(data, list):
        raise RequestError(f"input {spec.name!r}: data must be a list, got {short(data)}")
    if data and isinstance(data[0], list) and shape:
        data = _flat(data, spec, shape)
    n_elements = math.prod(shape)
    if len(data) != n_elements:
        raise RequestError(
            f"input {spec.name!r}: data has {len(data)} elements, the shape {list(shape)} takes {n_elements}"
        )

    def place(i: int) -> str:
        return f"input {spec.name!r}: data[{i}]"

    return to_array(data, spec, place).reshape(shape)


def array_from_raw(raw: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the binary tensor `raw` as an array; raises RequestError when its length does not fit `shape`.

    NaN is looked for later, for a whole batch at once.
    """
    if spec.datatype == "BYTES":
        return _text_from_raw(raw, spec, math.prod(shape)).reshape(shape)
    check_raw_size(len(raw), spec, shape)
    if spec.datatype == "BOOL":
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape).astype(np.bool_)
    # Copied: a tensor may start at any offset of the body.
    array: NDArray[Any] = np.frombuffer(bytes(raw), dtype=spec.numpy_dtype.newbyteorder("<")).reshape(shape)
    return array


def check_raw_size(n_bytes: int, spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """Raise RequestError where a binary tensor of `shape` cannot have `n_bytes`; BYTES may have any."""
    if spec.datatype == "BYTES":
        return
    takes = math.prod(shape) * spec.numpy_dtype.itemsize
    if n_bytes != takes:
        raise RequestError(
            f"input {spec.name!r}: binary_data_size is {n_bytes}, {spec.datatype} of shape {list(shape)} takes {takes} bytes"
        )


def raw_from_array(array: NDArray[Any]) -> bytes:
    """Return `array` as a binary tensor."""
    if array.dtype == object:
        encoded = [str(text).encode() for text in array.reshape(-1)]
        return b"".join(chain.from_iterable((_LENGTH.pack(len(text)), text) for text in encoded))
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def classes(array: NDArray[Any], spec: TensorSpec, n_classes: int) -> NDArray[Any]:
    """Return the `n_classes` best of the last axis as "score:index[:label]" texts, as the classification extension has it."""
    if spec.datatype == "BF16":
        array = bfloat16_values(array)
    best = np.argsort(-array.astype(np.float64), axis=-1, kind="stable")[..., :n_classes]
    labels = spec.labels if spec.labels and len(spec.labels) == array.shape[-1] else None
    told = np.empty(best.shape, dtype=object)
    for place in np.ndindex(*best.shape):
        index = int(best[place])
        label = "" if labels is None else f":{labels[index]}"
        told[place] = f"{float(array[place[:-1]][index]):f}:{index}{label}"
    return told


def json_from_array(array: NDArray[Any], spec: TensorSpec) -> Any:
    """Return `array` flat, row-major, as something orjson writes (NaN and infinities as null)."""
    if array.dtype == object:
        return array.reshape(-1).tolist()
    if spec.datatype == "BF16":
        array = bfloat16_values(array)
    return np.ascontiguousarray(array).reshape(-1)


def _flat(data: Sequence[Any], spec: TensorSpec, shape: tuple[int, ...]) -> list[Any]:
    """Unpack lists nested like `shape`."""
    level = list(data)
    for axis, size in enumerate(shape[1:], start=1):
        if not all(isinstance(part, list) and len(part) == size for part in level):
            raise RequestError(
                f"input {spec.name!r}: data is nested, but axis {axis} has not {size} values everywhere, as the shape {list(shape)} says"
            )
        level = list(chain.from_iterable(level))
    return level


def _text_from_raw(raw: memoryview, spec: TensorSpec, n_elements: int) -> NDArray[Any]:
    texts: list[str] = []
    offset = 0
    try:
        while offset < len(raw):
            (length,) = _LENGTH.unpack_from(raw, offset)
            offset += _LENGTH.size + length
            if offset > len(raw):
                raise RequestError(
                    f"input {spec.name!r}: element {len(texts)} is {length} bytes long, more than there are; check the lengths"
                )
            texts.append(str(raw[offset - length : offset], "utf-8"))
    except struct.error as exc:
        raise RequestError(f"input {spec.name!r}: the binary data ends within the length of an element") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"input {spec.name!r}: element {len(texts)} is not UTF-8 text ({exc})") from exc
    if len(texts) != n_elements:
        raise RequestError(
            f"input {spec.name!r}: the binary data has {len(texts)} elements, the shape takes {n_elements}"
        )
    array = np.empty(n_elements, dtype=object)
    array[:] = texts
    return array
