"""A trained pipeline → one ONNX graph → a bundle, with the proof that both answer every held-out row alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.answers import answers_reader, choose_cases
from modelyard.bundle.cases import Arrays, differing_rows
from modelyard.bundle.format import Bundle, BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, Lineage, Signature, Targets, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.errors import SkewDetected
from modelyard.metrics import Answers
from modelyard.training.models import PREDICT_ROWS, Pipeline, class_array, in_parts
from modelyard.training.onnx_graph import GraphBuilder

LABEL, PROBABILITIES, PREDICTION = "label", "probabilities", "prediction"
SKEW_RTOL = SKEW_ATOL = 1e-5
TIES_ALLOWED = 1 / 10_000
CASE_MARGIN = 1e-3
"""Golden cases keep this distance between their two best scores, so that rounding on another machine flips no label."""


@dataclass(frozen=True)
class Proof:
    """That graph and pipeline agree."""

    n_rows: int
    worst_difference: float
    """Largest absolute difference of a score or value."""
    ties: tuple[int, ...] = field(default=())
    """Rows excused: the label differs, and the two labels' scores are equal within the tolerance."""

    def text(self) -> str:
        excused = f", {len(self.ties)} threshold ties excused" if self.ties else ""
        return f"graph and pipeline agree on {self.n_rows:,} held-out rows (largest difference {self.worst_difference:.1e}{excused})"


def to_onnx(pipeline: Pipeline, specs: tuple[TensorSpec, ...]) -> tuple[bytes, Signature]:
    """Draw the pipeline, label decoding included, as one graph with named inputs; return its bytes and signature."""
    graph = GraphBuilder()
    core = pipeline.add_to(graph)
    if pipeline.classes:
        classes = class_array(pipeline.classes)
        graph.add("Identity", core, output=PROBABILITIES)
        best = graph.add("ArgMax", core, axis=1, keepdims=0)
        graph.add("Gather", graph.constant(classes), best, output=LABEL)
        outputs = (
            TensorSpec(
                name=LABEL,
                datatype="BYTES" if classes.dtype == object else "INT64",
                shape=(BATCH,),
                labels=pipeline.classes,
            ),
            TensorSpec(
                name=PROBABILITIES, datatype="FP32", shape=(BATCH, len(pipeline.classes)), labels=pipeline.classes
            ),
        )
    else:
        graph.add("Reshape", core, graph.constant(np.array([-1], dtype=np.int64)), output=PREDICTION)
        outputs = (TensorSpec(name=PREDICTION, datatype="FP32", shape=(BATCH,)),)
    signature = Signature(inputs=specs, outputs=outputs)
    return graph.build(specs, outputs).SerializeToString(), signature


def run_graph(model: bytes) -> Callable[[Arrays], dict[str, NDArray[Any]]]:
    """Return a function that answers named inputs with onnxruntime, in parts."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
        parts = [session.run(names, dict(part)) for part in in_parts(inputs)]
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}

    return run


def prove_no_skew(
    pipeline: Pipeline,
    run: Callable[[Arrays], Arrays],
    signature: Signature,
    inputs: Arrays,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Send every row through pipeline and graph; any that differs fails.

    The inputs are float32 already, so a label may differ only where the original itself cannot tell the classes apart: the
    scores agree within the tolerance, and so do the scores of the two labels. At most one row in 10,000 is excused.

    Raises:
        SkewDetected: names the row, the output and both answers.
    """
    n_rows = len(next(iter(inputs.values())))
    read = answers_reader(signature, pipeline.task)
    ties: list[int] = []
    worst = 0.0
    for start in range(0, n_rows, PREDICT_ROWS):
        part = {name: array[start : start + PREDICT_ROWS] for name, array in inputs.items()}
        original, served = pipeline.predict(part), read(run(part))
        wanted, got = (original.scores, served.scores) if pipeline.classes else (original.values, served.values)
        assert wanted is not None  # a pipeline answers with scores or with values
        assert got is not None
        wrong = differing_rows(wanted, got, rtol=SKEW_RTOL, atol=SKEW_ATOL)
        if wrong.size:
            row = int(wrong[0])
            raise SkewDetected(
                f"held-out row {start + row}: the pipeline answers {wanted[row]}, the graph {got[row]} ({wrong.size} of "
                f"{len(wanted)} rows differ by more than {SKEW_RTOL}); nothing was written: report the model's kind, or use another",
                row=start + row,
            )
        worst = max(worst, float(np.abs(wanted.astype(np.float64) - got).max(initial=0)))
        ties += [start + row for row in _ties(original, served, start)]
        progress(f"{min(start + PREDICT_ROWS, n_rows):,} of {n_rows:,} rows agree")
    if len(ties) > max(1, n_rows * TIES_ALLOWED):
        raise SkewDetected(
            f"{len(ties)} of {n_rows} labels differ at ties of their scores (the first at held-out row {ties[0]}), more than one in "
            "10,000; the model does not separate these classes: train it differently",
            row=ties[0],
        )
    return Proof(n_rows=n_rows, worst_difference=worst, ties=tuple(ties))


def _ties(original: Answers, served: Answers, start: int) -> list[int]:
    """Rows whose label differs; raises SkewDetected unless the two labels' scores are equal within the tolerance."""
    if original.labels is None or served.labels is None or original.scores is None:
        return []
    differing = np.flatnonzero(original.labels != served.labels)
    for row in differing:
        best = np.sort(original.scores[row])[-2:]
        if not np.isclose(best[0], best[1], rtol=SKEW_RTOL, atol=SKEW_ATOL):
            raise SkewDetected(
                f"held-out row {start + row}: the pipeline says {original.labels[row]!r}, the graph {served.labels[row]!r}; nothing "
                "was written: report the model's kind, or use another",
                row=start + int(row),
            )
    return [int(row) for row in differing]


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
    proof = prove_no_skew(pipeline, run, signature, held_out, progress=progress)
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
