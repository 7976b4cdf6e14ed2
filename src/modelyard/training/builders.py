"""One function per [model] kind: it fits the model to the training rows and returns it as a pipeline."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import ConfigError, MissingExtra, TrainingError
from modelyard.metering import Meter
from modelyard.schema import to_builtins
from modelyard.training.callables import call
from modelyard.training.data import Dataset
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
from modelyard.training.preprocess import Matrix, Preprocessor
from modelyard.training.watch import Watch

if TYPE_CHECKING:
    import torch

    from modelyard.training.fit import FitResult

LINEAR_ITERATIONS = 300


@dataclass(frozen=True)
class Job:
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
        return encoded_targets(self.dataset, rows)

    def matrix(self, rows: NDArray[np.int64]) -> Matrix:
        return self.preprocessor.apply(self.dataset.take(rows))


def encoded_targets(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return class codes, int64, or values, float32, of these rows."""
    label = dataset.label[rows]
    return class_codes(label, dataset.classes) if dataset.classes else label.astype(np.float32)


Built = tuple[Pipeline, "FitResult | None"]


def _network(job: Job) -> Built:
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


def _module(job: Job, x: "torch.Tensor", *, is_image: bool) -> "torch.nn.Module":
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


def _lightgbm(job: Job) -> Built:
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


def _linear(job: Job) -> Built:
    return fit_linear(job.dataset, job.preprocessor), None


def fit_linear(dataset: Dataset, preprocessor: Preprocessor) -> EstimatorPipeline:
    """Logistic regression or ridge over the same features as every other model."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    rows = dataset.split.train
    x = preprocessor.apply(dataset.take(rows))
    estimator = LogisticRegression(max_iter=LINEAR_ITERATIONS, tol=1e-3) if dataset.classes else Ridge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline that is a little short of its optimum will do
        estimator.fit(x, encoded_targets(dataset, rows))
    return EstimatorPipeline(estimator, preprocessor, x.shape[1], dataset.task, dataset.classes)


def _sklearn(job: Job) -> Built:
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


BUILDERS: Mapping[str, Callable[[Job], Built]] = {
    "network": _network,
    "torch": _network,
    "lightgbm": _lightgbm,
    "linear": _linear,
    "sklearn": _sklearn,
}


def _run_key(job: Job, module: "torch.nn.Module", torch_version: str) -> str:
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
