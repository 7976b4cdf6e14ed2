"""LightGBM models: onnxmltools' converter, made known to skl2onnx so that they may also stand inside pipelines."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    import lightgbm

_PROBABILITY_OBJECTIVES = ("binary", "multiclass", "multiclassova")


@functools.cache
def register_lightgbm() -> None:
    """Make skl2onnx convert LightGBM estimators wherever the libraries are installed; repeating it changes nothing."""
    try:
        from lightgbm import LGBMClassifier, LGBMRegressor
    except ImportError:
        return  # nothing of LightGBM can be in a pipeline then
    try:
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
        from skl2onnx import update_registered_converter
        from skl2onnx.common.shape_calculator import (
            calculate_linear_classifier_output_shapes,
            calculate_linear_regressor_output_shapes,
        )
    except ImportError as exc:
        raise MissingExtra(exc.name or "onnxmltools", "train", "converting a LightGBM model") from exc

    def convert(scope: Any, operator: Any, container: Any) -> None:
        original = operator.raw_operator
        operator.raw_operator = _Float32Thresholds(original)
        try:
            convert_lightgbm(scope, operator, container)
        finally:
            operator.raw_operator = original

    booster_classifier, booster_regressor = _booster_estimators()
    for kind in (LGBMClassifier, booster_classifier):
        update_registered_converter(
            kind,
            f"LightGbm{kind.__name__}",
            calculate_linear_classifier_output_shapes,
            convert,
            options={"nocl": [True, False], "zipmap": [True, False, "columns"]},
        )
    for kind in (LGBMRegressor, booster_regressor):
        update_registered_converter(
            kind,
            f"LightGbm{kind.__name__}",
            calculate_linear_regressor_output_shapes,
            convert,
            options={"split": None},
        )


def booster_as_estimator(booster: "lightgbm.Booster", labels: tuple[str | int, ...] | None) -> Any:
    """Return `booster` in the manner of a fitted scikit-learn estimator.

    Args:
        labels: names of its classes 0 to k-1, if it has classes; None names them 0 to k-1.

    Raises:
        ExportError: `labels` are as many as no class, or the objective is one that no graph can be made of.
    """
    objective = str(booster.dump_model(num_iteration=1)["objective"]).partition(" ")[0]
    classifier, regressor = _booster_estimators()
    if objective not in _PROBABILITY_OBJECTIVES:
        if labels:
            raise ExportError(
                f"labels {list(labels)} name classes, and a Booster of objective {objective!r} has none; leave them out"
            )
        return regressor(booster)
    n_classes = 2 if objective == "binary" else booster.num_model_per_iteration()
    labels = tuple(range(n_classes)) if labels is None else labels
    if len(labels) != n_classes:
        raise ExportError(
            f"labels must name the {n_classes} classes of this Booster, got {list(labels)}; name each once"
        )
    return classifier(booster, labels)


def require_numbers_only(booster: "lightgbm.Booster") -> None:
    """Raise ExportError where the trees look at pandas categories, whose codes only the training table knew."""
    if booster.pandas_categorical:
        raise ExportError(
            f"this LightGBM model was trained on pandas categories {booster.pandas_categorical[0][:3]}…, whose codes no graph can "
            "compute; encode them in a pipeline (OrdinalEncoder or OneHotEncoder) before the model"
        )


class _Float32Thresholds:
    """A LightGBM estimator whose thresholds are rounded down to float32.

    The graph compares in float32, and for a float32 x, x <= t is x <= floor32(t): rounded to the nearest instead, x may fall
    between t and its rounding, and take the other branch.
    """

    def __init__(self, estimator: Any) -> None:
        from lightgbm import Booster

        self._estimator = estimator
        lines = estimator.booster_.model_to_string().split("\n")
        # LightGBM reads the trees one after the other where their sizes in bytes, which change here, are not given.
        kept = (_floored(line) for line in lines if not line.startswith("tree_sizes="))
        self.booster_ = Booster(model_str="\n".join(kept))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._estimator, name)


def _floored(line: str) -> str:
    """Return a line of LightGBM's model text, its thresholds rounded down to float32."""
    name, _, values = line.partition("=")
    if name != "threshold":
        return line
    exact = np.array(values.split(), dtype=np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float32)
        down = np.where(nearest.astype(np.float64) > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return "threshold=" + " ".join(repr(float(value)) for value in down)


@functools.cache
def _booster_estimators() -> tuple[Any, Any]:
    """Return the classes of estimators that boosters are dressed as; scikit-learn is imported at use."""
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

    class BoosterClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
        boosting_type = "gbdt"

        def __init__(self, booster: "lightgbm.Booster", labels: tuple[str | int, ...]) -> None:
            self.booster = self.booster_ = booster
            self.labels = labels
            self.classes_ = np.array(labels)
            self.n_features_in_ = booster.num_feature()

        def predict_proba(self, x: Any) -> NDArray[Any]:
            raw = np.asarray(self.booster_.predict(x))
            return np.stack([1 - raw, raw], axis=1) if raw.ndim == 1 else raw

        def predict(self, x: Any) -> NDArray[Any]:
            names: NDArray[Any] = self.classes_[self.predict_proba(x).argmax(axis=1)]
            return names

    class BoosterRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
        boosting_type = "gbdt"

        def __init__(self, booster: "lightgbm.Booster") -> None:
            self.booster = self.booster_ = booster
            self.n_features_in_ = booster.num_feature()

        def predict(self, x: Any) -> NDArray[Any]:
            return np.asarray(self.booster_.predict(x))

    return BoosterClassifier, BoosterRegressor
