"""The closing page of `modelyard run`: a conclusion, a table, and what a person needs to know before acting on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.cli.ask import Served

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.bundle.profile import Latency
    from modelyard.compress.search import Compression
    from modelyard.prices import Device
    from modelyard.training.train import Trained


@dataclass(frozen=True)
class Variant:
    """A column of the table: a bundle and what was measured of it."""

    role: str
    bundle: "Bundle"
    version: int
    single: "Latency"
    """At batch 1 on one thread."""
    best: "Latency"
    """At the batch size with the highest throughput on one thread."""

    @property
    def size_bytes(self) -> int:
        return self.bundle.model_path.stat().st_size

    def cost_usd_per_million(self, core: "Device") -> float:
        """Compute of a million rows, one at a time, at the price of one core kept busy."""
        return core.cost_usd(self.single.mean_s * 1e6)

    def to_json(self, core: "Device") -> dict[str, Any]:
        from modelyard.schema import to_builtins

        lineage = self.bundle.manifest.lineage
        return {
            "role": self.role,
            "version": self.version,
            "bundle": str(self.bundle.path),
            "digest": self.bundle.digest,
            "scores": to_builtins(lineage.scores),
            "size_bytes": self.bundle.size_bytes,
            "model_bytes": self.size_bytes,
            "weight_bytes": self.bundle.graph.weight_bytes,
            "latencies": to_builtins([self.single, self.best]),
            "spent": to_builtins(lineage.spent),
            "cost_usd_per_million": self.cost_usd_per_million(core),
        }


@dataclass(frozen=True)
class Promotion:
    """Whether the new version became champion, and why."""

    version: int
    before: int | None
    """The champion until now."""
    moved: bool
    reason: str

    def text(self, store: str, name: str) -> str:
        if not self.moved:
            stays = "there is none" if self.before is None else f"stays version {self.before}"
            return f"champion {stays}: {self.reason}; to move it: modelyard store tag {store} {name} champion {self.version} --reason …"
        came = "" if self.before is None else f", moved from version {self.before}"
        return f"champion is version {self.version}{came}: {self.reason}"


def conclusion(name: str, variants: list[Variant], compression: "Compression") -> str:
    """Return what came out, in one line."""
    from modelyard.metrics import METRICS

    if compression.child is None or compression.finalist is None or compression.finalist.verdict is None:
        return f"{name}: version {variants[-1].version}, as trained; no compressed variant was accepted"
    verdict = compression.finalist.verdict
    speed, quality = verdict.cost.speedup, verdict.quality
    label = METRICS[quality.metric].label
    share = 1 - verdict.cost.child_bytes / verdict.cost.parent_bytes
    pace = f"{speed.value:.2g} × as fast" if verdict.cost.faster else "not measurably slower"
    return (
        f"{name}: version {variants[-1].version}, {compression.finalist.technique}: weights {share:.0%} smaller, {pace}, "
        f"{label} {quality.child.value:.4g} against {quality.parent.value:.4g} as trained"
    )


def table(variants: list[Variant], core: "Device") -> Iterator[str]:
    """Yield the lines of the table; with two variants a third column says how many times the first the second is."""
    from modelyard.metrics import METRICS

    score = METRICS[variants[0].bundle.manifest.lineage.scores[0].metric].label
    spent = [variant.bundle.manifest.lineage.spent for variant in variants]
    lines: list[tuple[str, list[str], list[float]]] = [
        ("", [variant.role for variant in variants], []),
        ("version", [str(variant.version) for variant in variants], []),
        (f"{score} on test rows, 95 % interval", [_score(variant) for variant in variants], []),
        _row("model.onnx", [v.size_bytes for v in variants], lambda size: f"{size / 1e3:,.0f} kB"),
        _row("p50, one row, one thread", [v.single.p50_s for v in variants], _milliseconds),
        _row("p99, one row, one thread", [v.single.p99_s for v in variants], _milliseconds),
        (
            "rows/s, best batch, one thread",
            [f"{v.best.rows_per_s:,.0f} (batch {v.best.batch_size})" for v in variants],
            [v.best.rows_per_s for v in variants],
        ),
        _row("compute of 1 million rows, one by one", [v.cost_usd_per_million(core) for v in variants], _money),
        ("time to make", ["–" if cost is None else f"{cost.wall_s:.1f} s" for cost in spent], []),
        ("cost to make", ["–" if cost is None else _money(cost.cost_usd) for cost in spent], []),
    ]
    rows = [
        [title, *cells, f"{values[1] / values[0]:.2f} ×" if len(values) == 2 and values[0] else ""]
        for title, cells, values in lines
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for title, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([title.ljust(widths[0]), *right]).rstrip()


def story(
    name: str,
    model: "Trained",
    compression: "Compression",
    served: Served,
    variants: list[Variant],
    promotion: Promotion,
    store: str,
    work: Path,
) -> Iterator[str]:
    """Yield what a person needs to know before acting on the table, and where to go from here."""
    champion = variants[-1]
    made_by = variants[0].bundle.manifest.lineage.made_by
    for comparison in model.comparisons:
        yield f"the model {comparison.text()}"
    if not model.comparisons[-1].beats and made_by in ("train: network", "train: torch", "train: lightgbm"):
        yield '  a linear model costs less to train and to serve: try [model] kind = "linear", or more data'
    yield model.proof.text()
    for candidate in compression.candidates:
        yield from candidate.lines()
    yield f"served: version {served.version} answered {served.n_rows:,} held-out rows over HTTP as the bundle does"
    yield (
        f"  one row a request: p50 {served.p50_s * 1e3:.2f} ms, p99 {served.p99_s * 1e3:.2f} ms over {served.n_single} requests; "
        f"{served.rows_per_request} rows a request: {served.rows_per_s:,.0f} rows/s; one request after the other"
    )
    target_s = champion.bundle.manifest.targets.latency_p99_s
    if target_s is not None:
        met = "met" if served.p99_s <= target_s else "MISSED: try a smaller model, or a larger target"
        yield f"  target of {target_s * 1e3:g} ms at p99: {met} by these {served.n_single} requests without load"
    yield promotion.text(store, name)
    yield ""
    yield "money is compute alone: CPU seconds at the catalogue's price of one core"
    yield f"store      {store}/{name}"
    yield f"reports    {work}/reports: data.txt, data.json, run.json"
    yield f"look       modelyard bundle show {store}/{name}/{champion.version}"
    yield f"serve      modelyard serve {store}"


def _row(title: str, values: list[float], show: Any) -> tuple[str, list[str], list[float]]:
    return title, [show(value) for value in values], values


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _money(usd: float) -> str:
    return f"${usd:.4f}" if usd >= 0.0001 else "under $0.0001"


def _score(variant: Variant) -> str:
    from modelyard.statistics import Interval

    score = variant.bundle.manifest.lineage.scores[0]
    return Interval(score.value, score.low, score.high).text()
