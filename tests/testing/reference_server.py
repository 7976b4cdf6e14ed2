"""A small server that keeps every rule of the suite, and breaks one of them when told to: what the suite is tested with.

Its models give their inputs back. Written for being read beside the rules, not for speed; nothing of it is shared with the
server that Modelyard ships. The names of the faults are the texts in `has(...)`, and "takes RULE" or "500 for RULE" for the
texts in `rule(...)`: a fault of the first kind takes a request that it should refuse, one of the second blames itself.
"""

import contextlib
import gzip
import importlib.util
import json
import math
import re
import socket
import socketserver
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from modelyard.testing.open_inference.messages import message

Array = NDArray[Any]
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BF16": "<u2",
    "BYTES": object,
}
MODELS: dict[str, tuple[str, ...]] = {
    "plain": ("INT64", "FP32", "BYTES"),
    "single": ("FP32",),
    "every": tuple(datatype for datatype in DTYPES if datatype not in ("FP16", "BF16")),
    "halves": ("FP16", "BF16"),
    "flat": ("FP32", "BYTES"),
    "fixed": ("INT32", "BYTES"),
}
SHAPES = {"flat": [-1], "fixed": [2, 3]}
"""Of the tensors of a model; of the others [-1, WIDTH]."""
WIDTH = 2
LENGTH = "inference-header-content-length"
EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "statistics",
    "model_repository",
    "model_configuration",
    "trace",
    "logging",
    "schedule_policy",
    "system_shared_memory",
]
CONTENTS = {
    "BOOL": "bool_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}


class Refused(Exception):
    """A request that must not be answered."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Taken(Exception):
    """A request that must not be answered, and is: the fault of the day."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Response:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200) -> "Response":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


@dataclass
class Tensor:
    """An input on its way in: an array, once its datatype and shape have been believed."""

    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    raw: bytes | None = None
    typed: Any = None
    """The InferTensorContents of gRPC."""


class ReferenceServer:
    """Serves MODELS over HTTP, and over gRPC where grpcio is installed, until the block ends."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.loaded = set(MODELS)
        self.counts = {name: [0, 0] for name in MODELS}
        self.settings: dict[str, dict[str, Any]] = {
            "trace": {"trace_level": ["OFF"], "trace_rate": "1000"},
            "logging": {"log_info": True, "log_file": "", "log_verbose_level": 0},
        }
        self.url = self.grpc = ""

    @staticmethod
    def grpc_is_installed() -> bool:
        return importlib.util.find_spec("grpc") is not None

    def has(self, fault: str) -> bool:
        return self.fault == fault

    def rule(self, name: str, broken: bool, status: int = 400) -> None:
        """Refuse when a rule is broken; with a fault of the rule's name, take it, or blame the server."""
        if not broken:
            return
        if self.has(f"takes {name}"):
            raise Taken
        raise Refused(500 if self.has(f"500 for {name}") else status, name)

    # Starting and stopping

    def __enter__(self) -> "ReferenceServer":
        reference = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    Connection(reference, self.request).serve()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 128

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self._grpc = self._start_grpc()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        if self._grpc is not None:
            self._grpc.stop(None)

    # Routes

    def answer(self, request: Request) -> Response:
        """Return the response to a request that HTTP has no fault with."""
        try:
            response = self._routed(request)
        except Refused as exc:
            response = Response.json({"error": str(exc)}, exc.status)
            if exc.status == 405 and not self.has("405 without Allow"):
                response.headers["Allow"] = "POST" if request.path.endswith("/infer") else "GET, HEAD"
            if self.has("errors as text/plain"):
                response.headers["Content-Type"] = "text/plain"
        except Taken:
            response = Response.json(
                {"model_name": "plain", "outputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}]}
            )
        return self._compressed(request, response)

    def _routed(self, request: Request) -> Response:
        path, query, _ = request.path.partition("?")
        if query and self.has("takes the query for path"):
            path = request.path
        if not self.has("leaves paths encoded"):
            path = unquote(path)
        method = request.method
        if method == "HEAD" and not self.has("HEAD is 405"):
            method = "GET"
        for pattern, verbs, answer in self._routes():
            found = re.fullmatch(pattern, path)
            if found is None:
                continue
            if method not in verbs:
                if self.has("takes any method") and not path.endswith("/infer"):
                    return answer(request, *found.groups())
                if self.has("takes any method"):
                    return Response(200)
                raise Refused(400 if self.has("400 for a wrong method") else 405, f"{method} is not taken here")
            return answer(request, *found.groups())
        raise Refused(400 if self.has("400 for an unknown path") else 404, "there is nothing here")

    def _routes(self) -> Iterable[tuple[str, tuple[str, ...], Callable[..., Response]]]:
        model = "/v2/models/([^/]+)(?:/versions/([^/]+))?"
        return (
            ("/v2/health/(live|ready)", ("GET",), self._health),
            ("/v2" if self.has("no /v2/") else "/v2/?", ("GET",), self._server_metadata),
            (f"{model}/ready", ("GET",), self._model_ready),
            (f"{model}/infer", ("POST",), self._infer),
            (f"{model}/config", ("GET",), self._config),
            ("/v2/models(?:/([^/]+)(?:/versions/([^/]+))?)?/stats", ("GET",), self._statistics),
            ("/v2(?:/models/([^/]+))?/trace/setting", ("GET", "POST"), self._trace),
            ("/v2/logging", ("GET", "POST"), self._logging),
            ("/v2/repository/index", ("POST",), self._index),
            ("/v2/repository/models/([^/]+)/(load|unload)", ("POST",), self._load),
            ("/v2/systemsharedmemory/status", ("GET",), self._shared_memory),
            (model, ("GET",), self._metadata),
        )

    def _known(self, name: str, version: str | None, place: str, *, loaded: bool = True) -> None:
        self.rule(f"an unknown model in {place}", name not in MODELS or (loaded and name not in self.loaded), 404)
        self.rule(f"an unknown version in {place}", bool(version) and version != "1", 404)

    # Health and metadata

    def _health(self, request: Request, kind: str) -> Response:
        if self.has(f"{kind} is 503"):
            return Response.json({kind: False}, 503)
        return Response(200) if self.has(f"{kind} has no body") else Response.json({kind: True})

    def _model_ready(self, request: Request, name: str, version: str | None) -> Response:
        if self.has("a model is never ready" if version is None else "a version is never ready"):
            return Response.json({"name": name, "ready": False}, 503)
        self._known(name, version, "ready")
        return (
            Response(200) if self.has("a model's ready has no body") else Response.json({"name": name, "ready": True})
        )

    def _server_metadata(self, request: Request) -> Response:
        version: Any = 1 if self.has("the server's version is a number") else "1.0"
        listed = [each for each in EXTENSIONS if not (each == "statistics" and self.has("does not list statistics"))]
        return Response.json({"name": "reference", "version": version, "extensions": listed})

    def _described(self, name: str) -> dict[str, Any]:
        kind = {"FP32": "FLOAT32"} if self.has("metadata names FLOAT32") else {}
        tensors = [
            {"name": f"{each.lower()}_in", "datatype": kind.get(each, each), "shape": SHAPES.get(name, [-1, WIDTH])}
            for each in MODELS[name]
        ]
        outputs = [{**each, "name": f"{each['name'][:-3]}_out"} for each in tensors]
        described = {"name": name, "versions": ["1"], "platform": "onnx_onnxv1", "inputs": tensors, "outputs": outputs}
        if self.has("metadata has another name"):
            described["name"] = "another"
        if self.has("metadata has no platform"):
            del described["platform"]
        if self.has("the platform is python"):
            described["platform"] = "python"
        return described

    def _metadata(self, request: Request, name: str, version: str | None) -> Response:
        if version and self.has("metadata of a version is not there"):
            raise Refused(404, "no versions here")
        if version == "no-number":
            self.rule("an odd version in metadata", True, 404)
        try:
            self._known(name, version, "metadata")
        except Refused as exc:
            if self.has("metadata's errors have no text"):
                return Response(exc.status)
            raise
        return Response.json(self._described(name))

    def _config(self, request: Request, name: str, version: str | None) -> Response:
        self._known(name, version, "config")
        return Response.json({"name": "another" if self.has("config has another name") else name})

    # Inference over REST

    def _infer(self, request: Request, name: str, version: str | None) -> Response:
        if self.has("never answers"):
            raise Refused(500, "out of order")
        self._known(name, version, "infer")
        try:
            return self._infer_known(name, request)
        except Refused:
            self.counts[name][1] += self.has("counts refused requests")
            raise

    def _infer_known(self, name: str, request: Request) -> Response:
        body, headers = self._decompressed(request), request.headers
        media = headers.get("content-type", "")
        in_binary = LENGTH in headers
        if self.has("wants a Content-Type") and not media and not in_binary:
            raise Refused(415, "no Content-Type")
        if self.has("wants application/json and no more") and media.startswith("application/json;"):
            raise Refused(415, "another Content-Type")
        if self.has("wants application/octet-stream") and in_binary and media != "application/octet-stream":
            raise Refused(415, "another Content-Type")
        length = self._json_length(headers, body)
        if length == 0 and in_binary:
            return self._raw(name, body)
        value, binary = self._json(body[:length]), body[length:]
        if self.has("refuses padding") and body[:length].endswith(b" "):
            raise Refused(400, "padding")
        if self.has("refuses a length without binary tensors") and in_binary and not binary:
            raise Refused(400, "no binary tensors")
        self._check_members(value)
        tensors = self._tensors(value, binary)
        if self.has("binary tensors in the order of metadata") and all(each.raw for each in tensors):
            names = [f"{each.lower()}_in" for each in MODELS[name]]
            raws = [each.raw for each in tensors]
            tensors = sorted(tensors, key=lambda each: names.index(each.name) if each.name in names else -1)
            for each, raw in zip(tensors, raws, strict=True):
                each.raw = raw
        if self.has("refuses JSON beside binary") and len({each.raw is None for each in tensors}) > 1:
            raise Refused(400, "mixed")
        arrays = self._arrays(name, tensors)
        outputs = self._compute(name, arrays)
        wanted = self._wanted(name, value, outputs)
        if self.has("binary in, binary out") and all(each.raw is not None for each in tensors):
            wanted = [(each, parameters, True) for each, parameters, _ in wanted]
        answer: dict[str, Any] = {"model_name": name, "model_version": "1"}
        if self.has("no model_name"):
            del answer["model_name"]
        if self.has("another model_version"):
            answer["model_version"] = "2"
        if "id" in value and not self.has("the id is lost"):
            answer["id"] = value["id"]
        if "id" not in value and self.has("an id is made up"):
            answer["id"] = "made-up"
        return self._encoded(answer, wanted, outputs)

    def _json_length(self, headers: dict[str, str], body: bytes) -> int:
        text = headers.get(LENGTH)
        if text is None:
            return len(body)
        self.rule("a length that is no number", not text.isdigit())
        self.rule("a length beyond the body", int(text) > len(body))
        return int(text)

    def _json(self, body: bytes) -> Any:
        try:
            text = body.decode()
        except UnicodeDecodeError:
            self.rule("what is not UTF-8", True)
        try:
            value = json.loads(text)
        except ValueError:
            self.rule("what is no JSON", True)
        if self.has("refuses JSON over several lines") and b"\n" in body:
            raise Refused(400, "a line break")
        return value

    def _check_members(self, value: Any) -> None:
        self.rule("a body that is no object", not isinstance(value, dict))
        inputs = value.get("inputs")
        no_objects = not isinstance(inputs, list) or not all(isinstance(each, dict) for each in inputs)
        self.rule("inputs that are no objects", no_objects)
        self.rule("an id that is no string", not isinstance(value.get("id", ""), str))
        self.rule("parameters that are no object", not isinstance(value.get("parameters", {}), dict))
        outputs = value.get("outputs", [])
        self.rule("outputs that are no array", not isinstance(outputs, list))
        known = {"id", "parameters", "inputs", "outputs"}
        if self.has("refuses unknown members") and set(value) - known:
            raise Refused(400, "unknown members")
        holders = [value, *inputs, *outputs]
        self._check_parameters({key for each in holders for key in each.get("parameters", {})})
        if self.has("refuses empty parameters") and any(each.get("parameters") == {} for each in holders):
            raise Refused(400, "empty parameters")

    def _check_parameters(self, names: set[str]) -> None:
        if self.has("refuses unknown parameters") and any(name.startswith("x-") for name in names):
            raise Refused(400, "unknown parameters")
        if self.has("refuses priority") and "priority" in names:
            raise Refused(400, "no priorities")
        self.rule("an unknown region", "shared_memory_region" in names)

    def _tensors(self, value: Any, binary: bytes) -> list[Tensor]:
        tensors = []
        offset = 0
        for each in value["inputs"]:
            self.rule("an input without a name", not isinstance(each.get("name"), str))
            shape = each.get("shape")
            self.rule("a shape that is no array", not isinstance(shape, list))
            self.rule("a size that is no integer", not all(type(size) is int for size in shape))
            tensor = Tensor(each["name"], str(each.get("datatype")), shape, each.get("data"))
            size = each.get("parameters", {}).get("binary_data_size")
            self.rule("data beside binary data", size is not None and "data" in each)
            self.rule("an input without data", size is None and "data" not in each)
            if size is not None:
                self.rule("a binary size that is no number", type(size) is not int or size < 0)
                self.rule("a binary size beyond the body", offset + size > len(binary))
                tensor.raw = binary[offset : offset + size]
                offset += size
            else:
                self.rule("data that is no array", not isinstance(tensor.data, list))
            tensors.append(tensor)
        self.rule("bytes behind the last tensor", offset < len(binary))
        return tensors

    def _raw(self, name: str, body: bytes) -> Response:
        if self.has("no raw requests"):
            raise Refused(400, "no raw requests")
        (datatype,) = MODELS[name]
        arrays = self._arrays(name, [Tensor(f"{datatype.lower()}_in", datatype, [1, WIDTH], raw=body)])
        outputs = self._compute(name, arrays)
        binary = not self.has("raw requests are answered in JSON")
        wanted: list[tuple[str, dict[str, Any], bool]] = [(each, {}, binary) for each in outputs]
        return self._encoded({"model_name": name, "model_version": "1"}, wanted, outputs)

    # What REST and gRPC share

    def _arrays(self, name: str, tensors: list[Tensor]) -> dict[str, Array]:
        """Return the inputs by name, checked against the model."""
        model = {f"{each.lower()}_in": each for each in MODELS[name]}
        if self.has("inputs by position"):
            for tensor, own in zip(tensors, model, strict=False):
                tensor.name = own
        arrays: dict[str, Array] = {}
        for tensor in tensors:
            self.rule("an unknown datatype", tensor.datatype not in DTYPES)
            self.rule("an unknown input", tensor.name not in model)
            self.rule("an input given twice", tensor.name in arrays)
            self.rule("another datatype than the model's", tensor.datatype != model[tensor.name])
            self.rule("a negative size", any(size < 0 for size in tensor.shape))
            array = self._array(tensor)
            expected = SHAPES.get(name, [-1, WIDTH])
            self.rule("another rank", len(tensor.shape) != len(expected))
            self.rule("another size", any(a not in (-1, b) for a, b in zip(expected, tensor.shape, strict=True)))
            arrays[tensor.name] = array.reshape(tensor.shape)
        self.rule("a request that lacks an input", len(arrays) < len(model))
        self.rule("inputs with different rows", len({len(array) for array in arrays.values()}) > 1)
        return {each: arrays[each] for each in model}

    def _array(self, tensor: Tensor) -> Array:
        if tensor.raw is not None:
            return self._from_raw(tensor)
        if tensor.typed is not None:
            return self._from_typed(tensor)
        return self._from_json(tensor)

    def _from_json(self, tensor: Tensor) -> Array:
        flat = tensor.data
        if self.has("flat data alone") and any(isinstance(each, list) for each in flat):
            raise Refused(400, "nested data")
        if any(isinstance(each, list) for each in flat):
            self.rule("data nested in another way", not _is_nested(flat, tensor.shape))
            for _ in tensor.shape[1:]:
                flat = [each for part in flat for each in part]
        self.rule("data of another length", len(flat) != math.prod(tensor.shape))
        datatype = tensor.datatype
        self.rule("an object among the data", any(isinstance(each, dict) for each in flat))
        kinds = {"BYTES": str, "BOOL": bool}.get(datatype, (int, float))
        wrong = not all(isinstance(each, kinds) and (datatype == "BOOL" or not isinstance(each, bool)) for each in flat)
        wrong = wrong or ("INT" in datatype and any(each != int(each) for each in flat))
        if wrong and self.has("breaks down over a value"):
            raise Refused(500, "")
        self.rule("a value of another kind", wrong)
        if self.has("reads whole numbers as doubles") and "INT" in datatype:
            flat = [min(int(float(each)), int(np.iinfo(DTYPES[datatype]).max)) for each in flat]
        if datatype == "BYTES":
            return self._spoiled(_objects([each.encode() for each in flat]), datatype, "JSON")
        if datatype == "BF16":
            return self._spoiled((np.array(flat, "<f4").view("<u4") >> 16).astype("<u2"), datatype, "JSON")
        return self._spoiled(np.array(flat, dtype=DTYPES[datatype]), datatype, "JSON")

    def _from_raw(self, tensor: Tensor) -> Array:
        raw, datatype = tensor.raw or b"", tensor.datatype
        if datatype != "BYTES":
            n_bytes = math.prod(tensor.shape) * np.dtype(DTYPES[datatype]).itemsize
            self.rule("binary data of another size", len(raw) != n_bytes)
            return self._spoiled(np.frombuffer(raw, dtype=DTYPES[datatype]), datatype, "binary")
        elements = []
        while raw:
            self.rule("a length that is cut", len(raw) < 4)
            (length,) = struct.unpack_from("<I", raw)
            self.rule("an element beyond its tensor", length > len(raw) - 4)
            elements.append(raw[4 : 4 + length])
            raw = raw[4 + length :]
        self.rule("another number of elements", len(elements) != math.prod(tensor.shape))
        for element in elements:
            if (
                (self.has("refuses empty elements") and not element)
                or (self.has("wants UTF-8") and not _is_utf8(element))
                or (self.has("16-bit lengths of elements") and len(element) > 65535)
            ):
                raise Refused(400, "an element of BYTES")
        return self._spoiled(_objects(elements), datatype, "binary")

    def _from_typed(self, tensor: Tensor) -> Array:
        datatype = tensor.datatype
        self.rule("typed 16-bit floats", datatype not in CONTENTS)
        values = list(getattr(tensor.typed, CONTENTS[datatype]))
        others = [f for each, f in CONTENTS.items() if f != CONTENTS[datatype] and len(getattr(tensor.typed, f))]
        self.rule("elements in another field", bool(others))
        self.rule("data of another length", len(values) != math.prod(tensor.shape))
        array = _objects(values) if datatype == "BYTES" else np.array(values, dtype=DTYPES[datatype])
        return self._spoiled(array, datatype, "typed contents")

    def _spoiled(self, array: Array, datatype: str, form: str) -> Array:
        """Lose the largest value of a datatype, as a reader with too few bits would."""
        if not self.has(f"spoils {datatype} in {form}"):
            return array
        flat = array.reshape(-1).copy()
        if datatype == "BYTES":
            return _objects([each.replace("✈".encode(), b"?") for each in flat])
        if datatype == "BOOL":
            return ~flat if flat.all() else flat
        if datatype == "BF16":
            flat[flat == 0x7F7F] = 0
        else:
            dtype = np.dtype(DTYPES[datatype])
            flat[flat == (np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)).max] = 0
        return flat

    def _compute(self, name: str, arrays: dict[str, Array]) -> dict[str, Array]:
        outputs = {f"{key[:-3]}_out": array for key, array in arrays.items()}
        n_rows = len(next(iter(arrays.values()))) if name != "fixed" else 1
        if self.has("breaks down over no rows") and n_rows == 0:
            raise Refused(500, "no rows")
        if self.has("mixes rows") and n_rows > 1:
            outputs = {k: array[::-1] if "fp32" in k else array for k, array in outputs.items()}
        if self.has("answers the first row alone"):
            outputs = {key: array[:1] for key, array in outputs.items()}
        if self.has("FP32 comes as FP64"):
            outputs = {key: array.astype("<f8") if array.dtype == "<f4" else array for key, array in outputs.items()}
        if not self.has("counts nothing"):
            self.counts[name][0] += 1 if self.has("counts requests for rows") else n_rows
            self.counts[name][1] += 1
        return outputs

    def _wanted(self, name: str, value: Any, outputs: dict[str, Array]) -> list[tuple[str, dict[str, Any], bool]]:
        """Return which outputs were asked for, with their parameters, and whether in binary."""
        all_binary = value.get("parameters", {}).get("binary_data_output", False)
        asked = value.get("outputs") or [{"name": each} for each in outputs]
        names = [each.get("name") for each in asked]
        self.rule("an unknown output", not set(names) <= set(outputs))
        if self.has("leaves an output out") and not value.get("outputs") and len(asked) > 1:
            asked = asked[:-1]
        if self.has("all outputs, whatever is asked"):
            asked = [*asked, *({"name": each} for each in outputs if each not in names)]
        wanted = []
        for each in asked:
            parameters = each.get("parameters", {})
            binary = parameters.get("binary_data", all_binary)
            if self.has("binary_data_output is ignored"):
                binary = parameters.get("binary_data", False)
            if self.has("binary_data false is ignored"):
                binary = binary or all_binary
            wanted.append((each["name"], parameters, binary))
        if self.has("one in binary, all in binary") and any(binary for *_, binary in wanted) and not all_binary:
            wanted = [(each, parameters, True) for each, parameters, _ in wanted]
        return wanted

    def _encoded(
        self, answer: dict[str, Any], wanted: list[tuple[str, dict[str, Any], bool]], outputs: dict[str, Array]
    ) -> Response:
        raws: list[bytes] = []
        tensors = []
        for name, parameters, binary in wanted:
            array, datatype = outputs[name], self._datatype(name, outputs[name])
            if parameters.get("classification", 0):
                self.rule("a wrong number of classes", parameters["classification"] < 0)
                array, datatype = self._classified(array, parameters["classification"]), "BYTES"
            tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
            if binary:
                other = self.has("binary answers differ") and datatype == "FP32"
                raws.append(self._to_raw(array + np.float32(0.5) if other else array, datatype))
                tensor["parameters"] = {"binary_data_size": len(raws[-1])}
            else:
                tensor["data"] = self._to_json(array, datatype)
            tensors.append(tensor)
        response = Response.json({**answer, "outputs": tensors})
        if self.has("JSON as text/plain"):
            response.headers["Content-Type"] = "text/plain"
        if raws:
            if not self.has("no length of the JSON"):
                response.headers["Inference-Header-Content-Length"] = str(len(response.body))
            response.headers["Content-Type"] = "application/octet-stream"
            if self.has("binary as application/json"):
                response.headers["Content-Type"] = "application/json"
            response.body += b"".join(raws)
        return response

    def _datatype(self, name: str, array: Array) -> str:
        return "FP64" if name == "fp32_out" and array.dtype == "<f8" else name.removesuffix("_out").upper()

    def _to_json(self, array: Array, datatype: str) -> list[Any]:
        flat = array.reshape(-1)
        if datatype == "BYTES":
            return [each.decode() for each in flat]
        if datatype == "BF16":
            flat = (flat.astype("<u4") << 16).view("<f4")
        if datatype.startswith("FP") and not self.has("writes Infinity"):
            return [None if not math.isfinite(each) else each for each in flat.tolist()]
        values: list[Any] = flat.tolist()
        return values

    def _to_raw(self, array: Array, datatype: str) -> bytes:
        if datatype == "BYTES":
            return b"".join(struct.pack("<I", len(each)) + each for each in array.reshape(-1))
        return array.tobytes()

    def _classified(self, array: Array, n_classes: int) -> Array:
        rows = []
        for row in array:
            order = np.argsort(row)[:: 1 if self.has("lowest class first") else -1][:n_classes]
            rows.append([f"{float(row[i]):f}:{i}".encode() for i in order])
            if self.has("classes by index first"):
                rows[-1] = [f"{i}:{float(row[i]):f}".encode() for i in order]
        flat = _objects([each for row in rows for each in row])
        return flat if self.has("classes in one row") else flat.reshape(len(array), -1)

    # Statistics, repository, settings

    def _statistics(self, request: Request, name: str | None, version: str | None) -> Response:
        if name is None:
            names = [] if self.has("statistics of nothing") else list(MODELS)
        else:
            self._known(name, version, "stats")
            names = [name]
        versions = ["1", "2"] if version and self.has("statistics of all versions") else ["1"]
        return Response.json({"model_stats": [self._stats_of(each, v) for each in names for v in versions]})

    def _stats_of(self, name: str, version: str) -> dict[str, Any]:
        rows, requests = self.counts[name]
        duration: dict[str, Any] = {"count": requests, "ns": requests * 1000}
        if self.has("durations in seconds"):
            duration = {"count": requests, "s": 0.1}
        kinds = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit")
        computes = {kind: duration for kind in kinds if kind.startswith("compute")}
        return {
            "name": name,
            "version": version,
            "last_inference": 0,
            "inference_count": rows,
            "execution_count": requests,
            "inference_stats": dict.fromkeys(kinds, duration),
            "batch_stats": [{"batch_size": 1, **computes}],
        }

    def _index(self, request: Request) -> Response:
        if self.has("wants a body for the index") and not request.body:
            raise Refused(400, "no body")
        only_ready = json.loads(request.body or b"{}").get("ready", False)
        entries: list[dict[str, Any]] = [
            {"name": name, "version": "1", "state": "READY" if name in self.loaded else "UNAVAILABLE", "reason": ""}
            for name in MODELS
            if name in self.loaded or not only_ready or self.has("ready is ignored")
        ]
        if self.has("ready is ignored"):
            entries.append({"name": "another", "state": "UNAVAILABLE"})
        for entry in entries:
            if self.has("the index has no names"):
                del entry["name"]
            if self.has("states in lower case"):
                entry["state"] = entry["state"].lower()
        return Response.json(entries)

    def _load(self, request: Request, name: str, verb: str) -> Response:
        self._known(name, None, verb, loaded=False)
        if verb == "unload" and not self.has("unloads nothing"):
            self.loaded.discard(name)
        elif name in self.loaded and self.has("loads once"):
            raise Refused(400, "loaded already")
        elif verb == "load":
            self.loaded.add(name)
        return Response(200)

    def _trace(self, request: Request, name: str | None) -> Response:
        if name is not None:
            if self.has("a model has no trace settings") and name in MODELS:
                raise Refused(404, "no settings")
            self._known(name, None, "trace", loaded=False)
        if self.has("trace settings are numbers") and request.method == "GET":
            return Response.json({"trace_rate": 1000})
        return self._set("trace", request, "no such trace setting")

    def _logging(self, request: Request) -> Response:
        if self.has("log settings are lists") and request.method == "GET":
            return Response.json({"log_info": [True]})
        return self._set("logging", request, "no such log setting")

    def _set(self, kind: str, request: Request, rule: str) -> Response:
        settings = self.settings[kind]
        if request.method == "POST":
            given = json.loads(request.body)
            wrong = any(type(value) is not type(settings.get(key)) for key, value in given.items())
            self.rule(rule, wrong)
            if not self.has(f"keeps {kind} as it is"):
                settings.update(given)
        return Response.json(settings)

    def _shared_memory(self, request: Request) -> Response:
        return Response.json({"regions": []} if self.has("regions in an object") else [])

    # Compression

    def _decompressed(self, request: Request) -> bytes:
        coding = request.headers.get("content-encoding", "identity")
        if coding == "identity" or (coding == "x-unknown" and self.has("ignores what it does not know")):
            return request.body
        self.rule("an unknown coding", coding not in ("gzip", "deflate"), 415)
        if self.has(f"counts bytes of {coding}") and LENGTH in request.headers:
            raise Refused(400, "the length is not that of the body")
        try:
            body = gzip.decompress(request.body) if coding == "gzip" else zlib.decompress(request.body)
            if self.has(f"answers {coding} with something else"):
                raise Taken
            return body
        except (OSError, EOFError, zlib.error):
            self.rule("a broken coding", True)
            raise

    def _compressed(self, request: Request, response: Response) -> Response:
        accepted = request.headers.get("accept-encoding", "")
        for coding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
            unasked = self.has("compresses unasked") and f"{coding};q=0" in accepted
            if coding not in accepted or (";q=0" in accepted and not unasked):
                continue
            if self.has("errors are broken when compressed") and response.status >= 400:
                return Response(response.status, response.body, {"Content-Encoding": coding})
            said = {} if self.has(f"{coding} without saying so") else {"Content-Encoding": coding}
            other = zlib.compress if coding == "gzip" else gzip.compress
            body = (other if self.has(f"{coding} is something else") else compress)(response.body)
            return Response(response.status, body, {**response.headers, **said})
        return response

    # gRPC

    def _start_grpc(self) -> Any:
        try:
            import grpc
        except ImportError:
            return None
        reference = self

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc,no-any-unimported,unused-ignore]
            def service(self, details: Any) -> Any:
                return reference._method(grpc, details.method)

        server = grpc.server(ThreadPoolExecutor(4), (Handlers(),), options=(("grpc.so_reuseport", 0),))
        self.grpc = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        return server

    def _method(self, grpc: Any, path: str) -> Any:
        service, _, name = path.strip("/").partition("/")
        if service == "grpc.health.v1.Health":
            answer, asked, answered = self._grpc_health, "HealthCheckRequest", "HealthCheckResponse"
        elif name == "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(
                self._stream, message("ModelInferRequest").FromString, _bytes_of
            )
        else:
            found = getattr(self, f"_grpc_{name}", None)
            if found is None:
                if self.has("any method is taken"):
                    return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
                return None
            answer, asked, answered = found, f"{name}Request", f"{name}Response"

        def answered_or_refused(raw: bytes, context: Any) -> bytes:
            try:
                request = message(asked).FromString(raw)
            except Exception as exc:  # noqa: BLE001 - protobuf's DecodeError, whichever implementation raises it
                if self.has("bytes that are no message are taken"):
                    return b""
                context.abort(grpc.StatusCode.INTERNAL, str(exc))
            try:
                return _bytes_of(answer(request, message(answered)()))
            except Taken:
                return b""
            except Refused as exc:
                codes = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 500: "INTERNAL"}
                context.abort(getattr(grpc.StatusCode, codes[exc.status]), str(exc))
            raise AssertionError("abort returns nothing")

        return grpc.unary_unary_rpc_method_handler(answered_or_refused)

    def _grpc_health(self, request: Any, answer: Any) -> Any:
        self.rule("an unknown service", request.service == "no.such.Service", 404)
        answer.status = 2 if self.has("health says NOT_SERVING") else 1
        return answer

    def _grpc_ServerLive(self, request: Any, answer: Any) -> Any:  # noqa: N802 - the protocol's name
        answer.live = not self.has("gRPC is not live")
        return answer

    def _grpc_ServerReady(self, request: Any, answer: Any) -> Any:  # noqa: N802
        answer.ready = not self.has("gRPC is not ready")
        return answer

    def _grpc_ModelReady(self, request: Any, answer: Any) -> Any:  # noqa: N802
        try:
            self._known(request.name, request.version, "gRPC's ready")
        except Taken:
            answer.ready = True
            return answer
        answer.ready = not self.has("gRPC's model is not ready")
        return answer

    def _grpc_ServerMetadata(self, request: Any, answer: Any) -> Any:  # noqa: N802
        told = json.loads(self._server_metadata(Request("GET", "", {}, b"")).body)
        answer.name, answer.version = told["name"], str(told["version"])
        answer.extensions.extend(told["extensions"][:1] if self.has("gRPC lists less") else told["extensions"])
        return answer

    def _grpc_ModelMetadata(self, request: Any, answer: Any) -> Any:  # noqa: N802
        self._known(request.name, request.version, "gRPC's metadata")
        told = self._described(request.name)
        answer.name, answer.platform = told["name"], told.get("platform", "")
        answer.versions.extend(told["versions"])
        for kind, tensors in (("inputs", answer.inputs), ("outputs", answer.outputs)):
            for each in told[kind]:
                shape = [1, WIDTH] if self.has("gRPC's metadata has another shape") else each["shape"]
                tensors.add(name=each["name"], datatype=each["datatype"], shape=shape)
        return answer

    def _grpc_ModelInfer(self, request: Any, answer: Any) -> Any:  # noqa: N802
        self._known(request.model_name, request.model_version, "infer")
        if self.has("gRPC breaks over gzip") and request.id == "compressed":  # grpcio does not say how a message came
            raise Refused(500, "gzip")
        tensors = [Tensor(each.name, each.datatype, list(each.shape), typed=each.contents) for each in request.inputs]
        raws = list(request.raw_input_contents)
        if self.has("no typed contents") and not raws:
            raise Refused(400, "typed")
        if self.has("no raw contents") and raws:
            raise Refused(400, "raw")
        self.rule(
            "raw contents beside others", bool(raws) and any(each.HasField("contents") for each in request.inputs)
        )
        self.rule("another number of raw contents", bool(raws) and len(raws) != len(tensors))
        for tensor, raw in zip(tensors, raws, strict=False):
            tensor.raw, tensor.typed = raw, None
        parameters = [each for holder in (request, *request.inputs, *request.outputs) for each in holder.parameters]
        self._check_parameters({each.key for each in parameters})
        outputs = self._compute(request.model_name, self._arrays(request.model_name, tensors))
        names = [each.name for each in request.outputs] or list(outputs)
        self.rule("an unknown output", not set(names) <= set(outputs))
        if self.has("gRPC ignores requested outputs"):
            names = list(outputs)
        if self.has("gRPC answers one row") and len(outputs[names[0]]) > 1:
            outputs = {name: array[:1] for name, array in outputs.items()}
        answer.model_name, answer.model_version, answer.id = request.model_name, "1", request.id
        if self.has("gRPC names no model"):
            answer.model_name = ""
        if self.has("gRPC loses the id"):
            answer.id = ""
        for name in names:
            tensor = answer.outputs.add(name=name, datatype=self._datatype(name, outputs[name]))
            tensor.shape.extend(outputs[name].shape)
            answer.raw_output_contents.append(self._to_raw(outputs[name], tensor.datatype))
            if self.has("gRPC answers twice over"):
                tensor.contents.fp32_contents.append(1.0)
        return answer

    def _stream(self, requests: Any, context: Any) -> Any:
        for request in requests:
            response = message("ModelStreamInferResponse")()
            try:
                self._grpc_ModelInfer(request, response.infer_response)
            except (Refused, Taken) as exc:
                if self.has("a wrong request ends the stream"):
                    return
                response.Clear()
                if isinstance(exc, Refused):
                    response.error_message = str(exc)
            if self.has("a stream loses ids"):
                response.infer_response.id = ""
            yield response

    def _grpc_ModelStatistics(self, request: Any, answer: Any) -> Any:  # noqa: N802
        rows, _ = self.counts[request.name]
        answer.model_stats.add(name=request.name, version="1", inference_count=rows)
        return answer

    def _grpc_RepositoryIndex(self, request: Any, answer: Any) -> Any:  # noqa: N802
        for name in () if self.has("gRPC's index is empty") else MODELS:
            answer.models.add(name=name, version="1", state="READY")
        return answer

    def _grpc_TraceSetting(self, request: Any, answer: Any) -> Any:  # noqa: N802
        if not self.has("gRPC has no trace settings"):
            answer.settings.add(key="trace_rate")
        return answer

    def _grpc_LogSettings(self, request: Any, answer: Any) -> Any:  # noqa: N802
        if not self.has("gRPC has no log settings"):
            answer.settings.add(key="log_info")
        return answer


class Connection:
    """One HTTP connection: requests in, responses out, in order."""

    def __init__(self, reference: ReferenceServer, connected: socket.socket) -> None:
        self.reference = reference
        self.socket = connected
        self.buffer = b""

    def has(self, fault: str) -> bool:
        return self.reference.has(fault)

    def serve(self) -> None:
        while (head := self._head()) is not None:
            try:
                request, version = self._request(head)
            except Refused as exc:
                self._send(Response.json({"error": str(exc)}, exc.status), "HTTP/1.1", close=True)
                return
            response = self.reference.answer(request)
            asked = request.headers.get("connection", "").lower()
            close = asked == "close" or (version == "HTTP/1.0" and asked != "keep-alive")
            if "transfer-encoding" in request.headers and "content-length" in request.headers:
                close = not self.has("goes on behind length and chunks")
            if self.has("closes after each answer") or (
                self.has("drops the client after an error") and response.status >= 400
            ):
                self._send(response, version, close=self.has("closes after each answer"), head=request.method == "HEAD")
                return
            if self.has("keeps open what is to be closed") and asked == "close":
                close = False
            if self.has("keeps HTTP/1.0 open") and version == "HTTP/1.0":
                close = False
            self._send(response, version, close=close, head=request.method == "HEAD")
            if self.has("loses what is pipelined"):
                self.buffer = b""
            if close:
                return

    def _head(self) -> list[str] | None:
        """Return the lines of the next request's head; None at the end."""
        while b"\r\n\r\n" not in self.buffer:
            if len(self.buffer) > 32768:
                if not self.has("resets long headers"):
                    self._send(Response.json({"error": "the headers are too long"}, 431), "HTTP/1.1", close=True)
                    self.socket.shutdown(1)
                    while self.socket.recv(65536):
                        pass
                return None
            received = self.socket.recv(65536)
            if not received or (self.has("takes a head in one piece") and b"\r\n\r\n" not in received):
                return None
            self.buffer += received
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if self.has("wants both halves open"):
            self.socket.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                if self.socket.recv(1, socket.MSG_PEEK) == b"":
                    return None
            self.socket.settimeout(None)
        return head.decode("latin-1").split("\r\n")

    def _request(self, lines: list[str]) -> tuple[Request, str]:
        first, *others = lines
        parts = first.split(" ")
        if len(parts) != 3 or parts[2] not in ("HTTP/1.0", "HTTP/1.1"):
            if self.has("hangs on what is no HTTP"):
                self.socket.recv(1)
            raise Refused(400, "no HTTP")
        method, target, version = parts
        headers: dict[str, str] = {}
        lengths = set()
        for line in others:
            name, _, value = line.partition(":")
            key = name if self.has("headers in one spelling") else name.lower()
            headers[key.lower() if key == key.title() or key.islower() else key] = value.strip()
            if name.lower() == "content-length":
                lengths.add(value.strip())
        if version == "HTTP/1.1" and "host" not in {name.lower() for name in headers} and not self.has("needs no Host"):
            raise Refused(400, "no Host")
        if target.startswith("http://") and not self.has("paths alone"):
            target = "/" + target.split("/", 3)[3]
        if len(lengths) > 1 and not self.has("takes two lengths"):
            raise Refused(400, "two lengths")
        return Request(method, target, headers, self._body(headers)), version

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("expect") == "100-continue" and not self.has("never says 100"):
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding") == "chunked":
            if self.has("wants a length"):
                raise Refused(411, "no length")
            body = b""
            while size := int(self._line().split(b";")[0], 16):
                body += self._exactly(size)
                self._line()
            self._line()
            return body
        length = headers.get("content-length", "0")
        if not length.isdigit():
            if self.has("takes any length"):
                return b""
            raise Refused(400, "a length that is no number")
        if self.has("takes a body in one piece"):
            self.buffer += self.socket.recv(65536) if int(length) and not self.buffer else b""
            body, self.buffer = self.buffer[: int(length)], self.buffer[int(length) :]
            return body
        return self._exactly(int(length))

    def _line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            self._more()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def _exactly(self, n_bytes: int) -> bytes:
        while len(self.buffer) < n_bytes:
            self._more()
        taken, self.buffer = self.buffer[:n_bytes], self.buffer[n_bytes:]
        return taken

    def _more(self) -> None:
        received = self.socket.recv(65536)
        if not received:
            raise ConnectionError
        self.buffer += received

    def _send(self, response: Response, version: str, *, close: bool, head: bool = False) -> None:
        lines = [f"{version} {response.status} Reason"]
        body = response.body
        if version == "HTTP/1.0" and self.has("chunks for HTTP/1.0"):
            lines.append("Transfer-Encoding: chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if close:
            lines.append("Connection: close")
        if head and not self.has("HEAD has a body"):
            body = b""
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def _bytes_of(value: Any) -> bytes:
    data: bytes = value.SerializeToString()
    return data


def _objects(values: list[bytes]) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _is_nested(data: Any, shape: list[int]) -> bool:
    """Return whether lists are nested like a shape, the whole way down."""
    if not shape:
        return not isinstance(data, list)
    return isinstance(data, list) and len(data) == shape[0] and all(_is_nested(each, shape[1:]) for each in data)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
