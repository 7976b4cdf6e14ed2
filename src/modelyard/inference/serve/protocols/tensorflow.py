"""TensorFlow Serving's REST protocol, KServe v1 on the paths they share, and rows with named columns for people with curl.

    POST /v1/models/NAME[/versions/V|/labels/L]:predict
        {"instances": [{"dep_hour": 7, "carrier": "UA"}]}   → {"predictions": [{"label": "late", "probabilities": {"late": 0.8}}]}
        {"inputs": {"dep_hour": [7], "carrier": ["UA"]}}    → {"outputs": {"label": ["late"], "probabilities": [[0.8, 0.2]]}}
    POST …:classify, …:regress   {"examples": [{…}], "context": {…}} → {"results": […]}
    GET  /v1/models, /v1/models/NAME[/versions/V|/labels/L][/metadata]

https://www.tensorflow.org/tfx/serving/api_rest. A model with one output answers with its bare value, one with one input takes
the bare value. Beyond that protocol: a single row may be given without its batch axis as {"inputs": row}, and is answered
without one; NaN in answers is null, since JSON has no NaN.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import RequestError, UnknownPath
from modelyard.inference.rows import rows_to_arrays
from modelyard.inference.serve.calls import Call, Run, terms_of
from modelyard.inference.serve.front import Front, HttpAdapter, check_rows
from modelyard.inference.serve.models.repository import Entry, Loaded, Repository
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols.rows_json import QuickReader, RowWriter
from modelyard.inference.serve.transport.messages import Request, Response, json_response
from modelyard.inference.serve.transport.routes import Route
from modelyard.inference.values import short

# Our states in TensorFlow Serving's words.
_STATES = {"loading": "LOADING", "ready": "AVAILABLE", "failed": "END", "draining": "UNLOADING", "unloaded": "END"}
_SIGNATURE_NAMES = ("", "serving_default", "predict", "classify", "regress")
_ROWS, _COLUMNS, _ONE_ROW = "rows", "columns", "one row"

# The datatypes in TensorFlow's words, for metadata.
_DTYPES = {
    "BOOL": "DT_BOOL", "INT8": "DT_INT8", "INT16": "DT_INT16", "INT32": "DT_INT32", "INT64": "DT_INT64", "UINT8": "DT_UINT8",
    "UINT16": "DT_UINT16", "UINT32": "DT_UINT32", "UINT64": "DT_UINT64", "FP16": "DT_HALF", "BF16": "DT_BFLOAT16", "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE", "BYTES": "DT_STRING",
}  # fmt: skip


class Codec:
    """Reads and writes the rows of one signature."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.packer = Packer(signature)
        self.quick = QuickReader(signature)
        self.writer = RowWriter(signature)
        self.tensor_names = [orjson.dumps(spec.name) for spec in signature.outputs]
        self._in_b64 = [spec.name for spec in signature.outputs if is_in_b64(spec)]

    def to_write(self, call: Call) -> Call:
        """Return the call as the writer is to have it: with the texts that are written as {"b64": …} turned into that."""
        run = call.run
        if not self._in_b64 or run is None:
            return call
        written: Run | None = run.scratch.get(self)
        if written is None:
            written = run.scratch[self] = copy(run)
            written.outputs = {**run.outputs, **{name: _wrapped(run.outputs[name]) for name in self._in_b64}}
            written.scratch = {}
        call = copy(call)
        call.run = written
        return call


class Predict(HttpAdapter):
    """:predict, in rows or in columns."""

    protocol = "rest-v1"

    def read(self, request: Request, loaded: Loaded) -> Call:
        codec = loaded.codec(Codec)
        body = request.body
        start = body.find(b'"', 0, 64)
        if body.startswith(b'"inputs"', start):
            call = codec.quick.columnar_row(body)
            if call is not None:
                call.form = _ONE_ROW
                return call
        elif body.startswith(b'"instances"', start):
            call = codec.quick.instances(body, loaded.max_rows)
            if call is not None:
                call.form = _ROWS
                return call
        return self._read_any(body, loaded)

    def _read_any(self, body: bytes, loaded: Loaded) -> Call:
        fields = _object(body, '{"instances": [row, …]} or {"inputs": columns}')
        _check_signature_name(fields)
        if ("instances" in fields) == ("inputs" in fields):
            raise RequestError(
                'the body must be {"instances": [row, …]}, a row being an object of named columns, or {"inputs": columns}, and not both'
            )
        if "instances" in fields:
            rows = fields["instances"]
            if not isinstance(rows, list):
                raise RequestError(f"instances must be a list of rows, got {short(rows)}")
            form = _ROWS
            check_rows(len(rows), loaded)
        else:
            rows, form = _rows_of_columns(fields["inputs"], loaded)
        signature = loaded.signature
        call = loaded.codec(Codec).packer.pack(rows_to_arrays(_decoded(rows, body), signature), len(rows))
        call.form = form
        return call

    def write(self, request: Request, call: Call) -> Response:
        assert call.loaded is not None
        codec = call.loaded.codec(Codec)
        writer = codec.writer
        call = codec.to_write(call)
        if call.form is _ROWS:
            return Response(200, b'{"predictions":[%b]}' % b",".join(writer.predictions(call)))
        tensors = writer.tensors(call, one=call.form is _ONE_ROW)
        if len(tensors) == 1:
            return Response(200, b'{"outputs":%b}' % tensors[0])
        named = [b"%b:%b" % pair for pair in zip(codec.tensor_names, tensors, strict=True)]
        return Response(200, b'{"outputs":{%b}}' % b",".join(named))


class Examples(HttpAdapter):
    """:classify and :regress: rows as examples, on top of a context that holds for all of them."""

    protocol = "rest-v1"

    def __init__(self, verb: str) -> None:
        self._verb = verb

    def read(self, request: Request, loaded: Loaded) -> Call:
        codec = loaded.codec(Codec)
        fields = _object(request.body, '{"examples": [row, …], "context": row}')
        _check_signature_name(fields)
        examples, context = fields.get("examples"), fields.get("context", {})
        if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
            raise RequestError(f"examples must be a list of objects of named columns, got {short(examples)}")
        check_rows(len(examples), loaded)
        if not isinstance(context, dict):
            raise RequestError(f"context must be an object of named columns, got {short(context)}")
        _result_output(self._verb, loaded.signature)
        rows = [context | example for example in examples]
        return codec.packer.pack(rows_to_arrays(_decoded(rows, request.body), codec.signature), len(rows))

    def write(self, request: Request, call: Call) -> Response:
        assert call.loaded is not None
        spec = _result_output(self._verb, call.loaded.signature)
        array = call.output(spec.name).reshape(call.n_rows, -1)
        if self._verb == "regress":
            return json_response({"results": np.ascontiguousarray(array[:, 0])})
        labels = [str(label) for label in spec.labels or range(array.shape[1])]
        scores = orjson.loads(orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY))
        return json_response({"results": [list(zip(labels, row, strict=True)) for row in scores]})


def routes(front: Front, repository: Repository) -> Iterable[Route]:
    """Return the protocol's routes."""
    adapters: dict[str, HttpAdapter] = {
        "predict": Predict(),
        "classify": Examples("classify"),
        "regress": Examples("regress"),
    }

    def ask(verb: str) -> Any:
        adapter = adapters[verb]

        def answer(request: Request, model: str, version: str | None = None, label: str | None = None) -> None:
            front.ask(request, terms_of(request.head), adapter, model, _given(version), label)

        return answer

    def models(request: Request) -> Response:
        return json_response({"models": repository.names()})

    def status(request: Request, model: str, version: str | None = None, label: str | None = None) -> Response:
        version = _given(version)
        every = version is None and label is None
        entries = repository.entries(model) if every else (repository.entry(model, version, label),)
        return json_response(
            {
                "name": model,
                "ready": entries[0].answers,
                "model_version_status": [_version_status(entry) for entry in entries],
            }
        )

    def metadata(request: Request, model: str, version: str | None = None, label: str | None = None) -> Response:
        entry = repository.entry(model, _given(version), label)
        return json_response(
            {
                "model_spec": {"name": model, "signature_name": "", "version": str(entry.version)},
                "metadata": {
                    "signature_def": {"signature_def": {"serving_default": _signature(repository.signature(entry))}}
                },
            }
        )

    def explain(request: Request, model: str, version: str | None = None, label: str | None = None) -> Response:
        """KServe v1 has it, and clients are to learn that it is not their path that is wrong."""
        raise UnknownPath(
            "explanations of predictions are not offered here; POST the rows to :predict, and with the header "
            "Modelyard-Explain: true for how the answer came about in time"
        )

    places = ("/v1/models/{model}", "/v1/models/{model}/versions/{version}", "/v1/models/{model}/labels/{label}")
    asked = [Route("POST", f"{place}:{verb}", ask(verb), ignore_case=True) for place in places for verb in adapters]
    asked += [Route("POST", f"{place}:explain", explain, ignore_case=True) for place in places]
    told = [
        Route("GET", f"{place}{end}", answer, ignore_case=True)
        for place in places
        for end, answer in (("", status), ("/metadata", metadata))
    ]
    return [*asked, Route("GET", "/v1/models", models, ignore_case=True), *told]


def _given(version: str | None) -> str | None:
    """Return the version in a URL; 0, which clients of OpenVINO's server send for "the default", is none."""
    return None if version == "0" else version


def _object(body: bytes, what: str) -> Mapping[str, Any]:
    """Return the JSON object in `body`; NaN and Infinity, which TensorFlow Serving takes, are taken too."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        fields = _with_nan(body)
        if fields is None:
            raise RequestError(f"the body is not valid JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise RequestError(f"the body must be {what}")
    return fields


def _with_nan(body: bytes) -> Any:
    """Return the value of a body that is JSON but for NaN and Infinity; None where it is not."""
    if b"NaN" not in body and b"Infinity" not in body:
        return None
    try:
        fields = json.loads(body.decode())
        if b"\\u" in body:  # half a character, which no text may hold, and which only this parser lets through
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return fields


def _check_signature_name(fields: Mapping[str, Any]) -> None:
    name = fields.get("signature_name", "")
    if name not in _SIGNATURE_NAMES:
        raise RequestError(
            f"signature_name must be serving_default or left out, got {short(name)}; models have one signature here"
        )


def _rows_of_columns(inputs: Any, loaded: Loaded) -> tuple[list[Any], str]:
    """Return the rows in the columns {name: tensor}, or in the bare tensor of the only input, and the form of the answer."""
    signature = loaded.signature
    names = [spec.name for spec in signature.inputs]
    if not isinstance(inputs, dict):
        if len(names) > 1:
            raise RequestError(
                f"inputs must be an object of columns, got {short(inputs)}; the columns are {', '.join(names)}"
            )
        inputs = {names[0]: inputs}
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise RequestError(f"inputs: unknown column {short(unknown[0])}; the columns are {', '.join(names)}")
    batched = {spec.name: spec.batched for spec in signature.inputs}
    if not all(batched.values()) or all(_is_one_row(inputs.get(spec.name), spec) for spec in signature.inputs):
        return [inputs], _ONE_ROW
    sizes = {name: len(column) for name, column in inputs.items() if isinstance(column, list)}
    if len(sizes) < len(inputs) or len(set(sizes.values())) != 1:
        raise RequestError(f"inputs: every column must be a list with one value per row, all equally long, got {sizes}")
    n_rows = next(iter(sizes.values()))
    check_rows(n_rows, loaded)
    return [{name: column[i] for name, column in inputs.items()} for i in range(n_rows)], _COLUMNS


def _is_one_row(value: Any, spec: TensorSpec) -> bool:
    """Whether `value` has the axes of one row and no batch axis in front."""
    depth = 0
    while isinstance(value, list) and value:
        value, depth = value[0], depth + 1
    return depth == len(spec.row_shape)


def is_in_b64(spec: TensorSpec) -> bool:
    """Whether an output is written as {"b64": …}: TensorFlow Serving does so by its name."""
    return spec.datatype == "BYTES" and spec.name.endswith("_bytes")


def _wrapped(texts: NDArray[Any]) -> NDArray[Any]:
    """Return the same array with {"b64": …} in the place of each text."""
    wrapped = np.empty(texts.shape, dtype=object)
    wrapped.reshape(-1)[:] = [{"b64": base64.b64encode(text.encode()).decode()} for text in texts.reshape(-1).tolist()]
    return wrapped


def _decoded(rows: list[Any], body: bytes) -> list[Any]:
    """Return the rows of `body` with {"b64": …} as the text it stands for."""
    if b"b64" not in body and b"\\u" not in body:  # nor any of it written as an escape
        return rows
    return [_unwrapped(row) for row in rows] if any(_has_b64(row) for row in rows) else rows


def _has_b64(value: Any) -> bool:
    if isinstance(value, dict):
        return "b64" in value or any(_has_b64(inner) for inner in value.values())
    return isinstance(value, list) and any(_has_b64(inner) for inner in value)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, list):
        return [_unwrapped(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"b64"}:
        return {name: _unwrapped(inner) for name, inner in value.items()}
    try:
        return base64.b64decode(value["b64"], validate=True).decode()
    except (TypeError, ValueError) as exc:  # not a text, not ASCII, not base64, not UTF-8
        raise RequestError(f"b64 must be the base64 of UTF-8 text, got {short(value['b64'])} ({exc})") from exc


def _result_output(verb: str, signature: Signature) -> TensorSpec:
    """Return the output that classify or regress answers with; raises RequestError where the model has none."""
    floats = [spec for spec in signature.outputs if spec.datatype.startswith(("FP", "BF"))]
    wide = [spec for spec in floats if spec.batched and len(spec.shape) == 2]
    if verb == "classify":
        chosen = [spec for spec in wide if spec.labels] or wide
        if chosen:
            return chosen[0]
        raise RequestError("this model gives no scores per class; use :predict")
    single = [spec for spec in floats if spec.batched and spec.shape[1:] in ((), (1,))]
    if len(signature.outputs) == 1 and single:
        return single[0]
    raise RequestError("this model is no regression with one number per row; use :predict")


def _version_status(entry: Entry) -> dict[str, Any]:
    """A version that its first request loads is available: a client that waited for it to be would wait for ever."""
    return {
        "version": str(entry.version),
        "state": "AVAILABLE" if entry.answers else _STATES[entry.state],
        "status": {
            "error_code": "FAILED_PRECONDITION" if entry.reason and not entry.answers else "OK",
            "error_message": entry.reason,
        },
    }


def _signature(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": {spec.name: _tensor_info(spec) for spec in signature.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in signature.outputs},
        "method_name": "tensorflow/serving/predict",
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    sizes = [{"size": str(axis) if isinstance(axis, int) else "-1", "name": ""} for axis in spec.shape]
    return {
        "dtype": _DTYPES[spec.datatype],
        "tensor_shape": {"dim": sizes, "unknown_rank": False},
        "name": f"{spec.name}:0",
    }
