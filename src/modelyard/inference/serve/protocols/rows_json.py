"""JSON rows ↔ packed inputs and outputs, quickly: what the row protocols read and write for every request.

What clients usually send is decoded straight into the signature's types and packed. Whatever that does not take goes the long
way through rows.py, which takes every form there is and says what is wrong with the rest; the answers are the same.
Outputs become JSON once per run, for all its calls together.
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.inference.serve.calls import Call, Part, Run
from modelyard.inference.serve.packing import value_packer
from modelyard.inference.values import bfloat16_values

_TYPES: dict[str, type] = {"BYTES": str, "BOOL": bool, "FP16": float, "FP32": float, "FP64": float}
_NAN = float("nan")
_UNFIT = (msgspec.DecodeError, UnicodeDecodeError, struct.error, OverflowError)
"""What decoding and packing raise for a body that is not as usual."""


class QuickReader:
    """Reads the usual bodies of one signature; returns None for anything else."""

    def __init__(self, signature: Signature) -> None:
        self._one = _OneTensor(signature.inputs[0]) if len(signature.inputs) == 1 else None
        self._columns = _Columns(signature.inputs) if all(_is_column(spec) for spec in signature.inputs) else None

    def columnar_row(self, body: bytes) -> Call | None:
        """Read {"inputs": [values of one row]}, for a model with one input of one axis."""
        return self._one.row(body) if self._one is not None else None

    def instances(self, body: bytes, max_rows: int) -> Call | None:
        """Read {"instances": [row, …]}: objects of columns, or bare rows where the model has one input."""
        start = body.find(b"[", 0, 64) + 1
        first = body[start : start + 8].lstrip()[:1]
        if first == b"{":
            return self._columns.instances(body, max_rows) if self._columns is not None else None
        return self._one.instances(body, max_rows) if first == b"[" and self._one is not None else None


class RowWriter:
    """Writes the outputs of one signature as JSON, one text per row."""

    def __init__(self, signature: Signature) -> None:
        self._outputs = signature.outputs
        self._quick = {spec.name: _LabelledTemplate(spec) for spec in signature.outputs if spec.labels}
        self._names = [orjson.dumps(spec.name) for spec in signature.outputs]

    def predictions(self, call: Call) -> Sequence[bytes]:
        """Return one JSON text per row: an object of outputs, or the bare value where the model has one output."""
        run = call.run
        assert run is not None
        rows: list[bytes] | None = run.scratch.get(self)
        if rows is None:
            rows = run.scratch[self] = self._rows(run)
        if run.n_rows == call.n_rows:
            return rows
        return rows[call.first_row : call.first_row + call.n_rows]

    def tensors(self, call: Call, *, one: bool) -> list[bytes]:
        """Return the JSON text of each output as a plain tensor; `one`: of a single row, without its batch axis."""
        return [self._tensor(call, spec, one=one) for spec in self._outputs]

    def _tensor(self, call: Call, spec: TensorSpec, *, one: bool) -> bytes:
        run = call.run
        assert run is not None
        key = (self, spec.name)
        rows: list[bytes] | None = run.scratch.get(key)
        if rows is None:
            array = run.outputs[spec.name]
            rows = run.scratch[key] = tensor_rows(array if spec.batched else array[np.newaxis], spec)
        if one or not spec.batched:
            return rows[call.first_row if spec.batched else 0]
        return b"[%b]" % b",".join(rows[call.first_row : call.first_row + call.n_rows])

    def _rows(self, run: Run) -> list[bytes]:
        columns = [self._column(run.outputs[spec.name], spec, run.n_rows) for spec in self._outputs]
        if len(columns) == 1:
            return columns[0]
        template = b"{" + b",".join([b"%b:%%b" % name.replace(b"%", b"%%") for name in self._names]) + b"}"
        return [template % values for values in zip(*columns, strict=True)]

    def _column(self, array: NDArray[Any], spec: TensorSpec, n_rows: int) -> list[bytes]:
        if not spec.batched:
            return tensor_rows(array[np.newaxis], spec) * n_rows
        labelled = self._quick.get(spec.name)
        if labelled is not None and array.shape[1:] == (labelled.n_labels,) and array.dtype.kind not in "OUS":
            return labelled.rows(array, spec)
        if array.shape[1:] == (1,):
            array = array.reshape(len(array))
        return tensor_rows(array, spec, empty_is_null=spec.nullable and array.ndim == 1)


class _LabelledTemplate:
    """{label: score, …} of one output."""

    def __init__(self, spec: TensorSpec) -> None:
        labels = spec.labels or ()
        self.n_labels = len(labels)
        keys = [orjson.dumps(str(label)).replace(b"%", b"%%") for label in labels]
        self._template = b"{" + b",".join([b"%b:%%b" % key for key in keys]) + b"}"

    def rows(self, array: NDArray[Any], spec: TensorSpec) -> list[bytes]:
        return [self._template % tuple(row[1:-1].split(b",")) for row in tensor_rows(array, spec)]


class _OneTensor:
    """The only input of a signature, a tensor of numbers of fixed size with one axis per row."""

    def __init__(self, spec: TensorSpec) -> None:
        self._takes = spec.batched and len(spec.shape) == 2 and isinstance(spec.shape[1], int) and spec.shape[1] > 0
        self._size = spec.shape[1] if self._takes else 0
        packer = value_packer(spec, int(self._size)) if self._takes else None
        if packer is None:
            self._takes = False
            return
        self._pack = packer.pack
        value = _TYPES.get(spec.datatype, int)
        self._row = _decoder("inputs", list[value])  # type: ignore[valid-type]  # a type made here
        self._rows = _decoder("instances", list[list[value]])  # type: ignore[valid-type]  # as above

    def row(self, body: bytes) -> Call | None:
        if not self._takes:
            return None
        try:
            return Call((self._pack(*self._row.decode(body).inputs),), 1)
        except _UNFIT:  # the long way says what is wrong, if anything is
            return None

    def instances(self, body: bytes, max_rows: int) -> Call | None:
        if not self._takes:
            return None
        try:
            rows = self._rows.decode(body).instances
            if not 0 < len(rows) <= max_rows:
                return None
            return Call((b"".join([self._pack(*row) for row in rows]),), len(rows))
        except _UNFIT:  # as above
            return None


class _Columns:
    """Inputs of one value per row, given as objects."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        fields = []
        for i, spec in enumerate(specs):
            value = _TYPES.get(spec.datatype, int)
            # A missing value is None; only float and text columns have one to put in its place.
            nullable = spec.nullable and (value is float or value is str)
            kind = value | None if nullable else value
            fields.append((f"c{i}", kind, None) if nullable else (f"c{i}", kind))
        # Fields without a default come first in a struct; the order of the columns is kept by their numbers.
        fields.sort(key=len)
        row = msgspec.defstruct(
            "Row",
            fields,
            forbid_unknown_fields=True,
            rename={f"c{i}": spec.name for i, spec in enumerate(specs)},
        )
        self._decoder = _decoder("instances", list[row])  # type: ignore[valid-type]  # made above
        self._columns = [
            (f"c{i}", value_packer(spec, 1), spec.nullable and spec.datatype in ("FP16", "FP32", "FP64"), spec)
            for i, spec in enumerate(specs)
        ]

    def instances(self, body: bytes, max_rows: int) -> Call | None:
        try:
            rows = self._decoder.decode(body).instances
            if not 0 < len(rows) <= max_rows:
                return None
            return Call(tuple([self._column(rows, *column) for column in self._columns]), len(rows))
        except _UNFIT:  # as above
            return None

    def _column(
        self, rows: Sequence[Any], field: str, packer: struct.Struct | None, may_miss: bool, spec: TensorSpec
    ) -> Part:
        if packer is None:  # texts; a missing one is ""
            return [getattr(row, field) or "" for row in rows]
        if len(rows) == 1:
            value = getattr(rows[0], field)
            return packer.pack(_NAN if value is None and may_miss else value)
        values = [getattr(row, field) for row in rows]
        if may_miss and None in values:
            values = [_NAN if value is None else value for value in values]
        return struct.pack(f"<{len(values)}{packer.format[-1]}", *values)


def tensor_rows(array: NDArray[Any], spec: TensorSpec, *, empty_is_null: bool = False) -> list[bytes]:
    """Return each row as JSON, nested lists for more than one axis; NaN and infinities are null, as is "" where said."""
    if array.dtype == object:
        if array.ndim == 1:
            return [b"null" if empty_is_null and not text else orjson.dumps(text) for text in array.tolist()]
        return [orjson.dumps(row) for row in array.tolist()]
    if spec.datatype == "BF16":
        array = bfloat16_values(array)
    if not len(array):
        return []
    text = orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)
    if array.ndim == 1:
        return text[1:-1].split(b",")
    if array.ndim == 2 and array.shape[1]:
        return [b"[%b]" % row for row in text[2:-2].split(b"],[")]
    return [orjson.dumps(np.ascontiguousarray(row), option=orjson.OPT_SERIALIZE_NUMPY) for row in array]


def _decoder(key: str, kind: Any) -> "msgspec.json.Decoder[Any]":
    """Return what decodes {key: kind} and nothing else."""
    return msgspec.json.Decoder(msgspec.defstruct("Body", [(key, kind)], forbid_unknown_fields=True))


def _is_column(spec: TensorSpec) -> bool:
    """Whether it has one value per row, of a type the decoder knows, under a name the decoder takes.

    {"b64": …} in the place of a row is the text that it encodes, whatever the columns are called.
    """
    plain_name = orjson.dumps(spec.name) == b'"%b"' % spec.name.encode() and spec.name != "b64"
    return spec.batched and len(spec.shape) == 1 and spec.datatype != "BF16" and plain_name
