"""The reader that needs no onnx package agrees with the onnx package."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelyard.bundle import graph as graph_module
from modelyard.bundle.graph import read_graph
from modelyard.bundle.manifest import Signature
from modelyard.errors import MalformedGraph, SignatureMismatch, TooLarge
from modelyard.testing.bundles import late_model

VALUE = helper.make_tensor_value_info


def linear(batch: str | int | None) -> onnx.ModelProto:
    """y = x W + b, (batch, 3) → (batch, 2), the weights also listed as inputs, as old exporters did."""
    weights = [
        numpy_helper.from_array(np.ones((3, 2), np.float32), "W"),
        numpy_helper.from_array(np.zeros(2, np.float32), "b"),
    ]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "W", "b"], ["y"])],
        "linear",
        [
            VALUE("x", TensorProto.FLOAT, [batch, 3]),
            VALUE("W", TensorProto.FLOAT, [3, 2]),
            VALUE("b", TensorProto.FLOAT, [2]),
        ],
        [VALUE("y", TensorProto.FLOAT, [batch, 2])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="hand")


def branching() -> onnx.ModelProto:
    """Subgraphs, a function, and an operator of another domain inside it."""
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"])], "then", [], [VALUE("n", TensorProto.DOUBLE, None)]
    )
    other = helper.make_graph(
        [helper.make_node("F", ["x"], ["f"], domain="ours")], "else", [], [VALUE("f", TensorProto.DOUBLE, None)]
    )
    body = [helper.make_node("Abs", ["a"], ["t"]), helper.make_node("Gelu", ["t"], ["o"], domain="com.microsoft")]
    function = helper.make_function(
        "ours", "F", ["a"], ["o"], body, [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        "branching",
        [VALUE("x", TensorProto.DOUBLE, ["n", "width", None, 4]), VALUE("c", TensorProto.BOOL, [])],
        [VALUE("y", TensorProto.DOUBLE, ["n", "width", None, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ours", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function])


MODELS = {
    "dynamic-batch": linear("n"),
    "nameless-batch": linear(None),
    "fixed-batch": linear(8),
    "strings": onnx.load_from_string(late_model()),
    "branching": branching(),
}
DATATYPES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64",
    TensorProto.STRING: "BYTES",
    TensorProto.BOOL: "BOOL",
}


def nodes_of(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield every node of a model as the onnx package sees it."""
    open_ = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while open_:
        node = open_.pop()
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                open_.extend(attribute.g.node)


@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_with_the_onnx_package(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    onnx.save(model, tmp_path / "model.onnx")
    graph = read_graph(tmp_path / "model.onnx")

    weights = {tensor.name for tensor in model.graph.initializer}
    for ours, theirs in (
        (graph.signature.inputs, [value for value in model.graph.input if value.name not in weights]),
        (graph.signature.outputs, list(model.graph.output)),
    ):
        assert [spec.name for spec in ours] == [value.name for value in theirs]
        for spec, value in zip(ours, theirs, strict=True):
            tensor = value.type.tensor_type
            assert spec.datatype == DATATYPES[tensor.elem_type]
            assert len(spec.shape) == len(tensor.shape.dim)
            for axis, dim in zip(spec.shape, tensor.shape.dim, strict=True):
                assert (axis == dim.dim_value) if dim.HasField("dim_value") else isinstance(axis, str)
    counted = Counter(f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in nodes_of(model))
    assert graph.operators == dict(counted)
    assert graph.opsets == {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    arrays = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type != TensorProto.STRING]
    text = sum(len(s) for t in model.graph.initializer for s in t.string_data)
    assert graph.weight_bytes == sum(array.nbytes for array in arrays) + text
    assert graph.external_files == ()


def shapes(signature: Signature) -> list[tuple[int | str, ...]]:
    return [spec.shape for spec in (*signature.inputs, *signature.outputs)]


def test_the_first_open_axis_is_the_batch_and_others_keep_their_names(tmp_path: Path) -> None:
    read = {}
    for name, model in MODELS.items():
        onnx.save(model, tmp_path / name)
        read[name] = read_graph(tmp_path / name)
    assert shapes(read["dynamic-batch"].signature) == [("batch", 3), ("batch", 2)]
    assert shapes(read["nameless-batch"].signature) == [("batch", 3), ("batch", 2)]
    assert shapes(read["fixed-batch"].signature) == [(8, 3), (8, 2)]
    assert shapes(read["branching"].signature)[:2] == [("batch", "width", "axis_2", 4), ()]
    assert not read["fixed-batch"].signature.inputs[0].batched
    assert read["dynamic-batch"].producer == "hand"
    assert read["branching"].domains == {"ai.onnx", "ours", "com.microsoft"}


def two_inputs(x: str | int | None, w: str | int | None, y: str | int | None) -> onnx.ModelProto:
    """y = x times w, with first axes of these names."""
    inputs = [VALUE("x", TensorProto.FLOAT, [x, 2]), VALUE("w", TensorProto.FLOAT, [w, 2, 2])]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "two", inputs, [VALUE("y", TensorProto.FLOAT, [y, "k", 2])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("axes", "read_as"),
    [
        (("N", "N", "anything"), ("batch", "batch", "batch")),
        ((None, "N", None), ("batch", "batch", "batch")),
        ((None, None, "N"), ("batch", "batch", "batch")),
        (("N", 4, "M"), ("batch", 4, "batch")),
        (("N", "M", "M"), ("N", "M", "M")),
        (("N", "M", None), ("N", "M", "axis_0")),
        (("batch", "M", "batch"), ("axis_0", "M", "axis_0")),
    ],
)
def test_inputs_that_name_their_first_axes_differently_share_no_batch(
    tmp_path: Path, axes: tuple[str | int | None, ...], read_as: tuple[str | int, ...]
) -> None:
    onnx.save(two_inputs(*axes), tmp_path / "model.onnx")
    signature = read_graph(tmp_path / "model.onnx").signature
    assert tuple(shape[0] for shape in shapes(signature)) == read_as
    assert any(spec.batched for spec in (*signature.inputs, *signature.outputs)) == ("batch" in read_as)


@pytest.mark.parametrize("size", [-1, 2**31, 2**40])
def test_an_axis_that_no_manifest_can_hold_is_refused(tmp_path: Path, size: int) -> None:
    onnx.save(two_inputs("N", size, "N"), tmp_path / "model.onnx")
    with pytest.raises(SignatureMismatch, match=f"model.onnx: axis 0 of input 'w' is {size}.*a name for an axis"):
        read_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None), "zipmap=False"),
        (VALUE("y", TensorProto.COMPLEX64, ["n"]), "cast it"),
        (VALUE("y", TensorProto.FLOAT, None), "export it with a shape"),
    ],
    ids=["sequence", "complex", "no-shape"],
)
def test_outputs_that_no_protocol_can_carry_are_refused(tmp_path: Path, value: Any, remedy: str) -> None:
    model = linear("n")
    model.graph.output[0].CopyFrom(value)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SignatureMismatch, match=f"model.onnx: output 'y'.*{remedy}"):
        read_graph(tmp_path / "model.onnx")


def test_a_graph_without_inputs_is_refused(tmp_path: Path) -> None:
    model = linear("n")
    del model.graph.input[0]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SignatureMismatch, match="no inputs or no outputs"):
        read_graph(tmp_path / "model.onnx")


def test_reading_needs_neither_the_onnx_package_nor_a_runtime(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(late_model())
    code = (
        "import sys; from pathlib import Path; from modelyard.bundle.graph import read_graph;"
        "print(len(read_graph(Path(sys.argv[1])).operators), {'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "7 set()\n"


def test_a_large_file_is_read_without_its_weights_and_tells_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are cut out before protobuf parses; what is told of the file must not depend on it."""
    path = tmp_path / "model.onnx"
    weights = numpy_helper.from_array(np.ones((64, 512), dtype=np.float32), "w")
    shape = numpy_helper.from_array(np.array([-1, 512], dtype=np.int64), "shape")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["wide"]), helper.make_node("Reshape", ["wide", "shape"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512])],
        [weights, shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    whole = read_graph(path)
    monkeypatch.setattr(graph_module, "_SMALL_BYTES", 0)
    assert read_graph(path) == whole
    assert whole.weight_bytes == 4 * 64 * 512 + 16
    # A tensor that declares more than its file holds is still found out, and nobody can say how much there is but we.
    model.graph.initializer[0].dims[0] = 65
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TooLarge, match="declares 133120 elements or bytes, its file holds 131072"):
        read_graph(path)
    forged = b"\xf8\xff\xff\xff\x0f" + b"\xff\xff\xff\x7f"
    tensor = model.graph.initializer[0].SerializeToString() + forged
    inner = b"\x2a" + varint(len(tensor)) + tensor
    path.write_bytes(b"\x3a" + varint(len(inner)) + inner)
    with pytest.raises(MalformedGraph, match="not an ONNX model"):
        read_graph(path)


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])
