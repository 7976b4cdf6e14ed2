"""Messages of ModelInfer: what is read from their bytes, and that remembering an outline never changes what is read."""

import re
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.calls import NO_TERMS, Call, Run
from modelyard.inference.serve.protocols.infer_message import Codec, Outlines, read_ask
from modelyard.inference.serve.protocols.protos import COMPILED, file_descriptors, message, pool

Request = message("inference.ModelInferRequest")
Response = message("inference.ModelInferResponse")

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", datatype="FP32", shape=(BATCH, 3)),
        TensorSpec(name="n", datatype="INT8", shape=(BATCH,)),
    ),
    outputs=(
        TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 2), labels=("no", "yes")),
        TensorSpec(name="word", datatype="BYTES", shape=(BATCH,)),
    ),
)
TYPES = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [1.5, -0.0]),
    "FP64": ("fp64_contents", [0.1, 1e300]),
    "BYTES": ("bytes_contents", [b"", "drück ✈".encode()]),
}


def request(n_rows: int = 2, **fields: Any) -> Any:
    """Return a good request with raw tensors."""
    made = Request(model_name="m", **fields)
    made.inputs.add(name="x", datatype="FP32", shape=[n_rows, 3])
    made.inputs.add(name="n", datatype="INT8", shape=[n_rows])
    made.raw_input_contents.append(np.arange(n_rows * 3, dtype="<f4").tobytes())
    made.raw_input_contents.append(np.arange(n_rows, dtype=np.int8).tobytes())
    return made


def call_of(made: Any, codec: Codec | None = None, outlines: Outlines | None = None) -> Call:
    data = made.SerializeToString()
    outline, request_id, at = (outlines or Outlines()).read(data)
    return (codec or Codec(SIGNATURE)).call(outline, data, request_id, at)


def parts_of(call: Call) -> list[Any]:
    return [bytes(part) if isinstance(part, memoryview) else part for part in call.inputs]


class TestReading:
    def test_raw_tensors_go_to_the_model_as_they_came(self) -> None:
        call = call_of(request(3))
        assert call.n_rows == 3
        assert parts_of(call) == [np.arange(9, dtype="<f4").tobytes(), bytes((0, 1, 2))]

    def test_inputs_are_told_by_name(self) -> None:
        made = request(3)
        turned = Request(
            model_name="m", inputs=reversed(made.inputs), raw_input_contents=reversed(made.raw_input_contents)
        )
        assert parts_of(call_of(turned)) == parts_of(call_of(made))

    def test_parameters(self) -> None:
        made = request()
        made.parameters["timeout"].int64_param = 2500
        made.parameters["priority"].uint64_param = 3
        made.parameters["unknown"].string_param = "passed over"
        call = call_of(made)
        assert (call.timeout_s, call.priority) == (0.0025, 3)

    @pytest.mark.parametrize("datatype", TYPES)
    def test_contents_of_every_type(self, datatype: str) -> None:
        kind, values = TYPES[datatype]
        spec = TensorSpec(name="a", datatype=datatype, shape=(BATCH,))  # type: ignore[arg-type]  # one of the literals
        signature = Signature(inputs=(spec,), outputs=SIGNATURE.outputs)
        made = Request(model_name="m")
        tensor = made.inputs.add(name="a", datatype=datatype, shape=[2])
        getattr(tensor.contents, kind).extend(values)
        (part,) = call_of(made, Codec(signature)).inputs
        if datatype == "BYTES":
            assert part == ["", "drück ✈"]
        else:
            assert np.frombuffer(part, spec.numpy_dtype).tolist() == values  # type: ignore[arg-type]


WRONG: dict[str, Any] = {
    "unknown input 'y'": lambda r: setattr(r.inputs[0], "name", "y"),
    "is given twice": lambda r: setattr(r.inputs[1], "name", "x"),
    "must have the datatype FP32, got 'FP64'": lambda r: setattr(r.inputs[0], "datatype", "FP64"),
    r"must have the shape \[-1, 3\]": lambda r: r.inputs[0].shape.append(1),
    "same number of rows": lambda r: (r.inputs[1].shape.__setitem__(0, 3), r.raw_input_contents.__setitem__(1, bytes(3))),
    "2 inputs and 1 raw_input_contents": lambda r: r.raw_input_contents.pop(),
    "has 7 bytes, FP32 of shape": lambda r: r.raw_input_contents.__setitem__(0, bytes(7)),
    "is missing": lambda r: (r.inputs.pop(), r.raw_input_contents.pop()),
    "use one of them": lambda r: r.inputs[0].contents.fp32_contents.append(1),
    "unknown output 'z'": lambda r: r.outputs.add(name="z"),
    "holds no scores": lambda r: r.outputs.add(name="word").parameters["classification"].__setattr__("int64_param", 1),
    "classification must be a number": lambda r: r.outputs.add(name="scores").parameters["classification"].__setattr__("string_param", "1"),
    "shared memory": lambda r: r.inputs[0].parameters["shared_memory_region"].__setattr__("string_param", "r"),
    "timeout must be": lambda r: r.parameters["timeout"].__setattr__("string_param", "1"),
    "priority must be": lambda r: r.parameters["priority"].__setattr__("int64_param", -1),
}  # fmt: skip
WRONG_CONTENTS: dict[str, Any] = {
    "fp32_contents has 5 values": lambda r: r.inputs[0].contents.fp32_contents.extend(range(5)),
    "FP32 goes into fp32_contents, got fp64_contents": lambda r: r.inputs[0].contents.fp64_contents.extend(range(6)),
    "300 does not fit INT8": lambda r: (
        r.inputs[0].contents.fp32_contents.extend(range(6)), r.inputs[1].contents.int_contents.extend([1, 300]),
    ),
    "fp32_contents has 0 values": lambda r: None,
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_request_is_explained(message: str) -> None:
    made = request()
    WRONG[message](made)
    with pytest.raises(RequestError, match=message):
        call_of(made)


@pytest.mark.parametrize("message", WRONG_CONTENTS)
def test_wrong_contents_are_explained(message: str) -> None:
    made = request()
    made.ClearField("raw_input_contents")
    WRONG_CONTENTS[message](made)
    with pytest.raises(RequestError, match=message):
        call_of(made)


def test_what_contents_cannot_hold_must_come_raw() -> None:
    signature = Signature(inputs=(TensorSpec(name="h", datatype="FP16", shape=(BATCH,)),), outputs=SIGNATURE.outputs)
    made = Request(model_name="m", inputs=[{"name": "h", "datatype": "FP16", "shape": [1]}])
    with pytest.raises(RequestError, match="contents cannot hold FP16; use raw_input_contents"):
        call_of(made, Codec(signature))


@pytest.mark.parametrize("data", [b"\xff", b"\x0a", b"\x0a\x05ab", b"\x1a\x7fabc", b"\x0a\x02\xff\xfe"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError, match="not a ModelInferRequest"):
        Outlines().read(data)


class TestAnswers:
    def answer(self, made: Any, codec: Codec, n_rows: int, first_row: int, of_rows: int, loaded: Any) -> Any:
        call = call_of(made, codec)
        scores = np.arange(of_rows * 2, dtype=np.float32).reshape(of_rows, 2)
        words = np.array([f"w{i}" for i in range(of_rows)], dtype=object)
        call.run = Run({"scores": scores, "word": words}, of_rows, 1, "instance free", 0.0, 0.0)
        call.first_row, call.loaded, call.terms = first_row, loaded, NO_TERMS
        assert call.n_rows == n_rows
        return Response.FromString(codec.answer(call))

    @pytest.mark.parametrize("outputs", [[], ["scores"], ["word", "scores"]])
    @pytest.mark.parametrize("request_id", ["", "seven"])
    def test_every_call_of_a_run_gets_its_own_rows(self, outputs: list[str], request_id: str) -> None:
        codec = Codec(SIGNATURE)
        loaded = type("Model", (), {"name": "m", "version": 4})()
        for first_row in (0, 2, 3):
            made = request(2, id=request_id, outputs=[{"name": name} for name in outputs])
            response = self.answer(made, codec, 2, first_row, 5, loaded)
            assert (response.model_name, response.model_version, response.id) == ("m", "4", request_id)
            wanted = outputs or ["scores", "word"]
            assert [output.name for output in response.outputs] == wanted
            raws = dict(zip(wanted, response.raw_output_contents, strict=True))
            for output in response.outputs:
                if output.name == "scores":
                    assert (output.datatype, list(output.shape)) == ("FP32", [2, 2])
                    assert np.frombuffer(raws["scores"], "<f4").tolist() == [first_row * 2.0 + i for i in range(4)]
                else:
                    words = [b"w%d" % (first_row + i) for i in range(2)]
                    assert raws["word"] == b"".join(len(word).to_bytes(4, "little") + word for word in words)

    def test_classification(self) -> None:
        made = request(1)
        made.outputs.add(name="scores").parameters["classification"].int64_param = 1
        response = self.answer(made, Codec(SIGNATURE), 1, 1, 2, type("Model", (), {"name": "m", "version": 4})())
        assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [1, 1])
        assert response.raw_output_contents[0][4:] == b"3.000000:1:yes"


names = st.text(st.characters(codec="utf-8"), max_size=140)


@given(
    st.lists(
        st.tuples(names, names, names, st.integers(1, 3), st.binary(min_size=8, max_size=8), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
@settings(deadline=None)
def test_law_remembering_outlines_changes_nothing_that_is_read(
    asked: list[tuple[str, str, str, int, bytes, bool]],
) -> None:
    outlines = Outlines()
    for name, version, request_id, n_tensors, raw, with_contents in asked * 2:
        made = Request(model_name=name, model_version=version, id=request_id)
        for i in range(n_tensors):
            made.inputs.add(name=f"i{i}", datatype="FP32", shape=[2])
            if with_contents:
                made.inputs[i].contents.fp32_contents.extend([1, 2])
            else:
                made.raw_input_contents.append(raw * (i + 1))
        data = made.SerializeToString()
        outline, got_id, at = outlines.read(data)
        assert (outline.name, outline.version, got_id) == (name, version or None, request_id.encode())
        raws = outline.parts if outline.raws is None else [data[at + start : at + end] for start, end in outline.raws]
        assert raws == list(made.raw_input_contents)
        assert outline.request.inputs == made.inputs


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_law_whatever_the_bytes_remembering_changes_nothing(data: st.DataObject) -> None:
    """A damaged message is read the same way by who knows the good one and by who does not."""
    knows = Outlines()
    good = request(2, id="7").SerializeToString()
    knows.read(good)
    damaged = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))

    def read(outlines: Outlines) -> Any:
        try:
            outline, request_id, at = outlines.read(bytes(damaged))
        except RequestError:
            return None
        raws = outline.parts if outline.raws is None else [bytes(damaged[at + i : at + j]) for i, j in outline.raws]
        return outline.name, outline.version, outline.request.inputs, raws, request_id

    fresh = read(Outlines())
    known = read(knows)
    if fresh is not None or (known is not None and known[4].isascii()):
        assert known == fresh


@given(st.binary(max_size=200))
def test_law_no_bytes_break_the_reader(data: bytes) -> None:
    try:
        outline, _, _ = Outlines().read(data)
        read_ask(outline, SIGNATURE)
    except RequestError:
        pass


class TestProtos:
    def test_messages_are_those_of_the_public_protocols(self) -> None:
        """By name, number, type and label of every field, as unmodified clients have them."""
        from grpc_health.v1 import health_pb2
        from grpc_reflection.v1alpha import reflection_pb2
        from tritonclient.grpc import model_config_pb2, service_pb2

        public: dict[str, Any] = {}
        for module in (service_pb2, model_config_pb2, health_pb2, reflection_pb2):
            file = descriptor_pb2.FileDescriptorProto()
            module.DESCRIPTOR.CopyToProto(file)
            public |= _fields(file)
        for file in file_descriptors().file:
            for name, described in _fields(file).items():
                assert described == public[name.replace("reflection.v1.", "reflection.v1alpha.")], name

    def test_classes_live_in_a_pool_of_their_own(self) -> None:
        from tritonclient.grpc import service_pb2

        assert Request is not service_pb2.ModelInferRequest
        assert service_pb2.ModelInferRequest.FromString(request().SerializeToString()).model_name == "m"

    def test_the_compiled_file_says_what_the_sources_say(self) -> None:
        """Every field, enum value and method; `scripts/compile_protos.py --check` compares the rest."""
        for file in file_descriptors().file:
            source = re.sub(r"//.*", "", (COMPILED.parent / file.name).read_text())
            numbered = re.findall(r"^ *(?:repeated )?(?:[\w.]+|map<[\w., ]+>)? ?\b(\w+) = (\d+);", source, re.MULTILINE)
            methods = re.findall(r"rpc (\w+)", source)
            described = _fields(file)
            assert sorted((*numbered, *((name, "rpc") for name in methods))) == sorted(
                (
                    name.rpartition(".")[2],
                    "rpc" if isinstance(value, tuple) and len(value) == 4 else str(_number(value)),
                )
                for name, value in described.items()
                if "Entry." not in name
            ), file.name

    def test_reflection_can_find_every_file(self) -> None:
        assert {file.name for file in file_descriptors().file} >= {"inference.proto", "model_config.proto"}
        assert pool().FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]


def _number(value: Any) -> int:
    number: int = value[0] if isinstance(value, tuple) else value
    return number


def _fields(file: Any) -> dict[str, Any]:
    """Return what defines each field, enum value and method, by full name."""
    found: dict[str, Any] = {}

    def walk(prefix: str, described: Any) -> None:
        for one in described.field:
            kind = one.type_name.replace("reflection.v1.", "reflection.v1alpha.")
            found[f"{prefix}.{one.name}"] = (one.number, one.type, one.label, kind, one.HasField("oneof_index"))
        for enum in described.enum_type:
            found.update({f"{prefix}.{enum.name}.{value.name}": value.number for value in enum.value})
        for nested in described.nested_type:
            walk(f"{prefix}.{nested.name}", nested)

    for top in file.message_type:
        walk(f"{file.package}.{top.name}", top)
    for enum in file.enum_type:
        found.update({f"{file.package}.{enum.name}.{value.name}": value.number for value in enum.value})
    for service in file.service:
        for method in service.method:
            kinds = [
                kind.replace("reflection.v1.", "reflection.v1alpha.")
                for kind in (method.input_type, method.output_type)
            ]
            streams = (method.client_streaming, method.server_streaming)
            found[f"{file.package}.{service.name}.{method.name}"] = (*kinds, *streams)
    return found
