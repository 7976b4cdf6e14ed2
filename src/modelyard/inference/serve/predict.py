"""Rows with named columns over REST, on the paths of TensorFlow Serving and KServe v1.

    POST /v1/models/NAME:predict                {"instances": [{"dep_hour": 7, "carrier": "UA"}]}
    POST /v1/models/NAME/versions/V:predict     → {"predictions": [{"label": "late", "probabilities": {"late": 0.8, "on_time": 0.2}}]}

What a row may hold, and what comes back, is said in rows.py. As in TensorFlow Serving, a model with one output answers
with its bare value per row, and a model with one input takes the bare value.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from modelyard.errors import RequestError
from modelyard.inference.rows import predictions, rows_to_arrays
from modelyard.inference.serve.messages import Answer, Request, Response, json_body, json_response
from modelyard.inference.serve.repository import Entry, Loaded, Repository
from modelyard.inference.serve.routes import Route
from modelyard.inference.serve.work import Outputs

# Our states in TensorFlow Serving's words.
_STATES = {"loading": "LOADING", "ready": "AVAILABLE", "failed": "END", "draining": "UNLOADING"}


def instances(body: Any) -> list[Any]:
    """Return the rows in a request's JSON; raises RequestError."""
    if not isinstance(body, dict) or "instances" not in body:
        raise RequestError('the body must be {"instances": [row, ...]}, a row being an object of named columns')
    rows = body["instances"]
    if not isinstance(rows, list):
        raise RequestError(f"instances must be a list of rows, got {rows!r:.60}")
    return rows


def encode_predictions(outputs: Outputs, model: Loaded) -> Response:
    return json_response({"predictions": predictions(outputs, model.signature)})


def routes(repository: Repository) -> Iterable[Route]:
    """Return the routes for rows over the models of `repository`."""

    def predict(request: Request, model: str, version: str | None = None) -> Answer:
        loaded = repository.get(model, version)
        rows = instances(json_body(request))
        answer = loaded.instance.submit(rows_to_arrays(rows, loaded.signature), len(rows))
        if isinstance(answer, Mapping):
            return encode_predictions(answer, loaded)

        async def later() -> Response:
            return encode_predictions(await answer, loaded)

        return later()

    def models(request: Request) -> Response:
        return json_response({"models": repository.names()})

    def status(request: Request, model: str, version: str | None = None) -> Response:
        entries = repository.entries(model) if version is None else (repository.entry(model, version),)
        return json_response(
            {
                "name": model,
                "ready": entries[0].state == "ready",
                "model_version_status": [_version_status(entry) for entry in entries],
            }
        )

    return [
        Route("POST", "/v1/models/{model}:predict", predict),
        Route("POST", "/v1/models/{model}/versions/{version}:predict", predict),
        Route("GET", "/v1/models", models),
        Route("GET", "/v1/models/{model}", status),
        Route("GET", "/v1/models/{model}/versions/{version}", status),
    ]


def _version_status(entry: Entry) -> dict[str, Any]:
    return {
        "version": str(entry.version),
        "state": _STATES[entry.state],
        "status": {"error_code": "FAILED_PRECONDITION" if entry.reason else "OK", "error_message": entry.reason},
    }
