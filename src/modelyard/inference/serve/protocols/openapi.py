"""The HTTP interface described in OpenAPI 3.1, from the signatures of the models that are served.

    signature → json_schema.py → `document` → GET /openapi.json, GET /v2/models/NAME/openapi.json

https://spec.openapis.org/oas/v3.1.1
"""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from modelyard import __version__
from modelyard.bundle.manifest import Signature
from modelyard.errors import NotReady
from modelyard.inference.serve.models.repository import Entry, Repository
from modelyard.inference.serve.protocols.json_schema import (
    COUNT,
    FLAG,
    NUMBER_OR_NULL,
    TEXT,
    Json,
    answer_tensors_schema,
    array,
    columns_schema,
    example_schema,
    fits_example,
    obj,
    outputs_schema,
    prediction_schema,
    row_schema,
    tensors_schema,
)
from modelyard.inference.serve.protocols.operations import OPENAPI, Operation
from modelyard.inference.serve.protocols.tensorflow import is_in_b64
from modelyard.inference.serve.transport.messages import Request, Response
from modelyard.inference.serve.transport.routes import Route


@dataclass(frozen=True)
class Described:
    """A version of a model, as far as a client needs to know it."""

    name: str
    version: int
    signature: Signature
    is_default: bool = True
    """Answers where a path names no version."""
    example: Mapping[str, Any] | None = None
    """A row that it can answer."""
    target_s: float | None = None


def versions_of(repository: Repository, name: str) -> tuple[Entry, ...]:
    """Return the versions of a model, the default one first; none where its policy asks for what the store has not."""
    try:
        return repository.entries(name)
    except NotReady:
        return ()


def described(repository: Repository, name: str) -> tuple[Described, ...]:
    """Return the versions of a model whose signature is known, the default one first; raises UnknownModel."""
    found = []
    for i, entry in enumerate(versions_of(repository, name)):
        try:
            signature = repository.signature(entry)
        except NotReady:
            continue
        example, target_s = (entry.loaded.example, entry.loaded.target_s) if entry.loaded else (None, None)
        found.append(Described(name, entry.version, signature, i == 0, example, target_s))
    return tuple(found)


def document(models: Iterable[Described], operations: Iterable[Operation] = ()) -> Json:
    """Return the OpenAPI document of a server with these models and operations."""
    return _assembled([_part_of(model) for model in models], operations)


def routes(repository: Repository, operations: Iterable[Operation]) -> Iterable[Route]:
    """Return the routes of the document; `operations` are those of the server's other routes."""
    shared = (*operations, *OPENAPI)
    known: dict[tuple[str, int], tuple[Described, _Part]] = {}

    async def written(names: Iterable[str], operations: Iterable[Operation]) -> Response:
        parts = []
        for name in names:
            for model in described(repository, name):
                found = known.get((name, model.version))
                if found is None or found[0] != model:
                    known[name, model.version] = found = (model, _part_of(model).as_json())
                    await asyncio.sleep(0)  # hundreds of models must not hold up who waits for an answer
                parts.append(found[1])
        return Response(200, orjson.dumps(_assembled(parts, operations)))

    async def everything(request: Request) -> Response:
        names = repository.names()
        served = {(name, entry.version) for name in names for entry in versions_of(repository, name)}
        for gone in known.keys() - served:
            del known[gone]
        return await written(names, shared)

    async def one_model(request: Request, model: str) -> Response:
        repository.entries(model)  # there is such a model
        return await written([model], ())

    return [Route("GET", "/openapi.json", everything), Route("GET", "/v2/models/{model}/openapi.json", one_model)]


# One model.


@dataclass(frozen=True)
class _Part:
    """What one version adds to a document."""

    name: str
    schemas: Mapping[str, Any]
    paths: Mapping[str, Any]

    def as_json(self) -> "_Part":
        """Return the same written down already, which makes another document of it cheap."""
        return _Part(self.name, _as_json(self.schemas), _as_json(self.paths))


def _as_json(values: Mapping[str, Any]) -> dict[str, orjson.Fragment]:
    return {key: orjson.Fragment(orjson.dumps(value)) for key, value in values.items()}


def _part_of(model: Described) -> _Part:
    return _Part(model.name, _schemas_of(model), _paths_of(model))


def _assembled(parts: Sequence[_Part], operations: Iterable[Operation]) -> Json:
    schemas, paths = dict[str, Any](_SCHEMAS), dict[str, Any]()
    for part in parts:
        schemas |= part.schemas
        paths |= part.paths
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe(operation)
    return {
        "openapi": "3.1.1",
        "info": {"title": "Modelyard", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(part.name for part in parts)],
        "paths": paths,
        "components": {"schemas": schemas, "parameters": _PARAMETERS, "headers": _HEADERS, "responses": _RESPONSES},
    }


def _schemas_of(model: Described) -> dict[str, Json]:
    signature, key = model.signature, _key(model)
    row, prediction, example = f"{key}.Row", f"{key}.Prediction", f"{key}.Example"
    timeline = {"timeline": _ref("Timeline")}
    shared = {"description": "Columns for all examples; an example's own come before these.", **_ref(example)}
    wanted = obj(
        {"name": {"enum": [spec.name for spec in signature.outputs]}, "parameters": _OUTPUT_PARAMETERS}, ["name"]
    )
    return {
        row: row_schema(signature, model.example),
        prediction: _with_b64(prediction_schema(signature), signature),
        example: example_schema(signature),
        f"{key}.PredictRequest": {
            "anyOf": [
                obj({"instances": array(_ref(row), least=1), "signature_name": _SIGNATURE_NAME}, ["instances"]),
                obj({"inputs": columns_schema(signature), "signature_name": _SIGNATURE_NAME}, ["inputs"]),
            ]
        },
        f"{key}.PredictAnswer": {
            "anyOf": [
                obj({"predictions": array(_ref(prediction)), **timeline}, ["predictions"]),
                obj({"outputs": _with_b64(outputs_schema(signature), signature), **timeline}, ["outputs"]),
            ]
        },
        f"{key}.ExamplesRequest": obj(
            {"examples": array(_ref(example), least=1), "context": shared, "signature_name": _SIGNATURE_NAME},
            ["examples"],
        ),
        f"{key}.InferRequest": obj(
            {
                "id": TEXT,
                "parameters": _REQUEST_PARAMETERS,
                "inputs": tensors_schema(signature),
                "outputs": array(wanted),
            },
            ["inputs"],
        ),
        f"{key}.InferAnswer": obj(
            {
                "model_name": TEXT,
                "model_version": TEXT,
                "id": TEXT,
                "parameters": {"type": "object"},
                "outputs": answer_tensors_schema(signature),
                **timeline,
            },
            ["model_name", "outputs"],
        ),
    }


def _with_b64(schema: Json, signature: Signature) -> Json:
    """Return the schema of these outputs with those that are written in base64 left open but for a description."""
    in_b64 = {spec.name: _IN_B64 for spec in signature.outputs if is_in_b64(spec)}
    if not in_b64:
        return schema
    return _IN_B64 if len(signature.outputs) == 1 else schema | {"properties": schema["properties"] | in_b64}


def _paths_of(model: Described) -> dict[str, Json]:
    version = "" if model.is_default else f"/versions/{model.version}"
    v1, v2 = f"/v1/models/{model.name}{version}", f"/v2/models/{model.name}{version}"
    key = _key(model)
    paths = {
        f"{v1}:predict": _asks(
            model, "predict", "Predict rows", f"{key}.PredictAnswer", f"{key}.PredictRequest", _rows(model)
        ),
        f"{v2}/infer": _asks(
            model, "infer", "Infer tensors", f"{key}.InferAnswer", f"{key}.InferRequest", _tensors(model)
        ),
    }
    paths[f"{v2}/infer"]["post"]["responses"]["200"]["content"] |= _BINARY
    for verb, answers, possible in (
        ("classify", "Classifications", _gives_scores(model.signature)),
        ("regress", "Regressions", _is_regression(model.signature)),
    ):
        if possible:
            paths[f"{v1}:{verb}"] = _asks(model, verb, f"{verb.title()} rows", answers, f"{key}.ExamplesRequest", None)
    return paths


def _asks(model: Described, verb: str, summary: str, answers: str, takes: str, example: Json | None) -> Json:
    body: Json = {"schema": _ref(takes)}
    if example is not None and fits_example(example):
        body["example"] = example
    at_version = "" if model.is_default else f"@{model.version}"
    target = f" Answers are aimed at within {model.target_s * 1e3:g} ms." if model.target_s else ""
    return {
        "post": {
            "tags": [model.name],
            "operationId": f"{verb}-{model.name}{at_version}",
            "summary": f"{summary}, {model.name} version {model.version}",
            "description": f"A version can be named in the path, as in /versions/{model.version}.{target}",
            "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in _TERMS],
            "requestBody": {"required": True, "content": {"application/json": body}},
            "responses": _responses({"application/json": {"schema": _ref(answers)}}, _FAULTS),
        }
    }


def _rows(model: Described) -> Json | None:
    """Return the example row as a body of :predict."""
    return None if model.example is None else {"instances": [model.example]}


def _tensors(model: Described) -> Json | None:
    """Return the example row as a body of infer, where every axis has a size."""
    if model.example is None or any(
        isinstance(axis, str) for spec in model.signature.inputs for axis in spec.row_shape
    ):
        return None
    tensors = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": [1, *spec.row_shape] if spec.batched else list(spec.row_shape),
            "data": _flat(model.example[spec.name]),
        }
        for spec in model.signature.inputs
    ]
    return {"inputs": tensors}


def _flat(value: Any) -> list[Any]:
    return [one for inner in value for one in _flat(inner)] if isinstance(value, list) else [value]


def _gives_scores(signature: Signature) -> bool:
    """Whether :classify is answered, as tensorflow.py decides."""
    return any(_is_float(spec.datatype) and spec.batched and len(spec.shape) == 2 for spec in signature.outputs)


def _is_regression(signature: Signature) -> bool:
    """Whether :regress is answered, as tensorflow.py decides."""
    spec, *others = signature.outputs
    return not others and _is_float(spec.datatype) and spec.batched and spec.shape[1:] in ((), (1,))


def _is_float(datatype: str) -> bool:
    return datatype.startswith(("FP", "BF"))


def _key(model: Described) -> str:
    return f"{model.name}.{model.version}"


# Any operation.


def _describe(operation: Operation) -> Json:
    names = re.findall(r"\{(\w+)\}", operation.path)
    if operation.answers is None:
        content: Json = {"text/plain": {"schema": TEXT}}
    else:
        content = {"application/json": {"schema": operation.answers}}
    faults = _FAULTS if names or operation.takes is not None else {"default": _FAULTS["default"]}
    responses = _responses(content, faults)
    if operation.may_be_unready:
        either = {"application/json": {"schema": {"anyOf": [operation.answers or {}, _ref("Error")]}}}
        responses["503"] = {"description": "Not ready.", "headers": _ANSWER_HEADERS, "content": either}
    told: Json = {
        "operationId": f"{operation.method.lower()}{re.sub('[{}]', '', operation.path).replace('/', '-')}",
        "summary": operation.summary,
        "responses": responses,
    }
    if names:
        told["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in names]
    if operation.takes is not None:
        body = {"application/json": {"schema": operation.takes}}
        told["requestBody"] = {"required": not operation.may_be_empty, "content": body}
    return told


def _responses(content: Json, faults: Mapping[str, str]) -> Json:
    answered = {"description": "Answered.", "headers": _ANSWER_HEADERS, "content": content}
    return {"200": answered} | {code: {"$ref": f"#/components/responses/{name}"} for code, name in faults.items()}


def _ref(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _header(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _placeholder(name: str, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": TEXT}


def _fault(description: str, *, retry: bool = False) -> Json:
    headers = _ANSWER_HEADERS | ({"Retry-After": {"$ref": "#/components/headers/RetryAfter"}} if retry else {})
    return {"description": description, "headers": headers, "content": {"application/json": {"schema": _ref("Error")}}}


_DESCRIPTION = (
    "Rows with named columns on the paths of TensorFlow Serving and KServe v1, tensors by the Open Inference Protocol v2 with its "
    'binary extension. Every fault is answered as {"error": text}.'
)
_IN_B64: Json = {"description": 'Texts in base64, each as {"b64": text}, nested as the shape says.'}
_SIGNATURE_NAME: Json = {"enum": ["serving_default"]}
_BINARY: Json = {
    "application/octet-stream": {"schema": TEXT | {"format": "binary", "description": "JSON, and tensors behind it."}}
}
_REQUEST_PARAMETERS = obj(
    {
        "timeout": COUNT | {"description": "Microseconds from arrival; 0 takes the header's or the model's."},
        "priority": COUNT | {"description": "1 is the highest, 0 the default."},
        "binary_data_output": FLAG,
    }
)
_OUTPUT_PARAMETERS = obj(
    {
        "binary_data": FLAG,
        "classification": COUNT | {"description": "That many best classes as score:index:label; 0 for the tensor."},
    }
)
_MS = NUMBER_OR_NULL
_SCHEMAS: dict[str, Json] = {
    "Error": obj({"error": TEXT, "timeline": _ref("Timeline")}, ["error"]),
    "Timeline": obj(
        {
            "request_id": TEXT,
            "model": TEXT,
            "version": COUNT,
            "rows": COUNT,
            "arrived_at": TEXT,
            "deadline_ms": _MS,
            "load_wait_ms": _MS,
            "admitted_after_ms": _MS,
            "waited_ms": _MS,
            "started_because": TEXT,
            "batch": obj({"rows": COUNT, "requests": COUNT, "compute_ms": _MS}),
            "cause": TEXT,
            "total_ms": _MS,
            "summary": TEXT,
        },
        ["request_id", "total_ms", "summary"],
    )
    | {"description": "What happened to the request, where the header Modelyard-Explain asked for it; milliseconds."},
    "Classifications": obj(
        {
            "results": array(
                array({"type": "array", "prefixItems": [TEXT, NUMBER_OR_NULL], "minItems": 2, "maxItems": 2})
            ),
            "timeline": _ref("Timeline"),
        },
        ["results"],
    ),
    "Regressions": obj({"results": array(NUMBER_OR_NULL), "timeline": _ref("Timeline")}, ["results"]),
}
_PARAMETERS: dict[str, Json] = {
    "Timeout": _header(
        "Modelyard-Timeout-Ms",
        "By when the answer is wanted, from the arrival of the request; else the model's target.",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400_000},
    ),
    "Priority": _header("Modelyard-Priority", "1 is the highest, 0 the default.", COUNT | {"maximum": 1000}),
    "Tenant": _header("Modelyard-Tenant", "Whom the computing time is charged to; cut at 128 characters.", TEXT),
    "Key": _header("Modelyard-Key", "Requests with the same key meet the same version while traffic is split.", TEXT),
    "Explain": _header("Modelyard-Explain", "true puts a timeline into the answer.", {"enum": ["true", "false"]}),
    "RequestId": _header("X-Request-Id", "Comes back with the answer where it is 1 to 128 printable characters.", TEXT),
    "Traceparent": _header("traceparent", "The W3C trace context to continue; ignored where malformed.", TEXT),
    "model": _placeholder("model", "The name of a model."),
    "version": _placeholder("version", "A version of it, a whole number."),
    "label": _placeholder("label", "A tag of the store, such as champion."),
}
_TERMS = ("Timeout", "Priority", "Tenant", "Key", "Explain", "RequestId", "Traceparent")
_HEADERS: dict[str, Json] = {
    "RequestId": {"description": "The client's id, or a fresh one.", "schema": TEXT},
    "RetryAfter": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 1}},
}
_ANSWER_HEADERS: Json = {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}}
_FAULTS = {"400": "BadRequest", "404": "NotFound", "503": "Unavailable", "504": "TooLate", "default": "Fault"}
_RESPONSES: dict[str, Json] = {
    "BadRequest": _fault("The request is wrong; the text names the place, the value and what fits."),
    "NotFound": _fault("No such model or version."),
    "Unavailable": _fault("Not ready, or more work than can be done in time.", retry=True),
    "TooLate": _fault("It could not be done by its deadline.", retry=True),
    "Fault": _fault("Any other fault."),
}
