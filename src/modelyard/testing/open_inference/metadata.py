"""Checks of metadata: the server's, a model's, and the versions it names."""

import re

from modelyard.testing.open_inference.check import (
    Skipped,
    check,
    expect,
    expect_list,
    expect_object,
    expect_text,
    listed,
    shown,
)
from modelyard.testing.open_inference.inference import read_answer, read_metadata
from modelyard.testing.open_inference.server import UNKNOWN, UNKNOWN_VERSION, Server
from modelyard.testing.open_inference.tensors import NUMPY_DTYPES
from modelyard.testing.open_inference.wire import Reply


@check(
    "metadata.server",
    "MUST",
    "GET /v2 gives name and version as strings and extensions as an array of strings",
    "inference_rest.md, Server Metadata; OpenAPI, metadata_server_response",
)
def server_metadata(server: Server) -> None:
    body = expect_object(server.get("/v2").expect(200).json(), "server metadata")
    expect_text(body.get("name"), "name")
    expect_text(body.get("version"), "version")
    for name in expect_list(body.get("extensions"), "extensions"):
        expect_text(name, "an extension")


@check(
    "metadata.server-slash",
    "SHOULD",
    "GET /v2/ gives the same as GET /v2",
    "OpenAPI, /v2/; the Markdown has v2 only",
)
def server_slash(server: Server) -> None:
    if not server.metadata:
        raise Skipped("server metadata cannot be read; see metadata.server")
    body = server.get("/v2/").expect(200).json()
    expect(body == server.metadata, f"the body is {shown(body)}, that of /v2 {shown(server.metadata)}")


@check(
    "metadata.model",
    "MUST",
    "GET /v2/models/NAME gives the model's name, and inputs and outputs with name, datatype and shape",
    "inference_rest.md, Model Metadata Response JSON Object; the OpenAPI requires name and platform alone",
)
def model_metadata(server: Server) -> None:
    model = read_metadata(server.get(server.model_path()).expect(200).json())
    expect(model.name == server.name, f"name is {shown(model.name)}, expected {shown(server.name)}")
    for kind, tensors in (("inputs", model.inputs), ("outputs", model.outputs)):
        names = [tensor.name for tensor in tensors]
        expect(len(names) > 0, f"{kind} is empty")
        expect(len(names) == len(set(names)), f"two of the {kind} have one name: {listed(names)}")


@check(
    "metadata.tensors",
    "MUST",
    "datatypes are those of the table (or BF16), unknown sizes are -1",
    "inference_rest.md, Tensor Data Types; BF16 is in its text and in the protobuf, not in the table",
)
def tensors(server: Server) -> None:
    model = read_metadata(_ok(server, server.model_path()).json())
    for tensor in (*model.inputs, *model.outputs):
        expect(tensor.datatype in NUMPY_DTYPES, f"{tensor.name!r} has the datatype {shown(tensor.datatype)}")


@check(
    "metadata.platform",
    "MUST",
    "model metadata has a platform, a string",
    "inference_rest.md, Model Metadata Response JSON Object; OpenAPI, metadata_model_response",
)
def platform(server: Server) -> None:
    body = expect_object(_ok(server, server.model_path()).json(), "model metadata")
    expect(isinstance(body.get("platform"), str), f"platform must be a string, got {shown(body.get('platform'))}")


@check(
    "metadata.platform-format",
    "SHOULD",
    "the platform is <project>_<format>",
    "inference_rest.md, Platforms; its list of names is of 2019 and is not held against a server",
)
def platform_format(server: Server) -> None:
    name = server.model.platform
    if not name:
        raise Skipped("there is none; see metadata.platform")
    expect(re.fullmatch(r"[A-Za-z0-9]+_[A-Za-z0-9_]+", name) is not None, f"the platform is {shown(name)}")


@check(
    "metadata.versions",
    "MUST",
    "the metadata of every version it names can be asked for by the version's own path",
    "inference_rest.md, Model Metadata; OpenAPI, /v2/models/${MODEL_NAME}/versions/${MODEL_VERSION}",
)
def versions(server: Server) -> None:
    if not server.model.versions:
        raise Skipped("the model's metadata lists no versions")
    for version in server.model.versions:
        model = read_metadata(server.get(server.model_path(server.name, version)).expect(200).json())
        expect(model.name == server.name, f"version {version}: name is {shown(model.name)}")


@check(
    "metadata.version-infer",
    "MUST",
    "inference by a version's path is answered by that version, and says so in model_version",
    "inference_rest.md, Inference; OpenAPI, /v2/models/${MODEL_NAME}/versions/${MODEL_VERSION}/infer",
)
def version_infer(server: Server) -> None:
    if not server.model.versions:
        raise Skipped("the model's metadata lists no versions")
    _ = server.base
    for version in server.model.versions:
        path = f"{server.model_path(server.name, version)}/infer"
        answer = read_answer(server.post_call(server.call(), path=path))
        got = answer.body.get("model_version")
        expect(got == version, f"model_version is {shown(got)}, expected {shown(version)}")


@check(
    "metadata.unknown-model",
    "MUST",
    'metadata of a model that is not there is an error with {"error": text}',
    "inference_rest.md, Model Metadata Response JSON Error Object",
)
def unknown_model(server: Server) -> None:
    server.get(server.model_path(UNKNOWN)).expect_refusal()


@check(
    "metadata.unknown-model.status",
    "SHOULD",
    "a model that is not there is 404 or 400",
    "inference_rest.md, “typically 400”; RFC 9110, 15.5.5",
)
def unknown_model_status(server: Server) -> None:
    reply = server.get(server.model_path(UNKNOWN))
    if reply.status < 400:
        raise Skipped(f"the status is {reply.status}; see metadata.unknown-model")
    _expect_client_fault(reply)


@check(
    "metadata.unknown-version",
    "MUST",
    'metadata of a version that is not there is an error with {"error": text}',
    "inference_rest.md, Model Metadata Response JSON Error Object",
)
def unknown_version(server: Server) -> None:
    server.get(server.model_path(server.name, UNKNOWN_VERSION)).expect_refusal()


@check(
    "metadata.odd-version",
    "SHOULD",
    "a version that is no number and not listed is the client's fault",
    "inference_rest.md, “typically 400”",
)
def odd_version(server: Server) -> None:
    if "no-number" in server.model.versions:
        raise Skipped("the model has a version no-number")
    _expect_client_fault(server.get(server.model_path(server.name, "no-number")))


def _ok(server: Server, path: str) -> Reply:
    reply = server.get(path)
    if reply.status != 200:
        raise Skipped(f"the status is {reply.status}; see metadata.model")
    return reply


def _expect_client_fault(reply: Reply) -> None:
    expect(400 <= reply.status < 500, f"the status is {reply.status}, expected 4xx")
