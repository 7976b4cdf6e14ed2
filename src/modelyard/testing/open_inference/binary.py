"""Checks of the binary tensor data extension: tensors behind the JSON, in requests and in answers."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelyard.testing.open_inference.check import (
    Check,
    Failed,
    Level,
    Run,
    Skipped,
    check,
    expect,
    listed,
)
from modelyard.testing.open_inference.inference import JSON_LENGTH, Call, read_answer
from modelyard.testing.open_inference.server import Server
from modelyard.testing.open_inference.tensors import SIXTEEN_BIT_FLOATS, filled
from modelyard.testing.open_inference.wire import Headers, Reply

EXTENSION = "binary_tensor_data"
DOCUMENT = "extension_binary_data.md"
REQUEST = f"{DOCUMENT}, Binary Tensor Request"


@check("binary.both", "MUST", "a request with every tensor in binary is answered, in binary", REQUEST, EXTENSION)
def both(server: Server) -> None:
    expected = server.base
    answer = server.infer(server.call(binary=True, binary_output=True))
    json_ones = [name for name, output in answer.outputs.items() if not output.binary]
    expect(not json_ones, f"asked with binary_data_output, {listed(json_ones)} came as JSON")
    expect(answer.outputs.keys() == expected.outputs.keys(), f"the outputs are {listed(answer.outputs)}")


@check("binary.same-answer", "MUST", "binary tensors and JSON carry the same values", REQUEST, EXTENSION)
def same_answer(server: Server) -> None:
    server.steady.expect_same(server.binary_base, "the answer in binary")


@check("binary.input", "MUST", "tensors in binary may be answered in JSON", REQUEST, EXTENSION)
def binary_input(server: Server) -> None:
    expected = server.steady
    _ = server.binary_base
    answer = server.infer(server.call(binary=True))
    wrong = [
        name for name, output in answer.outputs.items() if output.binary and output.datatype not in SIXTEEN_BIT_FLOATS
    ]
    expect(not wrong, f"{listed(wrong)} came in binary, which nobody asked for")
    expected.expect_same(answer, "the answer to binary tensors")


@check("binary.output", "MUST", "an output with binary_data comes in binary, the others do not", REQUEST, EXTENSION)
def binary_output(server: Server) -> None:
    expected = server.steady
    _ = server.binary_base
    for wanted in server.model.outputs:
        call = server.call()
        call.body.pop("outputs", None)
        for spec in server.model.outputs:
            as_binary = spec == wanted or spec.datatype in SIXTEEN_BIT_FLOATS
            call.ask_for(spec.name, **({"binary_data": True} if as_binary else {}))
        answer = server.infer(call)
        for spec in server.model.outputs:
            as_binary = spec == wanted or spec.datatype in SIXTEEN_BIT_FLOATS
            expect(
                answer[spec.name].binary == as_binary,
                f"asked for {wanted.name} in binary, {spec.name} came {'in binary' if not as_binary else 'as JSON'}",
            )
        expected.expect_same(answer, "the answer in part in binary")


@check(
    "binary.output-false",
    "MUST",
    "binary_data on an output is stronger than binary_data_output on the request",
    REQUEST,
    EXTENSION,
)
def output_false(server: Server) -> None:
    _ = server.binary_base
    spec = next((s for s in server.model.outputs if s.datatype not in SIXTEEN_BIT_FLOATS), None)
    if spec is None:
        raise Skipped("every output is a 16-bit float")
    call = server.call(binary_output=True)
    for each in server.model.outputs:
        call.ask_for(each.name, **({"binary_data": False} if each == spec else {}))
    answer = server.infer(call)
    expect(not answer[spec.name].binary, f"{spec.name} came in binary, asked for with binary_data false")
    for each in server.model.outputs:
        expect(each == spec or answer[each.name].binary, f"{each.name} came as JSON, asked with binary_data_output")


@check("binary.mixed-inputs", "MUST", "one input in binary and the others as JSON, each in turn", REQUEST, EXTENSION)
def mixed_inputs(server: Server) -> None:
    expected = server.steady
    _ = server.binary_base
    if len(server.model.inputs) < 2:
        raise Skipped("the model has one input")
    for spec in server.model.inputs:
        expected.expect_same(server.infer(server.call(binary=[spec.name])), f"the answer to {spec.name} in binary")


@check("binary.order", "MUST", "binary tensors come in the order of the JSON, whatever that is", REQUEST, EXTENSION)
def order(server: Server) -> None:
    expected = server.steady
    _ = server.binary_base
    call = server.call(binary=True)
    if len(call.inputs) < 2:
        raise Skipped("the model has one input")
    call.inputs.reverse()
    call.raws.reverse()
    expected.expect_same(server.infer(call), "the answer to inputs in reverse order")


@check("binary.any-offset", "MUST", "binary tensors may start at any byte of the body", REQUEST, EXTENSION)
def any_offset(server: Server) -> None:
    expected = server.steady
    _ = server.binary_base
    call = server.call(binary=True)
    text, raw = json.dumps(call.body).encode(), b"".join(call.raws)
    for n_spaces in range(8):
        padded = text + b" " * n_spaces
        reply = server.post_body(padded + raw, _headers(len(padded)))
        expected.expect_same(read_answer(reply), f"the answer with {n_spaces} spaces behind the JSON")


@check(
    "binary.response-header",
    "MUST",
    f"an answer with binary tensors has {JSON_LENGTH}, the length of its JSON",
    f"{REQUEST}: “must be provided”",
    EXTENSION,
)
def response_header(server: Server) -> None:
    _ = server.base
    reply = server.post_call(server.call(binary=True, binary_output=True)).expect(200)
    length = reply.header(JSON_LENGTH)
    if length is None:
        if b"binary_data_size" not in reply.body:
            raise Skipped("the answer is not in binary; see binary.both")
        raise Failed(f"the answer has no {JSON_LENGTH}")
    expect(length.isdigit() and 0 < int(length) <= len(reply.body), f"{JSON_LENGTH} is {length!r}")
    try:
        json.loads(reply.body[: int(length)])
    except ValueError as exc:
        raise Failed(f"the first {length} bytes, as {JSON_LENGTH} says, are not JSON: {exc}") from exc


@check(
    "binary.content-type",
    "SHOULD",
    "an answer with binary tensors says Content-Type application/octet-stream",
    f"{DOCUMENT}, Examples",
    EXTENSION,
)
def content_type(server: Server) -> None:
    _ = server.binary_base
    reply = server.post_call(server.call(binary=True, binary_output=True)).expect(200)
    got = (reply.header("Content-Type") or "").partition(";")[0].strip().lower()
    expect(got == "application/octet-stream", f"Content-Type is {got!r}")


@check("binary.any-content-type", "SHOULD", "binary tensors are taken whatever Content-Type says", REQUEST, EXTENSION)
def any_content_type(server: Server) -> None:
    _ = server.binary_base
    body, headers = server.call(binary=True).encoded()
    kept = tuple((name, value) for name, value in headers if name != "Content-Type")
    read_answer(server.post_body(body, kept))
    read_answer(server.post_body(body, (*kept, ("Content-Type", "application/json"))))


@check(
    "binary.header-of-json",
    "MUST",
    f"a request without binary tensors may have {JSON_LENGTH}, equal to Content-Length",
    REQUEST,
    EXTENSION,
)
def header_of_json(server: Server) -> None:
    _ = server.base
    call = server.call()
    if call.raws:
        raise Skipped("an input travels in binary")
    body, _headers_of_json = call.encoded()
    read_answer(server.post_body(body, _headers(len(body))))


@check(
    "binary.raw",
    "MUST",
    f"{JSON_LENGTH}: 0 means that the body is the one input, one row; every output comes in binary",
    f"{DOCUMENT}, Raw Binary Request",
    EXTENSION,
)
def raw(server: Server) -> None:
    expected = server.steady
    _ = server.binary_base
    answer = read_answer(server.post_body(_raw_request(server), _headers(0)))
    json_ones = [name for name, output in answer.outputs.items() if not output.binary]
    expect(not json_ones, f"{listed(json_ones)} came as JSON")
    expected.expect_same(answer, "the answer to a raw request")


@check(
    "binary.bytes-empty", "MUST", "an element of BYTES may be empty", f"{REQUEST}: a length, then the bytes", EXTENSION
)
def bytes_empty(server: Server) -> None:
    _expect_echo(server, [b"", b"a"])


@check(
    "binary.bytes-any",
    "SHOULD",
    "an element of BYTES may hold any bytes, zeros and what is not UTF-8 among them",
    f"{REQUEST}: “the actual bytes”",
    EXTENSION,
)
def bytes_any(server: Server) -> None:
    _expect_echo(server, [b"\x00", b"\xff\xfe\x80", bytes(range(256))])


@check("binary.bytes-long", "MUST", "an element of BYTES may be longer than 65,535 bytes", REQUEST, EXTENSION)
def bytes_long(server: Server) -> None:
    _expect_echo(server, [b"x" * 70_000])


def _expect_echo(server: Server, elements: list[bytes]) -> None:
    spec, output = server.echo_of("BYTES")
    _ = server.binary_base
    for element in elements:
        array = filled("BYTES", spec.sized(), [element])
        arrays = {**server.arrays(), spec.name: array}
        call = server.call(arrays, binary=True)
        call.body["outputs"] = [{"name": output, "parameters": {"binary_data": True}}]
        got = server.infer(call)[output].array
        expect(
            got.reshape(-1).tolist() == array.reshape(-1).tolist(),
            f"{element[:40]!r} came back as {bytes(got.reshape(-1)[0])[:40]!r}",
        )


# Requests that are wrong

Change = Callable[[Call], tuple[bytes, Headers]]


@dataclass(frozen=True)
class BinaryFault:
    """A wrong request with binary tensors; `made` turns a right one into its bytes and headers."""

    id: str
    level: Level
    what: str
    made: Change

    @property
    def checks(self) -> tuple[Check, Check]:
        rule = f'{self.what} is refused with {{"error": text}}'
        status = f"{self.what} is the client's fault: 4xx"
        return (
            Check(f"binary.{self.id}", self.level, rule, REQUEST, self._refused(), EXTENSION),
            Check(f"binary.{self.id}.status", "SHOULD", status, REQUEST, self._status(), EXTENSION),
        )

    def send(self, server: Server) -> Reply:
        _ = server.binary_base
        return server.post_body(*self.made(server.call(binary=True)))

    def _refused(self) -> Run:
        def run(server: Server) -> None:
            self.send(server).expect_refusal()

        return run

    def _status(self) -> Run:
        def run(server: Server) -> None:
            status = self.send(server).status
            if status < 400:
                raise Skipped(f"it is not refused; see binary.{self.id}")
            expect(status < 500, f"the status is {status}, expected 4xx")

        return run


def _headers(json_length: int | str) -> Headers:
    return (("Content-Type", "application/octet-stream"), (JSON_LENGTH, str(json_length)))


def _with_length(length: Callable[[int, int], int | str]) -> Change:
    """Lie in Inference-Header-Content-Length, told the length of the JSON and of the body."""

    def made(call: Call) -> tuple[bytes, Headers]:
        body, _ = call.encoded()
        return body, _headers(length(len(json.dumps(call.body).encode()), len(body)))

    return made


def _with_size(size: Callable[[int], Any]) -> Change:
    """Lie in the binary_data_size of the last input."""

    def made(call: Call) -> tuple[bytes, Headers]:
        parameters = call.inputs[-1]["parameters"]
        parameters["binary_data_size"] = size(parameters["binary_data_size"])
        return call.encoded()

    return made


def _without_header(call: Call) -> tuple[bytes, Headers]:
    return call.encoded()[0], (("Content-Type", "application/octet-stream"),)


def _last_byte_missing(call: Call) -> tuple[bytes, Headers]:
    body, headers = call.encoded()
    return body[:-1], headers


def _bytes_left(call: Call) -> tuple[bytes, Headers]:
    body, headers = call.encoded()
    return body + b"\x00" * 8, headers


def _other_size(change: int) -> Change:
    """Make the last tensor a byte longer or shorter, and say so: it no longer fits its shape."""

    def made(call: Call) -> tuple[bytes, Headers]:
        raw = call.raws[-1]
        call.raws[-1] = raw + b"\x00" if change > 0 else raw[:-1]
        call.inputs[-1]["parameters"]["binary_data_size"] = len(call.raws[-1])
        return call.encoded()

    return made


def _data_too(call: Call) -> tuple[bytes, Headers]:
    tensor = call.inputs[0]
    n_elements = 1
    for size in tensor["shape"]:
        n_elements *= size
    tensor["data"] = [{"BYTES": "1", "BOOL": True}.get(tensor["datatype"], 1)] * n_elements
    return call.encoded()


def _text_changed(change: Callable[[bytes], bytes]) -> Change:
    """Spoil the binary form of an input of BYTES, and give its new size."""

    def made(call: Call) -> tuple[bytes, Headers]:
        for i, tensor in enumerate(call.inputs):
            if tensor["datatype"] == "BYTES":
                call.raws[i] = change(call.raws[i])
                tensor["parameters"]["binary_data_size"] = len(call.raws[i])
                return call.encoded()
        raise Skipped("the model has no input of BYTES")

    return made


def _element_more(raw: bytes) -> bytes:
    return raw + struct.pack("<I", 1) + b"a"


def _length_lies(raw: bytes) -> bytes:
    (length,) = struct.unpack_from("<I", raw)
    return struct.pack("<I", length + 2**31) + raw[4:]


FAULTS = (
    BinaryFault("no-header", "MUST", f"a request with binary tensors and no {JSON_LENGTH}", _without_header),
    BinaryFault("header-too-large", "MUST", f"a {JSON_LENGTH} larger than the body", _with_length(lambda text, body: body + 1)),
    BinaryFault("header-huge", "MUST", f"a {JSON_LENGTH} of 2**64", _with_length(lambda text, body: 2**64)),
    BinaryFault("header-too-small", "MUST", f"a {JSON_LENGTH} that cuts the JSON", _with_length(lambda text, body: text - 3)),
    BinaryFault("header-negative", "MUST", f"a negative {JSON_LENGTH}", _with_length(lambda text, body: -1)),
    BinaryFault("header-no-number", "MUST", f"a {JSON_LENGTH} that is no number", _with_length(lambda text, body: "many")),
    BinaryFault("size-too-large", "MUST", "a binary_data_size larger than what is left", _with_size(lambda size: size + 1)),
    BinaryFault("size-huge", "MUST", "a binary_data_size of 2**62", _with_size(lambda size: 2**62)),
    BinaryFault("size-too-small", "MUST", "a binary_data_size smaller than the shape takes", _with_size(lambda size: size - 1)),
    BinaryFault("size-negative", "MUST", "a negative binary_data_size", _with_size(lambda size: -size)),
    BinaryFault("size-no-number", "SHOULD", "a binary_data_size that is a string", _with_size(str)),
    BinaryFault("size-fraction", "SHOULD", "a binary_data_size that is a fraction", _with_size(lambda size: size + 0.5)),
    BinaryFault("body-too-short", "MUST", "a body that lacks the last byte of the last tensor", _last_byte_missing),
    BinaryFault("bytes-left", "SHOULD", "a body with 8 bytes behind the last tensor", _bytes_left),
    BinaryFault("tensor-too-long", "MUST", "a binary tensor with a byte too many for its shape", _other_size(1)),
    BinaryFault("tensor-too-short", "MUST", "a binary tensor with a byte too few for its shape", _other_size(-1)),
    BinaryFault("data-and-size", "SHOULD", "an input with both data and binary_data_size", _data_too),
    BinaryFault("element-lies", "MUST", "an element of BYTES that says it is longer than the tensor", _text_changed(_length_lies)),
    BinaryFault("elements-missing", "MUST", "a tensor of BYTES with fewer elements than its shape", _text_changed(lambda raw: b"")),
    BinaryFault("elements-too-many", "MUST", "a tensor of BYTES with more elements than its shape", _text_changed(_element_more)),
    BinaryFault("element-cut", "MUST", "a tensor of BYTES that ends within a length", _text_changed(lambda raw: raw + b"\x01\x00")),
)  # fmt: skip

CHECKS = tuple(each for fault in FAULTS for each in fault.checks)


def _send_raw_wrong(server: Server) -> Reply:
    _ = server.binary_base
    return server.post_body(_raw_request(server) + b"\x00", _headers(0))


def _raw_request(server: Server) -> bytes:
    """Return the one input of the model in binary; raises Skipped where the model cannot be asked so."""
    if len(server.model.inputs) != 1:
        raise Skipped("a raw request needs a model with one input")
    spec = server.model.inputs[0]
    if spec.datatype == "BYTES" or spec.shape.count(-1) > 1:
        raise Skipped("a raw request needs an input of numbers with at most one axis of any size")
    call = server.call(binary=True)
    return b"".join(call.raws)


@check(
    "binary.raw-wrong-size",
    "MUST",
    "a raw request with a byte too many is refused",
    f"{DOCUMENT}, Raw Binary Request",
    EXTENSION,
)
def raw_wrong_size(server: Server) -> None:
    _send_raw_wrong(server).expect_refusal()
