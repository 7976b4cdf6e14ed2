"""One function per [model] kind: it fits the model to the training rows and returns it as a pipeline."""

import contextlib
import difflib
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard import __version__
from modelyard.errors import ConfigError, MissingExtra, ModelyardError
from modelyard.metering import Meter
from modelyard.schema import to_builtins
from modelyard.training.callables import call, failed
from modelyard.training.data import Dataset
from modelyard.training.fit_config import FitConfig
from modelyard.training.models import (
    EstimatorPipeline,
    FramePipeline,
    ModelConfig,
    NetworkPipeline,
    Pipeline,
    class_codes,
    raw_answers,
    to_frame,
)
from modelyard.training.preprocess import Matrix, Preprocessor
from modelyard.training.watch import Watch

if TYPE_CHECKING:
    import torch

    from modelyard.training.fit import FitResult

LINEAR_ITERATIONS = 1000
_LIGHTGBM_NAMES = (
    "bagging_fraction",
    "bagging_freq",
    "categorical_feature",
    "feature_fraction",
    "lambda_l1",
    "lambda_l2",
    "max_bin",
    "metric",
    "min_data_in_leaf",
    "min_sum_hessian_in_leaf",
)
"""Usual names beside the arguments of LightGBM's estimators; to suggest, not to refuse by."""


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
    try:
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
    except ModelyardError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as exc:
        if not job.model.callable:
            raise
        raise failed(exc, f"{_named(job)}: training the module", "correct the module") from exc
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
            raise ConfigError(f"{_named(job)} must return a torch module, got {_told(made)}")
        _try_module(job, made, x[:2], n_outputs)
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


def _try_module(job: Job, module: "torch.nn.Module", x: "torch.Tensor", n_outputs: int) -> None:
    """Send two rows through the user's module: what does not fit is told before anything is fitted."""
    import torch

    where = f"{_named(job)}: {type(module).__name__}"
    taken = f"{str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}"
    wanted = f"[{len(x)}, {n_outputs}]" + ("" if job.dataset.classes else f" or [{len(x)}]")
    module.eval()
    try:
        with torch.no_grad():
            out = module(x)
    except Exception as exc:  # a module of the user's own may raise anything
        raise failed(exc, f"{where}, given two rows, {taken},", f"take such rows and return {wanted}") from exc
    if not isinstance(out, torch.Tensor):
        raise ConfigError(f"{where} must return a tensor of shape {wanted}, got {_told(out)}")
    allowed = [(len(x), n_outputs)] + ([] if job.dataset.classes else [(len(x),)])
    if tuple(out.shape) not in allowed or not out.is_floating_point():
        raise ConfigError(
            f"{where}, given two rows, {taken}, must return floats of shape {wanted}, got {str(out.dtype).removeprefix('torch.')} "
            f"of shape {list(out.shape)}; correct its last layer"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"{where} has no parameters to train; return a module with layers")


def _named(job: Job) -> str:
    return f"[model] callable = {job.model.callable!r}"


def _told(made: object) -> str:
    if inspect.isclass(made):
        return f"the class {made.__name__}; return an instance, {made.__name__}(…)"
    return f"{type(made).__name__}; correct what is returned"


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
    _require_known_parameters(job.model.parameters, frozenset(kind().get_params()))

    def tell(env: Any) -> None:
        scores = ", ".join(f"{entry[1]} {entry[2]:.5f}" for entry in env.evaluation_result_list)
        job.watch.detail(f"tree {env.iteration + 1} of {env.end_iteration}, validation {scores}")

    x = job.matrix(split.train)
    with _refusals_of_lightgbm(job.model.parameters):
        estimator = kind(**parameters)
        estimator.fit(
            x,
            job.targets_of(split.train),
            eval_X=(job.matrix(split.validation),),
            eval_y=(job.targets_of(split.validation),),
            callbacks=[lightgbm.early_stopping(20, verbose=False), tell],
        )
    return EstimatorPipeline(estimator, job.preprocessor, x.shape[1], job.dataset.task, job.dataset.classes), None


@contextlib.contextmanager
def _refusals_of_lightgbm(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Tell what LightGBM refuses as a fault of its parameters, where any were given."""
    from lightgbm.basic import LightGBMError

    try:
        yield
    except (LightGBMError, TypeError, ValueError) as exc:
        if not parameters:
            raise
        raise failed(exc, f"[model] parameters = {dict(parameters)!r}: LightGBM", "correct the parameters") from exc


def _require_known_parameters(parameters: Mapping[str, Any], arguments: frozenset[str]) -> None:
    """Raise where LightGBM does not know a name: it would ignore it, and at our verbosity say nothing.

    It tells which ones it does not know only by a warning, while it makes a data set.

    Args:
        arguments: of the estimator, which are not all LightGBM's own.
    """
    import lightgbm

    asked = {name: value for name, value in parameters.items() if name not in arguments}
    if not asked:
        return
    heard = _Heard()
    log = logging.getLogger("modelyard.lightgbm")
    log.propagate, log.handlers = False, [heard]
    log.setLevel(logging.INFO)  # as which LightGBM logs its warnings too
    # LightGBM has no way to ask which logger was set before: from here on its few warnings go to this one.
    lightgbm.register_logger(log)
    with _refusals_of_lightgbm(parameters):
        rows = np.zeros((2, 1), dtype=np.float32)
        lightgbm.Dataset(rows, label=np.array([0, 1]), params=asked | {"verbosity": 0}).construct()
    unknown = [name for name in asked if f"Unknown parameter: {name}" in heard.messages]
    if unknown:
        close = difflib.get_close_matches(unknown[0], {*arguments, *_LIGHTGBM_NAMES}, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"[model] parameters: LightGBM knows no {unknown[0]!r}{hint}; correct the name or remove it")


class _Heard(logging.Handler):
    """Keeps what is logged, without LightGBM's name before it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().strip().removeprefix("[LightGBM] [Warning] "))


def _linear(job: Job) -> Built:
    pipeline, converged = fit_linear(job.dataset, job.preprocessor)
    if not converged:
        job.watch.detail(f"the linear model is still short of its optimum after {LINEAR_ITERATIONS} iterations")
    return pipeline, None


def fit_linear(dataset: Dataset, preprocessor: Preprocessor) -> tuple[EstimatorPipeline, bool]:
    """Return logistic regression or ridge over the same features as every other model, and whether it converged."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    rows = dataset.split.train
    x = preprocessor.apply(dataset.take(rows))
    estimator = LogisticRegression(max_iter=LINEAR_ITERATIONS, tol=1e-3) if dataset.classes else Ridge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # returned instead
        estimator.fit(x, encoded_targets(dataset, rows))
    converged = not dataset.classes or int(np.max(estimator.n_iter_)) < LINEAR_ITERATIONS
    return EstimatorPipeline(estimator, preprocessor, x.shape[1], dataset.task, dataset.classes), converged


def _sklearn(job: Job) -> Built:
    """An estimator of the user's own, over a DataFrame of the columns."""
    assert job.model.callable is not None  # the configuration says so
    dataset, rows = job.dataset, job.dataset.split.train
    estimator = call(job.model.callable, job.root, field="[model] callable")
    if inspect.isclass(estimator) or not hasattr(estimator, "fit"):
        raise ConfigError(f"{_named(job)} must return an estimator with fit(), got {_told(estimator)}")
    frame = to_frame(dataset.take(rows), dataset.specs)
    remedy = f"it is given a DataFrame of {_columns(dataset)}: prepare them inside the estimator"
    try:
        estimator.fit(frame, job.targets_of(rows))
    except Exception as exc:  # an estimator of the user's own may raise anything
        raise failed(exc, f"{_named(job)}: {type(estimator).__name__}.fit()", remedy) from exc
    if dataset.classes and not hasattr(estimator, "predict_proba"):
        raise ConfigError(
            f"{_named(job)}: {type(estimator).__name__} has no predict_proba(), and classes need scores; wrap it in "
            "sklearn.calibration.CalibratedClassifierCV"
        )
    try:
        raw_answers(estimator, to_frame(dataset.take(dataset.split.test), dataset.specs))
    except Exception as exc:  # as above
        raise failed(exc, f"{_named(job)}: {type(estimator).__name__}, asked for the test rows,", remedy) from exc
    return FramePipeline(estimator, dataset.specs, dataset.task, dataset.classes), None


def _columns(dataset: Dataset) -> str:
    text = [repr(spec.name) for spec in dataset.specs if spec.datatype == "BYTES"]
    listed = f" (text: {', '.join(text[:5])}{' …' if text[5:] else ''})" if text else ""
    return f"{len(dataset.specs)} columns{listed}"


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
        "threads": job.fit.n_threads or os.cpu_count(),  # sums are rounded in another order on another number
        "modelyard": __version__,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
