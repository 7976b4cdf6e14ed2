"""The Open Inference Protocol, version 2, over REST, with JSON and binary tensors.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md

Where the specification leaves room: health answers carry JSON bodies, not ready is 503, every fault of the client is a 4xx
with {"error": text}, a JSON null in data is a missing value where the signature says nullable, and NaN in JSON answers is
null, since JSON has no NaN; ask for binary outputs to get it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from numpy.typing import NDArray

from modelyard import __version__
from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.messages import Answer, Request, Response, json_body, json_response
from modelyard.inference.serve.repository import Loaded, Repository
from modelyard.inference.serve.routes import Route
from modelyard.inference.serve.tensors import (
    array_from_json,
    array_from_raw,
    check_shape,
    json_from_array,
    raw_from_array,
    wire_shape,
)
from modelyard.inference.serve.work import Outputs

EXTENSIONS = ("binary_tensor_data",)
_JSON_LENGTH = b"inference-header-content-length"


@dataclass(frozen=True)
class InferRequest:
    """An inference request, checked against a signature."""

    inputs: Mapping[str, NDArray[Any]]
    n_rows: int
    outputs: tuple[tuple[TensorSpec, bool], ...]
    """The outputs wanted, in this order, and whether each goes out as a binary tensor."""
    id: str | None


def parse_infer(body: Any, binary: memoryview, signature: Signature) -> InferRequest:
    """Return the request in the JSON value `body` and the binary tensors behind it.

    Raises:
        RequestError: names what is missing, unknown, of the wrong type, shape or length.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body must be an object with inputs, got {body!r:.60}")
    request_id = body.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError(f"id must be a string, got {request_id!r:.60}")
    inputs = _parse_inputs(body.get("inputs"), binary, signature)
    rows = {spec.name: len(inputs[spec.name]) for spec in signature.inputs if spec.batched}
    if len(set(rows.values())) > 1:
        raise RequestError(f"the inputs must have the same number of rows, got {rows}")
    outputs = _parse_outputs(body, signature)
    return InferRequest(inputs, next(iter(rows.values()), 1), outputs, request_id)


def encode_infer(request: InferRequest, outputs: Outputs, model: Loaded) -> Response:
    """Return the answer: JSON, and behind it the tensors that were asked for in binary."""
    raws: list[bytes] = []
    tensors: list[dict[str, Any]] = []
    for spec, binary in request.outputs:
        array = outputs[spec.name]
        tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if binary:
            raws.append(raw_from_array(array))
            tensor["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            tensor["data"] = json_from_array(array, spec)
        tensors.append(tensor)
    answer: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version), "outputs": tensors}
    if request.id is not None:
        answer["id"] = request.id
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raws:
        return Response(200, text)
    length = (b"Inference-Header-Content-Length", b"%d" % len(text))
    return Response(200, b"".join((text, *raws)), b"application/octet-stream", (length,))


def _parse_inputs(tensors: Any, binary: memoryview, signature: Signature) -> dict[str, NDArray[Any]]:
    names = [spec.name for spec in signature.inputs]
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise RequestError(
            f"inputs must be a list of tensors, got {tensors!r:.60}; this model takes {', '.join(names)}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for tensor in tensors:
        name = tensor.get("name")
        if name not in names:
            raise RequestError(f"unknown input {name!r:.100}; this model takes {', '.join(names)}")
        if name in arrays:
            raise RequestError(f"input {name!r} is given twice; give it once")
        spec = signature.input(name)
        if tensor.get("datatype") != spec.datatype:
            raise RequestError(
                f"input {name!r} must have the datatype {spec.datatype}, got {tensor.get('datatype')!r:.60}"
            )
        shape = check_shape(tensor.get("shape"), spec)
        size = _binary_size(tensor, name)
        if (size is None) == ("data" not in tensor):
            raise RequestError(f"input {name!r} must have either data or the parameter binary_data_size")
        if size is None:
            arrays[name] = array_from_json(tensor["data"], spec, shape)
            continue
        if offset + size > len(binary):
            raise RequestError(
                f"input {name!r}: binary_data_size is {size}, {len(binary) - offset} bytes are left in the body; check the sizes and "
                "Inference-Header-Content-Length"
            )
        arrays[name] = array_from_raw(binary[offset : offset + size], spec, shape)
        offset += size
    missing = [name for name in names if name not in arrays]
    if missing:
        raise RequestError(f"input {missing[0]!r} is missing; this model takes {', '.join(names)}")
    if offset != len(binary):
        raise RequestError(
            f"{len(binary) - offset} bytes are left in the body behind the last tensor; check the sizes and "
            "Inference-Header-Content-Length"
        )
    return arrays


def _parse_outputs(body: Mapping[str, Any], signature: Signature) -> tuple[tuple[TensorSpec, bool], ...]:
    all_binary = _flag(_parameters(body, "the request"), "binary_data_output", default=False)
    wanted = body.get("outputs")
    if not wanted:
        return tuple((spec, all_binary) for spec in signature.outputs)
    names = [spec.name for spec in signature.outputs]
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise RequestError(f"outputs must be a list of objects with a name, got {wanted!r:.60}")
    outputs = []
    for output in wanted:
        name = output.get("name")
        if name not in names:
            raise RequestError(f"unknown output {name!r:.100}; this model gives {', '.join(names)}")
        parameters = _parameters(output, f"output {name!r}")
        if parameters.get("classification"):
            raise RequestError(f"output {name!r}: classification is not offered; sort the scores yourself")
        _refuse_shared_memory(parameters, f"output {name!r}")
        outputs.append((signature.output(name), _flag(parameters, "binary_data", default=all_binary)))
    return tuple(outputs)


def _binary_size(tensor: Mapping[str, Any], name: str) -> int | None:
    parameters = _parameters(tensor, f"input {name!r}")
    _refuse_shared_memory(parameters, f"input {name!r}")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise RequestError(f"input {name!r}: binary_data_size must be a number of bytes, got {size!r:.60}")
    return size


def _parameters(of: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = of.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{what}: parameters must be an object, got {parameters!r:.60}")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"parameter {name} must be true or false, got {value!r:.60}")
    return value


def _refuse_shared_memory(parameters: Mapping[str, Any], what: str) -> None:
    if "shared_memory_region" in parameters:
        raise RequestError(f"{what}: shared memory is not offered; send the data in the request")


def routes(repository: Repository) -> Iterable[Route]:
    """Return the protocol's routes over the models of `repository`."""

    def infer(request: Request, model: str, version: str | None = None) -> Answer:
        loaded = repository.get(model, version)
        length = _json_length(request)
        body = json_body(request, length)
        parsed = parse_infer(body, memoryview(request.body)[length:], loaded.signature)
        answer = loaded.instance.submit(parsed.inputs, parsed.n_rows)
        if isinstance(answer, Mapping):
            return encode_infer(parsed, answer, loaded)

        async def later() -> Response:
            return encode_infer(parsed, await answer, loaded)

        return later()

    def server(request: Request) -> Response:
        return json_response({"name": "modelyard", "version": __version__, "extensions": EXTENSIONS})

    def live(request: Request) -> Response:
        return json_response({"live": True})

    def ready(request: Request) -> Response:
        return json_response({"ready": repository.ready}, 200 if repository.ready else 503)

    def model_ready(request: Request, model: str, version: str | None = None) -> Response:
        entry = repository.entry(model, version)
        answer = {"name": model, "ready": entry.state == "ready"}
        if entry.reason:
            answer["error"] = entry.reason
        return json_response(answer, 200 if entry.state == "ready" else 503)

    def metadata(request: Request, model: str, version: str | None = None) -> Response:
        loaded = repository.get(model, version)
        return json_response(
            {
                "name": model,
                "versions": [str(entry.version) for entry in repository.entries(model)],
                "platform": "onnxruntime_onnx",
                "inputs": [_described(spec) for spec in loaded.signature.inputs],
                "outputs": [_described(spec) for spec in loaded.signature.outputs],
            }
        )

    return [
        Route("POST", "/v2/models/{model}/infer", infer),
        Route("POST", "/v2/models/{model}/versions/{version}/infer", infer),
        Route("GET", "/v2/health/live", live),
        Route("GET", "/v2/health/ready", ready),
        Route("GET", "/v2", server),
        Route("GET", "/v2/models/{model}", metadata),
        Route("GET", "/v2/models/{model}/ready", model_ready),
        Route("GET", "/v2/models/{model}/versions/{version}", metadata),
        Route("GET", "/v2/models/{model}/versions/{version}/ready", model_ready),
    ]


def _json_length(request: Request) -> int:
    """Return how many bytes of the body are JSON."""
    text = request.headers.get(_JSON_LENGTH)
    if text is None:
        return len(request.body)
    if not text.isdigit() or not 0 < int(text) <= len(request.body):
        raise RequestError(
            f"Inference-Header-Content-Length must be from 1 to the body's {len(request.body)} bytes, got {text.decode('latin-1')!r:.60}"
        )
    return int(text)


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": wire_shape(spec)}
