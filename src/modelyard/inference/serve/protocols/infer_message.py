"""The messages of ModelInfer: a ModelInferRequest's bytes ↔ what is asked of a model, checked against its signature.

A client sends the same request again and again, with another id and other numbers. What lies around those is an `Outline`: it
is parsed once, checked once for each version it asks, and looked up by its bytes from then on. Answers are put together from
parts that protocol buffers have encoded before; outputs always go out in raw_output_contents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.explain import timeline
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols.open_inference import Wanted, priority_of, rows_of, timeout_of, wanted_output
from modelyard.inference.serve.protocols.protos import message
from modelyard.inference.serve.protocols.tensors import array_from_raw, check_shape, classes, raw_from_array

_MODEL_NAME, _MODEL_VERSION, _ID, _RAW_INPUT, _RAW_OUTPUT = 0x0A, 0x12, 0x1A, 0x3A, 0x32
"""Tags, as protocol buffers write them: field number and, for what has a length, type 2."""
_MAX_KNOWN, _MAX_KNOWN_BYTES = 256, 4096
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class Outline:
    """All of an inference request but its id and the numbers in raw_input_contents."""

    __slots__ = ("marks", "middle", "name", "parts", "raws", "request", "version")

    def __init__(self, request: Any) -> None:
        self.request = request
        self.name: str = request.model_name
        self.version: str | None = request.model_version or None
        self.middle = b""
        """The bytes from behind the id up to the first raw tensor."""
        self.marks: tuple[tuple[int, bytes], ...] = ()
        """What stands before each further one, and where, counted from behind the id."""
        self.raws: tuple[tuple[int, int], ...] | None = None
        """Where each raw tensor begins and ends, counted from behind the id; None where only `parts` tells."""
        self.parts: list[bytes] = list(request.raw_input_contents)


class Ask:
    """What an outline asks of one version, checked against its signature."""

    __slots__ = ("arrays", "explain", "frames", "head", "n_rows", "order", "outputs", "priority", "shapes", "timeout_s")

    def __init__(self, n_rows: int, outputs: tuple[Wanted, ...]) -> None:
        self.n_rows = n_rows
        self.outputs = outputs
        self.timeout_s: float | None = None
        self.priority = 0
        self.explain = False
        self.order: tuple[int, ...] = ()
        """For each input of the signature, which raw tensor it is."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.arrays: dict[str, NDArray[Any]] = {}
        """Inputs that came as contents."""
        self.head = b""
        self.frames: tuple[tuple[str, int, bytes], ...] | None = None
        """For each output its name, bytes a row and what goes before its bytes, where that is always the same."""


class Codec:
    """Reads requests to one version and writes its answers."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._packer = Packer(signature)
        self._known: dict[Outline, Ask] = {}
        self._response = message("inference.ModelInferResponse")

    def call(self, outline: "Outline", data: bytes, request_id: bytes, at: int) -> Call:
        """Return what a message asks, whose id ends at `at`; raises RequestError."""
        ask = self._known.get(outline)
        if ask is None:
            ask = read_ask(outline, self._signature)
            if outline.raws is not None:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[outline] = ask
        packer = self._packer
        raws = outline.raws
        if ask.arrays:
            call = packer.pack(ask.arrays, ask.n_rows, unchecked=True)
        else:
            view = memoryview(data)
            parts = outline.parts if raws is None else [view[at + start : at + end] for start, end in raws]
            if packer.takes_raw:
                call = Call(tuple([parts[i] for i in ask.order]), ask.n_rows, unchecked=True)
            else:
                call = packer.pack(self._arrays(ask, parts), ask.n_rows, unchecked=True)
        call.timeout_s, call.priority, call.form = ask.timeout_s, ask.priority, (ask, request_id)
        call.explain = ask.explain
        return call

    def answer(self, call: Call) -> bytes:
        """Return the ModelInferResponse to a call that has been run."""
        ask, request_id = call.form
        frames: tuple[tuple[str, int, bytes], ...] | None = ask.frames
        if frames is None:
            frames = self._prepare(ask, call)
        written: list[bytes] = [ask.head]
        if request_id:
            written.append(field(_ID, request_id))
        if call.explain or ask.explain:
            text = orjson.dumps(timeline(call)).decode()
            written.append(self._response(parameters={"timeline": {"string_param": text}}).SerializeToString())
        if not frames:
            written += self._outputs(ask, call)
            return b"".join(written)
        run = call.run
        assert run is not None
        n_rows, scratch = call.n_rows, run.scratch
        for name, row_bytes, frame in frames:
            raw = scratch.get(name)
            if raw is None:
                raw = scratch[name] = raw_from_array(run.outputs[name])
            if run.n_rows != n_rows:
                start = call.first_row * row_bytes
                raw = raw[start : start + n_rows * row_bytes]
            written.append(frame)
            written.append(raw)
        return b"".join(written)

    def _arrays(self, ask: "Ask", parts: Sequence[bytes | memoryview]) -> dict[str, NDArray[Any]]:
        return {
            spec.name: array_from_raw(memoryview(parts[i]), spec, ask.shapes[spec.name])
            for spec, i in zip(self._signature.inputs, ask.order, strict=True)
        }

    def _prepare(self, ask: "Ask", call: Call) -> tuple[tuple[str, int, bytes], ...]:
        """Find out what all answers to an ask have in common; no frames where its outputs may differ in size."""
        loaded, run = call.loaded, call.run
        assert loaded is not None
        assert run is not None
        ask.head = self._response(model_name=loaded.name, model_version=str(loaded.version)).SerializeToString()
        fixed = all(
            wanted.spec.batched
            and not wanted.n_classes
            and wanted.spec.datatype != "BYTES"
            and all(isinstance(axis, int) for axis in wanted.spec.row_shape)
            for wanted in ask.outputs
        )
        frames = []
        if fixed:
            arrays = [(wanted.spec, call.output(wanted.spec.name)) for wanted in ask.outputs]
            described = b"".join([self._described(spec, array.shape, spec.datatype) for spec, array in arrays])
            for spec, array in arrays:
                n_bytes = array.dtype.itemsize * array.size
                frames.append((spec.name, n_bytes // ask.n_rows, described + field(_RAW_OUTPUT, b"", n_bytes)))
                described = b""
        ask.frames = tuple(frames)
        return ask.frames

    def _outputs(self, ask: "Ask", call: Call) -> list[bytes]:
        """Return the outputs and their tensors."""
        described, raws = [], []
        for wanted in ask.outputs:
            array, datatype = call.output(wanted.spec.name), wanted.spec.datatype
            if wanted.n_classes:
                array, datatype = classes(array, wanted.spec, wanted.n_classes), "BYTES"
            described.append(self._described(wanted.spec, array.shape, datatype))
            raws.append(field(_RAW_OUTPUT, raw_from_array(array)))
        return described + raws

    def _described(self, spec: TensorSpec, shape: tuple[int, ...], datatype: str) -> bytes:
        output = {"name": spec.name, "datatype": datatype, "shape": shape}
        encoded: bytes = self._response(outputs=[output]).SerializeToString()
        return encoded


class Outlines:
    """Finds the outline of a request."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], Outline] = {}
        self._request = message("inference.ModelInferRequest")

    def read(self, data: bytes) -> tuple[Outline, bytes, int]:
        """Return the outline, the request's id, and where in `data` the id ends; raises RequestError."""
        try:
            # Encoders write fields in their order: name, version, id. What is written otherwise is read the long way.
            at = 2 + data[1] if data[0] == _MODEL_NAME else 0
            if data[at] == _MODEL_VERSION:
                at += 2 + data[at + 1]
            name = data[:at]
            request_id = b""
            if data[at] == _ID and data[at + 1] < 128:
                end = at + 2 + data[at + 1]
                request_id = data[at + 2 : end]
                at = end
        except IndexError:
            outline = self._parsed(data)
            return outline, outline.request.id.encode(), 0
        size = len(data) - at
        known = self._known.get((name, size))
        if known is not None and data.startswith(known.middle, at) and (not known.marks or _marked(data, at, known)):
            return known, request_id, at
        outline = self._parsed(data)
        if outline.request.id.encode() != request_id or not self._locate(outline, data, at, name):
            return outline, outline.request.id.encode(), 0
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[name, size] = outline
        return outline, request_id, at

    def _parsed(self, data: bytes) -> Outline:
        try:
            request = self._request.FromString(data)
        except DecodeError as exc:
            raise RequestError(f"the message is not a ModelInferRequest: {exc}") from exc
        return Outline(request)

    def _locate(self, outline: Outline, data: bytes, at: int, name: bytes) -> bool:
        """Find the raw tensors in `data`; False where it is not written the usual way, or is too long to remember."""
        parts = outline.parts
        frames = [field(_RAW_INPUT, b"", len(part)) for part in parts]
        begin = len(data) - at - sum(map(len, parts)) - sum(map(len, frames))
        usual = self._request(model_name=outline.name, model_version=outline.version or "").SerializeToString()
        if not parts or usual != name or not 0 <= begin <= _MAX_KNOWN_BYTES:
            return False
        raws, marks = [], []
        end = begin
        for frame, part in zip(frames, parts, strict=True):
            marks.append((end, frame))
            start = end + len(frame)
            end = start + len(part)
            raws.append((start, end))
        outline.marks = tuple(marks)
        if not _marked(data, at, outline) or any(
            data[at + i : at + j] != part for (i, j), part in zip(raws, parts, strict=True)
        ):
            return False
        outline.middle = data[at : at + raws[0][0]]
        outline.marks = tuple(marks[1:])
        outline.raws = tuple(raws)
        outline.parts = []
        outline.request.ClearField("raw_input_contents")
        return True


def _marked(data: bytes, at: int, outline: Outline) -> bool:
    return all(data.startswith(mark, at + offset) for offset, mark in outline.marks)


def field(tag: int, value: bytes, size: int = -1) -> bytes:
    """Return a field with a length as protocol buffers write it; with `size`, what goes before a value of that size."""
    size = len(value) if size < 0 else size
    head = bytearray((tag,))
    while size >= 128:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + value


def read_ask(outline: Outline, signature: Signature) -> Ask:
    """Return what is asked, checked against the signature.

    Raises:
        RequestError: names what is missing, unknown, of the wrong type, shape or length.
    """
    request = outline.request
    sizes = (
        [len(part) for part in outline.parts] if outline.raws is None else [end - start for start, end in outline.raws]
    )
    with_contents = [tensor.name for tensor in request.inputs if tensor.HasField("contents")]
    if sizes and with_contents:
        raise RequestError(
            f"input {with_contents[0]!r} has contents, and there are raw_input_contents too; use one of them for all inputs"
        )
    if sizes and len(sizes) != len(request.inputs):
        raise RequestError(f"{len(request.inputs)} inputs and {len(sizes)} raw_input_contents; send one for each input")
    names = [spec.name for spec in signature.inputs]
    places: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for place, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in names:
            raise RequestError(f"unknown input {name!r:.100}; this model takes {', '.join(names)}")
        if name in places:
            raise RequestError(f"input {name!r} is given twice; give it once")
        spec = signature.input(name)
        if tensor.datatype != spec.datatype:
            raise RequestError(f"input {name!r} must have the datatype {spec.datatype}, got {tensor.datatype!r:.60}")
        _refuse_shared_memory(parameters_of(tensor.parameters), f"input {name!r}")
        places[name] = place
        shapes[name] = check_shape(list(tensor.shape), spec)
        if not sizes:
            arrays[name] = _array_from_contents(tensor, spec, shapes[name])
        elif spec.datatype != "BYTES":
            takes = int(np.prod(shapes[name], dtype=object)) * spec.numpy_dtype.itemsize
            if sizes[place] != takes:
                raise RequestError(
                    f"input {name!r}: its raw_input_contents has {sizes[place]} bytes, {spec.datatype} of shape {list(shapes[name])} "
                    f"takes {takes}"
                )
    missing = [name for name in names if name not in places]
    if missing:
        raise RequestError(f"input {missing[0]!r} is missing; this model takes {', '.join(names)}")
    parameters = parameters_of(request.parameters)
    ask = Ask(rows_of(shapes, signature), _read_outputs(request, signature))
    ask.timeout_s, ask.priority = timeout_of(parameters), priority_of(parameters)
    ask.explain = parameters.get("explain") is True
    ask.shapes, ask.arrays = shapes, arrays
    ask.order = tuple(places[name] for name in names)
    return ask


def _read_outputs(request: Any, signature: Signature) -> tuple[Wanted, ...]:
    if not request.outputs:
        return tuple(Wanted(spec, binary=True) for spec in signature.outputs)
    names = [spec.name for spec in signature.outputs]
    outputs = []
    seen: set[str] = set()
    for output in request.outputs:
        if output.name not in names:
            raise RequestError(f"unknown output {output.name!r:.100}; this model gives {', '.join(names)}")
        if output.name in seen:  # a short request could otherwise have an answer of any length
            raise RequestError(f"output {output.name!r} is asked for twice; ask for it once")
        seen.add(output.name)
        parameters = parameters_of(output.parameters)
        _refuse_shared_memory(parameters, f"output {output.name!r}")
        outputs.append(wanted_output(signature.output(output.name), True, parameters.get("classification", 0)))
    return tuple(outputs)


def parameters_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a map of parameters, each a message with one of several fields set, as plain values."""
    plain = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        plain[name] = None if kind is None else getattr(parameter, kind)
    return plain


def _refuse_shared_memory(parameters: Mapping[str, Any], what: str) -> None:
    if "shared_memory_region" in parameters:
        raise RequestError(f"{what}: shared memory is not offered; send the data in the request")


def _array_from_contents(tensor: Any, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    kind = _CONTENTS.get(spec.datatype)
    if kind is None:
        raise RequestError(f"input {spec.name!r}: contents cannot hold {spec.datatype}; use raw_input_contents")
    wrong = [other.name for other, _ in tensor.contents.ListFields() if other.name != kind]
    if wrong:
        raise RequestError(f"input {spec.name!r}: {spec.datatype} goes into {kind}, got {wrong[0]}")
    values = list(getattr(tensor.contents, kind))
    n_values = int(np.prod(shape, dtype=object))
    if len(values) != n_values:
        raise RequestError(
            f"input {spec.name!r}: {kind} has {len(values)} values, the shape {list(shape)} takes {n_values}"
        )
    if spec.datatype == "BYTES":
        texts = np.empty(n_values, dtype=object)
        try:
            texts[:] = [value.decode() for value in values]
        except UnicodeDecodeError as exc:
            raise RequestError(f"input {spec.name!r} holds what is not UTF-8 text ({exc}); send text") from exc
        return texts.reshape(shape)
    dtype = spec.numpy_dtype
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        outside = next((value for value in values if not bounds.min <= value <= bounds.max), None)
        if outside is not None:
            raise RequestError(
                f"input {spec.name!r}: {outside} does not fit {spec.datatype}, {bounds.min} to {bounds.max}"
            )
    return np.array(values, dtype=dtype).reshape(shape)
