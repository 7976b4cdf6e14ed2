"""A fitted model from Python → a bundle: drawn as a graph, proven against the original on the user's samples, written."""

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelyard.bundle.cases import Arrays, Run, differing_rows
from modelyard.bundle.format import Bundle, read_bundle, require_free
from modelyard.bundle.independence import rows_independent
from modelyard.bundle.manifest import Lineage, Signature, Targets
from modelyard.bundle.store import Store, open_store
from modelyard.errors import ConfigError, ExportError
from modelyard.metering import Meter
from modelyard.prices import load_prices
from modelyard.provenance import environment
from modelyard.training.export import Export, prove_no_skew, run_graph, write
from modelyard.training.importers._base import Imported, Task

N_INDEPENDENCE = 16
"""Samples that are asked alone and among others."""


def import_model(
    obj: Any,
    *,
    samples: Any,
    name: str,
    task: Task | None = None,
    labels: Sequence[str | int] | None = None,
    store: Store | Path | str | None = None,
    target: Path | str | None = None,
    description: str | None = None,
    targets: Targets | None = None,
) -> Bundle:
    """Turn a fitted model into a bundle, and publish it where a store is given.

    Every sample is answered by the original and by the graph; one that differs fails the import. The samples also become the
    golden cases and the reference that drift is measured against, so give some hundred rows that the model will meet.

    Args:
        obj: a fitted scikit-learn classifier, regressor or pipeline; a LightGBM estimator or Booster; or an nn.Module with one
            input and one output.
        samples: rows as the model takes them: a DataFrame or a matrix, shape (n, n_features), for estimators; an array,
            shape (n, ...), for modules. Columns may be text (missing: ""), whole numbers, floats (taken as float32) and booleans.
        name: of the model, in the store and in URLs.
        task: "classification", "regression" or, for a module whose output is served as it is, "other"; None finds it out.
        labels: names of the classes of a Booster or module, in the order of its outputs; an estimator knows its own.
        store: a store, its folder or its URL, to publish to.
        target: folder of the bundle; must not exist. One of `store` and `target` is needed.
        targets: what compression holds itself to.

    Returns:
        The bundle at `target`, or else the one in the store.

    Raises:
        ConfigError: arguments that do not fit each other or the model.
        DataError: samples that the model cannot take.
        ExportError: an object of an unknown kind, not fitted, or with a step that no converter knows.
        SkewDetected: the graph answers a sample differently.
        MissingExtra: the converter is not installed.
        FileExistsError: for `target`.
    """
    if store is None and target is None:
        raise ConfigError("import_model needs store or target, got neither; say where the bundle is to go")
    folder = None if target is None else Path(target)
    if folder is not None:
        require_free(folder)
    meter = Meter(load_prices())
    imported = _import(obj, samples, None if labels is None else tuple(labels), task)
    if task is not None and imported.task != task:
        raise ConfigError(f"task must be {imported.task!r} for {type(obj).__name__}, got {task!r}; leave it out")
    run = run_graph(imported.model)
    inputs = imported.samples.inputs
    outputs = _steady_answers(run, inputs, imported.signature, type(obj).__name__)
    proof = prove_no_skew(
        imported.original, run, imported.signature, inputs, given=imported.samples.given, rows_called="samples"
    )
    if not rows_independent(run, {column: array[:N_INDEPENDENCE] for column, array in inputs.items()}):
        raise ExportError(
            f"{type(obj).__name__} answers a row differently beside other rows, and a server chooses who shares a batch; let each "
            "row's answer depend on that row alone"
        )
    lineage = Lineage(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        made_by=f"import: {imported.library}",
        environment=environment(),
        spent=meter.read(),
        notes=(proof.text(), *imported.notes),
    )
    exported = Export(model=imported.model, signature=imported.signature, proof=proof, outputs=outputs)

    def written(path: Path) -> Bundle:
        return write(
            path,
            exported,
            name=name,
            task=imported.task,
            train=inputs,
            held_out=inputs,
            lineage=lineage,
            targets=targets or Targets(),
            cases_origin="samples",
            description=description,
        )

    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            return _published(written(Path(scratch) / "bundle"), store)
    bundle = written(folder)
    if store is not None:
        _published(bundle, store)
    return bundle


def _steady_answers(run: Run, inputs: Arrays, signature: Signature, kind: str) -> Arrays:
    """Return the graph's answers to the samples; raise ExportError when it answers them otherwise a second time."""
    outputs, again = run(inputs), run(inputs)
    for spec in signature.outputs:
        wrong = differing_rows(outputs[spec.name], again[spec.name], rtol=1e-4, atol=1e-4)
        if wrong.size:
            raise ExportError(
                f"{kind} answers sample {int(wrong[0])} differently each time (output {spec.name!r}), so that no machine could check it; "
                "leave out what is random, such as torch.rand or dropout that is always on",
                row=int(wrong[0]),
                output=spec.name,
            )
    return outputs


def _import(obj: Any, samples: Any, labels: tuple[str | int, ...] | None, task: Task | None) -> Imported:
    """Choose the importer by the classes that `obj` is made of, so that no library is imported that it does not come from."""
    ancestry = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(obj).__mro__}
    if "torch.Module" in ancestry:
        from modelyard.training.importers.torch import import_module

        return import_module(obj, samples, labels, task)
    from modelyard.training.importers.sklearn import import_estimator

    if "lightgbm.Booster" in ancestry:
        from modelyard.training.importers.lightgbm import booster_as_estimator

        return import_estimator(booster_as_estimator(obj, labels), samples, library="lightgbm")
    if "sklearn.BaseEstimator" in ancestry:
        if labels is not None:
            raise ConfigError(
                f"labels are for Boosters and modules; {type(obj).__name__} knows its own: leave them out"
            )
        return import_estimator(obj, samples, library="lightgbm" if "lightgbm.LGBMModel" in ancestry else "sklearn")
    raise ExportError(
        f"import_model takes scikit-learn and LightGBM models and nn.Modules, got {type(obj).__module__}.{type(obj).__name__}; "
        "export others to ONNX and use: modelyard import FILE"
    )


def _published(bundle: Bundle, store: Store | Path | str | None) -> Bundle:
    """Publish and return the bundle in the store."""
    assert store is not None  # asked for above
    opened = open_store(store) if isinstance(store, str | Path) else store
    name = bundle.manifest.name
    version = opened.publish(bundle.path, name)
    return read_bundle(opened.fetch(name, version))
