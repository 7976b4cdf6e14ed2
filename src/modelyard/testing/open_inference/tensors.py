"""Tensors of every datatype: values made for a request, and their two forms on the wire, JSON data and binary.

Elements of BYTES are Python bytes in an object array. BF16, which NumPy has not, is the bit pattern in a uint16.
"""

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.testing.open_inference.check import Failed, shown

Array = NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
    "BF16": np.dtype("<u2"),
}
"""The datatypes of the specification's table, and BF16, which its text and the protobuf name but its table has not."""
SIXTEEN_BIT_FLOATS = ("FP16", "BF16")
"""JSON has no agreed form for them: they travel as binary data where the server takes it."""

_LENGTH = struct.Struct("<I")


def make(datatype: str, shape: Sequence[int], seed: int = 0, *, distinct: bool = False) -> Array:
    """Return values that most models take: 0 and 1, small fractions, digits as text.

    Args:
        datatype: a key of NUMPY_DTYPES.
        shape: sizes, none of them negative.
        seed: another seed gives other values.
        distinct: True for values further apart, by which a model that returns its input is known.
    """
    positions = np.arange(math.prod(shape)) + seed
    if datatype == "BYTES":
        texts = [b"echo-%d" % i if distinct else b"%d" % (i % 2 + 1) for i in positions]
        return objects(texts).reshape(shape)
    values: Array
    if datatype == "BOOL":
        values = positions % 2 == 1
    elif datatype in ("FP16", "FP32", "FP64", "BF16"):
        values = (positions % 50) * 0.5 + (0.25 if distinct else 0.0)
    else:
        values = (positions * 7 + 3) % 100 if distinct else positions % 2
    if datatype == "BF16":
        return to_bfloat16(values).reshape(shape)
    return values.astype(NUMPY_DTYPES[datatype]).reshape(shape)


def extremes(datatype: str) -> list[Any]:
    """Return the values of a datatype that are lost first: limits, denormals, what a double cannot hold, odd text."""
    if datatype == "BOOL":
        return [True, True, False, False]
    if datatype == "BYTES":
        return [b"", b"plain", "naïve ✈ 漢字".encode(), b'quote " and \\ slash', b"line\nbreak\ttab"]
    if datatype == "BF16":  # 1, -2, the largest, the smallest normal, the smallest of all
        return [0x3F80, 0xC000, 0x7F7F, 0x0080, 0x0001]
    dtype = NUMPY_DTYPES[datatype]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        odd = [2**53 + 1] if limits.bits == 64 else []
        return [0, 1, int(limits.min), int(limits.max), *odd]
    info = np.finfo(dtype)
    third = dtype.type(1) / dtype.type(3)
    return [0.0, third, float(info.max), float(info.min), float(info.tiny), float(info.smallest_subnormal)]


def filled(datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """Return a tensor with `values` over and over until it is full."""
    cycled = list(itertools.islice(itertools.cycle(values), math.prod(shape)))
    flat = objects(cycled) if datatype == "BYTES" else np.array(cycled, dtype=NUMPY_DTYPES[datatype])
    return flat.reshape(shape)


def objects(values: Sequence[bytes]) -> Array:
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array


def to_json(array: Array, datatype: str) -> list[Any]:
    """Return the elements flat and row-major, as JSON holds them."""
    flat = array.reshape(-1)
    if datatype == "BYTES":
        return [element.decode() for element in flat]
    if datatype == "BF16":
        flat = from_bfloat16(flat)
    values: list[Any] = flat.tolist()
    return values


def from_json(data: Any, datatype: str, shape: Sequence[int], what: str) -> Array:
    """Return JSON data, flat or nested, as a tensor; null is NaN in a float. Raises Failed."""
    if not isinstance(data, list):
        raise Failed(f"{what}: data must be an array, got {shown(data)}")
    flat = _flat(data, what)
    if len(flat) != math.prod(shape):
        raise Failed(f"{what}: data has {len(flat)} elements, the shape {list(shape)} takes {math.prod(shape)}")
    dtype = NUMPY_DTYPES[datatype]
    kinds: tuple[type, ...] = {"b": (bool,), "O": (str,), "f": (int, float, type(None))}.get(dtype.kind, (int,))
    if datatype == "BF16":
        kinds = (int, float, type(None))
    for element in flat:
        if not isinstance(element, kinds) or (isinstance(element, bool) and dtype.kind != "b"):
            raise Failed(f"{what}: {shown(element)} is no {datatype}")
    if datatype == "BYTES":
        return objects([text.encode() for text in flat]).reshape(shape)
    if datatype == "BF16":
        return to_bfloat16(np.array(flat, dtype=np.float64)).reshape(shape)
    try:
        return np.array(flat, dtype=dtype).reshape(shape)
    except OverflowError as exc:
        raise Failed(f"{what}: a value is outside the range of {datatype} ({exc})") from exc


def nested(flat: list[Any], shape: Sequence[int]) -> list[Any]:
    """Return flat data as lists of lists of the given shape."""
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)] if size else [[] for _ in range(shape[0])]
    return flat


def to_raw(array: Array, datatype: str) -> bytes:
    """Return a binary tensor: little-endian, row-major; an element of BYTES is its length in 4 bytes, then itself."""
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(element)) + element for element in array.reshape(-1))
    return np.ascontiguousarray(array, dtype=NUMPY_DTYPES[datatype]).tobytes()


def from_raw(raw: bytes, datatype: str, shape: Sequence[int], what: str) -> Array:
    """Return a binary tensor as an array; raises Failed when its size does not fit."""
    if datatype == "BYTES":
        elements = []
        offset = 0
        while offset < len(raw):
            if offset + 4 > len(raw):
                raise Failed(f"{what}: the binary data ends within the length of an element")
            (length,) = _LENGTH.unpack_from(raw, offset)
            offset += 4 + length
            if offset > len(raw):
                raise Failed(f"{what}: an element is said to have {length} bytes, more than there are")
            elements.append(raw[offset - length : offset])
        if len(elements) != math.prod(shape):
            raise Failed(
                f"{what}: {len(elements)} elements in binary, the shape {list(shape)} takes {math.prod(shape)}"
            )
        return objects(elements).reshape(shape)
    dtype = NUMPY_DTYPES[datatype]
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(raw) != n_bytes:
        raise Failed(f"{what}: {len(raw)} bytes of binary data, {datatype} of shape {list(shape)} takes {n_bytes}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def same(a: Array, b: Array, datatype: str, *, exactly: bool = False) -> bool:
    """Return whether two tensors of one datatype hold the same; floats within rounding, unless `exactly` bit by bit."""
    if a.shape != b.shape:
        return False
    if exactly or datatype == "BYTES":
        return to_raw(a, datatype) == to_raw(b, datatype)
    if datatype == "BF16":
        a, b = from_bfloat16(a), from_bfloat16(b)
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    tolerance = 1e-2 if datatype in SIXTEEN_BIT_FLOATS else 1e-4
    return bool(np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=tolerance, atol=tolerance, equal_nan=True))


def to_bfloat16(numbers: Array) -> Array:
    """Return the bit patterns of the nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(numbers, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")


def from_bfloat16(patterns: Array) -> Array:
    """Return the numbers that bit patterns of bfloat16 stand for, as float32."""
    return (patterns.astype("<u4") << np.uint32(16)).view("<f4")


def _flat(data: list[Any], what: str) -> list[Any]:
    while data and all(isinstance(part, list) for part in data):
        data = list(itertools.chain.from_iterable(data))
    if any(isinstance(part, list) for part in data):
        raise Failed(f"{what}: data is nested in one place and flat in another")
    return data
