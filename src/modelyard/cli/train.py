"""`modelyard train`: labelled rows → a bundle."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.progress import Progress
from modelyard.errors import DataError

if TYPE_CHECKING:
    from modelyard.cli.config import Yard
    from modelyard.training.checks import DataReport
    from modelyard.training.data import Dataset
    from modelyard.training.train import Trained


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default="yard.toml", metavar="[YARD_TOML]")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the bundle [default: WORK/bundles/trained-ID]."
)
@click.option("--check-only", is_flag=True, help="Check the data, print the report and stop.")
@click.option("--fresh", is_flag=True, help="Start anew where a checkpoint of the same run would be taken up.")
@click.option("--publish", is_flag=True, help="Publish the bundle to the configured store.")
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    envvar="MODELYARD_PRICES",
    help="Price file that overrides the catalogue.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def train(
    config: Path, output: Path | None, check_only: bool, fresh: bool, publish: bool, prices: Path | None, as_json: bool
) -> None:
    """Train the model that YARD_TOML describes and write its bundle.

    The data is checked and split first; the model is compared with a majority-class and a linear baseline; the bundle is
    written only when its graph answers every held-out row as the trained pipeline does. A run that was killed goes on from
    its last checkpoint when it is started again.

    \b
    Examples:
      modelyard train                          the yard.toml of this folder
      modelyard train flights/yard.toml --check-only
      modelyard train --output bundle --json
    """
    from modelyard.cli.config import load_yard
    from modelyard.prices import load_prices

    yard, root = load_yard(config), (config if config.is_dir() else config.parent).resolve()
    catalogue = load_prices(prices)
    with Progress() as progress:
        dataset, report = checked_data(yard, root, progress)
        if check_only:
            click.echo(json.dumps(report.to_json()) if as_json else report.text())
            return
        result = trained(yard, root, dataset, output, catalogue, progress, fresh=fresh)
        version = published(yard, root, result.bundle.path, progress) if publish else None
    if as_json:
        click.echo(json.dumps(_to_json(result, report, version)))
    else:
        click.echo(_text(result, version))


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
        f"{lineage.n_samples:,} rows, {len(dataset.specs)} inputs; {lineage.n_train:,} to train, {lineage.n_validation:,} to "
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
    from modelyard.training.train import Watch
    from modelyard.training.train import train as train_model

    work = work_folder(yard, root)
    checkpoint = work / "checkpoints" / f"{yard.name}.safetensors"
    if fresh:
        checkpoint.unlink(missing_ok=True)
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


def _text(result: "Trained", version: int | None) -> str:
    spent = result.spent
    lines = [
        result.evaluation.text(),
        "",
        *(f"the model {comparison.text()}" for comparison in result.comparisons),
        result.proof.text(),
        f"spent: {spent.wall_s:.1f} s, {spent.cpu_s:.1f} CPU s, {spent.energy_j:.0f} J ({spent.energy_source}), ${spent.cost_usd:.5f}",
        f"bundle: {result.bundle.path}",
    ]
    if version is not None:
        lines.append(f"published: version {version}")
    return "\n".join(lines)


def _to_json(result: "Trained", report: "DataReport", version: int | None) -> dict[str, Any]:
    from modelyard.schema import to_builtins

    return {
        "bundle": str(result.bundle.path),
        "digest": result.bundle.digest,
        "evaluation": result.evaluation.to_json(),
        "comparisons": [comparison.to_json() for comparison in result.comparisons],
        "proof": {
            "n_rows": result.proof.n_rows,
            "worst_difference": result.proof.worst_difference,
            "ties": list(result.proof.ties),
        },
        "spent": to_builtins(result.spent),
        "resumed_at": result.resumed_at,
        "data": report.to_json(),
        "version": version,
    }
