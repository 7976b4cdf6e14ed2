"""`modelyard import`: an ONNX file from elsewhere → a bundle. Runs on the bare install."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.options import allow_domain_option, as_json_option
from modelyard.errors import ConfigError, DataError, GoldenCaseFailed, ModelyardError, SignatureMismatch

if TYPE_CHECKING:
    from modelyard.bundle.cases import Arrays
    from modelyard.bundle.format import Bundle
    from modelyard.bundle.manifest import Signature

N_GENERATED = 16
FREE_AXIS_SIZE = 8
"""Length that generated rows give to an axis the graph leaves free."""
MAX_SAMPLES = 10_000
MAX_GENERATED_BYTES = 64 * 2**20


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Of the model, in the store and in URLs.")
@click.option("--store", help="Publish to this store, a folder or an fsspec URL.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the bundle to this folder instead of, or besides, a store."
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Rows for golden cases and reference statistics: CSV, JSON, JSON lines, .npy, .npz or Parquet.",
)
@click.option("--labels", help="Class labels, separated by commas, in the order of the scores.")
@click.option(
    "--task",
    type=click.Choice(["classification", "regression", "other"]),
    help="What the model does [default: classification with --labels, else other].",
)
@click.option("--description", help="A sentence for people.")
@click.option(
    "--rtol", default=1e-4, show_default=True, help="How closely floats of the golden cases must be met, relatively."
)
@click.option(
    "--atol", default=1e-4, show_default=True, help="How closely floats of the golden cases must be met, absolutely."
)
@allow_domain_option
@as_json_option
def import_(
    file: Path,
    name: str,
    store: str | None,
    output: Path | None,
    samples: Path | None,
    labels: str | None,
    task: str | None,
    description: str | None,
    rtol: float,
    atol: float,
    allow_domains: tuple[str, ...],
    as_json: bool,
) -> None:
    """Turn the ONNX model in FILE into a bundle and publish it.

    The graph is read, not run, to find its inputs, outputs and operators; axes stay as free as they are. Then rows are
    answered once, and become the golden cases that every machine re-checks: the rows of --samples, or generated ones, which
    the bundle says of itself.

    \b
    Examples:
      modelyard import model.onnx --name sentiment --store store
      modelyard import model.onnx --name churn --store store --samples rows.csv --labels no,yes
      modelyard import model.onnx --name churn --output bundle --json
    """
    import tempfile

    from modelyard.bundle.store import open_store

    if store is None and output is None:
        raise ConfigError("give --store to publish the bundle, --output to write it to a folder, or both")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give the path of an ONNX model")
    with tempfile.TemporaryDirectory(prefix="modelyard-") as scratch:
        target = output or Path(scratch) / name
        written = _write(
            file, target, name=name, samples=samples, labels=_split_labels(labels), task=task, description=description,
            rtol=rtol, atol=atol, allow_domains=allow_domains,
        )  # fmt: skip
        version = None if store is None else open_store(store).publish(target, name, allow_domains=allow_domains)
    where = str(output) if version is None else f"{store}/{name}/{version}"
    if as_json:
        click.echo(json.dumps({"bundle": where, "name": name, "version": version, **written}))
        return
    click.echo(f"{name}: {written['n_cases']} golden cases ({written['cases']}), digest {written['digest'][:12]}…")
    if not written["rows_independent"]:
        click.echo("answers depend on batch mates: the bundle is marked and will be run one row at a time")
    click.echo(f"bundle: {where}")


def _write(
    file: Path,
    target: Path,
    *,
    name: str,
    samples: Path | None,
    labels: tuple[str, ...],
    task: str | None,
    description: str | None,
    rtol: float,
    atol: float,
    allow_domains: tuple[str, ...],
) -> dict[str, Any]:
    """Write the bundle; return what the command tells of it."""
    import hashlib
    from datetime import UTC, datetime

    from modelyard.bundle.answers import choose_cases
    from modelyard.bundle.format import BundleContent, write_bundle
    from modelyard.bundle.graph import read_graph
    from modelyard.bundle.independence import rows_independent
    from modelyard.bundle.manifest import Lineage
    from modelyard.bundle.reference import summarise
    from modelyard.inference.runtime import RowByRow
    from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine

    graph = read_graph(file, extra_domains=allow_domains)
    signature = _labelled(graph.signature, labels)
    _require_values(signature, file)
    inputs = _generated(signature, file) if samples is None else _read(samples, signature)
    signature = _nullable(signature, inputs)
    engine = OnnxRuntimeEngine(file)
    try:
        outputs = engine.run(inputs)
    except ModelyardError as exc:
        if samples is not None:
            raise
        raise DataError(
            f"{file}: the model does not take generated rows ({exc}); give rows of its own with --samples"
        ) from exc
    _require_fit(outputs, inputs, signature, file)
    batched = all(spec.batched for spec in (*signature.inputs, *signature.outputs))
    independent = not batched or rows_independent(
        engine.run, {key: array[:N_GENERATED] for key, array in inputs.items()}
    )
    if not independent:
        outputs = RowByRow(engine).run(inputs)
    bundle = write_bundle(
        target,
        BundleContent(
            name=name,
            task=task or ("classification" if labels else "other"),
            signature=signature,
            model=file,
            cases=choose_cases(inputs, outputs, signature, margin=2 * max(rtol, atol))
            if batched
            else _whole(inputs, outputs),
            cases_origin="generated" if samples is None else "samples",
            reference=summarise(inputs, outputs, signature),
            lineage=Lineage(
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                made_by="import",
                environment={"engine": engine.name, "producer": graph.producer},
                notes=(f"imported from {file.name}, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}",),
            ),
            rtol=rtol,
            atol=atol,
            rows_independent=independent,
            extra_domains=tuple(sorted(set(allow_domains) & graph.domains)),
            description=description,
        ),
    )
    engine.close()
    _require_same_again(bundle, file)
    return {
        "digest": bundle.digest,
        "cases": bundle.manifest.cases.origin,
        "n_cases": bundle.manifest.cases.n_samples,
        "rows_independent": independent,
    }


def _require_values(signature: "Signature", file: Path) -> None:
    """Refuse tensors that can hold nothing, and an answer to all rows at once."""
    takes_rows = any(spec.batched for spec in signature.inputs)
    for role, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if 0 in spec.shape:
                raise SignatureMismatch(
                    f"{file}: {role} {spec.name!r} has the shape {list(spec.shape)}, which holds no values; export the model again, "
                    "with a name for an axis that varies"
                )
            if role == "output" and takes_rows and not spec.shape:
                raise SignatureMismatch(
                    f"{file}: output {spec.name!r} is one number for all rows; export the model with one answer per row, without "
                    "losses and totals"
                )


def _require_fit(outputs: "Arrays", inputs: "Arrays", signature: "Signature", file: Path) -> None:
    """Refuse a graph that answers otherwise than it declares."""
    from modelyard.bundle.cases import check_array

    n_rows = {len(inputs[spec.name]) for spec in signature.inputs if spec.batched}
    for spec in signature.outputs:
        answer = outputs[spec.name]
        try:
            check_array(answer, spec, f"{file}: output {spec.name!r}")
        except SignatureMismatch as exc:
            raise SignatureMismatch(
                f"{file}: output {spec.name!r} is declared as {spec.datatype} {list(spec.shape)}, and the model answers {answer.dtype} "
                f"of shape {list(answer.shape)}; export it again, declared as it answers"
            ) from exc
        if spec.batched and n_rows and len(answer) not in n_rows:
            raise SignatureMismatch(
                f"{file}: output {spec.name!r} has {len(answer)} rows for {max(n_rows)} rows of input; export the model with one answer "
                "per row"
            )


def _require_same_again(bundle: "Bundle", file: Path) -> None:
    """Open the bundle as a server would; remove it if its own golden cases fail, for no machine could serve it."""
    import shutil

    from modelyard.inference.runtime import open_engine

    try:
        open_engine(bundle).close()
    except GoldenCaseFailed as exc:
        shutil.rmtree(bundle.path)
        if "timeout_s" in exc.facts:
            raise
        raise GoldenCaseFailed(
            f"{file}: the model answers the same rows differently each time (output {exc.facts.get('output')!r}), so that no machine "
            "could check it; export it without random operators such as dropout, or widen --rtol and --atol if it only rounds",
            **exc.facts,
        ) from exc
    except BaseException:
        shutil.rmtree(bundle.path, ignore_errors=True)
        raise


def _split_labels(labels: str | None) -> tuple[str, ...]:
    return tuple(label.strip() for label in labels.split(",")) if labels else ()


def _labelled(signature: "Signature", labels: tuple[str, ...]) -> "Signature":
    """Name the classes of the output that has a score for each, and of the one that names a class per row."""
    from msgspec import structs

    if not labels:
        return signature
    outputs = []
    fitting = 0
    for spec in signature.outputs:
        floats = spec.datatype in ("FP16", "FP32", "FP64")
        is_scores = floats and len(spec.shape) == 2 and (spec.shape[1] == len(labels) or isinstance(spec.shape[1], str))
        is_label = len(spec.shape) == 1 and spec.datatype == "BYTES"
        fitting += is_scores
        outputs.append(structs.replace(spec, labels=labels) if is_scores or is_label else spec)
    if not fitting:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in signature.outputs)
        raise ConfigError(
            f"--labels names {len(labels)} classes, but no float output has a column for each ({shapes}); correct it"
        )
    return structs.replace(signature, outputs=tuple(outputs))


def _nullable(signature: "Signature", inputs: "Arrays") -> "Signature":
    """Mark the inputs that had a missing value among the rows."""
    import numpy as np
    from msgspec import structs

    def missing(array: Any) -> bool:
        return bool((array == "").any() if array.dtype == object else array.dtype.kind == "f" and np.isnan(array).any())

    specs = (structs.replace(spec, nullable=missing(inputs[spec.name])) for spec in signature.inputs)
    return structs.replace(signature, inputs=tuple(specs))


def _read(samples: Path, signature: "Signature") -> "Arrays":
    """Read up to 10,000 rows; any column may have missing values here."""
    import numpy as np
    from msgspec import structs

    from modelyard.cli.rowfiles import RowFile

    open_minded = structs.replace(
        signature, inputs=tuple(structs.replace(spec, nullable=True) for spec in signature.inputs)
    )
    file = RowFile(samples, open_minded, limit=MAX_SAMPLES)
    batches = list(file.batches())
    if file.ignored:
        click.echo(f"note: left out what the model does not take: {', '.join(file.ignored)}", err=True)
    if not batches:
        raise DataError(f"{samples}: has no rows; give at least one")
    if not all(spec.batched for spec in signature.inputs):
        return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _generated(signature: "Signature", file: Path, seed: int = 0) -> "Arrays":
    """Make rows that fit the signature: normal floats, small integers, any pixels, short words."""
    import math

    import numpy as np

    shapes = {}
    for spec in signature.inputs:
        row = [FREE_AXIS_SIZE if isinstance(axis, str) else axis for axis in spec.row_shape]
        shapes[spec.name] = [N_GENERATED, *row] if spec.batched else row
    n_bytes = sum(math.prod(shapes[spec.name]) * spec.numpy_dtype.itemsize for spec in signature.inputs)
    if n_bytes > MAX_GENERATED_BYTES:
        raise DataError(
            f"{file}: generated rows would take {n_bytes} bytes ({', '.join(f'{name} {shape}' for name, shape in shapes.items())}), the "
            f"limit is {MAX_GENERATED_BYTES}; give rows of its own with --samples"
        )
    rng = np.random.default_rng(seed)
    inputs = {}
    for spec in signature.inputs:
        shape = shapes[spec.name]
        if spec.datatype == "BYTES":
            array = np.asarray(rng.choice(np.array(["a", "b", "c"], dtype=object), size=shape), dtype=object)
        elif spec.datatype in ("FP16", "FP32", "FP64"):
            array = rng.normal(size=shape).astype(spec.numpy_dtype)
        elif spec.datatype == "BF16":
            array = (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            most = 256 if spec.datatype == "UINT8" else 2 if spec.datatype == "BOOL" else 10
            array = rng.integers(0, most, size=shape).astype(spec.numpy_dtype)
        inputs[spec.name] = np.asarray(array)  # of no axes, it would be a bare number
    return inputs


def _whole(inputs: "Arrays", outputs: "Arrays") -> Any:
    """A model without a batch axis: its one call is its golden case."""
    from modelyard.bundle.cases import CaseSet

    return CaseSet(inputs, outputs)
