"""The services that any gRPC server is expected to have, whatever else it does: health checking and reflection.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.message import DecodeError

from modelyard.inference.serve.protocols.protos import file_descriptors, message, pool
from modelyard.inference.serve.transport.grpc import Status, Streaming, StreamingCall, Unary, UnaryCall

HEALTH = "grpc.health.v1.Health"
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

IsReady = Callable[[str], bool | None]
"""Whether the service of that name can answer, "" being the server as a whole; None where there is no such service."""


def health(is_ready: IsReady) -> Mapping[str, Unary | Streaming]:
    """Return the methods of health checking."""
    request, response = message("grpc.health.v1.HealthCheckRequest"), message("grpc.health.v1.HealthCheckResponse")
    answers = {
        ready: response(status=name).SerializeToString()
        for ready, name in ((True, "SERVING"), (False, "NOT_SERVING"), (None, "SERVICE_UNKNOWN"))
    }

    def check(call: UnaryCall) -> None:
        try:
            service = request.FromString(call.message).service
        except DecodeError as exc:
            call.fail(Status.INVALID_ARGUMENT, f"not a HealthCheckRequest: {exc}")
            return
        ready = is_ready(service)
        if ready is None:
            call.fail(
                Status.NOT_FOUND, f"unknown service {service[:200]!r}; leave it empty to ask for the whole server"
            )
        else:
            call.reply(answers[ready])

    def watch(call: StreamingCall) -> None:
        told: list[bool | None] = []

        def tell(service: str) -> None:
            ready = is_ready(service)
            if told != [ready]:
                told[:] = [ready]
                call.send(answers[ready])

        def begin(data: bytes) -> None:
            try:
                service = request.FromString(data).service
            except DecodeError as exc:
                call.fail(Status.INVALID_ARGUMENT, f"not a HealthCheckRequest: {exc}")
                return
            tell(service)
            call.on_tick = lambda: tell(service)

        call.on_message = begin
        call.on_drain = lambda: call.fail(Status.UNAVAILABLE, "the server is draining")

    return {f"/{HEALTH}/Check": Unary(check), f"/{HEALTH}/Watch": Streaming(watch)}


def reflection(services: Iterable[str]) -> Mapping[str, Streaming]:
    """Return the methods of reflection, in both versions, over the compiled .proto files; `services` are those on offer."""
    offered = sorted({*services, *REFLECTION})
    methods = {}
    for service in REFLECTION:
        methods[f"/{service}/ServerReflectionInfo"] = Streaming(_Reflection(service.rpartition(".")[0], offered).start)
    return methods


class _Reflection:
    """One version of the reflection service."""

    def __init__(self, package: str, services: Iterable[str]) -> None:
        self._request = message(f"{package}.ServerReflectionRequest")
        self._response = message(f"{package}.ServerReflectionResponse")
        self._services = tuple(services)
        self._files = {file.name: file for file in file_descriptors().file}

    def start(self, call: StreamingCall) -> None:
        def answer(data: bytes) -> None:
            try:
                request = self._request.FromString(data)
            except DecodeError as exc:
                call.fail(Status.INVALID_ARGUMENT, f"not a ServerReflectionRequest: {exc}")
                return
            call.send(self._answer(request).SerializeToString())

        call.on_message = answer
        call.on_half_close = call.end
        call.on_drain = lambda: call.fail(Status.UNAVAILABLE, "the server is draining")

    def _answer(self, request: Any) -> Any:
        response = self._response(valid_host=request.host, original_request=request)
        asked = request.WhichOneof("message_request")
        if asked == "list_services":
            for name in self._services:
                response.list_services_response.service.add(name=name)
            return response
        try:
            if asked == "file_by_filename":
                name = request.file_by_filename
            elif asked == "file_containing_symbol":
                name = pool().FindFileContainingSymbol(request.file_containing_symbol).name
            elif asked == "all_extension_numbers_of_type":
                pool().FindMessageTypeByName(request.all_extension_numbers_of_type)  # exists, and nothing extends it
                response.all_extension_numbers_response.base_type_name = request.all_extension_numbers_of_type
                return response
            else:
                raise KeyError(asked)
            response.file_descriptor_response.file_descriptor_proto.extend(self._with_imports(name))
        except KeyError:
            response.error_response.error_code = Status.NOT_FOUND
            response.error_response.error_message = f"nothing of that name here: {request!s:.200}"
        return response

    def _with_imports(self, name: str) -> list[bytes]:
        """Return a file and all that it imports; raises KeyError."""
        wanted, found = [name], {}
        while wanted:
            name = wanted.pop()
            if name not in found:
                found[name] = self._files[name].SerializeToString()
                wanted += self._files[name].dependency
        return list(found.values())
