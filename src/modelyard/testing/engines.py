"""The suite that every Engine passes. Inherit from EngineTests and say how to make yours:

    class TestMyEngine(EngineTests):
        @pytest.fixture
        def make_engine(self):
            return MyEngine          # called with the bytes of an ONNX model

The right answer is what onnx.reference.ReferenceEvaluator computes, operator by operator in NumPy.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from modelyard.errors import MalformedGraph, MissingExtra, RequestError
from modelyard.inference.runtime import Engine
from modelyard.testing.bundles import late_cases, late_model

MakeEngine = Callable[[bytes], Engine]
Arrays = Mapping[str, NDArray[Any]]

NUMBERS = (
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
)


def reference_answers(model: bytes, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Return the outputs by name as the reference computes them; slow. Raises MissingExtra without the onnx package."""
    try:
        from onnx.reference import ReferenceEvaluator
    except ImportError as exc:
        raise MissingExtra("onnx", "train", "the reference that engines are compared with") from exc
    import onnx

    evaluator = ReferenceEvaluator(onnx.load_from_string(model))
    answers = evaluator.run(None, dict(inputs))
    return dict(zip(evaluator.output_names, answers, strict=True))


def image_model(seed: int = 0) -> bytes:
    """Return an ONNX model of uint8 images, shape (batch, 8, 8, 1) → "scores" (batch, 3) and "label" (batch,)."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    constants = {
        "scale": np.array(1 / 255, dtype=np.float32),
        "kernel": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "weights": rng.normal(size=(4 * 6 * 6, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["features"]),
        helper.make_node("Relu", ["features"], ["active"]),
        helper.make_node("Flatten", ["active"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "image",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 8, 8, 1])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model


def identity_model(datatype: str) -> bytes:
    """Return an ONNX model that gives "x", shape (batch, 2), back as "y"."""
    from onnx import TensorProto, helper

    kinds = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
    kind = getattr(TensorProto, kinds.get(datatype, datatype))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", kind, ["batch", 2])],
        [helper.make_tensor_value_info("y", kind, ["batch", 2])],
    )
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model


class EngineTests:
    """What serving, compression and planning rely on."""

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        """Return a function from the bytes of an ONNX model to an engine; override it."""
        raise NotImplementedError("override the fixture make_engine")

    @pytest.fixture
    def images(self, make_engine: MakeEngine) -> Iterator[Engine]:
        engine = make_engine(image_model())
        yield engine
        engine.close()

    @pytest.fixture
    def rows(self) -> Arrays:
        return {"image": np.random.default_rng(1).integers(0, 256, size=(6, 8, 8, 1), dtype=np.uint8)}

    def test_the_name_says_library_and_version(self, images: Engine) -> None:
        library, _, version = images.name.partition(" ")
        assert library
        assert version[:1].isdigit()

    def test_images_are_answered_as_the_reference_answers_them(self, images: Engine, rows: Arrays) -> None:
        answers, expected = images.run(rows), reference_answers(image_model(), rows)
        assert answers.keys() == expected.keys()
        assert_allclose(answers["scores"], expected["scores"], rtol=1e-5, atol=1e-5)
        assert_array_equal(answers["label"], expected["label"])

    def test_datatypes_and_shapes_are_those_of_the_graph(self, images: Engine, rows: Arrays) -> None:
        answers = images.run(rows)
        assert (str(answers["scores"].dtype), answers["scores"].shape) == ("float32", (6, 3))
        assert (str(answers["label"].dtype), answers["label"].shape) == ("int64", (6,))

    def test_text_and_missing_values_are_answered_as_numpy_answers_them(self, make_engine: MakeEngine) -> None:
        cases = late_cases()
        engine = make_engine(late_model())
        answers = engine.run(cases.inputs)
        engine.close()
        assert_allclose(answers["probability"], cases.outputs["probability"], rtol=1e-5, atol=1e-5)
        assert answers["label"].dtype == object
        assert all(isinstance(label, str) for label in answers["label"])
        assert_array_equal(answers["label"], cases.outputs["label"])

    @pytest.mark.parametrize("datatype", NUMBERS)
    def test_numbers_go_through_unchanged(self, make_engine: MakeEngine, datatype: str) -> None:
        from modelyard.bundle.manifest import TensorSpec

        dtype = TensorSpec(name="x", datatype=datatype, shape=("batch", 2)).numpy_dtype  # type: ignore[arg-type]  # one of NUMBERS
        extremes: Any = [0, 1]
        if dtype.kind in "iu":
            extremes = [np.iinfo(dtype).min, np.iinfo(dtype).max]
        elif dtype.kind == "f":
            extremes = [np.nan, np.finfo(dtype).max]
        x = np.array([extremes, [0, 1]], dtype=dtype)
        engine = make_engine(identity_model(datatype))
        answers = engine.run({"x": x})
        engine.close()
        assert answers["y"].dtype == dtype
        assert_array_equal(answers["y"], x)

    def test_text_of_any_script_goes_through_unchanged(self, make_engine: MakeEngine) -> None:
        x = np.array([["", "plain"], ["naïve ✈", "a\nb\t c"]], dtype=object)
        engine = make_engine(identity_model("BYTES"))
        answers = engine.run({"x": x})
        engine.close()
        assert_array_equal(answers["y"], x)

    def test_a_row_is_answered_alike_alone_and_in_company(self, images: Engine, rows: Arrays) -> None:
        together = images.run(rows)
        for i in range(6):
            alone = images.run({"image": rows["image"][i : i + 1]})
            assert_allclose(alone["scores"][0], together["scores"][i], rtol=1e-5, atol=1e-5)

    def test_read_only_and_strided_arrays_are_taken(self, images: Engine, rows: Arrays) -> None:
        frozen = np.frombuffer(rows["image"].tobytes(), dtype=np.uint8).reshape(rows["image"].shape)
        assert_array_equal(images.run({"image": frozen})["scores"], images.run(rows)["scores"])
        strided = np.repeat(rows["image"], 2, axis=0)[::2]
        assert_array_equal(images.run({"image": strided})["scores"], images.run(rows)["scores"])

    def test_several_threads_may_run_at_once(self, images: Engine, rows: Arrays) -> None:
        expected = images.run(rows)["scores"]
        with ThreadPoolExecutor(4) as threads:
            for answers in threads.map(images.run, [rows] * 40):
                assert_array_equal(answers["scores"], expected)

    @pytest.mark.parametrize(
        "inputs",
        [
            {},
            {"other": np.zeros((1, 8, 8, 1), dtype=np.uint8)},
            {"image": np.zeros((1, 8, 9, 1), dtype=np.uint8)},
            {"image": np.zeros((1, 8, 8, 1), dtype=np.float32)},
            {"image": np.zeros(64, dtype=np.uint8)},
        ],
        ids=["nothing", "another name", "another shape", "another datatype", "another rank"],
    )
    def test_inputs_that_do_not_fit_are_the_callers_fault(self, images: Engine, inputs: Arrays) -> None:
        with pytest.raises(RequestError):
            images.run(inputs)

    def test_what_is_no_graph_is_refused(self, make_engine: MakeEngine) -> None:
        with pytest.raises(MalformedGraph):
            make_engine(b"not a model")
