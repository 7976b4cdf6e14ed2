"""Checks of requests that are wrong: each is refused with {"error": text}, and as the client's fault, 4xx.

Each fault gives two checks. That it is refused follows "A failed inference request must be indicated by an HTTP error
status"; that the status is 4xx follows "(typically 400)", and is told separately, as ID.status, since servers differ there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelyard.testing.open_inference.check import Check, Level, Run, Skipped, expect
from modelyard.testing.open_inference.inference import Call
from modelyard.testing.open_inference.server import UNKNOWN, UNKNOWN_VERSION, Server
from modelyard.testing.open_inference.wire import Reply

ERROR = "inference_rest.md, Inference Response JSON Error Object; the OpenAPI has 400 alone, and error not required"
REQUEST = "inference_rest.md, Inference Request JSON Object"
INPUT = "inference_rest.md, Request Input"
DATA = "inference_rest.md, Tensor Data"
DATATYPES = "inference_rest.md, Tensor Data Types"
METADATA = "inference_rest.md, Model Metadata Response JSON Object"
PARAMETERS = "inference_rest.md, Parameters"

Send = Callable[[Server], Reply]


@dataclass(frozen=True)
class Fault:
    """A wrong request and how much the documents say about it: MUST where it contradicts itself or them."""

    id: str
    level: Level
    what: str
    where: str
    send: Send

    @property
    def checks(self) -> tuple[Check, Check]:
        """The check that it is refused, and the one that it is refused as the client's fault."""
        return (
            Check(
                f"faults.{self.id}",
                self.level,
                f'{self.what} is refused with {{"error": text}}',
                self.where,
                self._refused(),
            ),
            Check(
                f"faults.{self.id}.status", "SHOULD", f"{self.what} is the client's fault: 4xx", ERROR, self._status()
            ),
        )

    def _refused(self) -> Run:
        def run(server: Server) -> None:
            self.send(server).expect_refusal()

        return run

    def _status(self) -> Run:
        def run(server: Server) -> None:
            status = self.send(server).status
            if status < 400:
                raise Skipped(f"it is not refused; see faults.{self.id}")
            expect(status < 500, f"the status is {status}, expected 4xx")

        return run


def _body(body: bytes) -> Send:
    """Send these bytes where an inference request belongs."""

    def send(server: Server) -> Reply:
        _ = server.base
        return server.post_body(body)

    return send


def _changed(change: Callable[[Call], None]) -> Send:
    """Send the plainest request, changed."""

    def send(server: Server) -> Reply:
        _ = server.base
        call = server.call()
        change(call)
        return server.post_call(call)

    return send


def _input(
    change: Callable[[dict[str, Any]], None], *, where: Callable[[dict[str, Any]], bool] = lambda tensor: True
) -> Send:
    """Send the plainest request with one input in JSON changed, the first for which `where` holds."""

    def send(server: Server) -> Reply:
        _ = server.base
        call = server.call()
        tensor = next((each for each in call.inputs if "data" in each and where(each)), None)
        if tensor is None:
            raise Skipped("the model has no such input that travels in JSON")
        change(tensor)
        return server.post_call(call)

    return send


def _with(key: str, value: Any) -> Send:
    """Send the plainest request with one of its own members changed."""

    def change(call: Call) -> None:
        call.body[key] = value

    return _changed(change)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensor: dict[str, Any]) -> None:
        tensor[key] = value

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    def change(tensor: dict[str, Any]) -> None:
        del tensor[key]

    return change


def _is_matrix(tensor: dict[str, Any]) -> bool:
    return len(tensor["shape"]) >= 2 and tensor["shape"][-1] >= 2


def _is_number(tensor: dict[str, Any]) -> bool:
    return tensor["datatype"] not in ("BYTES", "BOOL") and bool(tensor["data"])


def _truncated(server: Server) -> Reply:
    _ = server.base
    return server.post_body(json.dumps(server.call().body).encode()[:-7])


def _trailing(server: Server) -> Reply:
    _ = server.base
    call = server.call()
    if call.raws:
        raise Skipped("an input travels in binary")
    return server.post_body(call.encoded()[0] + b" and more")


def _not_utf8(server: Server) -> Reply:
    _ = server.base
    call = server.call()
    if call.raws:
        raise Skipped("an input travels in binary")
    call.body["id"] = "MARK"
    return server.post_body(call.encoded()[0].replace(b"MARK", b"\xff\xfe"))


def _missing_input(call: Call) -> None:
    del call.inputs[-1]
    if call.raws:
        raise Skipped("an input travels in binary")


def _extra_input(call: Call) -> None:
    call.inputs.append({"name": "no-such-input", "shape": [1], "datatype": "INT32", "data": [1]})


def _duplicate_input(call: Call) -> None:
    if call.first_json_input is None:
        raise Skipped("no input travels in JSON")
    call.inputs.append(call.first_json_input)


def _other_datatype(tensor: dict[str, Any]) -> None:
    tensor["datatype"] = "INT32" if tensor["datatype"] != "INT32" else "INT64"


def _more_axes(tensor: dict[str, Any]) -> None:
    tensor["shape"] = [*tensor["shape"], 1]


def _wrong_size(server: Server) -> Reply:
    """Send one more on an axis whose size the metadata fixes."""
    _ = server.base
    call = server.call()
    for spec, tensor in zip(server.model.inputs, call.inputs, strict=True):
        axis = next((i for i, size in enumerate(spec.shape) if size > 0), None)
        if axis is None or not tensor.get("data"):
            continue
        n_before = len(tensor["data"])
        tensor["shape"][axis] += 1
        n_elements = n_before // (tensor["shape"][axis] - 1) * tensor["shape"][axis]
        tensor["data"] = (tensor["data"] * 2)[:n_elements]
        return server.post_call(call)
    raise Skipped("no input in JSON has an axis of a fixed size")


def _different_rows(server: Server) -> Reply:
    """Send two rows of the first input and one of the others."""
    _ = server.base
    model = server.model
    if not model.batched or len(model.inputs) < 2:
        raise Skipped("needs two inputs that take rows")
    two, one = server.arrays(2), server.arrays(1)
    first = model.inputs[0].name
    return server.post_call(server.call({**one, first: two[first]}))


def _too_short(tensor: dict[str, Any]) -> None:
    del tensor["data"][-1]


def _too_long(tensor: dict[str, Any]) -> None:
    tensor["data"].append(tensor["data"][0])


def _ragged(tensor: dict[str, Any]) -> None:
    """Give two rows of different length, as no shape has them."""
    data = tensor["data"]
    tensor["data"] = [data[:-1], data[-1:]] if len(data) > 2 else [data, []]


def _half_nested(tensor: dict[str, Any]) -> None:
    first, *others = tensor["data"]
    tensor["data"] = [[first], *others]


def _deep(tensor: dict[str, Any]) -> None:
    value: Any = tensor["data"]
    for _ in range(200):
        value = [value]
    tensor["data"] = value


def _object_in_data(tensor: dict[str, Any]) -> None:
    tensor["data"][0] = {"value": tensor["data"][0]}


def _huge(tensor: dict[str, Any]) -> None:
    """Give a shape whose number of elements is 2**64, which 64 bits count as 0."""
    tensor["shape"] = [2**32] * 2 + [1] * (len(tensor["shape"]) - 2)
    tensor["data"] = []


def _at_unknown_model(server: Server) -> Reply:
    _ = server.base
    return server.post_call(server.call(), path=f"{server.model_path(UNKNOWN)}/infer")


def _at_unknown_version(server: Server) -> Reply:
    _ = server.base
    return server.post_call(server.call(), path=f"{server.model_path(server.name, UNKNOWN_VERSION)}/infer")


FAULTS = (
    Fault("malformed-json", "MUST", "a body that is no JSON", ERROR, _body(b'{"inputs": [')),
    Fault("truncated-json", "MUST", "a request whose end is missing", ERROR, _truncated),
    Fault("trailing-text", "MUST", "text behind the JSON", "RFC 8259, 2", _trailing),
    Fault("not-utf-8", "SHOULD", "JSON that is not UTF-8", "RFC 8259, 8.1", _not_utf8),
    Fault("empty-body", "MUST", "an empty body", f"{REQUEST}: “is required in the HTTP body”", _body(b"")),
    Fault("null", "MUST", "a body of null", REQUEST, _body(b"null")),
    Fault("array", "MUST", "a body that is an array", REQUEST, _body(b"[]")),
    Fault("no-inputs", "MUST", "a request without inputs", REQUEST, _body(b"{}")),
    Fault("inputs-no-array", "MUST", "inputs that are no array", REQUEST, _with("inputs", {"a": 1})),
    Fault("inputs-of-numbers", "MUST", "inputs that are no objects", REQUEST, _with("inputs", [1, 2])),
    Fault("empty-inputs", "MUST", "an empty array of inputs", REQUEST, _body(b'{"inputs": []}')),
    Fault("id-no-string", "SHOULD", "an id that is no string", REQUEST, _with("id", {"a": 1})),
    Fault("parameters-no-object", "SHOULD", "parameters that are no object", PARAMETERS, _with("parameters", [1])),
    Fault("outputs-no-array", "SHOULD", "outputs that are no array", REQUEST, _with("outputs", "all")),
    Fault("no-name", "MUST", "an input without a name", INPUT, _input(_without("name"))),
    Fault("no-shape", "MUST", "an input without a shape", INPUT, _input(_without("shape"))),
    Fault("no-datatype", "MUST", "an input without a datatype", INPUT, _input(_without("datatype"))),
    Fault("no-data", "MUST", "an input without data", INPUT, _input(_without("data"))),
    Fault("missing-input", "MUST", "a request that lacks an input", f"{METADATA}: “The inputs required”", _changed(_missing_input)),
    Fault("unknown-input", "MUST", "an input by a name that the model has not", INPUT, _input(_set("name", "no-such-input"))),
    Fault("extra-input", "SHOULD", "one input more than the model has", INPUT, _changed(_extra_input)),
    Fault("duplicate-input", "SHOULD", "an input given twice", INPUT, _changed(_duplicate_input)),
    Fault("unknown-output", "MUST", "asking for an output that the model has not", REQUEST, _with("outputs", [{"name": "no-such-output"}])),
    Fault("unknown-datatype", "MUST", "a datatype that is not in the table", DATATYPES, _input(_set("datatype", "FLOAT32"))),
    Fault("wrong-datatype", "SHOULD", "a datatype other than the model's", INPUT, _input(_other_datatype, where=_is_number)),
    Fault("wrong-rank", "SHOULD", "a shape with an axis too many", INPUT, _input(_more_axes)),
    Fault("wrong-size", "MUST", "another size than the metadata fixes", METADATA, _wrong_size),
    Fault("negative-size", "MUST", "a shape with -1", f"{INPUT}: “an unsigned 64-bit integer”", _input(_set("shape", [-1, -1]))),
    Fault("fractional-size", "MUST", "a shape with 1.5", f"{INPUT}: “an integer”", _input(_set("shape", [1.5, 1]))),
    Fault("shape-no-array", "MUST", "a shape that is no array", INPUT, _input(_set("shape", 2))),
    Fault("overflowing-shape", "MUST", "a shape of 2**64 elements with no data", DATA, _input(_huge, where=_is_matrix)),
    Fault("different-rows", "SHOULD", "inputs with different numbers of rows", INPUT, _different_rows),
    Fault("data-too-short", "MUST", "data with an element too few", DATA, _input(_too_short)),
    Fault("data-too-long", "MUST", "data with an element too many", DATA, _input(_too_long)),
    Fault("ragged-data", "MUST", "nested data with rows of different length", DATA, _input(_ragged, where=_is_matrix)),
    Fault("half-nested-data", "MUST", "data nested in one place and flat in another", DATA, _input(_half_nested, where=_is_matrix)),
    Fault("deep-data", "SHOULD", "data nested 200 times", DATA, _input(_deep)),
    Fault("object-in-data", "MUST", "an object among the data", DATA, _input(_object_in_data, where=_is_number)),
    Fault("data-no-array", "MUST", "data that is no array", f"{DATA}: “provided in a JSON array”", _input(_set("data", "12"))),
    Fault("unknown-model", "MUST", "inference by a model that is not there", ERROR, _at_unknown_model),
    Fault("unknown-version", "MUST", "inference by a version that is not there", ERROR, _at_unknown_version),
)  # fmt: skip

CHECKS = tuple(each for fault in FAULTS for each in fault.checks)
