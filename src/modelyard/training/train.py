"""The walk from checked rows to a bundle: preprocess → baselines → fit → evaluate → export with proof → write."""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from modelyard.bundle.format import Bundle
from modelyard.bundle.manifest import Lineage, Targets
from modelyard.errors import ConfigError, MissingExtra, TrainingError
from modelyard.metering import Meter, Metered
from modelyard.metrics import Answers, default_metric
from modelyard.prices import Device
from modelyard.schema import to_builtins
from modelyard.training.callables import call
from modelyard.training.data import Dataset
from modelyard.training.evaluate import Comparison, Evaluation, compare, evaluate
from modelyard.training.export import Proof, export, write
from modelyard.training.fit_config import FitConfig
from modelyard.training.models import (
    EstimatorPipeline,
    FramePipeline,
    ModelConfig,
    NetworkPipeline,
    Pipeline,
    class_codes,
    to_frame,
)
from modelyard.training.preprocess import Matrix, Preprocessor, fit_preprocessor

if TYPE_CHECKING:
    import torch

    from modelyard.training.fit import FitProgress, FitResult

_RECORDED_PACKAGES = (
    "modelyard",
    "numpy",
    "onnx",
    "onnxruntime",
    "scikit-learn",
    "lightgbm",
    "torch",
    "skl2onnx",
    "pandas",
)
LINEAR_ITERATIONS = 300


@dataclass(frozen=True)
class Watch:
    """Where a run tells how far it is; every method may be left as it is."""

    step: Callable[[str], None] = lambda _: None
    """A new step begins."""
    detail: Callable[[str], None] = lambda _: None
    """How far the step is."""
    fit: "Callable[[FitProgress], None]" = lambda _: None
    """How far the training loop is."""


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
    if target.exists():
        raise FileExistsError(f"{target} exists; a bundle is never overwritten: choose another path or remove it")
    watch = watch or Watch()
    meter = Meter(prices, gpu=_takes_gpu(model))
    split = dataset.split
    train_rows, held_out = dataset.take(split.train), dataset.take(split.test)
    truth = dataset.label[split.test]
    metric = targets.metric or default_metric(dataset.task, dataset.classes)

    watch.step("preprocess")
    preprocessor = fit_preprocessor(dataset.specs, train_rows)
    watch.step(f"fit {model.kind}")
    builder = _BUILDERS[model.kind]
    pipeline, fitted = builder(_Job(dataset, preprocessor, model, fit_config, meter, checkpoint, root, watch))
    before = fitted.spent_before if fitted else None

    watch.step("export, prove no skew")
    exported = export(pipeline, dataset.specs, held_out, progress=watch.detail)
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
    spent = meter.read() if before is None else before + meter.read()
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


def _takes_gpu(model: ModelConfig) -> bool:
    """Whether the fit will run on a GPU, which is then paid for the whole of the training."""
    if model.kind not in ("network", "torch"):
        return False
    try:
        import torch
    except ImportError:
        return False  # the builder says what is missing
    return torch.cuda.is_available()


@dataclass(frozen=True)
class _Job:
    """What the builders of pipelines work on."""

    dataset: Dataset
    preprocessor: Preprocessor
    model: ModelConfig
    fit: FitConfig
    meter: Meter
    checkpoint: Path
    root: Path
    watch: Watch

    def targets_of(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Class codes, or values."""
        return _targets(self.dataset, rows)

    def matrix(self, rows: NDArray[np.int64]) -> Matrix:
        return self.preprocessor.apply(self.dataset.take(rows))


def _targets(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[Any]:
    label = dataset.label[rows]
    return class_codes(label, dataset.classes) if dataset.classes else label.astype(np.float32)


Built = tuple[Pipeline, "FitResult | None"]


def _network(job: _Job) -> Built:
    """Fit a built-in network, or the user's torch module."""
    try:
        import safetensors  # noqa: F401  # fit.py's checkpoints
        import torch
    except ImportError as exc:
        raise MissingExtra(exc.name or "torch", "torch", f'model.kind = "{job.model.kind}"') from exc
    from modelyard.training.fit import Rows, fit
    from modelyard.training.networks import Rescaled

    dataset, split = job.dataset, job.dataset.split
    image = dataset.specs[0] if len(dataset.specs) == 1 and dataset.specs[0].datatype == "UINT8" else None

    def rows(indices: NDArray[np.int64]) -> Rows:
        x = dataset.inputs[image.name][indices] if image else job.matrix(indices)
        return Rows(torch.from_numpy(x), torch.from_numpy(job.targets_of(indices)))

    if job.fit.shift_pixels and not image:
        raise ConfigError(
            f"fit.shift_pixels moves images, got {job.fit.shift_pixels} for {len(dataset.specs)} columns; remove it"
        )
    train, validation = rows(split.train), rows(split.validation)
    with torch.random.fork_rng():
        torch.manual_seed(job.fit.seed)
        module = _module(job, train.x, is_image=image is not None)
    if not dataset.classes:
        module = Rescaled(module, train.y.mean(), train.y.std())
    result = fit(
        module,
        train,
        validation,
        job.fit,
        meter=job.meter,
        checkpoint=job.checkpoint,
        run_key=_run_key(job, module, torch.__version__),
        progress=job.watch.fit,
    )
    pipeline = NetworkPipeline(
        module=module,
        preprocessor=None if image else job.preprocessor,
        input_name=image.name if image else "",
        example=train.x[:2].numpy(),
        task=dataset.task,
        classes=dataset.classes,
    )
    return pipeline, result


def _module(job: _Job, x: "torch.Tensor", *, is_image: bool) -> "torch.nn.Module":
    import torch

    from modelyard.training.networks import ImageNetwork, TableNetwork

    n_outputs = len(job.dataset.classes) or 1
    if job.model.callable:
        made = call(job.model.callable, job.root, tuple(x.shape[1:]), n_outputs, field="[model] callable")
        if not isinstance(made, torch.nn.Module):
            raise TrainingError(
                f"model.callable {job.model.callable!r} must return a torch module, got {type(made).__name__}"
            )
        return made
    if is_image:
        pixels = x[:10_000].to(torch.float32) / 255
        std = pixels.std(dim=(0, 1, 2))
        return ImageNetwork(
            pixels.mean(dim=(0, 1, 2)),
            torch.where(std > 0, std, 1.0),
            job.model.channels,
            n_outputs,
            job.model.dropout,
        )
    return TableNetwork(x.shape[1], job.model.hidden, n_outputs, job.model.dropout)


def _lightgbm(job: _Job) -> Built:
    """Boosted trees, stopped by the validation rows."""
    try:
        import lightgbm
    except ImportError as exc:
        raise MissingExtra("lightgbm", "train", 'model.kind = "lightgbm"') from exc
    split = job.dataset.split
    parameters: dict[str, Any] = {
        "n_estimators": 500,
        "learning_rate": 0.05,
        "num_leaves": 63,
        "random_state": job.fit.seed,
        "deterministic": True,
        "verbose": -1,
    } | job.model.parameters
    kind = lightgbm.LGBMClassifier if job.dataset.classes else lightgbm.LGBMRegressor
    estimator = kind(**parameters)

    def tell(env: Any) -> None:
        scores = ", ".join(f"{entry[1]} {entry[2]:.5f}" for entry in env.evaluation_result_list)
        job.watch.detail(f"tree {env.iteration + 1} of {env.end_iteration}, validation {scores}")

    x = job.matrix(split.train)
    estimator.fit(
        x,
        job.targets_of(split.train),
        eval_X=(job.matrix(split.validation),),
        eval_y=(job.targets_of(split.validation),),
        callbacks=[lightgbm.early_stopping(20, verbose=False), tell],
    )
    return EstimatorPipeline(estimator, job.preprocessor, x.shape[1], job.dataset.task, job.dataset.classes), None


def _linear(job: _Job) -> Built:
    return _fit_linear(job.dataset, job.preprocessor), None


def _fit_linear(dataset: Dataset, preprocessor: Preprocessor) -> EstimatorPipeline:
    """Logistic regression or ridge over the same features as every other model."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    rows = dataset.split.train
    x = preprocessor.apply(dataset.take(rows))
    estimator = LogisticRegression(max_iter=LINEAR_ITERATIONS, tol=1e-3) if dataset.classes else Ridge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline that is a little short of its optimum will do
        estimator.fit(x, _targets(dataset, rows))
    return EstimatorPipeline(estimator, preprocessor, x.shape[1], dataset.task, dataset.classes)


def _sklearn(job: _Job) -> Built:
    """An estimator of the user's own, over a DataFrame of the columns."""
    assert job.model.callable is not None  # the configuration says so
    dataset, rows = job.dataset, job.dataset.split.train
    estimator = call(job.model.callable, job.root, field="[model] callable")
    if not hasattr(estimator, "fit"):
        raise TrainingError(
            f"model.callable {job.model.callable!r} must return an estimator with fit(), got {type(estimator).__name__}"
        )
    estimator.fit(to_frame(dataset.take(rows), dataset.specs), job.targets_of(rows))
    if dataset.classes and not hasattr(estimator, "predict_proba"):
        raise TrainingError(
            f"model.callable {job.model.callable!r}: {type(estimator).__name__} has no predict_proba(), and classes need scores; wrap "
            "it in sklearn.calibration.CalibratedClassifierCV"
        )
    return FramePipeline(estimator, dataset.specs, dataset.task, dataset.classes), None


_BUILDERS: Mapping[str, Callable[[_Job], Built]] = {
    "network": _network,
    "torch": _network,
    "lightgbm": _lightgbm,
    "linear": _linear,
    "sklearn": _sklearn,
}


def _baselines(dataset: Dataset, preprocessor: Preprocessor, held_out: Any, watch: Watch) -> dict[str, Answers]:
    """Answers to the test rows of a model that always says the same, and of a linear one."""
    targets = _targets(dataset, dataset.split.train)
    n_rows = len(dataset.split.test)
    if dataset.classes:
        shares = np.bincount(targets, minlength=len(dataset.classes)) / len(targets)
        majority = Answers(scores=np.tile(shares, (n_rows, 1)), classes=dataset.classes)
    else:
        majority = Answers(values=np.full(n_rows, targets.mean()))
    watch.detail("fitting the linear baseline")
    linear = _fit_linear(dataset, preprocessor)
    return {"majority-class" if dataset.classes else "mean": majority, "linear": linear.predict(held_out)}


def _usual_metrics(dataset: Dataset) -> tuple[str, ...]:
    if not dataset.classes:
        return ("rmse", "mae")
    return ("accuracy", "auc", "log_loss") if len(dataset.classes) == 2 else ("accuracy", "log_loss")


def _run_key(job: _Job, module: "torch.nn.Module", torch_version: str) -> str:
    """Digest of everything that decides the weights."""
    decides = {
        "data": job.dataset.lineage.digest,
        "split": job.dataset.split.digest,
        "model": to_builtins(job.model),
        "module": str(module),  # what a callable returns may change without the configuration
        "fit": {key: value for key, value in to_builtins(job.fit).items() if key != "checkpoint_every_s"},
        "torch": torch_version,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def environment() -> dict[str, str]:
    """Return the versions that a result depends on, as far as they are installed."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_revision(root: Path) -> str | None:
    """Return the git commit of `root`, "-dirty" behind it where files differ from it; None outside of git."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
