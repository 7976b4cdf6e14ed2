"""The walk from checked rows to a bundle: preprocess → fit → export with proof → baselines → evaluate → write."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from modelyard.bundle.format import Bundle, require_free
from modelyard.bundle.manifest import Lineage, Targets
from modelyard.errors import ConfigError
from modelyard.metering import Meter, Metered
from modelyard.metrics import Answers, default_metric, find_metric
from modelyard.prices import Device
from modelyard.provenance import code_revision, environment
from modelyard.training.builders import BUILDERS, Job, encoded_targets, fit_linear
from modelyard.training.data import Dataset
from modelyard.training.evaluate import Comparison, Evaluation, compare, evaluate
from modelyard.training.export import Proof, export, write
from modelyard.training.fit_config import FitConfig
from modelyard.training.models import ModelConfig
from modelyard.training.preprocess import Preprocessor, fit_preprocessor
from modelyard.training.watch import Watch

if TYPE_CHECKING:
    from modelyard.training.fit import FitResult


@dataclass(frozen=True)
class Trained:
    """A model that was trained, judged and written."""

    bundle: Bundle
    evaluation: Evaluation
    """Of the model, on the test rows."""
    comparisons: tuple[Comparison, ...]
    """Against the majority-class and the linear baseline."""
    proof: Proof
    spent: Metered
    resumed_at: tuple[int, int] | None


def train(
    name: str,
    dataset: Dataset,
    model: ModelConfig,
    fit_config: FitConfig,
    targets: Targets,
    target: Path,
    *,
    root: Path,
    checkpoint: Path,
    prices: Mapping[str, Device],
    description: str | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train on the training rows, stop by the validation rows, judge and prove on the test rows, write a bundle.

    Args:
        target: folder of the bundle; must not exist.
        root: folder of the user's project: callables are imported from it, its git revision is recorded.
        checkpoint: where the training loop keeps its state, and takes it up again.

    Raises:
        TrainingError, ExportError, SkewDetected, MissingExtra; FileExistsError for `target`.
    """
    require_free(target)
    watch = watch or Watch()
    meter = Meter(prices, gpu=_takes_gpu(model))
    split = dataset.split
    train_rows, held_out = dataset.take(split.train), dataset.take(split.test)
    truth = dataset.label[split.test]
    metric = targets.metric or default_metric(dataset.task, dataset.classes)
    _check_targets(targets, metric, dataset, truth)

    watch.step("preprocess")
    preprocessor = fit_preprocessor(dataset.specs, train_rows)
    watch.step(f"fit {model.kind}")
    builder = BUILDERS[model.kind]
    pipeline, fitted = builder(Job(dataset, preprocessor, model, fit_config, meter, checkpoint, root, watch))
    before = fitted.spent_before if fitted else None
    if fitted:
        watch.detail(_how_it_ended(fitted, fit_config))

    watch.step("export, prove no skew")
    exported = export(pipeline, dataset.specs, held_out, progress=watch.detail)
    # What follows tells about the model and is no part of making it.
    spent = meter.read() if before is None else before + meter.read()
    answers = replace(pipeline.predict(held_out), positive=targets.positive)
    watch.step("baselines")
    baselines = _baselines(dataset, preprocessor, held_out, watch)
    watch.step("evaluate")
    names = (metric, *(other for other in _usual_metrics(dataset) if other != metric))
    slices = {column: values[split.test] for column, values in dataset.slices.items()}
    evaluation = evaluate(truth, answers, names, slices)
    comparisons = tuple(
        compare(
            truth, answers, replace(baseline, positive=targets.positive), metric, baseline_name=f"the {kind} baseline"
        )
        for kind, baseline in baselines.items()
    )
    watch.step("write the bundle")
    lineage = Lineage(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        made_by=f"train: {model.kind}",
        data=dataset.lineage,
        code_revision=code_revision(root),
        seeds={"fit": fit_config.seed},
        environment=environment(),
        spent=spent,
        scores=evaluation.scores,
        notes=(exported.proof.text(), *(comparison.text() for comparison in comparisons)),
    )
    bundle = write(
        target,
        exported,
        name=name,
        task=dataset.task,
        train=train_rows,
        held_out=held_out,
        lineage=lineage,
        targets=structs.replace(targets, metric=metric),
        description=description,
    )
    return Trained(bundle, evaluation, comparisons, exported.proof, spent, fitted.resumed_at if fitted else None)


def _check_targets(targets: Targets, metric: str, dataset: Dataset, truth: NDArray[Any]) -> None:
    """Find out before the fit, not after it, that its result could not be scored."""
    try:
        find_metric(metric, dataset.task)
    except ConfigError as exc:
        raise ConfigError(f"[targets] metric = {metric!r} for {dataset.task} of {dataset.label_name!r}: {exc}") from exc
    if targets.positive is not None and targets.positive not in dataset.classes:
        raise ConfigError(
            f"[targets] positive = {targets.positive!r}: the classes of {dataset.label_name!r} are {list(dataset.classes)}; name one"
        )
    missing = sorted(set(dataset.classes) - set(truth.tolist()), key=str)
    if metric == "auc" and missing:
        raise ConfigError(
            f"[targets] metric = 'auc': no test row has the class {missing[0]!r}, so there is nothing to rank; raise test in [split], "
            "split at random, or take another metric"
        )


def _how_it_ended(fitted: "FitResult", config: FitConfig) -> str:
    score = f"score {fitted.best_score:.4f} on the validation rows at the lowest loss"
    if fitted.stopped_early:
        return (
            f"stopped at epoch {fitted.epochs_run} of {config.epochs}, {config.patience} without a lower loss; {score}"
        )
    return f"{fitted.epochs_run} epochs; {score}"


def _takes_gpu(model: ModelConfig) -> bool:
    """Whether the fit will run on a GPU, which is then paid for the whole of the training."""
    if model.kind not in ("network", "torch"):
        return False
    try:
        import torch
    except ImportError:
        return False  # the builder says what is missing
    return torch.cuda.is_available()


def _baselines(dataset: Dataset, preprocessor: Preprocessor, held_out: Any, watch: Watch) -> dict[str, Answers]:
    """Answers to the test rows of a model that always says the same, and of a linear one."""
    targets = encoded_targets(dataset, dataset.split.train)
    n_rows = len(dataset.split.test)
    if dataset.classes:
        shares = np.bincount(targets, minlength=len(dataset.classes)) / len(targets)
        majority = Answers(scores=np.tile(shares, (n_rows, 1)), classes=dataset.classes)
    else:
        majority = Answers(values=np.full(n_rows, targets.mean()))
    watch.detail("fitting the linear baseline")
    linear, converged = fit_linear(dataset, preprocessor)
    # A baseline that stopped short of its optimum is beaten more easily; whoever reads the comparison must know.
    linear_name = "linear" if converged else "linear (not converged)"
    return {"majority-class" if dataset.classes else "mean": majority, linear_name: linear.predict(held_out)}


def _usual_metrics(dataset: Dataset) -> tuple[str, ...]:
    if not dataset.classes:
        return ("rmse", "mae")
    return ("accuracy", "auc", "log_loss") if len(dataset.classes) == 2 else ("accuracy", "log_loss")
