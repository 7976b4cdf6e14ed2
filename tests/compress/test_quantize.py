"""int8: smaller weights, answers close to the parent's, and a clear word where it does not apply."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from parents import Parent

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import BundleContent, content_of, write_bundle
from modelyard.bundle.graph import read_graph
from modelyard.bundle.reference import summarise
from modelyard.compress.quantize import TECHNIQUES, Technique, quantize
from modelyard.compress.search import apply
from modelyard.errors import CompressionError
from modelyard.inference.runtime import open_engine
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine
from modelyard.testing.bundles import late_bundle


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_int8_takes_about_a_quarter_of_the_weight_bytes(parent: Parent, technique: Technique, tmp_path: Path) -> None:
    child = apply(
        parent.bundle, technique, tmp_path / "child", calibration=parent.calibration, held_out=parent.selection.inputs
    )

    assert child.graph.weight_bytes < 0.3 * parent.bundle.graph.weight_bytes


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_int8_scores_stay_near_the_parents(parent: Parent, technique: Technique) -> None:
    rows = {name: array[:1] for name, array in parent.test.inputs.items()}

    child = OnnxRuntimeEngine(quantize(parent.bundle, technique, parent.calibration))
    wanted = open_engine(parent.bundle).run(rows)

    np.testing.assert_allclose(child.run(rows)["scores"], wanted["scores"], atol=0.1)


def test_a_graph_without_anything_heavy_is_refused_by_name(tmp_path: Path) -> None:
    bundle = late_bundle(tmp_path / "light")

    with pytest.raises(CompressionError, match="no Conv, ConvTranspose, Gemm, MatMul to quantize"):
        quantize(bundle, "static-int8", bundle.cases().inputs)


def test_a_quantized_graph_is_not_quantized_again(parent: Parent, tmp_path: Path) -> None:
    child = apply(
        parent.bundle, "static-int8", tmp_path / "child", calibration=parent.calibration, held_out=parent.test.inputs
    )

    with pytest.raises(CompressionError, match=r"quantized already.*start from its parent"):
        quantize(child, "dynamic-int8", parent.calibration)


def test_static_int8_without_calibration_rows_says_what_is_missing(parent: Parent) -> None:
    nothing = {name: array[:0] for name, array in parent.calibration.items()}

    with pytest.raises(CompressionError, match="needs calibration rows, got none"):
        quantize(parent.bundle, "static-int8", nothing)


def test_the_int8_graph_lists_only_operator_sets_that_it_uses(parent: Parent) -> None:
    model = onnx.load_from_string(quantize(parent.bundle, "static-int8", parent.calibration))

    used = {node.domain for node in model.graph.node} | {"", "ai.onnx"}
    assert {opset.domain for opset in model.opset_import} <= used


def test_batch_norms_beside_their_convolutions_are_folded_before_quantizing(tmp_path: Path, parent: Parent) -> None:
    rng = np.random.default_rng(0)
    channels = 4
    constants = {
        "w": rng.normal(size=(channels, 1, 3, 3)).astype(np.float32),
        **{name: np.full(channels, value, np.float32) for name, value in {"s": 2, "b": 1, "m": 0.5, "v": 4}.items()},
    }
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"]),
        onnx.helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "conv",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", 1, 6, 6])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", channels, 4, 4])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "conv.onnx"
    path.write_bytes(model.SerializeToString())
    rows = {"x": rng.normal(size=(16, 1, 6, 6)).astype(np.float32)}
    bundle = write_bundle(tmp_path / "conv", _content(path, rows, parent))

    int8 = onnx.load_from_string(quantize(bundle, "static-int8", rows))

    assert "BatchNormalization" not in {node.op_type for node in int8.graph.node}


def _content(path: Path, rows: dict[str, NDArray[np.float32]], parent: Parent) -> BundleContent:
    signature = read_graph(path).signature
    outputs = OnnxRuntimeEngine(path).run(rows)
    return replace(
        content_of(parent.bundle),
        task="other",
        signature=signature,
        model=path,
        cases=CaseSet(rows, outputs),
        reference=summarise(rows, outputs, signature),
    )
