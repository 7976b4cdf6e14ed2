"""`modelyard bundle`: what a bundle says of itself, whether it is sound on this machine, and how two differ."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.options import allow_domain_option, as_json_option
from modelyard.cli.terminal import printable
from modelyard.errors import ModelyardError

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.bundle.manifest import Lineage, Signature, TensorSpec
    from modelyard.bundle.profile import Profile

_path = click.Path(path_type=Path)


@click.group()
def bundle() -> None:
    """Show, verify and compare bundles.

    A bundle is a folder with a bundle.json; a version in a store, STORE/NAME/VERSION, is one too.
    """


@bundle.command()
@click.argument("path", type=_path)
@allow_domain_option
@as_json_option
def show(path: Path, allow_domains: tuple[str, ...], as_json: bool) -> None:
    """Print what a bundle holds: signature, operators, lineage, scores, cost, profiles.

    \b
    Examples:
      modelyard bundle show store/flights/3
      modelyard bundle show store/flights/3 --json
    """
    from modelyard.bundle.format import read_bundle

    found = read_bundle(path, allow_domains=allow_domains)
    if as_json:
        click.echo(json.dumps(_document(found), indent=2))
    else:
        click.echo("\n".join(map(printable, _page(found))))


@bundle.command()
@click.argument("paths", type=_path, nargs=-1, required=True)
@click.option("--no-run", is_flag=True, help="Read everything, but do not run the golden cases.")
@allow_domain_option
@as_json_option
def verify(paths: tuple[Path, ...], no_run: bool, allow_domains: tuple[str, ...], as_json: bool) -> None:
    """Check every byte of each bundle, then run its golden cases on this machine.

    Stops at the first failure. Exit code 0: sound; 1: this machine computes other answers; 2: not a sound bundle.

    \b
    Examples:
      modelyard bundle verify store/flights/3
      modelyard bundle verify store/*/[0-9]* --no-run
    """
    documents: list[dict[str, Any]] = []
    try:
        for path in paths:
            checks: list[dict[str, str]] = []
            documents.append({"path": str(path), "ok": False, "checks": checks})
            if not as_json:
                click.echo(str(path))
            for check, detail in _checks(path, allow_domains, run=not no_run):
                checks.append({"check": check, "detail": detail})
                if not as_json:
                    click.echo(printable(f"  ok  {check}  {detail}"))
            documents[-1]["ok"] = True
    except ModelyardError as exc:
        documents[-1]["error"] = {"kind": type(exc).__name__, "message": str(exc)}
        raise
    finally:
        if as_json:
            click.echo(json.dumps({"bundles": documents}, indent=2))


@bundle.command()
@click.argument("a", type=_path)
@click.argument("b", type=_path)
@allow_domain_option
@as_json_option
def diff(a: Path, b: Path, allow_domains: tuple[str, ...], as_json: bool) -> None:
    """Print the fields and files in which two bundles differ.

    Exit code 0: the same bundle; 1: they differ, as with diff(1).

    \b
    Examples:
      modelyard bundle diff store/flights/2 store/flights/3
    """
    from modelyard.bundle.format import differences, read_bundle

    old, new = read_bundle(a, allow_domains=allow_domains), read_bundle(b, allow_domains=allow_domains)
    fields = {
        name: pair
        for name, pair in differences(old.manifest, new.manifest).items()
        if name != "digest" and not name.startswith("files.")
    }
    files = {name: pair for name, pair in _joined(_digests(old), _digests(new)).items() if pair[0] != pair[1]}
    if as_json:
        pairs = {"fields": fields, "files": files}
        document: dict[str, Any] = {"equal": old.digest == new.digest, "a": old.digest, "b": new.digest}
        document |= {
            kind: {name: {"a": was, "b": now} for name, (was, now) in found.items()} for kind, found in pairs.items()
        }
        click.echo(json.dumps(document, indent=2))
    elif old.digest != new.digest:
        rows = [("digest", old.digest[:12], new.digest[:12])]
        rows += [(name, _value(was), _value(now)) for name, (was, now) in fields.items()]
        rows += [(name, _value(was)[:12], _value(now)[:12]) for name, (was, now) in files.items()]
        click.echo("\n".join(_table(("FIELD OR FILE", str(a), str(b)), rows)))
    else:
        click.echo(f"the same bundle, {old.digest[:12]}", err=True)
    if old.digest != new.digest:
        sys.exit(1)


def _checks(path: Path, allow_domains: Iterable[str], *, run: bool) -> Iterator[tuple[str, str]]:
    """Yield (what was checked, what was found), one after another; the first failure is raised."""
    from modelyard.bundle.format import MANIFEST, read_bundle

    found = read_bundle(path, allow_domains=allow_domains)
    yield MANIFEST, f"format version {found.manifest.format_version}  digest {found.digest}"
    for entry in found.manifest.files:
        yield entry.path, f"{_size(entry.size_bytes)}  sha256 {entry.sha256}"
    yield "graph", f"{sum(found.graph.operators.values())} operators of {', '.join(sorted(found.graph.domains))}"
    yield "signature", f"{len(found.signature.inputs)} inputs, {len(found.signature.outputs)} outputs, as in the graph"
    yield "golden cases", f"{found.cases().n_samples} readable, {found.manifest.cases.origin}"
    yield "reference", f"{len(found.reference())} features"
    yield "profiles", str(len(found.profiles()))
    if run:
        from modelyard.inference.runtime import open_engine

        engine = open_engine(found)
        try:
            expected = found.manifest.cases
            yield "answers", f"agree on {engine.name} within rtol {expected.rtol:g}, atol {expected.atol:g}"
        finally:
            engine.close()


def _document(found: "Bundle") -> dict[str, Any]:
    from modelyard.schema import to_builtins

    graph = found.graph
    return {
        "path": str(found.path),
        "digest": found.digest,
        "size_bytes": found.size_bytes,
        "manifest": to_builtins(found.manifest),
        "graph": {
            "operators": dict(graph.operators),
            "opsets": dict(graph.opsets),
            "weight_bytes": graph.weight_bytes,
            "external_files": list(graph.external_files),
            "producer": graph.producer,
        },
        "profiles": to_builtins(found.profiles()),
    }


def _page(found: "Bundle") -> Iterator[str]:
    manifest, graph = found.manifest, found.graph
    yield f"{manifest.name}: {manifest.task}"
    if manifest.description:
        yield manifest.description
    yield ""
    yield f"digest        {found.digest}"
    yield f"size          {_size(found.size_bytes)} in {len(manifest.files)} files, {_size(graph.weight_bytes)} of weights"
    cases = manifest.cases
    yield f"golden cases  {cases.n_samples}, {cases.origin}; rtol {cases.rtol:g}, atol {cases.atol:g}"
    if not manifest.rows_independent:
        yield "batching      none: an answer depends on its batch mates, so rows are run one at a time"
    if manifest.extra_domains:
        yield f"consent       needed for operators of {', '.join(manifest.extra_domains)}"
    yield from ("", *_signature(manifest.signature))
    operators = sorted(graph.operators.items(), key=lambda item: (-item[1], item[0]))
    yield ""
    counts = (f"{name.removeprefix('ai.onnx:')} × {count}" for name, count in operators)
    yield f"operators     {', '.join(counts)}"
    yield f"opsets        {', '.join(f'{domain} {version}' for domain, version in graph.opsets.items())}"
    yield from ("", *_lineage(manifest.lineage))
    yield from ("", *_profiles(found.profiles()))


def _signature(signature: "Signature") -> list[str]:
    rows = [
        (role, spec.name, spec.datatype, f"[{', '.join(map(str, spec.shape))}]", _remarks(spec))
        for role, specs in (("input", signature.inputs), ("output", signature.outputs))
        for spec in specs
    ]
    return _table(("", "NAME", "DATATYPE", "SHAPE", "NOTES"), rows)


def _remarks(spec: "TensorSpec") -> str:
    labels = ", ".join(map(str, spec.labels or ()))
    remarks = (
        "nullable" if spec.nullable else "",
        spec.unit or "",
        f"{len(spec.categories)} categories" if spec.categories else "",
        f"labels {labels if len(labels) <= 60 else labels[:57] + '...'}" if labels else "",
        spec.description or "",
    )
    return "; ".join(remark for remark in remarks if remark)


def _lineage(lineage: "Lineage") -> Iterator[str]:
    yield f"made          {lineage.created_at} by {lineage.made_by}"
    if lineage.parent:
        yield f"parent        {lineage.parent}"
    if data := lineage.data:
        yield f"data          {data.source}, {data.n_samples} rows, split {data.split}"
        yield f"              train {data.n_train}, validation {data.n_validation}, test {data.n_test}; digest {data.digest[:12]}"
    if lineage.code_revision:
        yield f"code          {lineage.code_revision}"
    if lineage.seeds:
        yield f"seeds         {', '.join(f'{name} {seed}' for name, seed in lineage.seeds.items())}"
    if lineage.environment:
        yield f"environment   {', '.join(f'{name} {version}' for name, version in lineage.environment.items())}"
    for score in lineage.scores:
        yield f"score         {score.metric} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] on {score.n_samples} rows"
    if spent := lineage.spent:
        yield (
            f"cost          {spent.wall_s:.1f} s, {spent.cpu_s:.1f} CPU s, {spent.energy_j:.0f} J {spent.energy_source}, "
            f"{spent.cost_usd:.6f} USD"
        )
    for note in lineage.notes:
        yield f"note          {note}"


def _profiles(profiles: "Sequence[Profile]") -> Iterator[str]:
    if not profiles:
        yield "profiles      none measured yet"
    for profile in profiles:
        hardware = profile.hardware
        yield f"profile       {hardware.processor}, {hardware.n_cores} cores, {hardware.engine}, {profile.measured_at}"
        rows = [
            (
                str(at.batch_size),
                str(at.n_threads),
                f"{at.p50_s * 1e3:.3f}",
                f"{at.p99_s * 1e3:.3f}",
                f"{at.rows_per_s:.0f}",
            )
            for at in profile.latencies
        ]
        yield from _table(("BATCH", "THREADS", "P50 MS", "P99 MS", "ROWS/S"), rows)


def _digests(found: "Bundle") -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in found.manifest.files}


def _joined(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    return {name: (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())}


def _value(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return left-aligned columns, two blanks apart, no trailing blanks."""
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _size(n_bytes: int) -> str:
    """Return bytes in decimal units with two or three digits that matter."""
    size, unit = float(n_bytes), "B"
    for bigger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{n_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
