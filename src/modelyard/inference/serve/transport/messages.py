"""What travels between the HTTP edge and the protocols: a request, its answer, and who answers the one with the other."""

import os
import re
import secrets
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

import msgspec
import orjson

from modelyard.errors import ModelyardError, RequestError

JSON = b"application/json"
Headers = tuple[tuple[bytes, bytes], ...]

_SANE_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")
_ids = count(1)


class Head:
    """The head of a request. Equal heads may share one object, so nothing in it belongs to a single request."""

    __slots__ = ("headers", "keep_alive", "method", "old_http", "path", "query", "route", "terms")

    def __init__(
        self,
        method: str,
        path: str,
        query: str = "",
        headers: dict[bytes, bytes] | None = None,
        *,
        keep_alive: bool = True,
        old_http: bool = False,
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers: dict[bytes, bytes] = {} if headers is None else headers
        """Names in lower case; of a repeated header the last one counts, but the values of repeated codings are joined."""
        self.keep_alive = keep_alive
        self.old_http = old_http
        self.route: Any = None
        """Whatever the router found for it, kept for the next equal head."""
        self.terms: Any = None
        """What calls.py read from the headers, kept likewise."""


class Request:
    """A whole HTTP request and the way to answer it, once, now or later, on the event loop."""

    __slots__ = ("_request_id", "arrived_s", "body", "head", "on_gone", "response", "served")

    def __init__(self, head: Head, body: bytes, arrived_s: float) -> None:
        self.head = head
        self.body = body
        self.arrived_s = arrived_s
        """When it arrived, as far as this process can know; time.perf_counter()."""
        self.on_gone: Callable[[], object] | None = None
        """Called when the client goes away before it is answered; set by whoever works on the answer."""
        self.response: Response | None = None
        self.served: Any = None
        """What the access log should know: a call, or the cause why it never became one; None for other requests."""
        self._request_id: bytes | None = None

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def headers(self) -> dict[bytes, bytes]:
        return self.head.headers

    @property
    def request_id(self) -> bytes:
        """The client's own id where it is printable and short, else a fresh one."""
        if self._request_id is None:
            given = self.head.headers.get(b"x-request-id")
            self._request_id = given if given and _SANE_REQUEST_ID.fullmatch(given) else new_request_id()
        return self._request_id

    def reply(self, response: "Response") -> None:
        """Answer. The edge overrides this to write to the socket; tests read `response`."""
        self.response = response


class Response(msgspec.Struct, frozen=True):
    """A whole HTTP answer; the edge adds length, date, request id and what the connection needs."""

    status: int
    body: bytes = b""
    content_type: bytes = JSON
    headers: Headers = ()


Answer = Response | Coroutine[Any, Any, Response] | None
"""A response at once, a coroutine that is still working on it, or None: `request.reply` will be called."""


Handler = Callable[[Request], None]
"""Answers requests. Called on the event loop; never raises, never blocks, replies exactly once."""


def new_request_id() -> bytes:
    """Return an id no other request of this server has, in any of its processes."""
    return b"%b-%x" % (_prefix[0], next(_ids))


_prefix = [secrets.token_hex(6).encode()]
os.register_at_fork(after_in_child=lambda: _prefix.__setitem__(0, secrets.token_hex(6).encode()))


def json_response(value: Any, status: int = 200, headers: Headers = ()) -> Response:
    """Return `value` as JSON; NaN and infinities, which JSON has not, become null."""
    return Response(status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), headers=headers)


def error_response(error: ModelyardError) -> Response:
    """Return the {"error": text} that the Open Inference Protocol and TensorFlow Serving both use."""
    headers: list[tuple[bytes, bytes]] = []
    if "allow" in error.facts:
        headers.append((b"Allow", error.allow.encode()))
    if error.status in (503, 504) and error.facts.get("retry", True):
        seconds = error.facts.get("retry_after_s", 1.0)
        headers.append((b"Retry-After", b"%d" % max(1, -int(-seconds // 1))))  # whole seconds, rounded up
    body = orjson.dumps({"error": str(error).encode("utf-8", "backslashreplace").decode()})
    return Response(error.status, body, headers=tuple(headers))


def json_body(body: bytes | memoryview) -> Any:
    """Return the JSON value in `body`; raises RequestError."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from exc
