"""Which variant of a bundle to keep: every technique tried, the best on selection rows judged once on the test rows.

Selecting and judging use different rows, so that the winner is not the luckiest. The parent is only read.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, structs
from numpy.typing import NDArray

from modelyard.bundle.answers import answers_reader, choose_cases, score_of
from modelyard.bundle.cases import Arrays
from modelyard.bundle.format import Bundle, content_of, require_free, write_bundle
from modelyard.bundle.independence import rows_independent
from modelyard.bundle.manifest import Lineage, Score
from modelyard.bundle.reference import summarise
from modelyard.compress.measure import compare_cost
from modelyard.compress.quantize import TECHNIQUES, Technique, quantize
from modelyard.compress.verdict import Verdict, judge, test_quality
from modelyard.errors import CompressionError
from modelyard.inference.runtime import Engine, RowByRow, open_engine
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine
from modelyard.metering import Meter, Metered
from modelyard.metrics import Answers, default_metric
from modelyard.prices import Device
from modelyard.provenance import environment
from modelyard.schema import Frozen, to_builtins

INT8_TOLERANCE = 1e-2
"""How closely an int8 bundle's golden cases must be met on another machine."""
RUN_ROWS = 1024


class CompressConfig(Frozen, frozen=True):
    """[compress] in yard.toml."""

    techniques: tuple[Technique, ...] = TECHNIQUES
    calibration_rows: Annotated[int, Meta(ge=1, le=100_000)] = 512
    """Training rows from which static-int8 takes the ranges of activations."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows with their truth, shape (n,)."""

    inputs: Arrays
    truth: NDArray[Any]


@dataclass(frozen=True)
class Candidate:
    """One variant and what became of it."""

    technique: Technique
    bundle: Bundle | None
    """None where the technique does not apply."""
    verdict: Verdict | None
    """On the selection rows; for the finalist on the test rows."""
    reason: str
    """In one sentence."""

    def lines(self) -> list[str]:
        """Return the outcome, and under it a line per reason."""
        if self.verdict is None:
            return [f"{self.technique} {self.reason}"]
        return [f"{self.technique} {self.verdict.outcome}", *(f"  - {reason}" for reason in self.verdict.reasons)]


@dataclass(frozen=True)
class Compression:
    """The outcome: the child that was accepted, if any, and every candidate with its verdict."""

    child: Bundle | None
    candidates: tuple[Candidate, ...]
    finalist: Candidate | None
    spent: Metered

    def text(self) -> str:
        lines = [line for candidate in self.candidates for line in candidate.lines()]
        ending = "no variant was accepted: the parent is kept" if self.child is None else f"accepted: {self.child.path}"
        return "\n".join([*lines, ending])

    def to_json(self) -> dict[str, Any]:
        return {
            "accepted": None if self.child is None else str(self.child.path),
            "candidates": [
                {
                    "technique": candidate.technique,
                    "bundle": None if candidate.bundle is None else str(candidate.bundle.path),
                    "rows_independent": candidate.bundle is not None and candidate.bundle.manifest.rows_independent,
                    "verdict": None if candidate.verdict is None else candidate.verdict.to_json(),
                    "reason": candidate.reason,
                }
                for candidate in self.candidates
            ],
            "spent": to_builtins(self.spent),
        }


def apply(parent: Bundle, technique: Technique, target: Path, *, calibration: Arrays, held_out: Arrays) -> Bundle:
    """Write the variant of `parent` that `technique` makes, unjudged, and return it.

    Where an answer depends on its batch mates the bundle is marked, and run one row at a time from then on.

    Args:
        calibration: training rows.
        held_out: rows for the reference statistics of the outputs.

    Raises:
        CompressionError: the technique does not apply.
        FileExistsError: `target` exists.
    """
    require_free(target)
    model = quantize(parent, technique, calibration)
    engine = OnnxRuntimeEngine(model)
    cases = parent.cases()
    independent = rows_independent(engine.run, cases.inputs)
    served = engine if independent else RowByRow(engine)
    outputs, case_outputs = run_rows(served, held_out), run_rows(served, cases.inputs)
    engine.close()
    reference = {name: feature for name, feature in parent.reference().items() if name.startswith("input:")}
    reference |= {
        name: feature
        for name, feature in summarise(held_out, outputs, parent.signature).items()
        if name.startswith("output:")
    }
    parents = parent.manifest.lineage
    content = replace(
        content_of(parent),
        model=model,
        cases=choose_cases(cases.inputs, case_outputs, parent.signature, margin=2 * INT8_TOLERANCE),
        reference=reference,
        lineage=Lineage(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            made_by=f"compress: {technique}",
            parent=parent.digest,
            data=parents.data,
            code_revision=parents.code_revision,
            seeds=parents.seeds,
            environment=environment(),
        ),
        rtol=INT8_TOLERANCE,
        atol=INT8_TOLERANCE,
        rows_independent=independent,
    )
    return write_bundle(target, content)


def compress(
    parent: Bundle,
    target: Path,
    *,
    calibration: Arrays,
    selection: LabelledRows,
    test: LabelledRows,
    config: CompressConfig,
    work: Path,
    prices: Mapping[str, Device],
    step: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
) -> Compression:
    """Try the techniques and write the accepted child, if there is one, to `target`.

    Args:
        calibration: training rows, for the ranges of activations.
        selection: rows the finalist is chosen by; none of them may be a test row.
        test: rows the finalist is judged by, once.
        work: folder for the candidates; those that were refused stay there to be looked at.

    Raises:
        FileExistsError: `target` exists.
        SignatureMismatch: the parent's outputs cannot be scored.
    """
    require_free(target)
    meter = Meter(prices)
    step("the parent's answers")
    judged = _Judge(parent, calibration, selection, test, work, detail)
    candidates = []
    for technique in config.techniques:
        step(technique)
        candidates.append(judged.try_technique(technique))
        detail(candidates[-1].reason)
    hopeful = [c for c in candidates if c.verdict and c.verdict.outcome != "refused"]
    finalist, child = None, None
    if hopeful:
        step("final test of the best")
        best = max(hopeful, key=lambda c: c.verdict.cost.speedup.value if c.verdict else 0.0)
        finalist, scores = judged.final(best)
        detail(finalist.reason)
        candidates = [finalist if c is best else c for c in candidates]
        if finalist.verdict and finalist.verdict.outcome == "accepted" and finalist.bundle:
            child = _publishable(finalist.bundle, target, finalist.verdict, scores, meter.read())
    judged.close()
    return Compression(child=child, candidates=tuple(candidates), finalist=finalist, spent=meter.read())


class _Judge:
    """Holds the parent's engine and answers while its candidates are compared with it."""

    def __init__(
        self,
        parent: Bundle,
        calibration: Arrays,
        selection: LabelledRows,
        test: LabelledRows,
        work: Path,
        detail: Callable[[str], None],
    ) -> None:
        targets = parent.manifest.targets
        self.parent, self.calibration, self.work, self.detail = parent, calibration, work, detail
        self.selection, self.test = selection, test
        self.read = answers_reader(parent.signature, parent.manifest.task, targets.positive)
        self.engine = open_engine(parent)
        self.on_selection = self.read(run_rows(self.engine, selection.inputs))
        self.metric = targets.metric or default_metric(parent.manifest.task, self.on_selection.classes)

    def close(self) -> None:
        self.engine.close()

    def try_technique(self, technique: Technique) -> Candidate:
        """Make the variant, time it, and judge it on the selection rows."""
        # Candidates are scratch: the name is drawn anew, so that another try never meets them.
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder = self.work / f"{technique}-{stamp}-{secrets.token_hex(4)}"
        try:
            self.detail("quantizing")
            bundle = apply(self.parent, technique, folder, calibration=self.calibration, held_out=self.selection.inputs)
        except CompressionError as exc:
            return Candidate(technique, None, None, f"does not apply: {exc}")
        engine = open_engine(bundle, check=False)
        cost = compare_cost(
            self.engine.run,
            engine.run,
            self.parent.cases().inputs,
            parent_bytes=self.parent.graph.weight_bytes,
            child_bytes=bundle.graph.weight_bytes,
            progress=self.detail,
        )
        answers = self.read(run_rows(engine, self.selection.inputs))
        engine.close()
        verdict = self._judge(self.selection, self.on_selection, answers, cost, bundle)
        return Candidate(technique, bundle, verdict, _sentence(verdict))

    def final(self, candidate: Candidate) -> tuple[Candidate, tuple[Score, ...]]:
        """Judge the finalist on the test rows, with the cost already measured; return it with its scores there."""
        assert candidate.bundle is not None  # only what was made can be hopeful
        assert candidate.verdict is not None
        engine = open_engine(candidate.bundle)
        parents = self.read(run_rows(self.engine, self.test.inputs))
        answers = self.read(run_rows(engine, self.test.inputs))
        engine.close()
        verdict = self._judge(self.test, parents, answers, candidate.verdict.cost, candidate.bundle)
        names = [self.metric, *(score.metric for score in self.parent.manifest.lineage.scores)]
        return replace(candidate, verdict=verdict, reason=_sentence(verdict)), tuple(
            score_of(name, self.test.truth, answers) for name in dict.fromkeys(names)
        )

    def _judge(self, rows: LabelledRows, parents: Answers, answers: Answers, cost: Any, bundle: Bundle) -> Verdict:
        quality = test_quality(rows.truth, parents, answers, self.metric, self.parent.manifest.targets.keep)
        return judge(quality, cost, rows_independent=bundle.manifest.rows_independent)


def run_rows(engine: Engine, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Answer many rows in parts, so that memory stays flat."""
    n_rows = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[start : start + RUN_ROWS] for name, array in inputs.items()})
        for start in range(0, n_rows, RUN_ROWS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sentence(verdict: Verdict) -> str:
    return f"{verdict.outcome}: {'; '.join(verdict.reasons)}"


def _publishable(
    candidate: Bundle, target: Path, verdict: Verdict, scores: tuple[Score, ...], spent: Metered
) -> Bundle:
    """Write the accepted candidate with its verdict, scores and the cost of the whole search in its lineage."""
    lineage = structs.replace(candidate.manifest.lineage, scores=scores, spent=spent, notes=(_sentence(verdict),))
    return write_bundle(target, replace(content_of(candidate), lineage=lineage))
