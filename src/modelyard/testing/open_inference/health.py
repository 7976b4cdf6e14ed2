"""Checks of health: live, ready, and one model's readiness.

The Markdown shows JSON bodies, the OpenAPI has none: the status is what a server must get right, the body what it should.
"""

from modelyard.testing.open_inference.check import Failed, Skipped, check, expect, shown
from modelyard.testing.open_inference.server import UNKNOWN, UNKNOWN_VERSION, Server
from modelyard.testing.open_inference.wire import Reply


@check(
    "health.live",
    "MUST",
    "GET /v2/health/live is 200 while the server can answer",
    "inference_rest.md, Server Live; OpenAPI, /v2/health/live",
)
def live(server: Server) -> None:
    server.get("/v2/health/live").expect(200)


@check(
    "health.ready",
    "MUST",
    "GET /v2/health/ready is 200 when the models are ready",
    "inference_rest.md, Server Ready; OpenAPI, /v2/health/ready",
)
def ready(server: Server) -> None:
    server.get("/v2/health/ready").expect(200)


@check(
    "health.live-body",
    "SHOULD",
    'the body of /v2/health/live is {"live": true}',
    "inference_rest.md, Server Live Response JSON Object; the OpenAPI has no body",
)
def live_body(server: Server) -> None:
    _expect_true(_ok(server, "/v2/health/live", "health.live"), "live")


@check(
    "health.ready-body",
    "SHOULD",
    'the body of /v2/health/ready is {"live": true} or {"ready": true}',
    "inference_rest.md, Server Ready Response JSON Object, which says live where ready is meant; the OpenAPI has no body",
)
def ready_body(server: Server) -> None:
    _expect_true(_ok(server, "/v2/health/ready", "health.ready"), "ready", "live")


@check(
    "health.model-ready",
    "MUST",
    "GET /v2/models/NAME/ready is 200 when the model is ready",
    "inference_rest.md, Model Ready; the OpenAPI has it with a version only",
)
def model_ready(server: Server) -> None:
    server.get(f"{server.model_path()}/ready").expect(200)


@check(
    "health.model-ready-body",
    "SHOULD",
    'the body of a model\'s ready is {"name": NAME, "ready": true}',
    "inference_rest.md, Model Ready Response JSON Object; the OpenAPI has no body",
)
def model_ready_body(server: Server) -> None:
    reply = _ok(server, f"{server.model_path()}/ready", "health.model-ready")
    _expect_true(reply, "ready")
    name = reply.json().get("name")
    expect(name == server.name, f"name is {shown(name)}, expected {shown(server.name)}")


@check(
    "health.version-ready",
    "MUST",
    "every version in the model's metadata has its own ready",
    "inference_rest.md, Model Ready; OpenAPI, /v2/models/${MODEL_NAME}/versions/${MODEL_VERSION}/ready",
)
def version_ready(server: Server) -> None:
    if not server.model.versions:
        raise Skipped("the model's metadata lists no versions")
    for version in server.model.versions:
        server.get(f"{server.model_path(server.name, version)}/ready").expect(200)


@check(
    "health.unknown-model",
    "MUST",
    "a model that is not there is not ready",
    "inference_rest.md, Model Ready",
)
def unknown_model(server: Server) -> None:
    _expect_not_ready(server.get(f"{server.model_path(UNKNOWN)}/ready"))


@check(
    "health.unknown-version",
    "MUST",
    "a version that is not there is not ready",
    "inference_rest.md, Model Ready",
)
def unknown_version(server: Server) -> None:
    if not server.model.versions:
        raise Skipped("the model's metadata lists no versions")
    _expect_not_ready(server.get(f"{server.model_path(server.name, UNKNOWN_VERSION)}/ready"))


def _ok(server: Server, path: str, where: str) -> Reply:
    reply = server.get(path)
    if reply.status != 200:
        raise Skipped(f"the status is {reply.status}; see {where}")
    return reply


def _expect_true(reply: Reply, *keys: str) -> None:
    value = reply.json()
    if not isinstance(value, dict) or not any(value.get(key) is True for key in keys):
        raise Failed(f"the body is {shown(value)}, expected {' or '.join(keys)} to be true")


def _expect_not_ready(reply: Reply) -> None:
    expect(reply.status >= 400, f"the status is {reply.status}, expected an error's")
