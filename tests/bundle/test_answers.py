"""Outputs are read as answers by what the signature says of them, and golden cases cover what a model can say."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modelyard.bundle.answers import N_CASES, answers_reader, choose_cases, label_output, score_output, value_output
from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import SignatureMismatch

LABEL = TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=("a", "b", "c"))
SCORES = TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 3), labels=("a", "b", "c"))
VALUE = TensorSpec(name="value", datatype="FP32", shape=(BATCH, 1))
X = TensorSpec(name="x", datatype="FP32", shape=(BATCH,))


def _signature(*outputs: TensorSpec, inputs: tuple[TensorSpec, ...] = (X,)) -> Signature:
    return Signature(inputs=inputs, outputs=outputs)


def _objects(values: list[str]) -> NDArray[Any]:
    return np.array(values, dtype=object)


def test_outputs_are_found_by_shape_datatype_and_labels_whatever_their_order() -> None:
    for signature in (_signature(LABEL, SCORES, VALUE), _signature(VALUE, SCORES, LABEL)):
        assert (label_output(signature), score_output(signature), value_output(signature)) == (LABEL, SCORES, VALUE)
    bare = _signature(TensorSpec(name="counts", datatype="INT64", shape=(BATCH, 3), labels=("a", "b", "c")))
    assert (label_output(bare), score_output(bare), value_output(bare)) == (None, None, None)


def test_labels_and_scores_become_answers_with_the_positive_class() -> None:
    outputs = {"label": _objects(["b"]), "scores": np.array([[0.1, 0.7, 0.2]])}
    answers = answers_reader(_signature(LABEL, SCORES), "classification", positive="b")(outputs)
    assert answers.labels is outputs["label"]
    assert answers.scores is outputs["scores"]
    assert (answers.classes, answers.positive) == (("a", "b", "c"), "b")


@pytest.mark.parametrize("spec", [LABEL, SCORES])
def test_one_of_labels_and_scores_is_enough(spec: TensorSpec) -> None:
    outputs = {"label": _objects(["b"]), "scores": np.array([[0.1, 0.7, 0.2]])}
    answers = answers_reader(_signature(spec), "classification")(outputs)
    assert (answers.labels is None, answers.scores is None) == (spec is SCORES, spec is LABEL)
    assert answers.classes == ("a", "b", "c")


def test_a_column_of_values_is_read_as_a_vector() -> None:
    answers = answers_reader(_signature(VALUE), "regression")({"value": np.array([[1.0], [2.0]])})
    assert answers.values is not None
    assert answers.values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("signature", "task"),
    [(_signature(VALUE), "classification"), (_signature(SCORES), "regression"), (_signature(VALUE), "other")],
)
def test_outputs_that_answer_another_task_are_named(signature: Signature, task: str) -> None:
    with pytest.raises(
        SignatureMismatch, match=rf"outputs \['(value|scores)'\] cannot be scored as {task}: .*importing"
    ):
        answers_reader(signature, task)


def test_cases_hold_every_class_that_was_said_and_a_missing_value() -> None:
    """The rare class and the one missing value are single rows of a thousand."""
    n = 1000
    x = np.arange(n, dtype=np.float32)
    x[123] = np.nan
    label = _objects(["a"] * n)
    label[77] = "c"
    nullable = TensorSpec(name="x", datatype="FP32", shape=(BATCH,), nullable=True)
    cases = choose_cases({"x": x}, {"label": label}, _signature(LABEL, inputs=(nullable,)), margin=1e-3)
    assert cases.n_samples == N_CASES
    assert set(cases.outputs["label"]) == {"a", "c"}
    assert np.isnan(cases.inputs["x"]).sum() == 1
    again = choose_cases({"x": x}, {"label": label}, _signature(LABEL, inputs=(nullable,)), margin=1e-3)
    np.testing.assert_array_equal(cases.inputs["x"], again.inputs["x"])


def test_a_missing_value_is_found_in_a_matrix_and_in_text() -> None:
    matrix, text = np.ones((100, 3), dtype=np.float32), _objects(["x"] * 100)
    matrix[40, 2], text[60] = np.nan, ""
    specs = (
        TensorSpec(name="matrix", datatype="FP32", shape=(BATCH, 3), nullable=True),
        TensorSpec(name="text", datatype="BYTES", shape=(BATCH,), nullable=True),
    )
    outputs = {"value": np.zeros((100, 1), dtype=np.float32)}
    cases = choose_cases({"matrix": matrix, "text": text}, outputs, _signature(VALUE, inputs=specs), margin=0)
    assert np.isnan(cases.inputs["matrix"]).any()
    assert "" in cases.inputs["text"].tolist()


def test_rows_whose_best_scores_are_close_are_left_out_unless_there_are_no_others() -> None:
    clear, close = [0.1, 0.7, 0.2], [0.2, 0.4001, 0.3999]
    inputs = {"x": np.arange(100, dtype=np.float32)}
    scores = np.array([clear if i % 10 == 0 else close for i in range(100)], dtype=np.float32)
    cases = choose_cases(inputs, {"scores": scores}, _signature(SCORES), margin=1e-3)
    assert sorted(cases.inputs["x"].tolist()) == [float(i) for i in range(0, 100, 10)]
    scores[:] = close
    assert choose_cases(inputs, {"scores": scores}, _signature(SCORES), margin=1e-3).n_samples == N_CASES


def test_few_rows_are_all_taken_once() -> None:
    cases = choose_cases({"x": np.arange(3)}, {"value": np.zeros((3, 1))}, _signature(VALUE), margin=0)
    assert sorted(cases.inputs["x"].tolist()) == [0, 1, 2]
