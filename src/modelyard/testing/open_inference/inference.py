"""Inference requests before they are encoded, answers after they are read, and what a model says of its tensors."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard.testing.open_inference.check import (
    Failed,
    expect,
    expect_list,
    expect_object,
    expect_text,
    listed,
    shown,
)
from modelyard.testing.open_inference.tensors import NUMPY_DTYPES, Array, from_json, from_raw, same, to_json, to_raw
from modelyard.testing.open_inference.tensors import nested as nested_like
from modelyard.testing.open_inference.wire import Headers, Reply

JSON_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class TensorMetadata:
    """What model metadata says of one tensor; -1 in `shape` is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def batched(self) -> bool:
        """The first axis may have any size: as far as metadata tells, it counts rows."""
        return bool(self.shape) and self.shape[0] == -1

    def sized(self, n_rows: int = 1) -> tuple[int, ...]:
        """Return the shape with `n_rows` rows and 1 on every other axis of any size."""
        sizes = [size if size >= 0 else 1 for size in self.shape]
        return (n_rows, *sizes[1:]) if self.batched else tuple(sizes)

    def fits(self, shape: Iterable[int]) -> bool:
        sizes = tuple(shape)
        return len(sizes) == len(self.shape) and all(a in (-1, b) for a, b in zip(self.shape, sizes, strict=True))


@dataclass(frozen=True)
class Model:
    """A model's metadata."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]

    @property
    def batched(self) -> bool:
        return all(tensor.batched for tensor in (*self.inputs, *self.outputs))

    @property
    def datatypes(self) -> set[str]:
        return {tensor.datatype for tensor in (*self.inputs, *self.outputs)}

    def output(self, name: str) -> TensorMetadata | None:
        return next((tensor for tensor in self.outputs if tensor.name == name), None)


def read_metadata(value: Any) -> Model:
    """Return model metadata from its JSON value; raises Failed. Unknown datatypes pass: they are a check's business."""
    body = expect_object(value, "model metadata")
    return Model(
        name=expect_text(body.get("name"), "name"),
        versions=tuple(expect_text(each, "a version") for each in expect_list(body.get("versions", []), "versions")),
        platform=body["platform"] if isinstance(body.get("platform"), str) else "",
        inputs=_tensors(body, "inputs"),
        outputs=_tensors(body, "outputs"),
    )


def _tensors(body: Mapping[str, Any], key: str) -> tuple[TensorMetadata, ...]:
    tensors = []
    for value in expect_list(body.get(key), key):
        tensor = expect_object(value, f"an element of {key}")
        name = expect_text(tensor.get("name"), f"the name of one of the {key}")
        shape = expect_list(tensor.get("shape"), f"the shape of {name!r}")
        whole = all(type(size) is int and size >= -1 for size in shape)
        expect(whole, f"the shape of {name!r} must be whole numbers from -1, got {shown(shape)}")
        tensors.append(
            TensorMetadata(name, expect_text(tensor.get("datatype"), f"the datatype of {name!r}"), tuple(shape))
        )
    return tuple(tensors)


@dataclass
class Call:
    """An inference request that a check may still change: the JSON value, and the binary tensors behind it."""

    body: dict[str, Any]
    raws: list[bytes] = field(default_factory=list)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        tensors: list[dict[str, Any]] = self.body["inputs"]
        return tensors

    @property
    def first_json_input(self) -> dict[str, Any] | None:
        return next((tensor for tensor in self.inputs if "data" in tensor), None)

    def copy(self) -> "Call":
        return Call(copy.deepcopy(self.body), list(self.raws))

    def add(self, tensor: TensorMetadata, array: Array, *, binary: bool = False, nested: bool = False) -> None:
        """Append an input."""
        value: dict[str, Any] = {"name": tensor.name, "shape": list(array.shape), "datatype": tensor.datatype}
        if binary:
            self.raws.append(to_raw(array, tensor.datatype))
            value["parameters"] = {"binary_data_size": len(self.raws[-1])}
        else:
            flat = to_json(array, tensor.datatype)
            value["data"] = nested_like(flat, array.shape) if nested else flat
        self.inputs.append(value)

    def ask_for(self, name: str, **parameters: Any) -> None:
        """Append an output to those requested."""
        output: dict[str, Any] = {"name": name}
        if parameters:
            output["parameters"] = parameters
        self.body.setdefault("outputs", []).append(output)

    def encoded(self) -> tuple[bytes, Headers]:
        """Return the HTTP body and the headers that go with it."""
        text = json.dumps(self.body).encode()
        if not self.raws:
            return text, (("Content-Type", "application/json"),)
        headers = (("Content-Type", "application/octet-stream"), (JSON_LENGTH, str(len(text))))
        return b"".join((text, *self.raws)), headers


@dataclass(frozen=True)
class Output:
    """One output of an answer."""

    name: str
    datatype: str
    array: Array
    binary: bool = False


@dataclass(frozen=True)
class Answer:
    """An inference response, read."""

    body: Mapping[str, Any]
    outputs: Mapping[str, Output]

    def __getitem__(self, name: str) -> Output:
        if name not in self.outputs:
            raise Failed(f"output {name!r} is not in the answer, which has {listed(self.outputs)}")
        return self.outputs[name]

    def expect_same(self, other: "Answer", what: str) -> None:
        """Raise Failed unless `other`, which is `what`, has the same outputs with the same values."""
        if self.outputs.keys() != other.outputs.keys():
            raise Failed(f"{what} has the outputs {listed(other.outputs)}, expected {listed(self.outputs)}")
        for name, output in self.outputs.items():
            expect_same_output(output, other.outputs[name], what)


def expect_same_output(expected: Output, got: Output, what: str) -> None:
    if got.datatype != expected.datatype or got.array.shape != expected.array.shape:
        a, b = f"{expected.datatype} {list(expected.array.shape)}", f"{got.datatype} {list(got.array.shape)}"
        raise Failed(f"{what}: output {expected.name!r} is {b}, expected {a}")
    if not same(expected.array, got.array, expected.datatype):
        a, b = (shown(each.array.reshape(-1)[:8].tolist()) for each in (expected, got))
        raise Failed(f"{what}: output {expected.name!r} is {b}, expected {a}")


def read_answer(reply: Reply) -> Answer:
    """Return the answer to an inference request; raises Failed unless it is a 200 and can be read."""
    reply.expect(200)
    length = reply.header(JSON_LENGTH)
    if length is None:
        return _answer(reply.json(), b"")
    if not length.isdigit() or not 0 < int(length) <= len(reply.body):
        raise Failed(f"{JSON_LENGTH} is {length!r}, the body has {len(reply.body)} bytes")
    try:
        value = json.loads(reply.body[: int(length)])
    except ValueError as exc:
        raise Failed(f"the first {length} bytes of the body, as {JSON_LENGTH} says, are not JSON: {exc}") from exc
    return _answer(value, reply.body[int(length) :])


def _answer(value: Any, binary: bytes) -> Answer:
    body = expect_object(value, "the body")
    outputs: dict[str, Output] = {}
    offset = 0
    for tensor in expect_list(body.get("outputs"), "outputs"):
        output, n_bytes = _output(expect_object(tensor, "an output"), binary[offset:])
        expect(output.name not in outputs, f"output {output.name!r} comes twice")
        outputs[output.name] = output
        offset += n_bytes
    expect(offset == len(binary), f"{len(binary) - offset} bytes are left behind the last binary tensor")
    return Answer(body, outputs)


def _output(tensor: Mapping[str, Any], binary: bytes) -> tuple[Output, int]:
    """Return an output, and how many bytes of `binary` it took."""
    name = expect_text(tensor.get("name"), "the name of an output")
    datatype = expect_text(tensor.get("datatype"), f"output {name!r}: datatype")
    expect(datatype in NUMPY_DTYPES, f"output {name!r}: there is no datatype {datatype}")
    shape = expect_list(tensor.get("shape"), f"output {name!r}: shape")
    whole = all(type(size) is int and size >= 0 for size in shape)
    expect(whole, f"output {name!r}: the shape must be whole numbers from 0, got {shown(shape)}")
    parameters = tensor.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return Output(name, datatype, from_json(tensor.get("data"), datatype, shape, f"output {name!r}")), 0
    expect("data" not in tensor, f"output {name!r} has both data and binary_data_size")
    expect(
        type(size) is int and 0 <= size <= len(binary),
        f"output {name!r}: binary_data_size is {shown(size)}, {len(binary)} bytes are left",
    )
    return Output(name, datatype, from_raw(binary[:size], datatype, shape, f"output {name!r}"), binary=True), size
