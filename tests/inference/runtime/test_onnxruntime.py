"""The default engine passes the published suite."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import write_bundle
from modelyard.errors import GoldenCaseFailed, MalformedGraph, RequestError
from modelyard.inference.runtime import Engine, RowByRow, open_engine
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine
from modelyard.inference.values import bfloat16_values
from modelyard.testing.bundles import late_bundle, late_content, late_model
from modelyard.testing.engines import EngineTests, MakeEngine, identity_model


class TestOnnxRuntime(EngineTests):
    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        return OnnxRuntimeEngine


class TestRowByRow(EngineTests):
    """Wrapping an engine changes no answer of a model whose rows are independent."""

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        def make(model: bytes) -> Engine:
            return RowByRow(OnnxRuntimeEngine(model))

        return make


def test_a_bundle_becomes_an_engine_that_gives_its_golden_answers(tmp_path: Path) -> None:
    bundle = late_bundle(tmp_path / "late")
    cases: Any = bundle.cases()
    engine = open_engine(bundle)
    answers = engine.run(cases.inputs)
    engine.close()
    assert_array_equal(answers["label"], cases.outputs["label"])
    np.testing.assert_allclose(answers["probability"], cases.outputs["probability"], rtol=1e-5)


def endless_model() -> bytes:
    """Return the late model with a loop of 2 ** 62 rounds before its probability."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Abs", ["p"], ["q"])],
        "body",
        [value("i", TensorProto.INT64, []), value("going", TensorProto.BOOL, []), value("p", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("q", TensorProto.FLOAT, None)],
    )
    model = onnx.load_from_string(late_model())
    sigmoid = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    sigmoid.output[0] = "first"
    position = list(model.graph.node).index(sigmoid) + 1
    model.graph.node.insert(position, helper.make_node("Loop", ["rounds", "", "first"], ["probability"], body=body))
    model.graph.initializer.append(helper.make_tensor("rounds", TensorProto.INT64, [], [2**62]))
    raw: bytes = model.SerializeToString()
    return raw


@pytest.mark.parametrize("rows_independent", [True, False])
def test_golden_cases_of_a_graph_that_loops_for_ever_are_given_up(tmp_path: Path, rows_independent: bool) -> None:
    content = replace(late_content(), model=endless_model(), rows_independent=rows_independent)
    bundle = write_bundle(tmp_path / "b", content)
    with pytest.raises(GoldenCaseFailed, match=r"not answered within 0\.2 s.*do not serve") as caught:
        open_engine(bundle, timeout_s=0.2)
    assert caught.value.timeout_s == 0.2


def onnx_node(operator: str, source: str, target: str, *, second: str = "", to: str = "") -> Any:
    from onnx import TensorProto, helper

    inputs = [source, second] if second else [source]
    return helper.make_node(operator, inputs, [target], **({"to": getattr(TensorProto, to)} if to else {}))


def graph_of(nodes: list[Any], inputs: dict[str, str], outputs: dict[str, str]) -> bytes:
    """Return an ONNX model of one axis in, one axis out; names to types as TensorProto calls them."""
    from onnx import TensorProto, helper

    def infos(named: dict[str, str]) -> list[Any]:
        return [helper.make_tensor_value_info(name, getattr(TensorProto, kind), [None]) for name, kind in named.items()]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs))
    opset = helper.make_opsetid("", 17)
    raw: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    return raw


def test_bfloat16_goes_through_in_company_of_other_datatypes() -> None:
    nodes = [
        onnx_node("Identity", "b", "same"),
        onnx_node("Cast", "b", "wide", to="FLOAT"),
        onnx_node("Cast", "f", "n", to="BFLOAT16"),
    ]
    engine = OnnxRuntimeEngine(
        graph_of(nodes, {"b": "BFLOAT16", "f": "FLOAT"}, {"same": "BFLOAT16", "wide": "FLOAT", "n": "BFLOAT16"})
    )
    for bits in ([0x3F80, 0xC000, 0x7FC0, 1], []):
        b = np.array(bits, np.uint16)
        answers = engine.run({"b": np.repeat(b, 2)[::2], "f": np.repeat(bfloat16_values(b), 2)[::2]})
        assert_array_equal(answers["same"], b)
        assert_array_equal(answers["wide"], bfloat16_values(b))
        assert answers["n"].dtype == np.uint16
        assert_array_equal(bfloat16_values(answers["n"]), bfloat16_values(b))
    engine.close()


def test_bfloat16_inputs_may_stand_beside_text() -> None:
    nodes = [onnx_node("Cast", "b", "wide", to="FLOAT"), onnx_node("Identity", "t", "same")]
    engine = OnnxRuntimeEngine(graph_of(nodes, {"b": "BFLOAT16", "t": "STRING"}, {"wide": "FLOAT", "same": "STRING"}))
    answers = engine.run({"b": np.array([0x3F80], np.uint16), "t": np.array(["é"], dtype=object)})
    engine.close()
    assert (answers["wide"].tolist(), answers["same"].tolist()) == ([1.0], ["é"])


def test_bfloat16_outputs_beside_text_inputs_are_refused_with_the_remedy() -> None:
    nodes = [onnx_node("Identity", "b", "same"), onnx_node("Identity", "t", "also")]
    model = graph_of(nodes, {"b": "BFLOAT16", "t": "STRING"}, {"same": "BFLOAT16", "also": "STRING"})
    with pytest.raises(MalformedGraph, match=r"text input 't'.*cast the output to FP32"):
        OnnxRuntimeEngine(model)


def test_floats_for_bfloat16_are_the_callers_fault() -> None:
    engine = OnnxRuntimeEngine(identity_model("BF16"))
    with pytest.raises(RequestError, match="'x' must be uint16 bits of BF16, got float16"):
        engine.run({"x": np.zeros((1, 2), np.float16)})
    engine.close()


def test_want_of_memory_is_not_the_callers_fault() -> None:
    engine = OnnxRuntimeEngine(
        graph_of([onnx_node("ConstantOfShape", "shape", "y")], {"shape": "INT64"}, {"y": "FLOAT"})
    )
    with pytest.raises(MemoryError, match=r"too little memory.*Failed to allocate"):
        engine.run({"shape": np.array([2**48])})
    engine.close()


def test_an_index_out_of_range_is_the_callers_fault() -> None:
    nodes = [onnx_node("Gather", "x", "y", second="i")]
    engine = OnnxRuntimeEngine(graph_of(nodes, {"x": "FLOAT", "i": "INT64"}, {"y": "FLOAT"}))
    with pytest.raises(RequestError, match="out of data bounds"):
        engine.run({"x": np.zeros(1, np.float32), "i": np.array([7])})
    engine.close()


def test_a_case_that_fails_in_time_is_no_matter_of_time(tmp_path: Path) -> None:
    content = late_content()
    outputs = {**content.cases.outputs, "probability": np.zeros(6, np.float32)}
    bundle = write_bundle(tmp_path / "b", replace(content, cases=CaseSet(content.cases.inputs, outputs)))
    with pytest.raises(GoldenCaseFailed, match="golden case 0 of 6"):
        open_engine(bundle)


def test_an_interrupted_engine_ends_its_run_and_answers_no_more() -> None:
    engine = OnnxRuntimeEngine(endless_model())
    inputs = {"delay": np.zeros(1, np.float32), "origin": np.array(["EWR"], dtype=object)}
    timer = threading.Timer(0.2, engine.interrupt)
    timer.start()
    for _ in range(2):
        with pytest.raises(RequestError, match="could not compute"):
            engine.run(inputs)
    engine.close()


def test_no_timer_outlives_the_check(tmp_path: Path) -> None:
    engine = open_engine(late_bundle(tmp_path / "late"))
    assert not [
        thread
        for thread in threading.enumerate()
        if isinstance(thread, threading.Timer) and not thread.finished.is_set()
    ]
    engine.close()
