"""`modelyard run`: the whole walk of a model, from labelled rows to served predictions and a table to act on."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from modelyard.cli.progress import Progress, duration
from modelyard.cli.steps import checked_data, compressed, published, store_url, trained, work_folder, write_beside
from modelyard.errors import ModelyardError, SkewDetected

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.bundle.profile import Latency
    from modelyard.compress.search import Compression
    from modelyard.prices import Device
    from modelyard.training.data import Dataset
    from modelyard.training.train import Trained

ROWS_PER_REQUEST = 100
SINGLE_REQUESTS = 500
START_WITHIN_S = 30.0


@dataclass(frozen=True)
class Variant:
    """A line of the closing table: a bundle and what was measured of it."""

    role: str
    bundle: "Bundle"
    version: int
    single: "Latency"
    """At batch 1 on one thread."""
    best: "Latency"
    """At the batch size with the highest throughput on one thread."""

    def cost_usd_per_million(self, core: "Device") -> float:
        """Compute of a million predictions, one row at a time, at the price of one core."""
        return core.cost_usd(self.single.mean_s * 1e6)


@dataclass(frozen=True)
class Served:
    """What a plain HTTP client saw."""

    n_rows: int
    n_requests: int
    worst_difference: float
    p50_s: float
    p99_s: float
    """Of single-row requests, one after the other."""
    rows_per_s: float
    """In requests of 100 rows, one after the other."""


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default="yard.toml", metavar="[YARD_TOML]")
@click.option("--fresh", is_flag=True, help="Start training anew where a checkpoint of the same run would be taken up.")
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    envvar="MODELYARD_PRICES",
    help="Price file that overrides the catalogue.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def run(config: Path, fresh: bool, prices: Path | None, as_json: bool) -> None:
    """Do the whole job that YARD_TOML describes.

    Check the data, train, prove that the exported graph answers as the pipeline does, compress with a verdict, publish,
    serve, and ask every held-out row over HTTP. Ends in a table: score with interval, size, latency, throughput and cost of
    the model and of its compressed child, and where everything was put.

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
    store = open_store(store_url(yard, root))
    with Progress() as progress:
        dataset, _ = checked_data(yard, root, progress)
        model = trained(yard, root, dataset, None, catalogue, progress, fresh=fresh)
        compression = compressed(yard, root, model.bundle, dataset, catalogue, progress)
        bundles = {"trained": model.bundle}
        if compression.child is not None:
            bundles["compressed"] = compression.child
        variants = []
        for role, bundle in bundles.items():
            progress.step(f"profile the {role} model")
            single, best = _profiled(bundle, progress)
            version = published(yard, root, bundle.path, progress)
            variants.append(Variant(role, bundle, version, single, best))
        champion = variants[-1]
        store.tag(yard.name, "champion", champion.version, reason=f"modelyard run: {champion.role}")
        progress.step("serve, ask the held-out rows over HTTP")
        with _server(store_url(yard, root), yard.name) as url:
            served = _ask(url, yard.name, champion.bundle, dataset, progress)
    result: dict[str, Any] = {
        "name": yard.name,
        "variants": [_variant_json(variant, catalogue["cpu-core"]) for variant in variants],
        "comparisons": [comparison.to_json() for comparison in model.comparisons],
        "compression": compression.to_json(),
        "served": {
            "version": champion.version,
            "n_rows": served.n_rows,
            "worst_difference": served.worst_difference,
            "p50_s": served.p50_s,
            "p99_s": served.p99_s,
            "rows_per_s": served.rows_per_s,
        },
        "store": store_url(yard, root),
        "work": str(work_folder(yard, root)),
    }
    write_beside(work_folder(yard, root) / "reports" / "run.json", json.dumps(result, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(result))
        return
    story = _story(yard.name, model, compression, served, champion, result["store"], work_folder(yard, root))
    for line in (*_table(variants, catalogue["cpu-core"]), "", *story):
        click.echo(line)


def _profiled(bundle: "Bundle", progress: Progress) -> "tuple[Latency, Latency]":
    """Measure on one thread, keep the profile in the bundle; return batch 1 and the batch of highest throughput."""
    from modelyard.compress.measure import profile_bundle

    profile = profile_bundle(bundle, progress=progress.detail)
    single = profile.latencies[0]
    best = max(profile.latencies, key=lambda latency: latency.rows_per_s)
    progress.detail(f"{single.p50_s * 1e3:.3f} ms at batch 1, {best.rows_per_s:,.0f} rows/s at batch {best.batch_size}")
    return single, best


@contextlib.contextmanager
def _server(store: str, name: str) -> Iterator[str]:
    """Run `modelyard serve` as a process of its own, as anybody would; yield its URL."""
    command = [sys.executable, "-m", "modelyard", "serve", store, "--model", name, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # asked for above
            ready = process.stdout.readline()
            if not ready:
                _, complaint = process.communicate(timeout=START_WITHIN_S)
                raise ModelyardError(f"the server did not start: {complaint.strip()}")
            yield json.loads(ready)["url"]
        finally:
            process.terminate()
            process.communicate(timeout=START_WITHIN_S)


def _ask(url: str, name: str, bundle: "Bundle", dataset: "Dataset", progress: Progress) -> Served:
    """Send every held-out row as named columns and compare the answers with the graph's own.

    Raises:
        SkewDetected: a served label differs, or a served number is off by more than 1e-5.
    """
    import numpy as np

    from modelyard.compress.search import run_rows
    from modelyard.inference.rows import example_row, predictions
    from modelyard.inference.runtime._base import open_engine

    inputs = dataset.take(dataset.split.test)
    n_rows = len(dataset.split.test)
    engine = open_engine(bundle, check=False)
    expected = predictions(run_rows(engine, inputs), bundle.signature)
    engine.close()
    rows = [
        example_row({column: array[i : i + 1] for column, array in inputs.items()}, bundle.signature)
        for i in range(n_rows)
    ]
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname or "", address.port)
    worst = 0.0
    started_s = time.perf_counter()
    asking_s = 0.0
    for start in range(0, n_rows, ROWS_PER_REQUEST):
        body = json.dumps({"instances": rows[start : start + ROWS_PER_REQUEST]})
        before_s = time.perf_counter()
        answers = _post(connection, name, body)
        asking_s += time.perf_counter() - before_s
        for i, answer in enumerate(answers, start):
            worst = max(worst, _difference(answer, expected[i], i))
        progress.detail(f"{start + len(answers):,} of {n_rows:,} rows answered alike")
    single_s = []
    for i in range(min(SINGLE_REQUESTS, n_rows)):
        body = json.dumps({"instances": [rows[i]]})
        before_s = time.perf_counter()
        _post(connection, name, body)
        single_s.append(time.perf_counter() - before_s)
    connection.close()
    p50_s, p99_s = np.quantile(single_s, [0.5, 0.99]).tolist()
    progress.detail(f"{n_rows:,} of {n_rows:,} rows answered alike in {duration(time.perf_counter() - started_s)}")
    n_requests = -(-n_rows // ROWS_PER_REQUEST) + len(single_s)
    return Served(n_rows, n_requests, worst, p50_s, p99_s, n_rows / asking_s)


def _post(connection: HTTPConnection, name: str, body: str) -> list[Any]:
    connection.request("POST", f"/v1/models/{name}:predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        raise ModelyardError(f"the server answered {response.status} to a held-out row: {answer}")
    rows: list[Any] = answer["predictions"]
    return rows


def _difference(answer: Any, expected: Any, row: int) -> float:
    """Return the largest difference of two answers' numbers; raise where anything else differs."""
    if isinstance(expected, dict) and isinstance(answer, dict) and expected.keys() == answer.keys():
        return max(_difference(answer[key], value, row) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(answer, list) and len(expected) == len(answer):
        return max((_difference(*pair, row) for pair in zip(answer, expected, strict=True)), default=0.0)
    numbers = isinstance(expected, float) and isinstance(answer, float)
    if numbers and abs(answer - expected) <= 1e-5 * (1 + abs(expected)):
        return float(abs(answer - expected))
    if answer == expected:
        return 0.0
    raise SkewDetected(
        f"held-out row {row}: the server answers {answer}, the bundle {expected}; do not use this server", row=row
    )


def _variant_json(variant: Variant, core: "Device") -> dict[str, Any]:
    from modelyard.schema import to_builtins

    lineage = variant.bundle.manifest.lineage
    return {
        "role": variant.role,
        "version": variant.version,
        "bundle": str(variant.bundle.path),
        "digest": variant.bundle.digest,
        "scores": to_builtins(lineage.scores),
        "size_bytes": variant.bundle.size_bytes,
        "weight_bytes": variant.bundle.graph.weight_bytes,
        "latencies": to_builtins([variant.single, variant.best]),
        "spent": to_builtins(lineage.spent),
        "cost_usd_per_million": variant.cost_usd_per_million(core),
    }


def _table(variants: list[Variant], core: "Device") -> Iterator[str]:
    metric = variants[0].bundle.manifest.lineage.scores[0].metric
    lines: list[tuple[str, list[str]]] = [("", [variant.role for variant in variants])]
    lines.append(("version", [str(variant.version) for variant in variants]))
    lines.append((f"{metric}, 95 % interval", [_score(variant) for variant in variants]))
    lines.append(("model file", [f"{variant.bundle.model_path.stat().st_size / 1e3:,.0f} kB" for variant in variants]))
    lines.append(("p50, one row", [f"{variant.single.p50_s * 1e3:.3f} ms" for variant in variants]))
    lines.append(("p99, one row", [f"{variant.single.p99_s * 1e3:.3f} ms" for variant in variants]))
    lines.append(
        (
            "rows/s, one thread",
            [f"{variant.best.rows_per_s:,.0f} (batch {variant.best.batch_size})" for variant in variants],
        )
    )
    spent = [variant.bundle.manifest.lineage.spent for variant in variants]
    lines.append(("seconds to make", ["–" if cost is None else f"{cost.wall_s:.1f}" for cost in spent]))
    lines.append(("cost to make", ["–" if cost is None else f"${cost.cost_usd:.5f}" for cost in spent]))
    lines.append(("per million rows", [f"${variant.cost_usd_per_million(core):.5f}" for variant in variants]))
    width = max(len(title) for title, _ in lines)
    columns = [max(len(cells[i]) for _, cells in lines) for i in range(len(variants))]
    for title, cells in lines:
        yield "  ".join([title.ljust(width), *(cell.rjust(size) for cell, size in zip(cells, columns, strict=True))])


def _score(variant: Variant) -> str:
    score = variant.bundle.manifest.lineage.scores[0]
    return f"{score.value:.4f} ({score.low:.4f} to {score.high:.4f})"


def _story(
    name: str, model: "Trained", compression: "Compression", served: Served, champion: Variant, store: str, work: Path
) -> Iterator[str]:
    """What a person needs to know before acting on the table, and where to go from here."""
    for comparison in model.comparisons:
        yield f"the model {comparison.text()}"
    linear = model.comparisons[-1]
    if not linear.beats and champion.bundle.manifest.lineage.made_by != "train: linear":
        yield '  a linear model costs less to train and to serve: try [model] kind = "linear", or more data'
    yield model.proof.text()
    for candidate in compression.candidates:
        yield from candidate.lines()
    yield (
        f"served: {name} version {champion.version} ({champion.role}, tagged champion) answered {served.n_rows:,} held-out rows over "
        "HTTP as the bundle does"
    )
    yield (
        f"  one row a request: p50 {served.p50_s * 1e3:.2f} ms, p99 {served.p99_s * 1e3:.2f} ms; requests of {ROWS_PER_REQUEST}: "
        f"{served.rows_per_s:,.0f} rows/s, one after the other"
    )
    target_s = champion.bundle.manifest.targets.latency_p99_s
    if target_s is not None:
        met = "met" if served.p99_s <= target_s else "MISSED: try a smaller model, or a larger target"
        yield f"  target of {target_s * 1e3:g} ms at p99: {met}"
    yield ""
    yield "money is compute alone: CPU seconds at the catalogue's price of one core"
    yield f"store      {store}/{name}"
    yield f"reports    {work}/reports: data.txt, data.json, run.json"
    yield f"look       modelyard bundle show {store}/{name}/{champion.version}"
    yield f"serve      modelyard serve {store}"
