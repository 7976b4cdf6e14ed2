"""A signature in JSON Schema (2020-12): what a client may send for a row or a tensor, and what it is answered with.

Said as strictly as the schema language can. A category is offered and no closed list, since models answer texts they never saw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from modelyard.bundle.manifest import Signature, TensorSpec

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 0}
NUMBER_OR_NULL: Json = {"type": ["number", "null"]}
"""A number in an answer: null for NaN and infinities, which JSON has not."""

LONGEST_EXAMPLE = 2000
"""Characters of JSON; a longer example row, such as an image, would hide the rest of a document."""
_MAX_CATEGORIES = 100
_FLOAT_MAX = {
    "FP16": 65504.0,
    "BF16": 3.3895313892515355e38,
    "FP32": float(np.finfo(np.float32).max),
    "FP64": float(np.finfo(np.float64).max),
}


def obj(properties: Mapping[str, Json], required: Sequence[str] = (), *, closed: bool = False) -> Json:
    """Return the schema of an object; a `closed` one has no other properties."""
    schema: Json = {"type": "object", "properties": dict(properties)}
    if required:
        schema["required"] = list(required)
    if closed:
        schema["additionalProperties"] = False
    return schema


def array(items: Json, *, least: int = 0) -> Json:
    return {"type": "array", "items": items, "minItems": least} if least else {"type": "array", "items": items}


def fits_example(example: Any) -> bool:
    """Whether `example` is short enough to be shown."""
    return len(orjson.dumps(example)) <= LONGEST_EXAMPLE


# What is sent.


def row_schema(signature: Signature, example: Mapping[str, Any] | None = None) -> Json:
    """Return the schema of one row: an object of columns, or the bare value too where the model has one input."""
    columns = {spec.name: _column_schema(spec, example) for spec in signature.inputs}
    required = [spec.name for spec in signature.inputs if not (may_be_null(spec) and not spec.row_shape)]
    row = obj(columns, required, closed=True)
    if len(columns) == 1:
        row = {"anyOf": [row, next(iter(columns.values()))]}
    if example is not None and fits_example(example):
        row["examples"] = [example]
    return row


def example_schema(signature: Signature) -> Json:
    """Return the schema of an example of :classify and :regress: a row that may lack columns, which the context then has."""
    return obj({spec.name: _column_schema(spec, None) for spec in signature.inputs}, closed=True)


def columns_schema(signature: Signature) -> Json:
    """Return the schema of {"inputs": …}: columns with a value per row, or one row without its batch axis; bare for one input."""
    values = {spec.name: _nested(_value_schema(spec), spec.row_shape) for spec in signature.inputs}
    forms = [values]
    if all(spec.batched for spec in signature.inputs):
        forms.append({name: array(value, least=1) for name, value in values.items()})
    required = [spec.name for spec in signature.inputs if not may_be_null(spec)]
    columns = [obj(form, required, closed=True) for form in forms]
    bare = [next(iter(form.values())) for form in forms] if len(values) == 1 else []
    return {"anyOf": [*bare, *columns]}


def tensors_schema(signature: Signature) -> Json:
    """Return the schema of the inputs of an inference: each tensor once, in any order."""
    named = [obj({"name": {"const": spec.name}}) for spec in signature.inputs]
    schema = array({"anyOf": [_tensor_schema(spec) for spec in signature.inputs]}, least=len(named))
    return schema | {"maxItems": len(named), "allOf": [{"contains": one} for one in named]}


def may_be_null(spec: TensorSpec) -> bool:
    """Whether null is taken as a missing value."""
    return spec.nullable and (spec.datatype in _FLOAT_MAX or spec.datatype == "BYTES")


def _value_schema(spec: TensorSpec) -> Json:
    if spec.categories is not None:
        # Whatever knows enumerations can offer the categories; any other text is valid all the same.
        schema: Json = {"anyOf": [{"enum": list(spec.categories[:_MAX_CATEGORIES])}, TEXT]}
    else:
        schema = _datatype_schema(spec.datatype)
    return _or_null(schema) if may_be_null(spec) else schema


def _column_schema(spec: TensorSpec, example: Mapping[str, Any] | None) -> Json:
    sizes = list(spec.row_shape)
    value = schema = _value_schema(spec)
    while sizes and sizes[-1] == 1:  # trailing axes of size 1 may be left out
        sizes.pop()
        schema = {"anyOf": [value, {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}]}
    schema = {**_nested(schema, sizes), "description": _about(spec), "x-datatype": spec.datatype}
    if not spec.row_shape and example is not None:
        schema["examples"] = [example.get(spec.name)]
    if spec.unit is not None:
        schema["x-unit"] = spec.unit
    return schema


def _tensor_schema(spec: TensorSpec) -> Json:
    sizes: list[Json] = [{"const": axis} if isinstance(axis, int) else COUNT for axis in spec.shape]
    if spec.batched:
        sizes[0] = {"type": "integer", "minimum": 1}
    value = _value_schema(spec)
    nested = {"anyOf": [value, {"type": "array"}]} if len(sizes) > 1 else value
    return obj(
        {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)},
            "data": array(nested) | {"description": f"Row-major, flat or nested like the shape. {_about(spec)}"},
            "parameters": {"type": "object"},
        },
        ["name", "datatype", "shape", "data"],
    )


# What is answered.


def prediction_schema(signature: Signature) -> Json:
    """Return the schema of the answer to one row: an object of outputs, or the bare value of the only one."""
    outputs = {spec.name: _output_schema(spec) for spec in signature.outputs}
    return next(iter(outputs.values())) if len(outputs) == 1 else obj(outputs, list(outputs))


def outputs_schema(signature: Signature) -> Json:
    """Return the schema of {"outputs": …}: tensors with or without their batch axis, as was asked; bare for one output."""
    forms = {}
    for spec in signature.outputs:
        row = _nested(_answer_schema(spec), spec.row_shape)
        forms[spec.name] = {"anyOf": [row, array(row)]} if spec.batched else row
    return next(iter(forms.values())) if len(forms) == 1 else obj(forms, list(forms))


def answer_tensors_schema(signature: Signature) -> Json:
    """Return the schema of the outputs of an inference."""
    datatypes = sorted({spec.datatype for spec in signature.outputs} | {"BYTES"})  # classes are texts
    tensor = obj(
        {
            "name": {"enum": [spec.name for spec in signature.outputs]},
            "datatype": {"enum": datatypes},
            "shape": array(COUNT),
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
        ["name", "datatype", "shape"],
    )
    return array(tensor)


def _output_schema(spec: TensorSpec) -> Json:
    """Return the schema of one row of an output."""
    value = _answer_schema(spec)
    labels, sizes = spec.labels or (), spec.row_shape
    if labels and spec.batched and sizes == (len(labels),) and spec.datatype not in ("BYTES", "BOOL"):
        names = [str(label) for label in labels]
        return obj(dict.fromkeys(names, value), names) | {"description": f"A score per label. {_about(spec)}"}
    if spec.batched and sizes == (1,):
        sizes = ()
    if spec.datatype == "BYTES" and spec.nullable:
        value = _or_null(value)
    return {**_nested(value, sizes), "description": _about(spec)}


def _answer_schema(spec: TensorSpec) -> Json:
    if spec.datatype in _FLOAT_MAX:
        return NUMBER_OR_NULL
    kind = {"BYTES": str, "BOOL": bool}.get(spec.datatype, int)
    labels = spec.labels or ()
    if labels and len(spec.shape) == 1 and all(type(label) is kind for label in labels):
        return {"enum": list(labels)}
    return _datatype_schema(spec.datatype)


# Both.


def _datatype_schema(datatype: str) -> Json:
    if datatype == "BYTES":
        return TEXT
    if datatype == "BOOL":
        return FLAG
    if datatype in _FLOAT_MAX:
        largest = _FLOAT_MAX[datatype]
        return {"type": "number", "minimum": -largest, "maximum": largest}
    info = np.iinfo(datatype.lower())
    return {"type": "integer", "minimum": int(info.min), "maximum": int(info.max)}


def _nested(schema: Json, sizes: Sequence[int | str]) -> Json:
    """Return the schema of nested lists of these sizes; a size that may vary is a name."""
    for size in reversed(sizes):
        schema = array(schema)
        if isinstance(size, int):
            schema |= {"minItems": size, "maxItems": size}
    return schema


def _or_null(schema: Json) -> Json:
    if "anyOf" in schema:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _about(spec: TensorSpec) -> str:
    """Return what a person should know of a column in a line or two."""
    words = [spec.description.rstrip(".") + "."] if spec.description else []
    sizes = list(spec.row_shape)
    words.append(f"{spec.datatype}{sizes if sizes else ''}{f', in {spec.unit}' if spec.unit else ''}.")
    if spec.categories is not None:
        n = len(spec.categories)
        some = f", the first {_MAX_CATEGORIES} of them listed here" if n > _MAX_CATEGORIES else ""
        words.append(f"{n} values were seen in training{some}; any other is taken and answered as unknown.")
    if may_be_null(spec):
        words.append("May be missing.")
    return " ".join(words)
