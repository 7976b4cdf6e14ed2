"""Models loaded, unloaded and shared out by call: Triton's repository extension over REST, and our traffic.

    POST /v2/repository/index                    every version and its state
    POST /v2/repository/models/NAME/load         load what the model's policy wants: new versions, and failed ones again
    POST /v2/repository/models/NAME/unload       serve it no more, until it is loaded again
    GET, POST /v2/repository/models/NAME/traffic how its requests are shared between versions, see traffic.py

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md

A call that changes something is a command: `broadcast` has every worker do it (`Repository.apply`), and the answers are
merged. What the extension says of files in the request has no meaning here: models come from the store, verified.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from modelyard.errors import RequestError
from modelyard.inference.serve.models.commands import Broadcast, Json
from modelyard.inference.serve.models.repository import Repository
from modelyard.inference.serve.transport.messages import Request, Response, json_body, json_response
from modelyard.inference.serve.transport.routes import Route

EXTENSION = "model_repository"

RETRY_AFTER = ((b"Retry-After", b"1"),)


@dataclass(frozen=True)
class Failure:
    """What went wrong when workers were to do a command."""

    message: str
    status: int


def routes(repository: Repository, broadcast: Broadcast) -> Iterable[Route]:
    """Return the routes; `broadcast` has every worker apply a command and returns (worker, answer) of each."""

    def index(request: Request) -> Response:
        return json_response(repository.index(only_ready=wants_ready_only(json_object(request.body))))

    async def load(request: Request, model: str) -> Response:
        return await done(load_command(model, json_object(request.body)))

    async def unload(request: Request, model: str) -> Response:
        return await done(unload_command(model, json_object(request.body)))

    async def set_traffic(request: Request, model: str) -> Response:
        return await answered({"command": "traffic", "model": model, "traffic": json_object(request.body)}, traffic_of)

    async def get_traffic(request: Request, model: str) -> Response:
        return await answered({"command": "traffic counts", "model": model}, traffic_of)

    async def done(command: Json) -> Response:
        return await answered(command, lambda answers: {})

    async def answered(command: Json, merged: Callable[[Sequence[Json]], Any]) -> Response:
        answers = await broadcast(command)
        failure = failure_of(answers)
        if failure is not None:
            headers = RETRY_AFTER if failure.status == 503 else ()
            return json_response({"error": failure.message}, failure.status, headers)
        return json_response(merged([answer for _, answer in answers]))

    return [
        Route("POST", "/v2/repository/index", index),
        Route("POST", "/v2/repository/models/{model}/load", load),
        Route("POST", "/v2/repository/models/{model}/unload", unload),
        Route("GET", "/v2/repository/models/{model}/traffic", get_traffic),
        Route("POST", "/v2/repository/models/{model}/traffic", set_traffic),
    ]


def wants_ready_only(body: Json) -> bool:
    """Return the index's filter `ready`; raises RequestError."""
    ready = body.get("ready", False)
    if not isinstance(ready, bool):
        raise RequestError(f"ready must be true or false, got {ready!r:.60}")
    return ready


def load_command(model: str, body: Json) -> Json:
    """Return the command for a load with the extension's parameters, of which `config` may hold a version_policy.

    Raises:
        RequestError: a parameter that cannot be followed here; it says what to do instead.
    """
    command: Json = {"command": "load", "model": model}
    parameters = _parameters(body)
    for name in parameters:
        if name.startswith("file:"):
            raise RequestError(
                f"parameter {name[:60]!r}: models are not taken from requests; publish the bundle to the store and load it from there"
            )
        if name != "config":
            raise RequestError(f"unknown parameter {name[:60]!r}; load takes config")
    if "config" in parameters:
        command["policy"] = _policy(parameters["config"])
    return command


def unload_command(model: str, body: Json) -> Json:
    """Return the command for an unload; `unload_dependents` is taken and means nothing, since no model here has dependents."""
    for name, value in _parameters(body).items():
        if name != "unload_dependents" or not isinstance(value, bool):
            raise RequestError(
                f"unknown parameter {name[:60]!r}; unload takes unload_dependents, which is true or false"
            )
    return {"command": "unload", "model": model}


def failure_of(answers: Iterable[tuple[int, Json]]) -> Failure | None:
    """Return what went wrong in the worst way, named with its worker where only some failed; None where nothing did."""
    answers = list(answers)
    failed = [(worker, answer) for worker, answer in answers if "error" in answer]
    if not failed:
        return None
    worker, answer = max(failed, key=lambda one: _status(one[1]))
    where = "" if len(failed) == len(answers) else f"worker {worker}: "
    return Failure(f"{where}{answer['error']}", _status(answer))


def traffic_of(answers: Sequence[Json]) -> Json:
    """Return the traffic with the counts of all workers added up."""
    merged: Json = {"traffic": answers[0]["traffic"], "split": _added([answer["split"] for answer in answers])}
    shadows = [answer["shadow"] for answer in answers if "shadow" in answer]
    if shadows:
        counted = [{key: value for key, value in one.items() if key in _SHADOW_COUNTS} for one in shadows]
        merged["shadow"] = {
            "version": shadows[0]["version"],
            **_added(counted),
            "max_abs_difference": max(one["max_abs_difference"] for one in shadows),
            "error": next((one["error"] for one in shadows if one["error"]), ""),
        }
    return merged


_SHADOW_COUNTS = ("agreed", "differed", "failed", "skipped", "rows", "rows_agreed")


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return total


def _status(answer: Json) -> int:
    """Return the HTTP status of a failed answer; a worker that is gone or late is our fault and passes."""
    return int(answer.get("status", 503 if "gone" in answer or "late" in answer else 500))


def json_object(body: bytes) -> Json:
    """Return the JSON object in a body that may be empty; raises RequestError."""
    value = json_body(body) if body.strip() else {}
    if not isinstance(value, dict):
        raise RequestError(f"the body must be empty or an object, got {value!r:.60}")
    return value


def _parameters(body: Json) -> Json:
    unknown = [key for key in body if key != "parameters"]
    if unknown:
        raise RequestError(f"unknown key {unknown[0][:60]!r}; the body may have parameters")
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters must be an object, got {parameters!r:.60}")
    return parameters


def _policy(config: Any) -> Any:
    """Return the version policy in a model configuration, which is JSON in a string, as serve.toml would write it."""
    try:
        wanted = orjson.loads(config) if isinstance(config, str) else None
    except orjson.JSONDecodeError:
        wanted = None
    if not isinstance(wanted, dict):
        raise RequestError(f"parameter config must be a string that holds a JSON object, got {config!r:.60}")
    others = [key for key in wanted if key not in ("name", "version_policy")]
    if others:
        raise RequestError(
            f"parameter config: {others[0][:60]!r} cannot be changed by a call; of a configuration version_policy is followed, how a "
            "model runs is set in serve.toml"
        )
    match wanted.get("version_policy"):
        case {"latest": dict(latest)} if _is_version(latest.get("num_versions", 1)):
            return {"latest": int(latest.get("num_versions", 1))}
        case {"all": dict()}:
            return "all"
        case {"specific": {"versions": [*versions]}} if versions and all(map(_is_version, versions)):
            return [int(version) for version in versions]
        case None:
            return None
        case other:
            raise RequestError(
                'parameter config: version_policy must be {"latest": {"num_versions": N}}, {"all": {}} or '
                f'{{"specific": {{"versions": [1, 3]}}}}, got {other!r:.80}'
            )


def _is_version(value: Any) -> bool:
    """Whether it is a version, or a number of them: positive, or its digits, as JSON made of a protobuf has it."""
    return (type(value) is int or (isinstance(value, str) and value.isdigit())) and int(value) >= 1
