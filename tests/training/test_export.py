"""A graph that answers one row otherwise than its pipeline is never written; a tie, and a tie alone, is excused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from sklearn.linear_model import LogisticRegression, Ridge

from modelyard.bundle.cases import Arrays, Run, check_cases
from modelyard.bundle.manifest import BATCH, Lineage, Signature, Targets, TensorSpec
from modelyard.errors import ConfigError, SkewDetected
from modelyard.metrics import Answers
from modelyard.training.export import Proof, export, named_outputs, prove_no_skew, run_graph, to_onnx, write
from modelyard.training.models import EstimatorPipeline, FramePipeline, Pipeline, to_frame
from modelyard.training.preprocess import fit_preprocessor

N = 400
SPECS = (
    TensorSpec(name="amount", datatype="FP32", shape=(BATCH,), nullable=True),
    TensorSpec(name="rooms", datatype="INT64", shape=(BATCH,)),
    TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), nullable=True, categories=("Aix", "Bonn")),
)


def _inputs(n: int = N) -> dict[str, NDArray[Any]]:
    """One column is called like an output of the graph."""
    generator = np.random.default_rng(0)
    amount = generator.normal(size=n).astype(np.float32)
    amount[::11] = np.nan
    return {
        "amount": amount,
        "rooms": generator.integers(1, 9, size=n),
        "label": generator.choice(np.array(["Aix", "Bonn", ""], dtype=object), size=n),
    }


def _pipeline(classes: tuple[str | int, ...]) -> EstimatorPipeline:
    inputs = _inputs()
    preprocessor = fit_preprocessor(SPECS, inputs)
    x = preprocessor.apply(inputs)
    if classes:
        estimator = LogisticRegression(max_iter=500).fit(x, np.arange(N) % len(classes))
        return EstimatorPipeline(estimator, preprocessor, x.shape[1], "classification", classes)
    return EstimatorPipeline(Ridge().fit(x, 100 * x[:, 1]), preprocessor, x.shape[1], "regression", ())


def _skewed(model: bytes, change: Callable[[NDArray[Any]], NDArray[Any]], is_it: Callable[[Any], bool]) -> bytes:
    """Return the model with its first constant of that kind changed."""
    proto = onnx.load_from_string(model)
    constant = next(tensor for tensor in proto.graph.initializer if is_it(tensor))
    constant.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(constant).copy()), constant.name))
    changed: bytes = proto.SerializeToString()
    return changed


def _prove(pipeline: Pipeline, model: bytes, signature: Signature, inputs: Arrays) -> Proof:
    return prove_no_skew(
        lambda rows: named_outputs(pipeline.predict(rows), signature), run_graph(model), signature, inputs
    )


@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c"), (0, 1), (7, 3, 5)])
def test_class_labels_are_decoded_inside_the_graph(classes: tuple[str | int, ...]) -> None:
    pipeline = _pipeline(classes)
    exported = export(pipeline, SPECS, _inputs())
    label, scores = exported.signature.outputs
    assert (label.name, scores.name) == ("label_", "probabilities")
    assert label.datatype == ("BYTES" if isinstance(classes[0], str) else "INT64")
    wanted = pipeline.predict(_inputs())
    assert wanted.labels is not None
    assert exported.outputs["label_"].tolist() == wanted.labels.tolist()
    assert exported.proof.n_rows == N
    assert exported.proof.worst_difference < 1e-5
    assert exported.proof.ties == ()


def test_values_of_a_regression_are_one_float_a_row() -> None:
    exported = export(_pipeline(()), SPECS, _inputs())
    (prediction,) = exported.signature.outputs
    assert (prediction.name, prediction.datatype, prediction.shape) == ("prediction", "FP32", (BATCH,))
    assert exported.outputs["prediction"].shape == (N,)


def test_a_nudged_number_in_the_graph_fails_the_proof_and_names_a_row() -> None:
    pipeline = _pipeline(("no", "yes"))
    model, signature = to_onnx(pipeline, SPECS)
    skewed = _skewed(model, lambda mean: mean + np.float32(1e-3), lambda t: numpy_helper.to_array(t).shape == (2,))
    with pytest.raises(
        SkewDetected, match=r"row 1 of the held-out rows: output 'probabilities' is .* by the graph"
    ) as caught:
        _prove(pipeline, skewed, signature, _inputs())
    assert caught.value.row == 1  # the amount of row 0 is missing, and nothing is nudged there
    assert "nothing was written" in str(caught.value)


def test_only_the_row_that_differs_is_named() -> None:
    """A category decoded wrongly touches the rows that hold it."""
    pipeline = _pipeline(("no", "yes"))
    model, signature = to_onnx(pipeline, SPECS)
    inputs = _inputs()
    inputs["label"][:] = "Aix"
    inputs["label"][17] = "Bonn"
    skewed = onnx.load_from_string(model)
    encoder = next(node for node in skewed.graph.node if node.op_type == "LabelEncoder")
    keys = next(attribute for attribute in encoder.attribute if attribute.name == "keys_strings")
    keys.strings[list(keys.strings).index(b"Bonn")] = b"Bonnn"
    with pytest.raises(SkewDetected) as caught:
        _prove(pipeline, skewed.SerializeToString(), signature, inputs)
    assert caught.value.row == 17


def test_labels_decoded_in_another_order_fail_though_every_score_agrees() -> None:
    pipeline = _pipeline(("no", "yes"))
    model, signature = to_onnx(pipeline, SPECS)
    skewed = _skewed(model, lambda classes: classes[::-1].copy(), lambda t: t.data_type == onnx.TensorProto.STRING)
    with pytest.raises(SkewDetected, match=r"output 'label_' is '(no|yes)' by the original, '(no|yes)' by the graph"):
        _prove(pipeline, skewed, signature, _inputs())


CLASSES = ("no", "yes")
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(BATCH,)),),
    outputs=(
        TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=CLASSES),
        TensorSpec(name="probabilities", datatype="FP32", shape=(BATCH, 2), labels=CLASSES),
    ),
)


def _answering(scores: NDArray[Any], flipped: list[int]) -> Run:
    """Answers rows, whose only column is their number, with these scores, some labels turned round."""
    codes = scores.argmax(axis=1)
    codes[flipped] = 1 - codes[flipped]
    labels = np.array(CLASSES, dtype=object)[codes]

    def run(inputs: Arrays) -> Arrays:
        rows = inputs["x"].astype(np.int64)
        return {"label": labels[rows], "probabilities": scores[rows].astype(np.float32)}

    return run


def _at_ties(n: int, ties: list[int], gap: float) -> Proof:
    scores = np.tile([0.2, 0.8], (n, 1))
    scores[ties] = [0.5 - gap / 2, 0.5 + gap / 2]
    inputs = {"x": np.arange(n, dtype=np.float32)}
    return prove_no_skew(_answering(scores, []), _answering(scores, ties), SIGNATURE, inputs)


@pytest.mark.parametrize(("n", "allowed"), [(10, 1), (10_000, 1), (19_999, 1), (30_000, 3)])
def test_a_tie_is_excused_for_one_row_in_ten_thousand_and_not_beyond(n: int, allowed: int) -> None:
    ties = list(range(n - allowed - 1, n))
    proof = _at_ties(n, ties[1:], gap=1e-6)
    assert proof.ties == tuple(ties[1:])
    assert f"{allowed} threshold ties excused" in proof.text()
    with pytest.raises(
        SkewDetected, match=rf"{allowed + 1} of {n} rows differ at threshold ties \(the first is row {ties[0]} "
    ):
        _at_ties(n, ties, gap=1e-6)


def test_a_label_that_flips_away_from_a_tie_fails() -> None:
    with pytest.raises(
        SkewDetected, match=r"row 7 of the held-out rows: output 'label' is 'yes' by the original, 'no' by the graph"
    ):
        _at_ties(20, [7], gap=1e-3)


def test_a_tie_of_two_classes_does_not_excuse_a_third() -> None:
    classes = ("a", "b", "c")
    signature = Signature(
        inputs=SIGNATURE.inputs, outputs=tuple(_with_classes(spec, classes) for spec in SIGNATURE.outputs)
    )
    scores = np.array([[0.45, 0.45, 0.1]], dtype=np.float32)

    def says(label: str) -> Run:
        return lambda inputs: {"label": np.array([label], dtype=object), "probabilities": scores}

    inputs = {"x": np.zeros(1, dtype=np.float32)}
    assert prove_no_skew(says("a"), says("b"), signature, inputs).ties == (0,)
    with pytest.raises(SkewDetected, match="output 'label' is 'a' by the original, 'c' by the graph"):
        prove_no_skew(says("a"), says("c"), signature, inputs)


def _with_classes(spec: TensorSpec, classes: tuple[str, ...]) -> TensorSpec:
    shape = (BATCH, len(classes)) if len(spec.shape) == 2 else spec.shape
    return TensorSpec(name=spec.name, datatype=spec.datatype, shape=shape, labels=classes)


def test_rounding_is_an_excuse_only_where_the_original_agrees_once_it_is_fed_the_rounded_input() -> None:
    signature = Signature(inputs=SIGNATURE.inputs, outputs=(TensorSpec(name="value", datatype="FP32", shape=(BATCH,)),))
    given = {"x": np.linspace(0, 1, 50)}
    given["x"][5] = 0.5 + 1e-12  # just above a threshold that its rounding is not above
    rounded = {"x": given["x"].astype(np.float32)}

    def step(rows: Arrays) -> Arrays:
        return {"value": (rows["x"] > 0.5).astype(np.float32)}

    proof = prove_no_skew(step, step, signature, rounded, given=given)
    assert proof.ties == (5,)

    def other(rows: Arrays) -> Arrays:
        return {"value": (rows["x"] > 0.3).astype(np.float32)}

    with pytest.raises(SkewDetected, match=r"output 'value' is 0\. by the original, 1\. by the graph"):
        prove_no_skew(step, other, signature, rounded, given=given)


def test_an_output_of_another_shape_is_told_as_such() -> None:
    signature = Signature(inputs=SIGNATURE.inputs, outputs=(TensorSpec(name="value", datatype="FP32", shape=(BATCH,)),))
    inputs = {"x": np.zeros(4, dtype=np.float32)}
    with pytest.raises(SkewDetected, match=r"has shape \(4,\) by the original, \(4, 1\) by the graph"):
        prove_no_skew(lambda rows: {"value": rows["x"]}, lambda rows: {"value": rows["x"][:, None]}, signature, inputs)


def test_the_bundle_holds_cases_and_reference_that_fit_the_graph(tmp_path: Path) -> None:
    pipeline = _pipeline(("no", "yes"))
    exported = export(pipeline, SPECS, _inputs())
    bundle = write(
        tmp_path / "bundle",
        exported,
        name="rooms",
        task="classification",
        train=_inputs(),
        held_out=_inputs(),
        lineage=Lineage(created_at="2026-01-01T00:00:00+00:00", made_by="test"),
        targets=Targets(),
    )
    run = run_graph(bundle.model_path.read_bytes())
    check_cases(bundle.cases(), bundle.manifest.cases, bundle.signature, run, source="the golden cases")
    assert {"input:amount", "input:label", "output:label_", "output:probabilities:yes"} <= set(bundle.reference())


def test_an_estimator_takes_columns_and_no_tensors() -> None:
    spec = TensorSpec(name="image", datatype="UINT8", shape=(BATCH, 8, 8, 1))
    pipeline = FramePipeline(Ridge(), (spec,), "regression", ())
    with pytest.raises(
        ConfigError, match=r"input 'image' has \['batch', 8, 8, 1\]: an estimator takes columns; use a network"
    ):
        pipeline.predict({"image": np.zeros((2, 8, 8, 1), dtype=np.uint8)})


def test_text_stays_objects_in_a_frame() -> None:
    """Whatever datatype this version of pandas would make of it."""
    frame = to_frame(_inputs(5), SPECS)
    assert [str(dtype) for dtype in frame.dtypes] == ["float32", "int64", "object"]


def test_answers_are_named_as_in_the_graph() -> None:
    answers = Answers(labels=np.array(["no"], dtype=object), scores=np.array([[1.0, 0.0]]), classes=CLASSES)
    assert list(named_outputs(answers, SIGNATURE)) == ["label", "probabilities"]
    assert list(named_outputs(replace(answers, labels=None), SIGNATURE)) == ["probabilities"]
