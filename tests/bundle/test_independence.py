"""Do batch mates change answers? A graph that takes a mean over the batch does; one that works row by row does not."""

import numpy as np
import pytest
from onnx import NodeProto, helper, numpy_helper

from modelyard.bundle.independence import rows_independent
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine


def engine(*nodes: NodeProto) -> OnnxRuntimeEngine:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", 3])],
        [helper.make_tensor_value_info("y", 1, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return OnnxRuntimeEngine(model.SerializeToString())


ROWS = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}


def test_a_row_wise_graph_is_independent() -> None:
    assert rows_independent(engine(helper.make_node("Softmax", ["x"], ["y"], axis=1)).run, ROWS)


@pytest.mark.parametrize("operator", ["ReduceMax", "ReduceMin", "ReduceMean"])
def test_a_statistic_over_the_batch_is_found(operator: str) -> None:
    over_batch = engine(
        helper.make_node(operator, ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])
    )

    assert not rows_independent(over_batch.run, ROWS)


def test_dependence_that_only_an_outlier_brings_out_is_found() -> None:
    """Scaling by the batch's largest value, clipped at 100, changes nothing until a row is larger than that."""
    graph = engine(
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=1),
        helper.make_node("Constant", [], ["least"], value_float=5.0),
        helper.make_node("Max", ["m", "least"], ["scale"]),
        helper.make_node("Div", ["x", "scale"], ["y"]),
    )

    assert not rows_independent(graph.run, ROWS)


def test_positions_in_a_table_are_never_pushed_beyond_it() -> None:
    """An embedding has as many rows as there are tokens; an outlier among integers must stay among those seen."""
    table = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        "embedding",
        [helper.make_tensor_value_info("x", 7, ["batch"])],
        [helper.make_tensor_value_info("y", 1, ["batch", 3])],
        [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    assert rows_independent(OnnxRuntimeEngine(model.SerializeToString()).run, {"x": np.array([0, 3, 1])})
