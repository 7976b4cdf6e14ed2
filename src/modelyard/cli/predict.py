"""`modelyard predict`: the rows of a file answered with a bundle, no server in between."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from modelyard.cli.options import allow_domain_option

if TYPE_CHECKING:
    from modelyard.bundle.manifest import Signature

_PROGRESS_EVERY_S = 2.0


@click.command()
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Write here instead of to stdout.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["csv", "jsonl"]),
    help="Of the answers. Default: by the name of --output, else csv for a CSV file, jsonl otherwise.",
)
@click.option("--proba", is_flag=True, help="Give the score of each label too, not only the label.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Read only the first N rows.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0 is one per core.")
@allow_domain_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document: the predictions, or with --output a summary."
)
def predict(
    bundle: Path,
    file: Path,
    output: Path | None,
    format_: str | None,
    proba: bool,
    limit: int | None,
    threads: int,
    allow_domains: tuple[str, ...],
    as_json: bool,
) -> None:
    """Answer the rows of FILE with BUNDLE, a bundle's folder such as STORE/NAME/VERSION.

    FILE is CSV with a header (an empty cell is a missing value), JSON (a list of objects, or {"instances": [...]}), JSON
    lines, .npy or .npz (arrays by input name), or Parquet. Columns the model does not take are left out, with a note. Where
    the model takes one matrix, a table with as many columns is taken in its order. Long files are read and answered in batches.

    \b
    Examples:
      modelyard predict store/flights/3 flights.csv
      modelyard predict store/flights/3 flights.csv --proba --output answers.jsonl
      modelyard predict store/digits/1 images.npy --limit 10
    """
    import time

    from modelyard.bundle.format import read_bundle
    from modelyard.cli.rowfiles import CsvWriter, JsonLinesWriter, RowFile
    from modelyard.errors import DataError
    from modelyard.inference.rows import arrays_to_rows
    from modelyard.inference.runtime import open_engine

    opened = read_bundle(bundle, allow_domains=allow_domains)
    engine = open_engine(opened, n_threads=threads)
    rows = RowFile(file, opened.signature, limit=limit)
    kept = _kept(opened.signature, proba=proba)
    format_ = format_ or _format_of(output, file)
    collected: list[Mapping[str, Any]] = []
    n_samples = 0
    started_s = noted_s = time.monotonic()

    def run(stream: IO[str] | None) -> None:
        nonlocal n_samples, noted_s
        writer = None if stream is None else CsvWriter(stream) if format_ == "csv" else JsonLinesWriter(stream)
        for batch in rows.batches():
            answers = [
                {name: row[name] for name in kept} for row in arrays_to_rows(engine.run(batch), opened.signature)
            ]
            n_samples += len(answers)
            if writer is None:
                collected.extend(answers)
            else:
                writer.write(answers)
            now_s = time.monotonic()
            if now_s - noted_s > _PROGRESS_EVERY_S:
                noted_s = now_s
                click.echo(f"{n_samples:,} rows, {n_samples / (now_s - started_s):,.0f} rows/s", err=True)
        if not n_samples:
            raise DataError(f"{file}: holds no rows; give at least one")

    if output is not None:
        _write_beside(output, run)
    elif as_json:
        run(None)
    else:
        _write_to_stdout(run)
    wall_s = time.monotonic() - started_s
    if rows.ignored:
        click.echo(f"note: left out what the model does not take: {', '.join(rows.ignored)}", err=True)
    if as_json:
        import orjson

        summary: dict[str, Any] = {"bundle": opened.digest, "n_samples": n_samples, "wall_s": wall_s}
        summary |= {"predictions": collected} if output is None else {"output": str(output)}
        click.echo(orjson.dumps(summary).decode())
    elif output is not None:
        click.echo(f"{output}: {n_samples:,} rows in {wall_s:.2f} s", err=True)


def _kept(signature: "Signature", *, proba: bool) -> list[str]:
    """Return the outputs to give: all with `proba`, else without scores per label where there is something else."""
    plain = [spec.name for spec in signature.outputs if not (spec.labels and len(spec.shape) == 2)]
    return [spec.name for spec in signature.outputs] if proba or not plain else plain


def _format_of(output: Path | None, file: Path) -> str:
    name = file if output is None else output
    return "csv" if name.suffix.lower() == ".csv" else "jsonl"


def _write_beside(output: Path, run: Callable[[IO[str]], None]) -> None:
    """Have `run` write to a file beside `output` and rename it, so that `output` is whole or not there."""
    import secrets

    from modelyard.errors import DataError

    beside = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        try:
            stream = beside.open("w", encoding="utf-8", newline="")
        except OSError as exc:
            raise DataError(f"{output}: cannot be written ({exc.strerror}); choose another --output") from exc
        with stream:
            run(stream)
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)


def _write_to_stdout(run: Callable[[IO[str]], None]) -> None:
    """Have `run` write to stdout, and end quietly when whoever reads it has had enough."""
    import os
    import sys

    try:
        run(sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
