"""`modelyard run`: the whole walk of a model, from labelled rows to served predictions and a table to act on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.ask import serve_and_ask
from modelyard.cli.options import prices_option
from modelyard.cli.progress import Progress
from modelyard.cli.steps import checked_data, compressed, published, store_url, trained, work_folder, write_beside
from modelyard.cli.summary import Promotion, Variant, conclusion, story, table

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.bundle.store import Store
    from modelyard.metrics import Answers
    from modelyard.training.data import Dataset
    from modelyard.training.train import Trained


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default="yard.toml", metavar="[YARD_TOML]")
@click.option("--fresh", is_flag=True, help="Start training anew where a checkpoint of the same run would be taken up.")
@prices_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def run(config: Path, fresh: bool, prices: Path | None, as_json: bool) -> None:
    """Do the whole job that YARD_TOML describes.

    Check the data, train, prove that the exported graph answers as the pipeline does, compress with a verdict, publish,
    serve, and ask every held-out row over HTTP. Ends in a table: score with interval, size, latency, throughput and cost of
    the model and of its compressed child, and where everything was put. The tag "champion" moves when every row was
    answered and the new version is not worse than the champion or than always saying the same.

    \b
    Examples:
      modelyard run                            the yard.toml of this folder
      modelyard run examples/digits/yard.toml
      modelyard run --json > result.json
    """
    from modelyard.bundle.store import open_store
    from modelyard.cli.config import load_yard
    from modelyard.prices import load_prices

    yard, root = load_yard(config), (config if config.is_dir() else config.parent).resolve()
    catalogue = load_prices(prices)
    core, work, url = catalogue["cpu-core"], work_folder(yard, root), store_url(yard, root)
    store = open_store(url)
    store.names()  # one that cannot be read is found out before the work
    with Progress() as progress:
        dataset, _ = checked_data(yard, root, progress)
        model = trained(yard, root, dataset, None, catalogue, progress, fresh=fresh)
        compression = compressed(yard, root, model.bundle, dataset, catalogue, progress)
        bundles = {"trained": model.bundle} | ({"compressed": compression.child} if compression.child else {})
        variants = []
        for role, bundle in bundles.items():
            variant = _profiled(role, bundle, progress)
            variants.append(variant(published(yard, root, bundle.path, progress)))
        newest = variants[-1]
        progress.step("serve, ask the held-out rows over HTTP")
        served = serve_and_ask(url, yard.name, newest.version, newest.bundle, dataset, progress)
        promotion = _promote(store, yard.name, newest, model, dataset)
    result: dict[str, Any] = {
        "name": yard.name,
        "variants": [variant.to_json(core) for variant in variants],
        "comparisons": [comparison.to_json() for comparison in model.comparisons],
        "compression": compression.to_json(),
        "served": served.to_json(),
        "champion": {"version": promotion.version if promotion.moved else promotion.before, "reason": promotion.reason},
        "store": url,
        "work": str(work),
    }
    write_beside(work / "reports" / "run.json", json.dumps(result, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(conclusion(yard.name, variants, compression) + "\n")
    for line in table(variants, core):
        click.echo(line)
    click.echo()
    for line in story(yard.name, model, compression, served, variants, promotion, url, work):
        click.echo(line)


def _profiled(role: str, bundle: "Bundle", progress: Progress) -> Any:
    """Measure on one thread and keep the profile in the bundle; return the variant but for its version."""
    from modelyard.compress.measure import profile_bundle

    progress.step(f"profile the {role} model")
    profile = profile_bundle(bundle, progress=progress.detail)
    single = profile.latencies[0]
    best = max(profile.latencies, key=lambda latency: latency.rows_per_s)
    progress.detail(f"{single.p50_s * 1e3:.3f} ms at batch 1, {best.rows_per_s:,.0f} rows/s at batch {best.batch_size}")
    return lambda version: Variant(role, bundle, version, single, best)


def _promote(store: "Store", name: str, newest: Variant, model: "Trained", dataset: "Dataset") -> Promotion:
    """Move the tag "champion" to the newest version unless something speaks against it."""
    before = store.tags(name).get("champion")
    against = _against(store, name, before, newest, model, dataset)
    if against:
        return Promotion(newest.version, before, moved=False, reason=against)
    reason = f"modelyard run, {newest.role}: every held-out row was answered"
    store.tag(name, "champion", newest.version, expected=before, reason=reason)
    return Promotion(newest.version, before, moved=True, reason=reason)


def _against(
    store: "Store", name: str, before: int | None, newest: Variant, model: "Trained", dataset: "Dataset"
) -> str:
    """Return why the newest version should not be champion, "" if nothing is known.

    It is compared with the champion where both were trained on the same rows: another champion may have seen these test rows.
    """
    from modelyard.bundle.answers import answers_reader
    from modelyard.bundle.format import read_bundle
    from modelyard.compress.search import run_rows
    from modelyard.inference.runtime import open_engine
    from modelyard.metrics import METRICS, find_metric

    simplest = model.comparisons[0]
    if not simplest.beats:
        return f"the new model {simplest.text()}"
    if before is None:
        return ""
    champion = read_bundle(store.fetch(name, before))
    theirs = champion.manifest.lineage.data
    same_rows = theirs is not None and (theirs.digest, theirs.split_digest) == (
        dataset.lineage.digest,
        dataset.lineage.split_digest,
    )
    if not same_rows or [spec.name for spec in champion.signature.inputs] != list(dataset.inputs):
        return ""
    inputs = dataset.take(dataset.split.test)

    def answers(bundle: "Bundle") -> "Answers":
        engine = open_engine(bundle, check=False)
        read = answers_reader(bundle.signature, dataset.task, newest.bundle.manifest.targets.positive)
        return read(run_rows(engine, inputs))

    metric, truth = find_metric(simplest.metric), dataset.label[dataset.split.test]
    difference = metric.difference(truth, answers(newest.bundle), answers(champion))
    if difference.high < 0:
        return f"on the same test rows the new model falls short of it: {difference.text(METRICS[metric.name].label)}"
    return ""
