"""Checks of the protocol over gRPC: tried where the target names an address and grpcio is installed.

The documents say of errors no more than "other codes indicate failure"; that the code tells the client's fault from the
server's is told separately, as ID.code.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelyard.errors import ConfigError, MissingExtra
from modelyard.testing.open_inference.check import (
    Check,
    Exchange,
    Failed,
    Level,
    Run,
    Skipped,
    check,
    expect,
    listed,
    shown,
)
from modelyard.testing.open_inference.datatypes import tensors_of_extremes
from modelyard.testing.open_inference.extensions import COUNTED_WITHIN_S
from modelyard.testing.open_inference.inference import Answer, Output, read_answer
from modelyard.testing.open_inference.messages import message
from modelyard.testing.open_inference.server import UNKNOWN, UNKNOWN_VERSION, Server
from modelyard.testing.open_inference.tensors import (
    NUMPY_DTYPES,
    SIXTEEN_BIT_FLOATS,
    Array,
    from_raw,
    objects,
    same,
    to_raw,
)

PROTO = "open_inference_grpc.proto"
MARKDOWN = "inference_grpc.md"
TRITON = "grpc_service.proto of Triton"
HEALTH = "the gRPC health checking protocol"
SERVICE = "/inference.GRPCInferenceService/"
CLIENTS_FAULT = ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED")
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field that holds elements of a datatype; 16-bit floats have none."""


class Refused(Exception):
    """A call that ended with a status other than OK."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"the status is {code}: {details[:200]}")
        self.code = code
        self.details = details


@contextmanager
def channel(server: Server) -> Iterator[Any]:
    """Give an open channel; raises Skipped where there is nothing to connect to, or with."""
    if not server.target.grpc:
        raise Skipped("no address of gRPC is given; give one with --grpc HOST:PORT")
    try:
        import grpc  # type: ignore[import-untyped,import-not-found,unused-ignore]  # an optional package without types
    except ImportError as exc:
        raise Skipped("grpcio is not installed; pip install grpcio") from exc
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    opened = grpc.insecure_channel(server.target.grpc, options=options)
    try:
        yield opened
    finally:
        opened.close()


def reach(server: Server) -> None:
    """Return where something answers gRPC, whatever it says.

    Raises:
        MissingExtra: grpcio is not installed.
        ConfigError: nothing answers at the target's address.
    """
    try:
        importlib.import_module("grpc")
    except ImportError as exc:
        raise MissingExtra("grpcio", "", "--grpc", alone=True) from exc
    try:
        call(server, f"{SERVICE}ServerLive", b"", "ServerLiveResponse")
    except Refused as exc:
        if exc.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise ConfigError(
                f"--grpc must be HOST:PORT where the server speaks gRPC, got {server.target.grpc!r}: {exc}; "
                "correct it, or leave it out to skip those checks"
            ) from exc


def call(server: Server, path: str, request: Any, answer: str, **options: Any) -> Any:
    """Return the answer to a unary call, a message of type `answer`; raises Refused."""
    import grpc  # type: ignore[import-untyped,import-not-found,unused-ignore]

    serialize = bytes if isinstance(request, bytes) else type(request).SerializeToString
    with channel(server) as opened:
        method = opened.unary_unary(
            path, request_serializer=serialize, response_deserializer=message(answer).FromString
        )
        try:
            got = method(request, timeout=server.target.timeout_s, **options)
        except grpc.RpcError as exc:
            refused = Refused(exc.code().name, exc.details() or "")
            _log(server, path, request, refused)
            raise refused from exc
    _log(server, path, request, got)
    return got


def ask(server: Server, method: str, **fields: Any) -> Any:
    """Return the answer of one of the protocol's methods; raises Failed when it is refused."""
    _connected(server)
    try:
        return call(server, SERVICE + method, message(f"{method}Request")(**fields), f"{method}Response")
    except Refused as exc:
        raise Failed(str(exc)) from exc


def infer(server: Server, request: Any) -> Answer:
    """Return the answer to an inference request, read; raises Failed when it is refused or cannot be."""
    try:
        return read(call(server, f"{SERVICE}ModelInfer", request, "ModelInferResponse"))
    except Refused as exc:
        raise Failed(str(exc)) from exc


def request_of(server: Server, arrays: Mapping[str, Array] | None = None, *, raw: bool | None = None) -> Any:
    """Return an inference request for all outputs: raw, or with typed contents; by default typed where the datatypes allow."""
    if raw is None:
        raw = any(spec.datatype in SIXTEEN_BIT_FLOATS for spec in server.model.inputs)
    made = message("ModelInferRequest")(model_name=server.name, model_version=server.target.version)
    arrays = server.arrays() if arrays is None else arrays
    for spec in server.model.inputs:
        array = arrays[spec.name]
        tensor = made.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if raw:
            made.raw_input_contents.append(to_raw(array, spec.datatype))
        elif spec.datatype in CONTENTS:
            getattr(tensor.contents, CONTENTS[spec.datatype]).extend(array.reshape(-1).tolist())
        else:
            raise Skipped(f"{spec.datatype} has no typed contents")
    return made


def base(server: Server, *, raw: bool | None = None) -> Any:
    """Return the plainest request, as `request_of` makes it; raises Skipped unless it is answered as it should be."""
    _connected(server)
    _ = server.base
    request = request_of(server, raw=raw)
    form = bool(request.raw_input_contents)
    if form not in server.grpc_answers:
        try:
            server.grpc_answers[form] = infer(server, request)
        except Failed as exc:
            raise Skipped(f"the plainest request is not answered ({exc}); see grpc.infer and grpc.infer-raw") from exc
    return request


def read(response: Any) -> Answer:
    """Return the outputs of a ModelInferResponse, raw or typed; raises Failed where they cannot be read."""
    raws = list(response.raw_output_contents)
    if raws:
        expect(
            len(raws) == len(response.outputs), f"{len(raws)} raw_output_contents for {len(response.outputs)} outputs"
        )
        filled = [tensor.name for tensor in response.outputs if tensor.HasField("contents")]
        expect(not filled, f"there are raw_output_contents, and {listed(filled)} has contents too")
    outputs = {}
    for i, tensor in enumerate(response.outputs):
        what = f"output {tensor.name!r}"
        expect(tensor.datatype in NUMPY_DTYPES, f"{what} has the datatype {tensor.datatype!r}")
        expect(tensor.name not in outputs, f"{what} comes twice")
        array = from_raw(raws[i], tensor.datatype, tensor.shape, what) if raws else _typed(tensor, what)
        outputs[tensor.name] = Output(tensor.name, tensor.datatype, array, binary=bool(raws))
    return Answer(
        {"id": response.id, "model_name": response.model_name, "model_version": response.model_version}, outputs
    )


def _typed(tensor: Any, what: str) -> Array:
    expect(tensor.datatype in CONTENTS, f"{what} is {tensor.datatype}, which has no typed contents: it must be raw")
    values = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
    shape = tuple(tensor.shape)
    expect(len(values) == int(np.prod(shape)), f"{what} has {len(values)} elements, the shape is {list(shape)}")
    if tensor.datatype == "BYTES":
        return objects(values).reshape(shape)
    return np.array(values, dtype=NUMPY_DTYPES[tensor.datatype]).reshape(shape)


def _log(server: Server, path: str, request: Any, got: Any) -> None:
    server.exchanges.append(Exchange(f"{path}\n{_text(request)}", _text(got)))


def _text(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= 600 else f"{text[:600]} ..."


def _connected(server: Server) -> None:
    with channel(server):
        pass


# Health and metadata


@check("grpc.live", "MUST", "ServerLive says live", f"{MARKDOWN}, Server Live")
def live(server: Server) -> None:
    expect(ask(server, "ServerLive").live, "live is false")


@check("grpc.ready", "MUST", "ServerReady says ready", f"{MARKDOWN}, Server Ready")
def ready(server: Server) -> None:
    expect(ask(server, "ServerReady").ready, "ready is false")


@check(
    "grpc.model-ready", "MUST", "ModelReady says ready, of the model and of each version", f"{MARKDOWN}, Model Ready"
)
def model_ready(server: Server) -> None:
    for version in ("", *server.model.versions):
        expect(
            ask(server, "ModelReady", name=server.name, version=version).ready, f"version {version!r}: ready is false"
        )


@check("grpc.unknown-model-ready", "MUST", "a model that is not there is not ready", f"{MARKDOWN}, Model Ready")
def unknown_model_ready(server: Server) -> None:
    _connected(server)
    for name, version in ((UNKNOWN, ""), (server.name, UNKNOWN_VERSION)):
        asked = message("ModelReadyRequest")(name=name, version=version)
        try:
            got = call(server, f"{SERVICE}ModelReady", asked, "ModelReadyResponse")
        except Refused:
            continue
        expect(not got.ready, f"{name} {version} is ready")


@check(
    "grpc.server-metadata",
    "MUST",
    "ServerMetadata says the same as GET /v2",
    f"{MARKDOWN}, Server Metadata (missing in its table of methods)",
)
def server_metadata(server: Server) -> None:
    got = ask(server, "ServerMetadata")
    over_rest = server.metadata
    for key, value in (("name", got.name), ("version", got.version)):
        expect(value == over_rest.get(key), f"{key} is {shown(value)}, over REST {shown(over_rest.get(key))}")
    here, there = set(got.extensions), set(over_rest.get("extensions", []))
    only = f"only over gRPC: {listed(sorted(here - there))}; only over REST: {listed(sorted(there - here))}"
    expect(here == there, f"the extensions differ; {only}")


@check(
    "grpc.model-metadata", "MUST", "ModelMetadata says the same as GET /v2/models/NAME", f"{MARKDOWN}, Model Metadata"
)
def model_metadata(server: Server) -> None:
    model = server.model
    got = ask(server, "ModelMetadata", name=server.name, version=server.target.version)
    expect(got.name == model.name, f"name is {got.name!r}, over REST {model.name!r}")
    expect(
        tuple(got.versions) == model.versions, f"versions are {list(got.versions)}, over REST {list(model.versions)}"
    )
    expect(got.platform == model.platform, f"platform is {got.platform!r}, over REST {model.platform!r}")
    for kind, theirs, ours in (("inputs", got.inputs, model.inputs), ("outputs", got.outputs, model.outputs)):
        a = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in theirs]
        b = [(tensor.name, tensor.datatype, tensor.shape) for tensor in ours]
        expect(a == b, f"{kind} are {a}, over REST {b}")


# Inference


@check("grpc.infer", "MUST", "a request with typed contents is answered as over REST", f"{MARKDOWN}, Inference")
def infer_typed(server: Server) -> None:
    _connected(server)
    server.steady.expect_same(infer(server, request_of(server, raw=False)), "the answer over gRPC")


@check(
    "grpc.infer-raw",
    "MUST",
    "a request with raw_input_contents is answered as over REST",
    f"{PROTO}, raw_input_contents",
)
def infer_raw(server: Server) -> None:
    _connected(server)
    server.steady.expect_same(infer(server, request_of(server, raw=True)), "the answer over gRPC")


@check(
    "grpc.model-name",
    "MUST",
    "an answer names the model and, where it has versions, the version",
    f"{PROTO}, ModelInferResponse",
)
def model_name(server: Server) -> None:
    for version in ("", *server.model.versions):
        request = base(server)
        request.model_version = version
        body = infer(server, request).body
        expect(body["model_name"] == server.name, f"model_name is {body['model_name']!r}")
        expected = (version,) if version else server.model.versions
        holds = not expected or body["model_version"] in expected
        expect(holds, f"model_version is {body['model_version']!r}, expected {listed(expected)}")


@check("grpc.id", "MUST", "the id of a request comes back in its answer, none where there was none", f"{PROTO}, id")
def request_id(server: Server) -> None:
    request = base(server)
    for sent in ("a-1 ✈", ""):
        request.id = sent
        got = infer(server, request).body["id"]
        expect(got == sent, f"id is {got!r}, expected {sent!r}")


@check(
    "grpc.requested-outputs", "MUST", "a request that names one output gets that one and no other", f"{PROTO}, outputs"
)
def requested_outputs(server: Server) -> None:
    for spec in server.model.outputs:
        request = base(server)
        request.outputs.add(name=spec.name)
        outputs = infer(server, request).outputs
        expect(set(outputs) == {spec.name}, f"asked for {spec.name}, got {listed(outputs)}")


@check("grpc.parameters", "SHOULD", "parameters that the server does not know are no error", f"{PROTO}, InferParameter")
def parameters(server: Server) -> None:
    request = base(server)
    for holder in (request, request.inputs[0], request.outputs.add(name=server.model.outputs[0].name)):
        holder.parameters.add(key="x-text", value=message("InferParameter")(string_param="a"))
        holder.parameters.add(key="x-number", value=message("InferParameter")(int64_param=1))
        holder.parameters.add(key="x-flag", value=message("InferParameter")(bool_param=True))
    infer(server, request)


@check("grpc.input-order", "MUST", "inputs are told by name, in whatever order they come", f"{PROTO}, inputs")
def input_order(server: Server) -> None:
    request = base(server)
    if len(request.inputs) < 2:
        raise Skipped("the model has one input")
    expected = server.steady
    inputs, raws = list(request.inputs)[::-1], list(request.raw_input_contents)[::-1]
    del request.inputs[:], request.raw_input_contents[:]
    request.inputs.extend(inputs)
    request.raw_input_contents.extend(raws)
    expected.expect_same(infer(server, request), "the answer to inputs in reverse order")


@check("grpc.batch", "MUST", "n rows are answered as over REST", f"{PROTO}, shape")
def batch(server: Server) -> None:
    base(server)
    _ = server.steady
    if not server.model.batched:
        raise Skipped("the first axis of some tensor has a fixed size")
    arrays = server.arrays(3)
    reply = server.post_call(server.call(arrays))
    if reply.status != 200:
        raise Skipped("the model does not take 3 rows")
    read_answer(reply).expect_same(infer(server, request_of(server, arrays)), "the answer over gRPC")


@check(
    "grpc.compression",
    "MAY",
    "a message in gzip, where it is taken, is answered like any other",
    "gRPC, compression.md",
)
def compression(server: Server) -> None:
    request = base(server)
    request.id = "compressed"
    import grpc  # type: ignore[import-untyped,import-not-found,unused-ignore]

    try:
        got = call(server, f"{SERVICE}ModelInfer", request, "ModelInferResponse", compression=grpc.Compression.Gzip)
    except Refused as exc:
        if exc.code == "UNIMPLEMENTED":
            raise Skipped(f"gzip is not taken: {exc.details}") from exc
        raise Failed(str(exc)) from exc
    server.steady.expect_same(read(got), "the answer to a message in gzip")


def _extremes(datatype: str, *, raw: bool) -> Run:
    def run(server: Server) -> None:
        spec, output = server.echo_of(datatype)
        base(server, raw=raw)
        for array in tensors_of_extremes(datatype, spec.sized()):
            request = request_of(server, {**server.arrays(), spec.name: array}, raw=raw)
            request.outputs.add(name=output)
            got = infer(server, request)[output].array
            a, b = (shown(each.reshape(-1)[:8].tolist()) for each in (array, got))
            expect(same(array, got, datatype, exactly=True), f"{a} came back as {b}")

    return run


RAW_CHECKS = tuple(
    Check(
        f"grpc.raw.{datatype}",
        "MUST",
        f"limits of {datatype} go through raw contents unchanged",
        f"{PROTO}, raw_input_contents",
        _extremes(datatype, raw=True),
    )
    for datatype in NUMPY_DTYPES
)
TYPED_CHECKS = tuple(
    Check(
        f"grpc.contents.{datatype}",
        "MUST",
        f"limits of {datatype} go through {field} unchanged",
        f"{PROTO}, InferTensorContents",
        _extremes(datatype, raw=False),
    )
    for datatype, field in CONTENTS.items()
)


# Requests that are wrong


@dataclass(frozen=True)
class GrpcFault:
    """A wrong request: the plainest one, changed."""

    id: str
    level: Level
    what: str
    where: str
    change: Callable[[Server, Any], None]

    @property
    def checks(self) -> tuple[Check, Check]:
        rule, code = f"{self.what} is refused", f"{self.what} is the client's fault: {' or '.join(CLIENTS_FAULT[:3])}"
        return (
            Check(f"grpc.{self.id}", self.level, rule, self.where, self._refused()),
            Check(f"grpc.{self.id}.code", "SHOULD", code, "gRPC, statuscodes.md", self._code()),
        )

    def send(self, server: Server) -> Refused | None:
        """Return how the wrong request was refused, None if it was not."""
        request = base(server)
        self.change(server, request)
        try:
            call(server, f"{SERVICE}ModelInfer", request, "ModelInferResponse")
        except Refused as exc:
            return exc
        return None

    def _refused(self) -> Run:
        def run(server: Server) -> None:
            expect(self.send(server) is not None, "the status is OK, expected an error's")

        return run

    def _code(self) -> Run:
        def run(server: Server) -> None:
            refused = self.send(server)
            if refused is None:
                raise Skipped(f"it is not refused; see grpc.{self.id}")
            expect(refused.code in CLIENTS_FAULT, str(refused))

        return run


def _raw(server: Server, request: Any) -> None:
    """Make the request one with raw contents."""
    request.CopyFrom(request_of(server, raw=True))


def _raw_and_contents(server: Server, request: Any) -> None:
    typed = next((t for t in request.inputs if t.HasField("contents")), None)
    if typed is None:
        raise Skipped("no input has typed contents")
    for spec in server.model.inputs:
        request.raw_input_contents.append(to_raw(server.arrays()[spec.name], spec.datatype))


def _raw_changed(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Server, Any], None]:
    def changed(server: Server, request: Any) -> None:
        _raw(server, request)
        raws = change(list(request.raw_input_contents))
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(raws)

    return changed


def _contents_changed(change: Callable[[Any], None]) -> Callable[[Server, Any], None]:
    """Change the elements of the first input with typed contents."""

    def changed(server: Server, request: Any) -> None:
        tensor = next((t for t in request.inputs if t.HasField("contents")), None)
        if tensor is None:
            raise Skipped("no input has typed contents")
        change(getattr(tensor.contents, CONTENTS[tensor.datatype]))

    return changed


def _one_tensor_less(raws: list[bytes]) -> list[bytes]:
    return raws[:-1] or [b"", b""]  # no raw contents at all would be a typed request


def _one_tensor_more(raws: list[bytes]) -> list[bytes]:
    return [*raws, raws[0]]


def _one_byte_less(raws: list[bytes]) -> list[bytes]:
    return [*raws[:-1], raws[-1][:-1]]


def _one_byte_more(raws: list[bytes]) -> list[bytes]:
    return [*raws[:-1], raws[-1] + b"\x00"]


def _one_element_less(elements: Any) -> None:
    del elements[-1]


def _one_element_more(elements: Any) -> None:
    elements.append(elements[0])


def _other_contents(server: Server, request: Any) -> None:
    tensor = next((t for t in request.inputs if t.HasField("contents") and t.datatype != "FP64"), None)
    if tensor is None:
        raise Skipped("no input has typed contents of another datatype than FP64")
    n_elements = int(np.prod(tensor.shape))
    tensor.ClearField("contents")
    tensor.contents.fp64_contents.extend([1.0] * n_elements)


def _sixteen_bits(server: Server, request: Any) -> None:
    spec = next((s for s in server.model.inputs if s.datatype in SIXTEEN_BIT_FLOATS), None)
    if spec is None:
        raise Skipped("the model has no input of FP16 or BF16")
    del request.raw_input_contents[:]
    for tensor in request.inputs:
        field = CONTENTS.get(tensor.datatype, "fp32_contents")
        values = server.arrays()[tensor.name].reshape(-1)
        numbers = values.tolist() if tensor.datatype in CONTENTS else [1.0] * values.size
        getattr(tensor.contents, field).extend(numbers)


def _set(path: str, value: Any) -> Callable[[Server, Any], None]:
    """Set a field of the request, or with "inputs." before it, of its first input."""

    def changed(server: Server, request: Any) -> None:
        holder, field = (
            (request.inputs[0], path.removeprefix("inputs.")) if path.startswith("inputs.") else (request, path)
        )
        if field == "shape":
            del holder.shape[:]
            holder.shape.extend(value)
        else:
            setattr(holder, field, value)

    return changed


def _without_last_input(server: Server, request: Any) -> None:
    del request.inputs[-1]
    if request.raw_input_contents:
        del request.raw_input_contents[-1]


def _unknown_output(server: Server, request: Any) -> None:
    request.outputs.add(name="no-such-output")


RAW = f"{PROTO}, raw_input_contents"
TYPED = f"{PROTO}, InferTensorContents"
FAULTS = (
    GrpcFault("unknown-model", "MUST", "inference by a model that is not there", MARKDOWN, _set("model_name", UNKNOWN)),
    GrpcFault("unknown-version", "MUST", "inference by a version that is not there", MARKDOWN, _set("model_version", UNKNOWN_VERSION)),
    GrpcFault("missing-input", "MUST", "a request that lacks an input", MARKDOWN, _without_last_input),
    GrpcFault("unknown-input", "MUST", "an input by a name that the model has not", MARKDOWN, _set("inputs.name", "no-such-input")),
    GrpcFault("unknown-output", "MUST", "asking for an output that the model has not", MARKDOWN, _unknown_output),
    GrpcFault("unknown-datatype", "MUST", "a datatype that is not in the table", MARKDOWN, _set("inputs.datatype", "FLOAT32")),
    GrpcFault("negative-size", "MUST", "a shape with -1", MARKDOWN, _set("inputs.shape", [-1, -1])),
    GrpcFault("overflowing-shape", "MUST", "a shape of 2**64 elements", MARKDOWN, _set("inputs.shape", [2**32, 2**32])),
    GrpcFault("raw-and-contents", "MUST", "raw_input_contents beside contents", RAW, _raw_and_contents),
    GrpcFault("raw-missing", "MUST", "raw_input_contents of fewer tensors than there are", RAW, _raw_changed(_one_tensor_less)),
    GrpcFault("raw-left", "MUST", "raw_input_contents of more tensors than there are", RAW, _raw_changed(_one_tensor_more)),
    GrpcFault("raw-too-short", "MUST", "raw contents with a byte too few", RAW, _raw_changed(_one_byte_less)),
    GrpcFault("raw-too-long", "MUST", "raw contents with a byte too many", RAW, _raw_changed(_one_byte_more)),
    GrpcFault("contents-too-short", "MUST", "typed contents with an element too few", TYPED, _contents_changed(_one_element_less)),
    GrpcFault("contents-too-long", "MUST", "typed contents with an element too many", TYPED, _contents_changed(_one_element_more)),
    GrpcFault("contents-of-another-type", "MUST", "elements in another datatype's field", TYPED, _other_contents),
    GrpcFault("sixteen-bits-in-contents", "SHOULD", "a 16-bit float in typed contents", RAW, _sixteen_bits),
)  # fmt: skip
FAULT_CHECKS = tuple(each for fault in FAULTS for each in fault.checks)


@check(
    "grpc.unknown-model-metadata",
    "MUST",
    "metadata of a model that is not there is refused",
    f"{MARKDOWN}, Model Metadata",
)
def unknown_model_metadata(server: Server) -> None:
    _connected(server)
    for name, version in ((UNKNOWN, ""), (server.name, UNKNOWN_VERSION)):
        asked = message("ModelMetadataRequest")(name=name, version=version)
        try:
            call(server, f"{SERVICE}ModelMetadata", asked, "ModelMetadataResponse")
        except Refused:
            continue
        raise Failed(f"the status is OK for {name} {version}")


@check("grpc.unknown-method", "MUST", "a method that is not there is UNIMPLEMENTED", "gRPC, statuscodes.md")
def unknown_method(server: Server) -> None:
    _connected(server)
    try:
        call(server, f"{SERVICE}NoSuchMethod", b"", "ServerLiveResponse")
    except Refused as exc:
        expect(exc.code == "UNIMPLEMENTED", str(exc))
    else:
        raise Failed("the status is OK")


@check(
    "grpc.malformed-message",
    "MUST",
    "bytes that are no message are refused, and the server goes on",
    "gRPC, statuscodes.md",
)
def malformed_message(server: Server) -> None:
    _connected(server)
    try:
        call(server, f"{SERVICE}ModelInfer", b"\xff\xff\xff\xff", "ModelInferResponse")
    except Refused:
        ask(server, "ServerLive")
    else:
        raise Failed("the status is OK")


# Streams, and what Triton adds


@check("grpc.stream", "MAY", "ModelStreamInfer, where it is offered, answers each request of a stream", TRITON)
def stream(server: Server) -> None:
    expected = server.steady
    requests = []
    for i in range(3):
        request = base(server)
        request.id = f"stream-{i}"
        requests.append(request)
    responses = _stream(server, requests)
    errors = [response.error_message for response in responses if response.error_message]
    expect(not errors, f"the stream says {errors}")
    ids = [response.infer_response.id for response in responses]
    expect(sorted(ids) == [f"stream-{i}" for i in range(3)], f"the ids of the answers are {ids}")
    for response in responses:
        expected.expect_same(read(response.infer_response), "an answer of the stream")


@check(
    "grpc.stream-error",
    "MAY",
    "a wrong request in a stream is answered with error_message, and the stream goes on",
    TRITON,
)
def stream_error(server: Server) -> None:
    _ = server.steady
    wrong, right = base(server), base(server)
    wrong.inputs[0].datatype = "FLOAT32"
    responses = _stream(server, [wrong, right])
    errors = [response for response in responses if response.error_message]
    expect(len(errors) == 1, f"{len(errors)} answers have an error_message, expected one of {len(responses)}")
    answered = [response for response in responses if not response.error_message]
    expect(len(answered) == 1, f"{len(answered)} requests are answered, expected the one that is right")


def _stream(server: Server, requests: list[Any]) -> list[Any]:
    import grpc  # type: ignore[import-untyped,import-not-found,unused-ignore]

    path = f"{SERVICE}ModelStreamInfer"
    with channel(server) as opened:
        method = opened.stream_stream(
            path,
            request_serializer=message("ModelInferRequest").SerializeToString,
            response_deserializer=message("ModelStreamInferResponse").FromString,
        )
        try:
            responses = list(method(iter(requests), timeout=server.target.timeout_s))
        except grpc.RpcError as exc:
            refused = Refused(exc.code().name, exc.details() or "")
            _log(server, path, "\n".join(map(str, requests)), refused)
            if refused.code == "UNIMPLEMENTED":
                raise Skipped("ModelStreamInfer is not offered") from exc
            raise Failed(f"the stream ended: {refused}") from exc
    _log(server, path, "\n".join(map(str, requests)), "\n".join(map(str, responses)))
    return responses


@check("grpc.health", "MAY", "grpc.health.v1, where it is offered, says SERVING", HEALTH)
def health(server: Server) -> None:
    got = _health(server, "")
    expect(got == 1, f"the status of the server is {got}, expected 1 (SERVING)")


@check(
    "grpc.health-unknown",
    "MAY",
    "grpc.health.v1, where it is offered, does not know a service that is not there",
    HEALTH,
)
def health_unknown(server: Server) -> None:
    _health(server, "")
    try:
        got = _health(server, "no.such.Service")
    except Failed as exc:
        expect("NOT_FOUND" in str(exc), str(exc))
    else:
        raise Failed(f"the status is OK, of the service {got}")


def _health(server: Server, service: str) -> int:
    _connected(server)
    asked = message("HealthCheckRequest")(service=service)
    try:
        return int(call(server, "/grpc.health.v1.Health/Check", asked, "HealthCheckResponse").status)
    except Refused as exc:
        if exc.code == "UNIMPLEMENTED":
            raise Skipped("grpc.health.v1 is not offered") from exc
        raise Failed(str(exc)) from exc


@check("grpc.statistics", "MUST", "ModelStatistics counts a request", TRITON, "statistics")
def statistics(server: Server) -> None:
    request = base(server)
    before = _inferences(server)
    infer(server, request)
    until_s = time.monotonic() + COUNTED_WITHIN_S
    while (after := _inferences(server)) == before and time.monotonic() < until_s:
        time.sleep(0.03)
    expect(after > before, f"inference_count is {before} before a request and behind it")


def _inferences(server: Server) -> int:
    stats = ask(server, "ModelStatistics", name=server.name).model_stats
    expect(len(stats) > 0, "model_stats is empty")
    expect(all(each.name == server.name for each in stats), f"the statistics are of {listed(s.name for s in stats)}")
    return sum(each.inference_count for each in stats)


@check("grpc.repository-index", "MUST", "RepositoryIndex lists the model as READY", TRITON, "model_repository")
def repository_index(server: Server) -> None:
    models = ask(server, "RepositoryIndex").models
    found = [model.state for model in models if model.name == server.name]
    expect("READY" in found, f"the states of {server.name} are {found}")


@check("grpc.trace", "MUST", "TraceSetting gives the settings", TRITON, "trace")
def trace(server: Server) -> None:
    expect(len(ask(server, "TraceSetting").settings) > 0, "there are no settings")


@check("grpc.logging", "MUST", "LogSettings gives the settings", TRITON, "logging")
def logging(server: Server) -> None:
    expect(len(ask(server, "LogSettings").settings) > 0, "there are no settings")
