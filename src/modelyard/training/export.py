"""A trained pipeline → one ONNX graph → a bundle, with the proof that both answer every held-out row alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.answers import choose_cases, label_output, score_output, value_output
from modelyard.bundle.cases import Arrays, Run, differing_rows
from modelyard.bundle.format import Bundle, BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, Lineage, Signature, Targets, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.errors import ExportError, SkewDetected
from modelyard.metrics import Answers
from modelyard.training.models import PREDICT_ROWS, Pipeline, class_array, class_codes, in_parts
from modelyard.training.onnx_graph import GraphBuilder

LABEL, PROBABILITIES, PREDICTION = "label", "probabilities", "prediction"
SKEW_RTOL = SKEW_ATOL = 1e-5
TIES_ALLOWED = 1 / 10_000
CASE_MARGIN = 1e-3
"""Golden cases keep this distance between their two best scores, so that rounding on another machine flips no label."""


@dataclass(frozen=True)
class Proof:
    """That a graph and its original agree."""

    n_rows: int
    worst_difference: float
    """Largest absolute difference of a score or value, in rows that needed no excuse."""
    ties: tuple[int, ...] = field(default=())
    """Rows excused."""
    rows_called: str = "held-out rows"

    def text(self) -> str:
        excused = f", {len(self.ties)} threshold ties excused" if self.ties else ""
        return (
            f"graph and original agree on {self.n_rows:,} {self.rows_called} (largest difference "
            f"{self.worst_difference:.1e}{excused})"
        )


def to_onnx(pipeline: Pipeline, specs: tuple[TensorSpec, ...]) -> tuple[bytes, Signature]:
    """Draw the pipeline, label decoding included, as one graph with named inputs; return its bytes and signature."""
    graph = GraphBuilder(reserved=[spec.name for spec in specs])
    core = pipeline.add_to(graph)
    outputs: tuple[TensorSpec, ...]
    if pipeline.classes:
        classes = class_array(pipeline.classes)
        label = TensorSpec(
            name=graph.unused(LABEL),
            datatype="BYTES" if classes.dtype == object else "INT64",
            shape=(BATCH,),
            labels=pipeline.classes,
        )
        scores = TensorSpec(
            name=graph.unused(PROBABILITIES),
            datatype="FP32",
            shape=(BATCH, len(pipeline.classes)),
            labels=pipeline.classes,
        )
        graph.add("Identity", core, output=scores.name)
        best = graph.add("ArgMax", core, axis=1, keepdims=0)
        graph.add("Gather", graph.constant(classes), best, output=label.name)
        outputs = (label, scores)
    else:
        value = TensorSpec(name=graph.unused(PREDICTION), datatype="FP32", shape=(BATCH,))
        graph.add("Reshape", core, graph.constant(np.array([-1], dtype=np.int64)), output=value.name)
        outputs = (value,)
    return graph.build(specs, outputs).SerializeToString(), Signature(inputs=specs, outputs=outputs)


def named_outputs(answers: Answers, signature: Signature) -> Arrays:
    """Return a pipeline's answers under the names that the graph gives them."""
    label, scores, value = label_output(signature), score_output(signature), value_output(signature)
    named = {label: answers.labels, scores: answers.scores} if label else {value: answers.values}
    return {spec.name: array for spec, array in named.items() if spec is not None and array is not None}


def run_graph(model: bytes) -> Run:
    """Return a function that answers named inputs with onnxruntime, in parts.

    Raises:
        ExportError: onnxruntime cannot load the graph; the function raises it where it cannot run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime's errors have no common class of their own
        raise _cannot("load", exc) from exc
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        try:
            parts = [session.run(names, dict(part)) for part in in_parts(inputs)]
        except Exception as exc:  # as above
            raise _cannot("run", exc) from exc
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}

    return run


def _cannot(what: str, exc: Exception) -> ExportError:
    first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return ExportError(
        f"onnxruntime cannot {what} the graph that was exported ({type(exc).__name__}: {first}); write the model with other "
        "operations, or use another kind"
    )


def prove_no_skew(
    original: Run,
    run: Run,
    signature: Signature,
    inputs: Arrays,
    *,
    given: Arrays | None = None,
    rows_called: str = "held-out rows",
    progress: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Send every row through the original and the graph; any that differs fails.

    The only excuse is a threshold tie, for at most one row in 10,000 (or one in all): the original, fed the input that the
    graph is fed, with floats rounded to their datatype, agrees with the graph; or the label alone differs, and the
    original's scores of both labels are equal within the tolerance.

    Args:
        original: answers rows with outputs by the graph's names.
        inputs: what the graph is fed.
        given: what the original is fed, where that has more digits.

    Raises:
        SkewDetected: names the row, the output and both answers.
    """
    n_rows = len(next(iter(inputs.values())))
    ties: list[int] = []
    worst = 0.0
    for start in range(0, n_rows, PREDICT_ROWS):
        rows = np.arange(start, min(start + PREDICT_ROWS, n_rows))
        rounded = _take(inputs, rows)
        served = run(rounded)
        found = _compare(original(rounded if given is None else _take(given, rows)), served, signature)
        excused = found.tied
        if found.differing.size and given is not None:
            # Rounding is the only excuse: whatever is no float stays as it was given.
            rounded = {n: column if column.dtype.kind == "f" else given[n][rows] for n, column in rounded.items()}
            again = _compare(original(_take(rounded, found.differing)), _take(served, found.differing), signature)
            excused = np.union1d(excused, np.delete(found.differing, again.differing))
        wrong = np.setdiff1d(found.differing, excused)
        if wrong.size:
            row = int(wrong[0])
            raise SkewDetected(
                f"row {start + row} of the {rows_called}: {found.tell(row)} ({wrong.size} of {len(rows)} rows differ by more than "
                f"{SKEW_RTOL}); nothing was written: report the model's kind, or use another",
                row=start + row,
            )
        ties += (excused + start).tolist()
        agreeing = np.setdiff1d(np.arange(len(rows)), excused)
        worst = max(worst, found.worst(agreeing))
        progress(f"{rows[-1] + 1:,} of {n_rows:,} rows agree")
    if len(ties) > max(1, n_rows * TIES_ALLOWED):
        raise SkewDetected(
            f"{len(ties)} of {n_rows} rows differ at threshold ties (the first is row {ties[0]} of the {rows_called}), more than one "
            "in 10,000; the model decides by less than float32 can tell apart: train it on float32, or differently",
            row=ties[0],
        )
    return Proof(n_rows=n_rows, worst_difference=worst, ties=tuple(ties), rows_called=rows_called)


@dataclass(frozen=True)
class _Found:
    """How two sets of answers compare, by row."""

    differing: NDArray[np.intp]
    """Rows of which some output differs, labels at a tie left out."""
    tied: NDArray[np.intp]
    """Rows of which only the label differs, between two classes with equal scores."""
    wanted: Arrays
    got: Arrays
    signature: Signature

    def tell(self, row: int) -> str:
        for spec in self.signature.outputs:
            wanted, got = self.wanted[spec.name][row : row + 1], self.got[spec.name][row : row + 1]
            if differing_rows(wanted, got, rtol=SKEW_RTOL, atol=SKEW_ATOL).size:
                return f"output {spec.name!r} is {_text(wanted[0])} by the original, {_text(got[0])} by the graph"
        return "the answers differ"

    def worst(self, rows: NDArray[np.intp]) -> float:
        """Return the largest difference of a float output in these rows."""
        floats = [name for name, array in self.wanted.items() if array.dtype.kind == "f"]
        return max((_largest_difference(self.wanted[name][rows], self.got[name][rows]) for name in floats), default=0.0)


def _compare(wanted: Arrays, got: Arrays, signature: Signature) -> _Found:
    label, scores = label_output(signature), score_output(signature)
    n_rows = len(next(iter(got.values())))
    differs, tied = np.zeros(n_rows, dtype=np.bool_), np.zeros(n_rows, dtype=np.bool_)
    for spec in signature.outputs:
        if wanted[spec.name].shape != got[spec.name].shape:
            raise SkewDetected(
                f"output {spec.name!r} has shape {wanted[spec.name].shape} by the original, {got[spec.name].shape} by the graph; "
                "nothing was written: report the model's kind, or use another",
                row=0,
            )
        rows = differing_rows(wanted[spec.name], got[spec.name], rtol=SKEW_RTOL, atol=SKEW_ATOL)
        if spec is label and scores is not None:
            tied[rows] = _scores_tie(wanted, got, label, scores, rows)
            rows = rows[~tied[rows]]
        differs[rows] = True
    return _Found(np.flatnonzero(differs), np.flatnonzero(tied & ~differs), wanted, got, signature)


def _scores_tie(
    wanted: Arrays, got: Arrays, label: TensorSpec, scores: TensorSpec, rows: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Whether the original gives its own label and the graph's the same score, within the tolerance; per row."""
    classes = label.labels or ()
    by_row = wanted[scores.name][rows]
    ours, theirs = (
        np.take_along_axis(by_row, class_codes(answers[label.name][rows], classes)[:, np.newaxis], axis=1)[:, 0]
        for answers in (wanted, got)
    )
    same: NDArray[np.bool_] = np.isclose(ours, theirs, rtol=SKEW_RTOL, atol=SKEW_ATOL)
    return same


def _largest_difference(wanted: NDArray[Any], got: NDArray[Any]) -> float:
    difference = np.abs(wanted.astype(np.float64) - got)
    return float(difference.max(initial=0, where=~np.isnan(difference)))


def _take(arrays: Arrays, rows: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
    return {name: array[rows] for name, array in arrays.items()}


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, str) else " ".join(np.array2string(np.asarray(value), threshold=8).split())


@dataclass(frozen=True)
class Export:
    """A graph that was proven against its pipeline, and its answers to the held-out rows."""

    model: bytes
    signature: Signature
    proof: Proof
    outputs: Arrays


def export(
    pipeline: Pipeline,
    specs: tuple[TensorSpec, ...],
    held_out: Arrays,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Draw the pipeline as a graph and prove it on the held-out rows.

    Raises:
        ExportError: it cannot be drawn.
        SkewDetected: graph and pipeline disagree.
    """
    model, signature = to_onnx(pipeline, specs)
    run = run_graph(model)
    proof = prove_no_skew(
        lambda rows: named_outputs(pipeline.predict(rows), signature), run, signature, held_out, progress=progress
    )
    return Export(model=model, signature=signature, proof=proof, outputs=run(held_out))


def write(
    target: Path,
    exported: Export,
    *,
    name: str,
    task: str,
    train: Arrays,
    held_out: Arrays,
    lineage: Lineage,
    targets: Targets,
    cases_origin: str = "held-out",
    description: str | None = None,
) -> Bundle:
    """Write the bundle: golden cases from the held-out rows, reference statistics from the training rows."""
    return write_bundle(
        target,
        BundleContent(
            name=name,
            task=task,
            signature=exported.signature,
            model=exported.model,
            cases=choose_cases(held_out, exported.outputs, exported.signature, margin=CASE_MARGIN),
            cases_origin=cases_origin,
            reference=summarise(train, exported.outputs, exported.signature),
            lineage=lineage,
            targets=targets,
            description=description,
        ),
    )
