"""The Open Inference Protocol, version 2, over gRPC, with Triton's extensions that mean something here.

    grpc.UnaryCall → infer_message.py (bytes → what is asked) → front.py → … → infer_message.py (→ bytes) → UnaryCall.reply

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

import asyncio
import sys
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import msgspec
import orjson
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from modelyard import __version__
from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import ModelyardError, RequestError, UnknownModel
from modelyard.inference.serve.calls import Call, Terms, read_terms
from modelyard.inference.serve.explain import timeline
from modelyard.inference.serve.front import Front, is_explained
from modelyard.inference.serve.models.repository import Json, Loaded, Repository
from modelyard.inference.serve.protocols import open_inference
from modelyard.inference.serve.protocols.extensions_grpc import Answer, Extensions
from modelyard.inference.serve.protocols.grpc_standard import HEALTH, health, reflection
from modelyard.inference.serve.protocols.infer_message import Codec, Outlines, field
from modelyard.inference.serve.protocols.open_inference import timeout_of
from modelyard.inference.serve.protocols.protos import message, pool
from modelyard.inference.serve.protocols.tensors import wire_shape
from modelyard.inference.serve.transport.grpc import (
    Answered,
    Metadata,
    Status,
    Streaming,
    StreamingCall,
    Unary,
    UnaryCall,
    status_of,
)
from modelyard.inference.serve.transport.messages import Head

SERVICE = "inference.GRPCInferenceService"

_INFER_RESPONSE = 0x12
"""The tag of ModelStreamInferResponse.infer_response."""
_MAX_UNANSWERED = 64
"""Requests of one stream above which no more is read from it."""


class Infer:
    """ModelInfer, and each request of ModelStreamInfer."""

    protocol = "grpc"

    def own_timeout_s(self, asker: "UnaryCall | StreamItem") -> float | None:
        parameters = asker.form[0].request.parameters
        try:
            return timeout_of({"timeout": parameters["timeout"].int64_param}) if "timeout" in parameters else None
        except RequestError:  # `read` says what is wrong
            return None

    def read(self, asker: "UnaryCall | StreamItem", loaded: Loaded) -> Call:
        outline, request_id, at = asker.form
        return loaded.codec(Codec).call(outline, asker.message, request_id, at)

    def done(self, asker: "UnaryCall | StreamItem", call: Call) -> None:
        asker.served = call
        loaded = call.loaded
        assert loaded is not None
        asker.reply(loaded.codec(Codec).answer(call))
        asker.served = None  # the call knows its asker too, and only a collection would free the two

    def fail(self, asker: "UnaryCall | StreamItem", error: Exception, call: Call | None) -> None:
        metadata: Metadata = ()
        if call is not None:
            if call.loaded is not None:
                asker.served = call
            if call.explain:
                metadata = ((b"modelyard-timeline", orjson.dumps(timeline(call))),)
        fail(asker, error, metadata)
        asker.served = None


class Asked(Protocol):
    """What a failure is told to: a call, or one request of a stream."""

    @property
    def request_id(self) -> bytes: ...

    def fail(self, status: Status, message: str, metadata: Metadata = ()) -> None: ...


def fail(asker: Asked, error: Exception, metadata: Metadata = ()) -> None:
    """Answer with what an error says; a bug keeps its details to the log."""
    if not isinstance(error, ModelyardError) or not is_explained(error):
        request_id = asker.request_id.decode("latin-1")
        asker.fail(Status.INTERNAL, f"internal error; see the server's log for request {request_id}", metadata)
        return
    if error.status in (503, 504):
        if error.facts.get("retry", True):
            wait_s = error.facts.get("retry_after_s", 1.0)
            metadata += (
                (b"retry-after", b"%d" % max(1, -int(-wait_s // 1))),
                (b"grpc-retry-pushback-ms", b"%d" % max(1, round(wait_s * 1e3))),
            )
        else:
            metadata += ((b"grpc-retry-pushback-ms", b"-1"),)  # do not
    asker.fail(status_of(error), str(error), metadata)


class StreamItem:
    """One request of a ModelStreamInfer: asks as a call of its own, and is answered in its turn."""

    __slots__ = ("_stream", "answer", "arrived_s", "form", "message", "on_gone", "served")

    def __init__(self, stream: "InferStream", data: bytes, arrived_s: float) -> None:
        self._stream = stream
        self.message = data
        self.arrived_s = arrived_s
        self.form: Any = None
        self.on_gone: Callable[[], object] | None = None
        self.served: Any = None
        self.answer: bytes | None = None

    @property
    def request_id(self) -> bytes:
        return self._stream.call.request_id

    @property
    def head(self) -> Head:
        return self._stream.call.head

    def reply(self, data: bytes) -> None:
        self._log(Status.OK, "", len(data))
        self._settle(field(_INFER_RESPONSE, data + self._stream.last))

    def fail(self, status: Status, message: str, metadata: Metadata = ()) -> None:
        self._log(status, message, 0)
        if self._stream.real_errors:
            self._stream.break_off(status, message, metadata)
        else:
            self._settle(self._stream.error(message, self.form, metadata))

    def _log(self, status: Status, message: str, n_bytes: int) -> None:
        on_answered = self._stream.call.plan.rpc.on_answered
        if on_answered is not None:
            on_answered(Answered(self, status, message, len(self.message), n_bytes))

    def _settle(self, answer: bytes) -> None:
        self.on_gone = None
        self.answer = answer
        self._stream.flush()


class InferStream:
    """One ModelStreamInfer. An error is told in its request's place and the stream goes on, unless the client wants real ones."""

    def __init__(self, call: StreamingCall, service: "InferenceService", terms: Terms) -> None:
        self.call = call
        self._service = service
        self._terms = terms
        self._items: deque[StreamItem] = deque()
        self._response = message("inference.ModelStreamInferResponse")
        final = message("inference.ModelInferResponse")(parameters={"triton_final_response": {"bool_param": True}})
        self.last: bytes = final.SerializeToString()
        """Says that a request has no further answers; clients of models that give several look for it."""
        self._ended = False
        self._draining = False
        self.real_errors = call.metadata.get(b"triton_grpc_error", b"").lower() == b"true"
        call.on_message = self._on_message
        call.on_half_close = self._on_half_close
        call.on_drain = self._on_drain
        call.on_gone = self._cancel

    def error(self, text: str, form: Any, metadata: Metadata) -> bytes:
        """Return the response that tells an error; what a call would have in its trailers, it has as parameters."""
        response = self._response(error_message=text)
        for name, value in metadata:
            response.infer_response.parameters[name.decode()].string_param = value.decode()
        if form is not None:
            response.infer_response.id = form[1].decode("utf-8", "replace")
        encoded: bytes = response.SerializeToString()
        return encoded

    def flush(self) -> None:
        """Send the answers that are there, up to the first that is not."""
        items, call = self._items, self.call
        while items and items[0].answer is not None:
            call.send(items.popleft().answer or b"")
        if call.paused and len(items) <= _MAX_UNANSWERED // 2:
            call.resume()
        self._end_if_done()

    def break_off(self, status: Status, text: str, metadata: Metadata) -> None:
        self._cancel()
        self.call.fail(status, text, metadata)

    def _on_message(self, data: bytes) -> None:
        item = StreamItem(self, data, self.call.connection.arrived_s)
        self._items.append(item)
        if len(self._items) >= _MAX_UNANSWERED:
            self.call.paused = True
        self._service.ask(item, self._terms_now())

    def _terms_now(self) -> Terms:
        """Return the stream's terms; what is left of its own time is all that a request of it has."""
        call, terms = self.call, self._terms
        if call.deadline_s is None:
            return terms
        left_s = max(1e-6, call.deadline_s - call.connection.arrived_s)
        return msgspec.structs.replace(terms, timeout_s=min(left_s, terms.timeout_s or left_s))

    def _on_half_close(self) -> None:
        self._ended = True
        self._end_if_done()

    def _on_drain(self) -> None:
        self._draining = True
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._items:
            return
        if self._ended:
            self.call.end()
        elif self._draining:
            self.call.fail(Status.UNAVAILABLE, "the server is draining; go on with a new stream")

    def _cancel(self) -> None:
        """Nobody waits for the answers any more."""
        items = tuple(self._items)
        self._items.clear()
        for item in items:
            if item.on_gone is not None:
                item.on_gone()


class InferenceService:
    """The methods of inference.GRPCInferenceService over the models of a repository."""

    def __init__(self, front: Front, repository: Repository, extensions: Extensions | None = None) -> None:
        self._front = front
        self._repository = repository
        self._extensions = extensions
        self._adapter = Infer()
        self._outlines = Outlines()
        self._tasks: set[asyncio.Task[None]] = set()

    def methods(self) -> Mapping[str, Unary | Streaming]:
        """Return them by path, with health checking and reflection."""
        offered: dict[str, Unary | Streaming] = {
            "ModelInfer": Unary(self.infer),
            "ModelStreamInfer": Streaming(self._start_stream),
            "ServerLive": self._plain("ServerLive", lambda _: {"live": True}),
            "ServerReady": self._plain("ServerReady", lambda _: {"ready": self._repository.ready}),
            "ServerMetadata": self._plain("ServerMetadata", self._server_metadata),
            "ModelReady": self._plain("ModelReady", self._model_ready),
            "ModelMetadata": self._plain("ModelMetadata", self._model_metadata),
        }
        if self._extensions is not None:
            offered |= {name: self._plain(name, answer) for name, answer in self._extensions.methods().items()}
        paths = {f"/{SERVICE}/{name}": method for name, method in offered.items()}
        return {**paths, **health(self._is_ready), **reflection((SERVICE, HEALTH))}

    def infer(self, call: UnaryCall) -> None:
        head = call.head
        terms: Terms | None = head.terms
        if terms is None:
            try:
                terms = read_terms(head.headers)
            except RequestError as exc:
                fail(call, exc)
                return
            if call.plan.timeout_s is not None:
                own_s = call.plan.timeout_s
                terms = msgspec.structs.replace(terms, timeout_s=min(own_s, terms.timeout_s or own_s))
            head.terms = terms
        self.ask(call, terms)

    def ask(self, asker: UnaryCall | StreamItem, terms: Terms) -> None:
        """Have a ModelInferRequest answered."""
        try:
            form = self._outlines.read(asker.message)
        except RequestError as exc:
            fail(asker, exc)
            return
        asker.form = form
        outline = form[0]
        self._front.ask(asker, terms, self._adapter, outline.name, outline.version)

    def _start_stream(self, call: StreamingCall) -> None:
        try:
            InferStream(call, self, read_terms(call.metadata))
        except RequestError as exc:
            fail(call, exc)

    def _is_ready(self, service: str) -> bool | None:
        return self._repository.ready if service in ("", SERVICE) else None

    def _server_metadata(self, request: Any) -> Json:
        others = () if self._extensions is None else self._extensions.names
        return {
            "name": "modelyard",
            "version": __version__,
            "extensions": (*open_inference.EXTENSIONS, *others),
        }

    def _model_ready(self, request: Any) -> Json:
        try:
            entry = self._repository.entry(request.name, request.version or None)
        except UnknownModel:
            return {"ready": False}
        return {"ready": entry.answers}

    def _model_metadata(self, request: Any) -> Json:
        repository = self._repository
        signature = repository.signature(repository.entry(request.name, request.version or None))
        return {
            "name": request.name,
            "versions": [str(entry.version) for entry in repository.entries(request.name)],
            "platform": "onnxruntime_onnx",
            "inputs": [_described(spec) for spec in signature.inputs],
            "outputs": [_described(spec) for spec in signature.outputs],
        }

    def _plain(self, name: str, answer: Answer) -> Unary:
        """Return a method from a function of its request that returns its response as plain values, or a coroutine that does."""
        request_class, response_class = message(f"inference.{name}Request"), message(f"inference.{name}Response")

        def reply(call: UnaryCall, values: Json) -> None:
            call.reply(ParseDict(values, response_class(), descriptor_pool=pool()).SerializeToString())

        async def later(call: UnaryCall, work: Coroutine[Any, Any, Json]) -> None:
            try:
                reply(call, await work)
            except Exception as exc:  # noqa: BLE001  # as below
                _fail_loudly(call, exc, name)

        def method(call: UnaryCall) -> None:
            try:
                values = answer(request_class.FromString(call.message))
                if isinstance(values, dict):
                    reply(call, values)
                    return
                task = asyncio.get_running_loop().create_task(later(call, values))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                call.on_gone = task.cancel
            except DecodeError as exc:
                call.fail(Status.INVALID_ARGUMENT, f"the message is not a {name}Request: {exc}")
            except Exception as exc:  # noqa: BLE001  # the last place where a bug can become an answer
                _fail_loudly(call, exc, name)

        return Unary(method)


def _described(spec: TensorSpec) -> Json:
    return {"name": spec.name, "datatype": spec.datatype, "shape": wire_shape(spec)}


def _fail_loudly(call: UnaryCall, error: Exception, name: str) -> None:
    if not is_explained(error):
        text = "".join(traceback.format_exception(error))
        sys.stderr.write(f"bug: {name} (request {call.request_id.decode('latin-1')}) failed:\n{text}")
    fail(call, error)
