"""`modelyard compress`: a bundle → a cheaper bundle that is provably no worse than allowed, or the reason why not."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelyard.cli.options import as_json_option, prices_option
from modelyard.cli.progress import Progress
from modelyard.cli.steps import checked_data, compressed, published
from modelyard.errors import ConfigError

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.training.data import Dataset


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("yard.toml"),
    help="The yard.toml whose data the bundle was trained on: calibration, selection and test rows come from it.",
)
@click.option(
    "--technique",
    "techniques",
    multiple=True,
    type=click.Choice(["static-int8", "dynamic-int8"]),
    help="Only these [default: those of the configuration].",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the accepted bundle [default: WORK/bundles/compressed-N].",
)
@click.option("--publish", is_flag=True, help="Publish an accepted bundle to the configured store.")
@prices_option
@as_json_option
def compress(
    bundle: Path,
    config: Path,
    techniques: tuple[str, ...],
    output: Path | None,
    publish: bool,
    prices: Path | None,
    as_json: bool,
) -> None:
    """Quantize BUNDLE; accept the result only by test and measurement.

    A variant is accepted when held-out rows show at 95 % confidence that it keeps the share of the parent's score that the
    targets ask for, when its answers do not depend on their batch mates, and when it is measurably faster, or smaller and
    not slower, on this machine. Exit status 1 says that no variant was accepted; the parent is untouched either way.

    \b
    Examples:
      modelyard compress store/digits/1 --config digits/yard.toml
      modelyard compress bundle --technique static-int8 --output bundle-int8
    """
    from modelyard.bundle.format import read_bundle
    from modelyard.cli.config import load_yard
    from modelyard.prices import load_prices

    yard, root = load_yard(config), (config if config.is_dir() else config.parent).resolve()
    parent, catalogue = read_bundle(bundle), load_prices(prices)
    with Progress() as progress:
        dataset, _ = checked_data(yard, root, progress)
        _require_same_rows(parent, dataset, config)
        result = compressed(yard, root, parent, dataset, catalogue, progress, techniques=techniques, output=output)
        version = published(yard, root, result.child.path, progress) if publish and result.child else None
    click.echo(json.dumps(result.to_json() | {"version": version}) if as_json else result.text())
    if result.child is None:
        raise click.exceptions.Exit(1)


def _require_same_rows(parent: "Bundle", dataset: "Dataset", config: Path) -> None:
    """The test rows of another data set or split may be rows the parent was trained on."""
    trained_on = parent.manifest.lineage.data
    if trained_on is None:
        return
    ours = dataset.lineage
    if trained_on.digest != ours.digest:
        difference = f"other rows (data {trained_on.digest[:12]}…, here {ours.digest[:12]}…)"
    elif trained_on.split_digest != ours.split_digest:
        difference = f"the same rows split otherwise ({trained_on.split!r}, here {ours.split!r})"
    else:
        return
    raise ConfigError(
        f"{parent.path} was trained on {difference}, so the test rows of {config} may be training rows; give the configuration it was "
        "trained with"
    )
