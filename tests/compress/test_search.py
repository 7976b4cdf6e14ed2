"""From a parent to an accepted child, or to the reason why there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from parents import Parent, make_parent

from modelyard.bundle.format import content_of, read_bundle, write_bundle
from modelyard.bundle.manifest import Targets
from modelyard.compress.search import CompressConfig, Compression, LabelledRows, apply, compress
from modelyard.inference.runtime import RowByRow, open_engine
from modelyard.prices import load_prices


def run(parent: Parent, folder: Path, config: CompressConfig | None = None) -> Compression:
    return compress(
        parent.bundle,
        folder / "child",
        calibration=parent.calibration,
        selection=parent.selection,
        test=parent.test,
        config=config or CompressConfig(),
        work=folder / "work",
        prices=load_prices(),
    )


def test_an_accepted_child_names_its_parent_and_carries_its_verdict(tmp_path: Path) -> None:
    parent = make_parent(tmp_path, width=512)  # wide enough for int8 to be faster as well as smaller

    result = run(parent, tmp_path, CompressConfig(techniques=("static-int8",)))

    assert result.child is not None, result.text()
    lineage = read_bundle(tmp_path / "child").manifest.lineage
    assert lineage.parent == parent.bundle.digest
    assert lineage.made_by == "compress: static-int8"
    assert lineage.scores[0].n_samples == len(parent.test.truth)
    assert lineage.notes[0].startswith("accepted: not worse than allowed")
    assert lineage.spent is not None
    assert lineage.spent.cpu_s > 0


def test_the_accepted_child_passes_its_own_golden_cases(tmp_path: Path) -> None:
    result = run(make_parent(tmp_path, width=512), tmp_path, CompressConfig(techniques=("static-int8",)))

    assert result.child is not None
    open_engine(result.child)  # raises GoldenCaseFailed otherwise


def test_a_child_whose_answers_depend_on_batch_mates_is_marked_refused_and_run_row_by_row(
    parent: Parent, tmp_path: Path
) -> None:
    result = run(parent, tmp_path, CompressConfig(techniques=("dynamic-int8",)))

    (candidate,) = result.candidates
    assert result.child is None
    assert candidate.bundle is not None
    assert not candidate.bundle.manifest.rows_independent
    assert "which rows share the batch" in candidate.reason
    engine = open_engine(candidate.bundle)
    assert isinstance(engine, RowByRow)
    rows = {name: array[:5] for name, array in parent.test.inputs.items()}
    together = engine.run(rows)["scores"]
    alone = engine.run({name: array[4:5] for name, array in rows.items()})["scores"]
    np.testing.assert_array_equal(together[4:5], alone)


def test_too_few_test_rows_never_accept(parent: Parent, tmp_path: Path) -> None:
    few = LabelledRows({name: array[:40] for name, array in parent.test.inputs.items()}, parent.test.truth[:40])

    result = run(replace(parent, test=few), tmp_path, CompressConfig(techniques=("static-int8",)))

    assert result.child is None
    assert not (tmp_path / "child").exists()


def test_a_technique_that_does_not_apply_is_a_candidate_with_a_reason(parent: Parent, tmp_path: Path) -> None:
    child = apply(
        parent.bundle, "static-int8", tmp_path / "int8", calibration=parent.calibration, held_out=parent.test.inputs
    )

    result = run(replace(parent, bundle=child), tmp_path)

    assert result.child is None
    assert all(
        candidate.reason.startswith("does not apply: the graph is quantized already") for candidate in result.candidates
    )
    assert result.finalist is None


def test_an_existing_target_is_refused_before_any_work(parent: Parent, tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()

    with pytest.raises(FileExistsError, match="never overwritten"):
        run(parent, tmp_path)
    assert not (tmp_path / "work").exists()


def test_the_parent_is_not_touched(parent: Parent, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in parent.bundle.path.iterdir()}

    run(parent, tmp_path, CompressConfig(techniques=("dynamic-int8",)))

    assert {path.name: path.read_bytes() for path in parent.bundle.path.iterdir()} == before


def test_the_margin_comes_from_the_parents_targets(parent: Parent, tmp_path: Path) -> None:
    strict = write_bundle(
        tmp_path / "strict", replace(content_of(parent.bundle), targets=Targets(metric="accuracy", keep=0.9999))
    )

    result = run(replace(parent, bundle=strict), tmp_path, CompressConfig(techniques=("static-int8",)))

    verdict = result.candidates[0].verdict
    assert verdict is not None
    assert verdict.quality.keep == 0.9999
    assert verdict.outcome != "accepted"  # 2,000 rows cannot show a loss below one in ten thousand
