"""A bundle's outputs read as answers: which output is the label, which holds the scores, which the value."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays, CaseSet
from modelyard.bundle.manifest import Score, Signature, TensorSpec
from modelyard.errors import SignatureMismatch
from modelyard.metrics import Answers, find_metric

N_CASES = 32
_FLOATS = ("FP16", "FP32", "FP64")


def label_output(signature: Signature) -> TensorSpec | None:
    """Return the output that names a class per row, if there is one."""
    return next((s for s in signature.outputs if s.labels and len(s.shape) == 1), None)


def score_output(signature: Signature) -> TensorSpec | None:
    """Return the output with a score per class, if there is one."""
    return next((s for s in signature.outputs if s.labels and len(s.shape) == 2 and s.datatype in _FLOATS), None)


def value_output(signature: Signature) -> TensorSpec | None:
    """Return the first output with one float per row."""
    return next((s for s in signature.outputs if s.datatype in _FLOATS and s.shape[1:] in ((), (1,))), None)


def answers_reader(signature: Signature, task: str, positive: str | int | None = None) -> Callable[[Arrays], Answers]:
    """Return a function from the graph's outputs to answers.

    Raises:
        SignatureMismatch: no output can be read as labels, scores or values for this task.
    """
    label, scores, value = label_output(signature), score_output(signature), value_output(signature)
    if task == "classification" and (label or scores):
        spec = scores or label
        assert spec is not None
        classes = spec.labels or ()
        return lambda outputs: Answers(
            labels=outputs[label.name] if label else None,
            scores=outputs[scores.name] if scores else None,
            classes=classes,
            positive=positive,
        )
    if task == "regression" and value:
        return lambda outputs: Answers(values=outputs[value.name].reshape(-1))
    raise SignatureMismatch(
        f"outputs {[spec.name for spec in signature.outputs]} cannot be scored as {task}: classification needs an output with "
        "labels, regression one float per row; say so when importing the model"
    )


def score_of(metric: str, truth: NDArray[Any], answers: Answers) -> Score:
    """Return a metric on rows with their truth, shape (n,), and its 95 % interval, as a lineage records it."""
    interval = find_metric(metric).score(truth, answers)
    return Score(metric=metric, value=interval.value, low=interval.low, high=interval.high, n_samples=len(truth))


def choose_cases(inputs: Arrays, outputs: Arrays, signature: Signature, *, margin: float, seed: int = 0) -> CaseSet:
    """Return up to 32 rows as golden cases: every class that was predicted, rows with missing values, others at random.

    Args:
        margin: rows whose two best scores are closer than this are left out where there are others, so that rounding on
            another machine flips no label.
    """
    n_rows = len(next(iter(inputs.values())))
    order = np.random.default_rng(seed).permutation(n_rows)
    scores, label = score_output(signature), label_output(signature)
    if scores and outputs[scores.name].shape[1] > 1:
        best = np.sort(outputs[scores.name][order], axis=1)
        clear = best[:, -1] - best[:, -2] > margin
        order = order[clear] if clear.any() else order
    chosen: dict[int, None] = {}
    if label:
        _, first = np.unique(outputs[label.name][order].astype(np.str_), return_index=True)
        chosen |= dict.fromkeys(order[first].tolist())
    for spec in signature.inputs:
        if spec.nullable:
            column = inputs[spec.name][order]
            missing = column == "" if column.dtype == object else np.isnan(column)
            rows = order[missing.reshape(len(order), -1).any(axis=1)]
            chosen |= dict.fromkeys(rows[:1].tolist())
    chosen |= dict.fromkeys(order[:N_CASES].tolist())
    kept = np.array(list(chosen)[:N_CASES])
    return CaseSet(
        inputs={spec.name: inputs[spec.name][kept] for spec in signature.inputs},
        outputs={spec.name: outputs[spec.name][kept] for spec in signature.outputs},
    )
