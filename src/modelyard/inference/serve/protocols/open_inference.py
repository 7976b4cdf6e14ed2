"""The Open Inference Protocol, version 2, over REST, with JSON and binary tensors, and Triton's extensions that mean something here.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md

Where the specification leaves room: health answers carry JSON bodies, not ready is 503, every fault of the client is a 4xx
with {"error": text}, a JSON null in data is a missing value where the signature says nullable, and NaN in JSON answers is
null, since JSON has no NaN; ask for binary outputs to get it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from modelyard import __version__
from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.calls import Call, terms_of
from modelyard.inference.serve.front import Front, HttpAdapter
from modelyard.inference.serve.models.repository import Loaded, Repository
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols.tensors import (
    array_from_json,
    array_from_raw,
    check_raw_size,
    check_shape,
    classes,
    json_from_array,
    raw_from_array,
    wire_shape,
)
from modelyard.inference.serve.transport.messages import Request, Response, json_body, json_response
from modelyard.inference.serve.transport.routes import Route
from modelyard.inference.values import short

EXTENSIONS = ("binary_tensor_data", "classification", "parameters", "schedule_policy")
"""Those of this file; others come with other routes."""
_JSON_LENGTH = b"inference-header-content-length"
_MAX_KNOWN_HEADERS, _MAX_KNOWN_HEADER_BYTES = 256, 4096


@dataclass(frozen=True)
class Wanted:
    """One output of an answer."""

    spec: TensorSpec
    binary: bool
    n_classes: int = 0
    """The classification extension: that many best classes instead of the scores; 0 for the tensor itself."""


@dataclass(frozen=True)
class InferHeader:
    """The JSON part of an inference request, checked against a signature, and the tensors that came in it."""

    n_rows: int
    n_binary_bytes: int
    """Of all tensors behind it."""
    inputs: Mapping[str, NDArray[Any]]
    """Those whose data is in the JSON."""
    binary: tuple[tuple[TensorSpec, tuple[int, ...], int, int], ...]
    """Those whose data follows: spec, shape, and from which byte to which, counted behind the JSON."""
    outputs: tuple[Wanted, ...]
    id: str | None
    timeout_s: float | None
    priority: int
    explain: bool = False


class Codec:
    """Reads and writes the tensors of one signature."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.packer = Packer(signature)
        self.known: dict[bytes, InferHeader] = {}
        """JSON headers seen before whose tensors all follow in binary: clients send the same one again and again."""
        self.tails: dict[Any, Any] = {}
        """Wanted outputs and number of rows → the JSON of the answer, where it is always the same."""


class Infer(HttpAdapter):
    """POST …/infer."""

    protocol = "rest-v2"

    def own_timeout_s(self, request: Request) -> float | None:
        body = request.body
        if b'"timeout"' not in body:
            return None
        length = int(request.head.headers.get(_JSON_LENGTH, b"") or len(body))
        try:
            return timeout_of(json_body(body[:length])["parameters"])
        except (RequestError, LookupError, TypeError, ValueError):  # `read` says what is wrong
            return None

    def read(self, request: Request, loaded: Loaded) -> Call:
        codec = loaded.codec(Codec)
        body = request.body
        text = request.head.headers.get(_JSON_LENGTH)
        length = len(body) if text is None else _json_length(text, body)
        if length == 0:
            return _raw_only(body, codec)
        json_part = body[:length]
        header = codec.known.get(json_part)
        if header is None or header.n_binary_bytes != len(body) - length:
            header = read_header(json_body(json_part), len(body) - length, codec.signature)
            _remember(codec, json_part, header)
        call = _call(header, body, length, codec)
        call.timeout_s, call.priority, call.explain, call.form = (
            header.timeout_s,
            header.priority,
            header.explain,
            header,
        )
        return call

    def write(self, request: Request, call: Call) -> Response:
        header: InferHeader = call.form
        loaded = call.loaded
        assert loaded is not None
        if header.id is None and len(header.outputs) == 1 and header.outputs[0].binary:
            quick = _quick_answer(header.outputs[0], call, loaded)
            if quick is not None:
                return quick
        return write_answer(header.outputs, header.id, call, loaded)


def read_header(body: Any, n_binary_bytes: int, signature: Signature) -> InferHeader:
    """Return the inference request in the JSON value `body`, behind which `n_binary_bytes` of tensors follow.

    Raises:
        RequestError: names what is missing, unknown, of the wrong type, shape or length.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body must be an object with inputs, got {short(body)}")
    request_id = body.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError(f"id must be a string, got {short(request_id)}")
    arrays, binary = _read_inputs(body.get("inputs"), n_binary_bytes, signature)
    shapes = {name: array.shape for name, array in arrays.items()} | {spec.name: shape for spec, shape, _, _ in binary}
    n_rows = rows_of(shapes, signature)
    parameters = _parameters(body, "the request")
    return InferHeader(
        n_rows,
        n_binary_bytes,
        arrays,
        binary,
        _read_outputs(body, parameters, signature),
        request_id,
        timeout_of(parameters),
        priority_of(parameters),
        _flag(parameters, "explain", default=False),
    )


def rows_of(shapes: Mapping[str, tuple[int, ...]], signature: Signature) -> int:
    """Return how many rows inputs of these shapes have; raises RequestError where they disagree."""
    rows = {spec.name: shapes[spec.name][0] for spec in signature.inputs if spec.batched}
    if len(set(rows.values())) > 1:
        raise RequestError(f"the inputs must have the same number of rows, got {rows}")
    return next(iter(rows.values()), 1)


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """Return the parameter timeout, which is in microseconds and None where 0 or absent, in seconds; raises RequestError."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value <= 2**63:
        raise RequestError(f"parameter timeout must be a whole number of microseconds, got {short(value)}")
    return value / 1e6 if value else None


def priority_of(parameters: Mapping[str, Any]) -> int:
    """Return the parameter priority: 1 is the highest, 0 the default; raises RequestError."""
    value = parameters.get("priority", 0)
    if type(value) is not int or not 0 <= value < 2**32:
        raise RequestError(
            f"parameter priority must be a whole number, 1 the highest and 0 the default, got {short(value)}"
        )
    return value


def write_answer(outputs: Sequence[Wanted], request_id: str | None, call: Call, loaded: Loaded) -> Response:
    """Return the answer: JSON, and behind it the tensors that were asked for in binary."""
    raws: list[bytes] = []
    tensors: list[dict[str, Any]] = []
    for wanted in outputs:
        array, spec = call.output(wanted.spec.name), wanted.spec
        datatype = spec.datatype
        if wanted.n_classes:
            array, datatype = classes(array, spec, wanted.n_classes), "BYTES"
        tensor: dict[str, Any] = {"name": spec.name, "datatype": datatype, "shape": array.shape}
        if wanted.binary:
            raws.append(raw_from_array(array))
            tensor["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            tensor["data"] = json_from_array(array, spec)
        tensors.append(tensor)
    answer: dict[str, Any] = {"model_name": loaded.name, "model_version": str(loaded.version), "outputs": tensors}
    if request_id is not None:
        answer["id"] = request_id
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return _binary_response(text, raws) if raws else Response(200, text)


def _quick_answer(wanted: Wanted, call: Call, loaded: Loaded) -> Response | None:
    """Return the answer with one binary output of fixed size, whose JSON is the same every time."""
    spec = wanted.spec
    if wanted.n_classes or spec.datatype == "BYTES" or not spec.batched:
        return None
    run = call.run
    assert run is not None
    array = run.outputs[spec.name]
    row_shape = array.shape[1:]
    known: dict[Any, Any] = loaded.codec(Codec).tails
    key = (spec.name, call.n_rows, row_shape)
    tail = known.get(key)
    n_bytes = array.dtype.itemsize * array.size // run.n_rows
    if tail is None:
        tensor = {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": (call.n_rows, *row_shape),
            "parameters": {"binary_data_size": n_bytes * call.n_rows},
        }
        answer = {"model_name": loaded.name, "model_version": str(loaded.version), "outputs": [tensor]}
        text = orjson.dumps(answer)
        if len(known) >= _MAX_KNOWN_HEADERS:
            known.clear()
        tail = known[key] = (text, ((b"Inference-Header-Content-Length", b"%d" % len(text)),))
    raw = run.scratch.get(spec.name)
    if raw is None:
        raw = run.scratch[spec.name] = raw_from_array(array)
    if call.n_rows != run.n_rows:
        raw = raw[call.first_row * n_bytes : (call.first_row + call.n_rows) * n_bytes]
    return Response(200, tail[0] + raw, b"application/octet-stream", tail[1])


def _binary_response(text: bytes, raws: Iterable[bytes]) -> Response:
    length = (b"Inference-Header-Content-Length", b"%d" % len(text))
    return Response(200, b"".join((text, *raws)), b"application/octet-stream", (length,))


def _call(header: InferHeader, body: bytes, length: int, codec: Codec) -> Call:
    """Return the call of a header and the binary tensors behind it."""
    if not header.inputs and codec.packer.takes_raw:
        view = memoryview(body)
        parts = {spec.name: view[length + start : length + end] for spec, _, start, end in header.binary}
        return codec.packer.call(parts, header.n_rows)
    arrays = dict(header.inputs)
    view = memoryview(body)[length:]
    for spec, shape, start, end in header.binary:
        arrays[spec.name] = array_from_raw(view[start:end], spec, shape)
    return codec.packer.pack(arrays, header.n_rows, unchecked=bool(header.binary))


def _remember(codec: Codec, json_part: bytes, header: InferHeader) -> None:
    if header.inputs or header.id is not None or len(json_part) > _MAX_KNOWN_HEADER_BYTES:
        return
    if len(codec.known) >= _MAX_KNOWN_HEADERS:
        codec.known.clear()
    codec.known[json_part] = header


def _raw_only(body: bytes, codec: Codec) -> Call:
    """Inference-Header-Content-Length: 0 says that the body is the only input, raw, one row."""
    signature = codec.signature
    spec = signature.inputs[0]
    free = [axis for axis in spec.row_shape if isinstance(axis, str)]
    if len(signature.inputs) > 1 or len(free) > 1 or (free and spec.datatype == "BYTES"):
        raise RequestError(
            "Inference-Header-Content-Length: 0 means that the body is the only input, raw; this model needs the JSON part"
        )
    row = [axis if isinstance(axis, int) else 1 for axis in spec.row_shape]
    if free:
        n_elements = len(body) // spec.numpy_dtype.itemsize
        row[spec.row_shape.index(free[0])] = n_elements // max(1, int(np.prod(row)))
    shape = (1, *row) if spec.batched else tuple(row)
    if spec.datatype == "BYTES":
        body = len(body).to_bytes(4, "little") + body
    array = array_from_raw(memoryview(body), spec, shape)
    call = codec.packer.pack({spec.name: array}, 1, unchecked=True)
    outputs = tuple(Wanted(output, binary=True) for output in signature.outputs)
    call.form = InferHeader(1, len(body), {}, (), outputs, None, None, 0)
    return call


def _read_inputs(
    tensors: Any, n_binary_bytes: int, signature: Signature
) -> tuple[dict[str, NDArray[Any]], tuple[tuple[TensorSpec, tuple[int, ...], int, int], ...]]:
    names = [spec.name for spec in signature.inputs]
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise RequestError(
            f"inputs must be a list of tensors, got {short(tensors)}; this model takes {', '.join(names)}; rows with named columns go "
            "to /v1/models/NAME:predict"
        )
    arrays: dict[str, NDArray[Any]] = {}
    binary: list[tuple[TensorSpec, tuple[int, ...], int, int]] = []
    seen: set[str] = set()
    offset = 0
    for tensor in tensors:
        name = tensor.get("name")
        if name not in names:
            raise RequestError(f"unknown input {short(name)}; this model takes {', '.join(names)}")
        if name in seen:
            raise RequestError(f"input {name!r} is given twice; give it once")
        seen.add(name)
        spec = signature.input(name)
        if tensor.get("datatype") != spec.datatype:
            raise RequestError(
                f"input {name!r} must have the datatype {spec.datatype}, got {short(tensor.get('datatype'))}"
            )
        shape = check_shape(tensor.get("shape"), spec)
        size = _binary_size(tensor, name)
        if (size is None) == ("data" not in tensor):
            raise RequestError(f"input {name!r} must have either data or the parameter binary_data_size")
        if size is None:
            arrays[name] = array_from_json(tensor["data"], spec, shape)
            continue
        if offset + size > n_binary_bytes:
            raise RequestError(
                f"input {name!r}: binary_data_size is {size}, {n_binary_bytes - offset} bytes are left in the body; check the sizes and "
                "Inference-Header-Content-Length"
            )
        check_raw_size(size, spec, shape)
        binary.append((spec, shape, offset, offset + size))
        offset += size
    missing = [name for name in names if name not in seen]
    if missing:
        raise RequestError(f"input {missing[0]!r} is missing; this model takes {', '.join(names)}")
    if offset != n_binary_bytes:
        raise RequestError(
            f"{n_binary_bytes - offset} bytes are left in the body behind the last tensor; check the sizes and "
            "Inference-Header-Content-Length"
        )
    return arrays, tuple(binary)


def _read_outputs(
    body: Mapping[str, Any], request_parameters: Mapping[str, Any], signature: Signature
) -> tuple[Wanted, ...]:
    all_binary = _flag(request_parameters, "binary_data_output", default=False)
    wanted = body.get("outputs")
    if not wanted:
        return tuple(Wanted(spec, all_binary) for spec in signature.outputs)
    names = [spec.name for spec in signature.outputs]
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise RequestError(f"outputs must be a list of objects with a name, got {short(wanted)}")
    outputs = []
    seen: set[str] = set()
    for output in wanted:
        name = output.get("name")
        if name not in names:
            raise RequestError(f"unknown output {short(name)}; this model gives {', '.join(names)}")
        if name in seen:  # a short request could otherwise have an answer of any length
            raise RequestError(f"output {name!r} is asked for twice; ask for it once")
        seen.add(name)
        parameters = _parameters(output, f"output {name!r}")
        _refuse_shared_memory(parameters, f"output {name!r}")
        outputs.append(
            wanted_output(
                signature.output(name),
                _flag(parameters, "binary_data", default=all_binary),
                parameters.get("classification", 0),
            )
        )
    return tuple(outputs)


def wanted_output(spec: TensorSpec, binary: bool, n_classes: Any) -> Wanted:
    """Return the output, or its `n_classes` best classes where that is not 0; raises RequestError."""
    if type(n_classes) is not int or n_classes < 0:
        raise RequestError(
            f"output {spec.name!r}: classification must be a number of classes, got {short(n_classes)}; 0 or nothing is the tensor"
        )
    if n_classes and (spec.datatype in ("BYTES", "BOOL") or not spec.row_shape):
        raise RequestError(f"output {spec.name!r} holds no scores to classify by; ask for it without classification")
    return Wanted(spec, binary, n_classes)


def _binary_size(tensor: Mapping[str, Any], name: str) -> int | None:
    parameters = _parameters(tensor, f"input {name!r}")
    _refuse_shared_memory(parameters, f"input {name!r}")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise RequestError(f"input {name!r}: binary_data_size must be a number of bytes, got {short(size)}")
    return size


def _parameters(of: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = of.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{what}: parameters must be an object, got {short(parameters)}")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"parameter {name} must be true or false, got {short(value)}")
    return value


def _refuse_shared_memory(parameters: Mapping[str, Any], what: str) -> None:
    if "shared_memory_region" in parameters:
        raise RequestError(f"{what}: shared memory is not offered; send the data in the request")


def routes(front: Front, repository: Repository, extensions: Sequence[str] = EXTENSIONS) -> Iterable[Route]:
    """Return the protocol's routes over the models of `repository`; `extensions` are those the server has in all."""
    adapter = Infer()

    def infer(request: Request, model: str, version: str | None = None) -> None:
        front.ask(request, terms_of(request.head), adapter, model, version)

    def server(request: Request) -> Response:
        return json_response({"name": "modelyard", "version": __version__, "extensions": extensions})

    def live(request: Request) -> Response:
        return json_response({"live": True})

    def ready(request: Request) -> Response:
        return json_response({"ready": repository.ready}, 200 if repository.ready else 503)

    def model_ready(request: Request, model: str, version: str | None = None) -> Response:
        entry = repository.entry(model, version)
        answer = {"name": model, "ready": entry.answers}
        if entry.reason:
            answer["error"] = entry.reason
        return json_response(answer, 200 if entry.answers else 503)

    def metadata(request: Request, model: str, version: str | None = None) -> Response:
        signature = repository.signature(repository.entry(model, version))
        return json_response(
            {
                "name": model,
                "versions": [str(entry.version) for entry in repository.entries(model)],
                "platform": "onnxruntime_onnx",
                "inputs": [_described(spec) for spec in signature.inputs],
                "outputs": [_described(spec) for spec in signature.outputs],
            }
        )

    def everywhere(method: str, end: str, answer: Callable[..., Any]) -> list[Route]:
        return [Route(method, f"/v2/models/{{model}}{place}{end}", answer) for place in ("", "/versions/{version}")]

    return [
        *everywhere("POST", "/infer", infer),
        Route("GET", "/v2/health/live", live),
        Route("GET", "/v2/health/ready", ready),
        Route("GET", "/v2", server),
        Route("GET", "/v2/", server),
        *everywhere("GET", "", metadata),
        *everywhere("GET", "/ready", model_ready),
    ]


def _json_length(text: bytes, body: bytes) -> int:
    """Return how many bytes of the body are JSON."""
    if not text.isdigit() or len(text) > 19 or int(text) > len(body):
        raise RequestError(
            f"Inference-Header-Content-Length must be from 0 to the body's {len(body)} bytes, got {text.decode('latin-1')!r:.60}"
        )
    return int(text)


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": wire_shape(spec)}
