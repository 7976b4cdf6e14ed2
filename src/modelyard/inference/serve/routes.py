"""Method and path → the function that answers them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from modelyard.errors import MethodNotAllowed, UnknownPath
from modelyard.inference.serve.messages import Answer, Request


@dataclass(frozen=True)
class Route:
    """`template` is a path with {placeholders}, each of which matches one or more characters but "/" and ":"."""

    method: str
    template: str
    answer: Callable[..., Answer]
    """Called with the request and the placeholders by name."""


class Router:
    """Finds the route of a request; HEAD is answered as GET."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(_compile(route.template), route) for route in routes]

    def answer(self, request: Request) -> Answer:
        """Return what the route answers; raises UnknownPath, MethodNotAllowed, and whatever the route raises."""
        method = "GET" if request.method == "HEAD" else request.method
        allowed = []
        for pattern, route in self._routes:
            found = pattern.fullmatch(request.path)
            if found is None:
                continue
            if route.method == method:
                return route.answer(request, **{name: unquote(text) for name, text in found.groupdict().items()})
            allowed.append("GET, HEAD" if route.method == "GET" else route.method)
        if allowed:
            methods = ", ".join(sorted(set(allowed)))
            raise MethodNotAllowed(f"{request.path} does not take {request.method}; use {methods}", allow=methods)
        raise UnknownPath(
            f"there is nothing at {request.path[:200]!r}; see /v1/models for the models, POST rows to /v1/models/NAME:predict or "
            "tensors to /v2/models/NAME/infer"
        )


def _compile(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{part}>[^/:]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))
