"""Checks of inference with JSON tensors: what a request may hold, and what an answer must."""

import json
from dataclasses import replace

from modelyard.testing.open_inference.check import Failed, Skipped, check, expect, listed, shown
from modelyard.testing.open_inference.inference import JSON_LENGTH, Answer, expect_same_output, read_answer
from modelyard.testing.open_inference.server import Server
from modelyard.testing.open_inference.tensors import make

REQUEST = "inference_rest.md, Inference Request JSON Object"
RESPONSE = "inference_rest.md, Inference Response JSON Object"


@check(
    "infer.json",
    "MUST",
    "a request made from the model's metadata is answered with 200 and outputs that can be read",
    "inference_rest.md, Inference; OpenAPI, inference_response",
)
def infer_json(server: Server) -> None:
    server.infer(server.call())


@check(
    "infer.model-name",
    "MUST",
    "an answer has the model's name in model_name",
    f"{RESPONSE}; OpenAPI, inference_response (the Markdown's own example leaves it out)",
)
def model_name(server: Server) -> None:
    got = server.base.body.get("model_name")
    expect(got == server.name, f"model_name is {shown(got)}, expected {shown(server.name)}")


@check(
    "infer.model-version",
    "MUST",
    "model_version is a string, and one of the versions in the metadata where those are listed",
    RESPONSE,
)
def model_version(server: Server) -> None:
    body, versions = server.base.body, server.model.versions
    if "model_version" not in body and not versions:
        raise Skipped("neither the metadata nor the answer has versions")
    version = body.get("model_version")
    holds = isinstance(version, str) and (not versions or version in versions)
    expect(holds, f"model_version is {shown(version)}, the metadata lists {listed(versions)}")


@check(
    "infer.all-outputs",
    "MUST",
    "a request that names no outputs gets all of them",
    f"{REQUEST}, outputs",
)
def all_outputs(server: Server) -> None:
    _ = server.base
    call = server.call()
    if call.body.pop("outputs", None):
        call.body["parameters"] = {"binary_data_output": True}
    got, expected = set(server.infer(call).outputs), {spec.name for spec in server.model.outputs}
    expect(got == expected, f"the outputs are {listed(sorted(got))}, expected {listed(sorted(expected))}")


@check(
    "infer.outputs-fit-metadata",
    "MUST",
    "outputs have the datatype of the metadata, and a shape that fits it",
    "inference_rest.md, Response Output and Model Metadata",
)
def outputs_fit_metadata(server: Server) -> None:
    for name, output in server.base.outputs.items():
        spec = server.model.output(name)
        if spec is None:
            raise Failed(
                f"output {name!r} is not in the metadata, which has {listed(s.name for s in server.model.outputs)}"
            )
        expect(output.datatype == spec.datatype, f"output {name!r} is {output.datatype}, metadata says {spec.datatype}")
        shape = output.array.shape
        expect(spec.fits(shape), f"output {name!r} has the shape {list(shape)}, metadata says {list(spec.shape)}")


@check(
    "infer.requested-outputs",
    "MUST",
    "a request that names one output gets that one and no other",
    f"{REQUEST}, outputs",
)
def requested_outputs(server: Server) -> None:
    expected = server.base
    for spec in server.model.outputs:
        call = server.call()
        call.body.pop("outputs", None)
        server.ask_for(call, spec)
        answer = server.infer(call)
        expect(set(answer.outputs) == {spec.name}, f"asked for {spec.name}, got {listed(answer.outputs)}")
        if spec.name in expected.outputs and _is_steady(server):
            expect_same_output(expected[spec.name], answer[spec.name], f"asked for {spec.name} alone, the answer")


@check("infer.id", "MUST", "the id of a request comes back in its answer", f"{REQUEST}, id")
def request_id(server: Server) -> None:
    _ = server.base
    for sent in ("a-1", 'naïve ✈ "quoted" \\ 42'):
        call = server.call()
        call.body["id"] = sent
        got = server.infer(call).body.get("id")
        expect(got == sent, f"id is {shown(got)}, expected {shown(sent)}")


@check(
    "infer.no-id",
    "SHOULD",
    "a request without an id gets none, or an empty one",
    f"{RESPONSE}, “if any”; OpenAPI, inference_response, where id is not required",
)
def no_id(server: Server) -> None:
    got = server.base.body.get("id", "")
    expect(got == "", f"id is {shown(got)}, the request had none")


@check(
    "infer.nested",
    "MUST",
    "data nested like the shape is taken, and answered as flat data is",
    "inference_rest.md, Tensor Data",
)
def nested(server: Server) -> None:
    expected = server.steady
    if all(len(tensor["shape"]) < 2 for tensor in server.call().inputs if "data" in tensor):
        raise Skipped("no input in JSON has two axes or more")
    expected.expect_same(server.infer(server.call(nested=True)), "the answer to nested data")


@check("infer.input-order", "MUST", "inputs are told by name, in whatever order they come", f"{REQUEST}, inputs")
def input_order(server: Server) -> None:
    expected = server.steady
    call = server.call()
    if len(call.inputs) < 2:
        raise Skipped("the model has one input")
    if call.raws and len(call.raws) != len(call.inputs):
        raise Skipped("some inputs travel in binary, whose order is tried in binary.order")
    call.inputs.reverse()
    call.raws.reverse()
    expected.expect_same(server.infer(call), "the answer to inputs in reverse order")


@check(
    "infer.batch-shape",
    "MUST",
    "n rows in give n rows out, where the first axis of every tensor is of any size",
    "inference_rest.md, Request Input and Response Output: “the full shape of the entire batch”",
)
def batch_shape(server: Server) -> None:
    for name, output in _batch(server, 3).outputs.items():
        rows = output.array.shape[:1]
        expect(rows == (3,), f"output {name!r} has the shape {list(output.array.shape)} for 3 rows")


@check(
    "infer.batch-values",
    "SHOULD",
    "a row is answered alike alone and among others",
    "inference_rest.md, Request Input and Response Output; a model that mixes its rows is no fault of the server",
)
def batch_values(server: Server) -> None:
    _ = server.steady
    arrays = server.arrays(3)
    together = _batch(server, 3)
    for row in range(3):
        alone = server.infer(server.call({name: array[row : row + 1] for name, array in arrays.items()}))
        for name, output in together.outputs.items():
            if output.array.shape[:1] != (3,):
                raise Skipped(f"output {name!r} has not 3 rows; see infer.batch-shape")
            among = replace(output, array=output.array[row : row + 1])
            expect_same_output(among, alone[name], f"row {row}, alone and among three:")


@check(
    "infer.parameters",
    "SHOULD",
    "parameters that the server does not know, on request, input and output, are no error",
    "inference_rest.md, Parameters: servers may have their own, so that a client's may meet one that has not",
)
def parameters(server: Server) -> None:
    _ = server.base
    unknown = {"x-text": "a", "x-number": 1, "x-flag": True}
    call = server.call()
    call.body["parameters"] = dict(unknown)
    for tensor in call.inputs:
        tensor["parameters"] = {**tensor.get("parameters", {}), **unknown}
    if "outputs" not in call.body:
        for spec in server.model.outputs:
            server.ask_for(call, spec)
    for output in call.body["outputs"]:
        output["parameters"] = {**output.get("parameters", {}), **unknown}
    server.infer(call)


@check(
    "infer.empty-parameters",
    "MUST",
    "empty parameters are as good as none",
    "inference_rest.md, Parameters: “zero or more”",
)
def empty_parameters(server: Server) -> None:
    _ = server.base
    call = server.call()
    call.body["parameters"] = {}
    for tensor in call.inputs:
        tensor.setdefault("parameters", {})
    server.infer(call)


@check(
    "infer.unknown-member",
    "SHOULD",
    "members of the request that no document names are left alone",
    "extension_binary_data.md, Examples, whose requests hold a model_name that no schema has",
)
def unknown_member(server: Server) -> None:
    _ = server.base
    call = server.call()
    call.body["model_name"] = server.name
    call.body["x-note"] = {"deep": [1, 2]}
    server.infer(call)


@check(
    "infer.json-escapes",
    "MUST",
    "JSON written with spaces and \\u escapes is the same JSON",
    "RFC 8259, 2 and 7",
)
def json_escapes(server: Server) -> None:
    _ = server.base
    call = server.call()
    if call.raws:
        raise Skipped("an input travels in binary")
    text = json.dumps(call.body, indent=2)
    name = server.model.inputs[0].name
    text = text.replace(json.dumps(name), '"' + "".join(f"\\u{unit:04x}" for unit in _utf16(name)) + '"')
    read_answer(server.post_body(text.encode()))


@check(
    "infer.content-type",
    "SHOULD",
    "an answer in JSON says Content-Type application/json",
    "inference_rest.md, Inference Request Examples",
)
def content_type(server: Server) -> None:
    _ = server.base
    call = server.call()
    if call.raws or "outputs" in call.body:
        raise Skipped("a tensor travels in binary")
    reply = server.post_call(call).expect(200)
    got = (reply.header("Content-Type") or "").partition(";")[0].strip().lower()
    expect(got == "application/json", f"Content-Type is {got!r}")


@check(
    "infer.no-content-type",
    "SHOULD",
    "a request without Content-Type, as tritonclient sends it, is taken",
    "RFC 9110, 8.3: the recipient may work out what it is",
)
def no_content_type(server: Server) -> None:
    _ = server.base
    body, headers = server.call().encoded()
    kept = tuple((name, value) for name, value in headers if name != "Content-Type")
    read_answer(server.post_body(body, kept))


@check(
    "infer.charset",
    "MUST",
    "Content-Type: application/json; charset=utf-8 is taken",
    "RFC 9110, 8.3.1: a media type may have parameters",
)
def charset(server: Server) -> None:
    _ = server.base
    call = server.call()
    if call.raws:
        raise Skipped("an input travels in binary")
    read_answer(server.post_body(call.encoded()[0], (("Content-Type", "application/json; charset=utf-8"),)))


@check(
    "infer.coercion",
    "MUST",
    "a fraction for a whole number, a string for a number, is coerced or refused with an error object",
    "inference_rest.md, Tensor Data: “can decide to coerce each element … or return an error”",
)
def coercion(server: Server) -> str:
    _ = server.base
    done = []
    for what, kinds, value in (
        ("a fraction", ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"), 0.5),
        ("text", ("FP32", "FP64", "INT32", "INT64"), "one"),
        ("a number", ("BYTES",), 1),
        ("a number", ("BOOL",), 1),
    ):
        call = server.call()
        tensor = next((each for each in call.inputs if each["datatype"] in kinds and each.get("data")), None)
        if tensor is None:
            continue
        tensor["data"][0] = value
        reply = server.post_call(call)
        if reply.status == 200:
            read_answer(reply)
            done.append(f"{what} for {tensor['datatype']} is taken")
        else:
            reply.expect_refusal()
            done.append(f"{what} for {tensor['datatype']} is refused with {reply.status}")
    return "; ".join(done)


@check(
    "infer.no-rows",
    "SHOULD",
    "a tensor of no rows is answered, or refused as the client's fault",
    "inference_rest.md, Request Input: a size is an unsigned integer, and so may be 0",
)
def no_rows(server: Server) -> str:
    _ = server.base
    if not server.model.batched:
        raise Skipped("the first axis of some tensor has a fixed size")
    reply = server.post_call(server.call({s.name: make(s.datatype, s.sized(0)) for s in server.model.inputs}))
    if reply.status == 200:
        read_answer(reply)
        return "answered"
    expect(400 <= reply.status < 500, f"the status is {reply.status}")
    return f"refused with {reply.status}"


@check(
    "infer.strict-json",
    "SHOULD",
    "answers are JSON without the tokens NaN and Infinity, which JSON has not",
    "RFC 8259, 6",
)
def strict_json(server: Server) -> str:
    _ = server.base
    spec = next((s for s in server.model.inputs if s.datatype in ("FP32", "FP64") and s.name in server.echoes), None)
    if spec is None or not server.binary:
        raise Skipped("needs the binary extension and a model that gives an input of FP32 or FP64 back")
    for value in ("inf", "nan"):
        arrays = {name: array.copy() for name, array in server.arrays().items()}
        arrays[spec.name].reshape(-1)[0] = float(value)
        call = server.call(arrays, binary=True)
        call.body["outputs"] = [{"name": server.echoes[spec.name]}]
        reply = server.post_call(call)
        if reply.header(JSON_LENGTH) is not None:
            raise Skipped("the answer is in binary, asked for in JSON; see binary.input")
        if reply.status == 200:
            _expect_strict(reply.body)
            return f"{value} is written as {shown(reply.json()['outputs'][0]['data'])}"
    raise Skipped("the model takes neither infinity nor NaN")


def _expect_strict(body: bytes) -> None:
    def refuse(token: str) -> None:
        raise Failed(f"the body holds {token}")

    try:
        json.loads(body, parse_constant=refuse)
    except ValueError as exc:
        raise Failed(f"the body is not JSON: {exc}") from exc


def _batch(server: Server, n_rows: int) -> Answer:
    """Return the answer to several rows at once; raises Skipped where the first axis does not count rows, or is kept at one."""
    answer = server.base
    if not server.model.batched:
        raise Skipped("the first axis of some tensor has a fixed size")
    other = [name for name, output in answer.outputs.items() if output.array.shape[:1] != (1,)]
    if other:
        raise Skipped(f"the first axis of {listed(other)} does not count rows: it is not 1 for one row")
    reply = server.post_call(server.call(server.arrays(n_rows)))
    if 400 <= reply.status < 500:
        raise Skipped(f"the model does not take {n_rows} rows: {reply.body[:200].decode('utf-8', 'replace')}")
    return read_answer(reply)


def _is_steady(server: Server) -> bool:
    try:
        return server.steady is not None
    except Skipped:
        return False


def _utf16(text: str) -> list[int]:
    data = text.encode("utf-16-be")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
