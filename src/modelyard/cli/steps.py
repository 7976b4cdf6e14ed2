"""Steps of the walk of a model that several commands take, with progress shown: check, train, compress, publish."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.cli.progress import Progress
from modelyard.errors import DataError

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.cli.config import Yard
    from modelyard.compress.search import Compression
    from modelyard.training.data import Dataset
    from modelyard.training.data_report import DataReport
    from modelyard.training.train import Trained


def checked_data(yard: "Yard", root: Path, progress: Progress) -> "tuple[Dataset, DataReport]":
    """Load, check and split; print the report's warnings, keep the whole of it in WORK, stop at its errors."""
    from modelyard.training.data import load_dataset

    progress.step("read and check the data")
    dataset, report = load_dataset(yard.data, yard.split, root=root, progress=progress.detail)
    reports = work_folder(yard, root) / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    write_beside(reports / "data.txt", report.text() + "\n")
    write_beside(reports / "data.json", json.dumps(report.to_json(), indent=2) + "\n")
    lineage = dataset.lineage
    progress.detail(
        f"{lineage.n_samples:,} rows, inputs: {len(dataset.specs)}; {lineage.n_train:,} to train, {lineage.n_validation:,} to "
        f"validate, {lineage.n_test:,} to test; split {lineage.split}"
    )
    for finding in report.findings:
        if finding.severity != "info":
            progress.note(f"  {finding.severity}: {finding.message}")
    try:
        report.raise_for_errors()
    except DataError:
        progress.note(f"  the whole report: {reports / 'data.txt'}")
        raise
    return dataset, report


def trained(
    yard: "Yard",
    root: Path,
    dataset: "Dataset",
    output: Path | None,
    catalogue: Any,
    progress: Progress,
    *,
    fresh: bool,
) -> "Trained":
    """Train with progress shown, the checkpoint kept in WORK."""
    from modelyard.training.train import train as train_model
    from modelyard.training.watch import Watch

    work = work_folder(yard, root)
    checkpoint = work / "checkpoints" / f"{yard.name}.safetensors"
    if fresh:
        checkpoint.unlink(missing_ok=True)
    elif checkpoint.exists():
        progress.note("  there is a checkpoint: it is taken up if it is of this very run (--fresh starts anew)")
    target = output or fresh_path(work / "bundles", "trained")
    result = train_model(
        yard.name,
        dataset,
        yard.model,
        yard.fit,
        yard.targets,
        target,
        root=root,
        checkpoint=checkpoint,
        prices=catalogue,
        description=yard.description,
        watch=Watch(step=progress.step, detail=progress.detail, fit=progress.fit),
    )
    # What was trained is in the bundle now; the next run of the same configuration is a new one.
    checkpoint.unlink(missing_ok=True)
    if result.resumed_at:
        epoch, batch = result.resumed_at
        progress.note(f"  went on from the checkpoint at epoch {epoch + 1}, batch {batch}")
    for comparison in result.comparisons:
        progress.note(f"  {comparison.text()}")
    progress.note(f"  {result.proof.text()}")
    return result


def compressed(
    yard: "Yard",
    root: Path,
    parent: "Bundle",
    dataset: "Dataset",
    catalogue: Any,
    progress: Progress,
    *,
    techniques: tuple[str, ...] = (),
    output: Path | None = None,
) -> "Compression":
    """Compress with the rows of `dataset`: calibrate on training rows, select on validation rows, judge on test rows."""
    from msgspec import structs

    from modelyard.compress.search import LabelledRows
    from modelyard.compress.search import compress as search

    split = dataset.split
    settings = structs.replace(yard.compress, techniques=techniques) if techniques else yard.compress
    work = work_folder(yard, root)
    return search(
        parent,
        output or fresh_path(work / "bundles", "compressed"),
        calibration=dataset.take(_spread(split.train, settings.calibration_rows)),
        selection=LabelledRows(dataset.take(split.validation), dataset.label[split.validation]),
        test=LabelledRows(dataset.take(split.test), dataset.label[split.test]),
        config=settings,
        work=work / "candidates",
        prices=catalogue,
        step=lambda text: progress.step(f"compress: {text}"),
        detail=progress.detail,
    )


def _spread(rows: Any, n: int) -> Any:
    """Take `n` rows evenly over the whole, so that a split by time is calibrated on all of its time."""
    import numpy as np

    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(np.int64)]


def published(yard: "Yard", root: Path, bundle: Path, progress: Progress) -> int:
    """Publish to the configured store; return the version."""
    from modelyard.bundle.store import open_store

    progress.step("publish")
    version = open_store(store_url(yard, root)).publish(bundle, yard.name)
    progress.detail(f"{yard.name} version {version} in {store_url(yard, root)}")
    return version


def store_url(yard: "Yard", root: Path) -> str:
    """Return the store as an absolute path, or as the URL it is."""
    return yard.store if "://" in yard.store else str((root / yard.store).resolve())


def work_folder(yard: "Yard", root: Path) -> Path:
    """Return the folder for reports, checkpoints and bundles on their way."""
    return (root / yard.work).resolve()


def fresh_path(folder: Path, stem: str) -> Path:
    """Return `folder/stem-N` with the lowest N that is free."""
    n = 1
    while (folder / f"{stem}-{n}").exists():
        n += 1
    return folder / f"{stem}-{n}"


def write_beside(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
