"""JSON values ↔ one array of a signature's datatype: the one place that says which value fits which datatype.

Rows with named columns and Open Inference Protocol tensors both come through here. A list of plain values takes the quick
path, a few NumPy calls; anything else is looked at value by value, which finds the first that does not fit.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import RequestError

Place = Callable[[int], str]
"""Names the i-th value for a message, e.g. "row 3, column 'dep_hour'"; called only when something is wrong."""

_INFINITE_FROM = {"FP16": 65520.0, "BF16": 3.39617752e38, "FP32": 2.0**128 - 2.0**103, "FP64": float("inf")}
"""What rounds to no finite number any more. The largest floats, written in the shortest decimals, lie below it."""
_PLAIN: dict[str, frozenset[type]] = {
    "float": frozenset((float, int)),
    "int": frozenset((int,)),
    "bool": frozenset((bool,)),
    "text": frozenset((str,)),
}


def to_array(values: Sequence[Any], spec: TensorSpec, place: Place) -> NDArray[Any]:
    """Return `values` as a flat array of the datatype of `spec`, shape (len(values),).

    None is a missing value: NaN in a float column, "" in a text column, refused unless `spec.nullable`.

    Raises:
        RequestError: a value is of another type, out of range, not finite, or missing; names its place and what fits.
    """
    kind = _kind(spec)
    if _PLAIN[kind].issuperset(map(type, values)):
        array = _plain_array(values, spec, kind)
        if array is not None:
            return array
    checked = [_scalar(value, spec, kind, place, i) for i, value in enumerate(values)]
    return _typed(checked, spec, kind)


def to_values(array: NDArray[Any]) -> Any:
    """Return `array` as nested lists that JSON can hold: NaN and infinities are None, floats keep their shortest form."""
    if array.dtype.kind != "f" or not array.size:
        return array.tolist()
    # orjson writes a float32 as 0.8 rather than 0.800000011920929, and NaN as null, faster than Python could.
    dumped = orjson.dumps(np.ascontiguousarray(array.reshape(-1)), option=orjson.OPT_SERIALIZE_NUMPY)
    flat = orjson.loads(dumped)
    for size in reversed(array.shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]
    return flat if array.ndim else flat[0]


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the BF16 bit patterns nearest to finite or NaN `values`, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the numbers behind BF16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def expected(spec: TensorSpec) -> str:
    """Say which values fit `spec`, e.g. "a whole number from 0 to 255 (UINT8)"."""
    kind = _kind(spec)
    if kind == "int":
        info = np.iinfo(spec.numpy_dtype)
        text = f"a whole number from {info.min} to {info.max}"
    else:
        text = {"float": "a finite number", "bool": "true or false", "text": "text"}[kind]
    return f"{text} ({spec.datatype}){' or null' if spec.nullable else ''}"


def short(value: Any) -> str:
    """Return `value` as it would stand in a message, cut at 60 characters; reads no more of it than that."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > 60:
            return text[:57] + "..."
    return text


def _pieces(value: Any) -> Iterator[str]:
    """Yield the parts of repr(value) for what JSON can hold, however large or deep."""
    if isinstance(value, list | tuple):
        yield "["
        for i, inner in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(inner)
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for i, (key, inner) in enumerate(value.items()):
            yield f"{', ' if i else ''}{short(key)}: "
            yield from _pieces(inner)
        yield "}"
    else:
        yield repr(value[:61] if isinstance(value, str | bytes) else value)


def _kind(spec: TensorSpec) -> str:
    if spec.datatype == "BYTES":
        return "text"
    if spec.datatype == "BOOL":
        return "bool"
    return "float" if spec.datatype in ("FP16", "BF16", "FP32", "FP64") else "int"


def _fits(value: float, spec: TensorSpec, kind: str) -> bool:
    """Whether a number, which may be an integer of any size but not NaN, is in the range of the datatype."""
    if kind == "float":
        return abs(value) < _INFINITE_FROM[spec.datatype]
    info = np.iinfo(spec.numpy_dtype)
    return info.min <= value <= info.max and (isinstance(value, int) or value.is_integer())


def _plain_array(values: Sequence[Any], spec: TensorSpec, kind: str) -> NDArray[Any] | None:
    """Return the array for values of the plain Python types, or None when one of them is out of range."""
    if kind == "float":
        try:
            wide = np.array(values, dtype=np.float64)
        except OverflowError:  # an integer beyond any float
            return None
        in_range = np.abs(wide).max(initial=0.0) < _INFINITE_FROM[spec.datatype]  # also False for NaN
        return _typed(wide, spec, kind) if in_range else None
    if kind == "int" and values:
        info = np.iinfo(spec.numpy_dtype)
        if min(values) < info.min or max(values) > info.max:
            return None
    return _typed(values, spec, kind)


def _typed(values: Any, spec: TensorSpec, kind: str) -> NDArray[Any]:
    if spec.datatype == "BF16":
        return bfloat16_bits(np.asarray(values, dtype=np.float32))
    if kind == "text":
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array
    return np.asarray(values, dtype=spec.numpy_dtype)


def _scalar(value: Any, spec: TensorSpec, kind: str, place: Place, index: int) -> Any:
    """Return `value` as a Python value that fits, or raise RequestError."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and value != value):
        if spec.nullable and kind in ("float", "text"):
            return "" if kind == "text" else np.nan
        raise RequestError(
            f"{place(index)} is missing and may not be, since the model never saw missing values there; give {expected(spec)}",
            value=None,
        )
    fits = False
    if kind == "text":
        fits = isinstance(value, str)
    elif kind == "bool":
        fits = isinstance(value, bool)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        fits = _fits(value, spec, kind)
    if not fits:
        raise RequestError(f"{place(index)} must be {expected(spec)}, got {short(value)}", value=value)
    return int(value) if kind == "int" else value
