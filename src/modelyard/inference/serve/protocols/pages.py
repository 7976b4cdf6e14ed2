"""The page that tries a model, and the JSON it is made from: what is served, and the columns of one version.

    GET /, GET /docs → static/page.html → its scripts ask /docs/models, then the models themselves by :predict, like any client

One page without a build step or anything from elsewhere. What models call themselves comes from strangers: the scripts insert
it as text only, and the policy sent along would stop the rest.
"""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import UnknownPath
from modelyard.inference.serve.models.repository import Loaded, Repository
from modelyard.inference.serve.protocols.json_schema import Json
from modelyard.inference.serve.protocols.openapi import versions_of
from modelyard.inference.serve.transport.messages import Headers, Request, Response, json_response
from modelyard.inference.serve.transport.routes import Route

PAGE = "page.html"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_HEADERS: Headers = (
    (b"Content-Security-Policy", b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"X-Content-Type-Options", b"nosniff"),
    (b"Referrer-Policy", b"no-referrer"),
    (b"Cache-Control", b"no-cache"),
)


def routes(repository: Repository) -> Iterable[Route]:
    """Return the page's routes; reads its files."""
    static = _static_files()

    def page(request: Request) -> Response:
        return static[PAGE]

    def file(request: Request, file: str) -> Response:
        found = static.get(file)
        if found is None:
            raise UnknownPath(f"there is no file {file[:100]!r} here; the page is at /docs")
        return found

    def models(request: Request) -> Response:
        return json_response({"models": [_listed(repository, name) for name in repository.names()]})

    async def version(request: Request, model: str, version: str) -> Response:
        loaded = await repository.ready_one(model, version)
        return json_response(_shown(loaded, is_default=loaded.version == repository.entry(model).version))

    return [
        Route("GET", "/", page),
        Route("GET", "/docs", page),
        Route("GET", "/docs/static/{file}", file),
        Route("GET", "/docs/models", models),
        Route("GET", "/docs/models/{model}/versions/{version}", version),
    ]


def _static_files() -> dict[str, Response]:
    found = {}
    for item in (files("modelyard.inference.serve.protocols") / "static").iterdir():
        content_type = _TYPES.get(Path(item.name).suffix)
        if content_type is not None:
            found[item.name] = Response(200, item.read_bytes(), content_type, _HEADERS)
    return found


def _listed(repository: Repository, name: str) -> Json:
    versions = [
        {
            "version": entry.version,
            "state": "ready" if entry.answers else entry.state,
            "reason": entry.reason,
            "default": i == 0,
        }
        for i, entry in enumerate(versions_of(repository, name))
    ]
    return {"name": name, "versions": versions}


def _shown(loaded: Loaded, *, is_default: bool) -> Json:
    return {
        "name": loaded.name,
        "version": loaded.version,
        "default": is_default,
        "target_ms": round(loaded.target_s * 1e3, 3),
        "inputs": [_column(spec) for spec in loaded.signature.inputs],
        "outputs": [_column(spec) for spec in loaded.signature.outputs],
        "example": loaded.example,
    }


def _column(spec: TensorSpec) -> Json:
    """Return what a form shows of a column; `sizes` are those of one row, null where one may vary."""
    column = {
        "name": spec.name,
        "datatype": spec.datatype,
        "sizes": [axis if isinstance(axis, int) else None for axis in spec.row_shape],
        "nullable": spec.nullable,
        "categories": spec.categories,
        "labels": spec.labels,
        "unit": spec.unit,
        "description": spec.description,
    }
    return {name: value for name, value in column.items() if value is not None}
