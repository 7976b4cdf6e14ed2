"""`modelyard train`: labelled rows → a bundle."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.options import as_json_option, prices_option
from modelyard.cli.progress import Progress
from modelyard.cli.steps import checked_data, published, trained

if TYPE_CHECKING:
    from modelyard.training.data_report import DataReport
    from modelyard.training.train import Trained


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default="yard.toml", metavar="[YARD_TOML]")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the bundle [default: WORK/bundles/trained-N]."
)
@click.option("--check-only", is_flag=True, help="Check the data, print the report and stop.")
@click.option("--fresh", is_flag=True, help="Start anew where a checkpoint of the same run would be taken up.")
@click.option("--publish", is_flag=True, help="Publish the bundle to the configured store.")
@prices_option
@as_json_option
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
