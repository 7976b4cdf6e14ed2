"""What travels between the HTTP edge and the protocols: a request, a response, and who answers the one with the other."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import orjson

from modelyard.errors import ModelyardError, RequestError

JSON = b"application/json"
Headers = tuple[tuple[bytes, bytes], ...]


class Request(msgspec.Struct, frozen=True):
    """A whole HTTP request. Header names are in lower case; of a repeated header the last one counts."""

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    request_id: str


class Response(msgspec.Struct, frozen=True):
    """A whole HTTP answer; the edge adds length, date, request id and what the connection needs."""

    status: int
    body: bytes = b""
    content_type: bytes = JSON
    headers: Headers = ()


Answer = Response | Awaitable[Response]
"""A response at once, for what is short, or one that is still being worked on."""
Handler = Callable[[Request], Answer]
"""Answers a request. Called on the event loop, never raises, returns without blocking."""


def json_response(value: Any, status: int = 200) -> Response:
    """Return `value` as JSON; NaN and infinities, which JSON has not, become null."""
    return Response(status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def error_response(error: ModelyardError) -> Response:
    """Return the {"error": text} that the Open Inference Protocol and TensorFlow Serving both use."""
    headers: list[tuple[bytes, bytes]] = []
    if "allow" in error.facts:
        headers.append((b"Allow", error.allow.encode()))
    if error.status == 503 and error.facts.get("retry", True):
        headers.append((b"Retry-After", b"1"))
    body = orjson.dumps({"error": str(error).encode("utf-8", "backslashreplace").decode()})
    return Response(error.status, body, headers=tuple(headers))


def json_body(request: Request, length: int | None = None) -> Any:
    """Return the JSON in the first `length` bytes of the body, all of them by default; raises RequestError."""
    encoding = request.headers.get(b"content-encoding", b"identity").lower()
    if encoding != b"identity":
        raise RequestError(f"Content-Encoding {encoding.decode('latin-1')!r} is not taken; send the body as it is")
    try:
        return orjson.loads(request.body if length is None else memoryview(request.body)[:length])
    except orjson.JSONDecodeError as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from exc
