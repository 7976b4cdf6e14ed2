"""Method and path → the function that answers them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from modelyard.errors import MethodNotAllowed, UnknownPath
from modelyard.inference.serve.transport.messages import Answer, Head

_MAX_KNOWN, _MAX_KNOWN_LENGTH = 4096, 256


@dataclass(frozen=True)
class Route:
    """`template` is a path with {placeholders}, each of which matches one or more characters but "/" and ":"."""

    method: str
    template: str
    answer: Callable[..., Answer]
    """Called with the request and the placeholders by name."""
    ignore_case: bool = False
    """Of the path around the placeholders."""


Found = tuple[Callable[..., Answer], dict[str, str]]
"""What answers, and the placeholders' values."""


class Router:
    """Finds the route of a request; HEAD is answered as GET. Paths that were found once are looked up from then on."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(_compile(route), route) for route in routes]
        self._known: dict[tuple[str, str], Found] = {}

    def find(self, head: Head) -> Found:
        """Return what answers; raises UnknownPath or MethodNotAllowed."""
        found: Found | None = head.route
        if found is None:
            key = (head.method, head.path)
            found = self._known.get(key)
            if found is None:
                found = self._search(*key)
                if (
                    len(head.path) <= _MAX_KNOWN_LENGTH
                ):  # a placeholder takes any text, and strangers may send long ones
                    if len(self._known) >= _MAX_KNOWN:
                        self._known.clear()
                    self._known[key] = found
            head.route = found
        return found

    def _search(self, method: str, path: str) -> Found:
        wanted = "GET" if method == "HEAD" else method
        allowed: list[Any] = []
        for pattern, route in self._routes:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            if route.method == wanted:
                return route.answer, {name: unquote(text) for name, text in match.groupdict().items()}
            allowed.append("GET, HEAD" if route.method == "GET" else route.method)
        if allowed:
            methods = ", ".join(sorted(set(allowed)))
            raise MethodNotAllowed(f"{path[:200]} does not take {method}; use {methods}", allow=methods)
        raise UnknownPath(
            f"there is nothing at {path[:200]!r}; see /v1/models for the models, POST rows to /v1/models/NAME:predict or "
            "tensors to /v2/models/NAME/infer"
        )


def _compile(route: Route) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", route.template)
    pattern = "".join(f"(?P<{part}>[^/:]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(pattern, re.IGNORECASE if route.ignore_case else 0)
