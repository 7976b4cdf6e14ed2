"""scikit-learn and LightGBM estimators → ONNX, by skl2onnx and onnxmltools."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelyard.bundle.cases import Arrays
from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import DataError, ExportError, MissingExtra
from modelyard.metrics import Answers
from modelyard.training.export import named_outputs, to_onnx
from modelyard.training.importers._base import FEATURES, Imported, Samples, frame_samples, matrix_samples
from modelyard.training.importers.lightgbm import register_lightgbm, require_numbers_only
from modelyard.training.models import FramePipeline, class_array, embed_estimator, in_parts, raw_answers, to_frame
from modelyard.training.models import Task as ModelTask
from modelyard.training.onnx_graph import ML_OPSET, OPSET, GraphBuilder

if TYPE_CHECKING:
    import onnx


def convert_estimator(estimator: Any, n_features: int) -> "onnx.ModelProto":
    """Return an estimator over a float matrix, shape (n, n_features), as an ONNX model."""
    from skl2onnx.common.data_types import FloatTensorType

    return _convert(estimator, [("x", FloatTensorType([None, n_features]))])


def convert_frame_estimator(estimator: Any, specs: tuple[TensorSpec, ...]) -> "onnx.ModelProto":
    """Return an estimator over a DataFrame's columns as an ONNX model with one input (n, 1) per column, in their order.

    Text enters as strings, every number as a float: steps that stack columns of several datatypes would be converted wrongly.
    """
    try:
        from skl2onnx.common import data_types
    except ImportError as exc:
        raise MissingExtra("skl2onnx", "train", "converting an estimator") from exc

    if not _takes_columns(estimator):
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import FunctionTransformer

        steps = getattr(estimator, "steps", [("estimator", estimator)])
        estimator = Pipeline([("one matrix of all columns", FunctionTransformer()), *steps])

    def column(spec: TensorSpec) -> Any:
        kind = data_types.StringTensorType if spec.datatype == "BYTES" else data_types.FloatTensorType
        return kind([None, 1])

    return _convert(estimator, [(spec.name, column(spec)) for spec in specs])


def _takes_columns(estimator: Any) -> bool:
    """Whether the first step picks columns, as ColumnTransformer does, rather than taking one matrix of all."""
    while hasattr(estimator, "steps"):
        estimator = estimator.steps[0][1]
    return hasattr(estimator, "transformers") or hasattr(estimator, "transformer_list")


def _convert(estimator: Any, inputs: list[tuple[str, Any]]) -> "onnx.ModelProto":
    """Convert with plain score tensors, not the maps that no protocol can carry.

    Raises:
        ExportError: the converter does not know a step of the pipeline.
    """
    try:
        from skl2onnx import to_onnx
    except ImportError as exc:
        raise MissingExtra("skl2onnx", "train", "converting an estimator") from exc

    register_lightgbm()
    _refuse_pandas_categories(estimator)
    options = {"zipmap": False} if hasattr(estimator, "predict_proba") else None
    try:
        model: onnx.ModelProto = to_onnx(
            estimator,
            initial_types=inputs,
            options=None if options is None else {id(estimator): options},
            target_opset={"": OPSET, "ai.onnx.ml": ML_OPSET},
        )
    except Exception as exc:  # the converter raises many kinds
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise ExportError(
            f"skl2onnx cannot convert {type(estimator).__name__}: {first}; replace the step it names by one it knows"
        ) from exc
    return model


def _refuse_pandas_categories(estimator: Any) -> None:
    """Look for a LightGBM model in the estimator, or in a step of the pipeline that it is."""
    for step in [estimator, *(step for _, step in getattr(estimator, "steps", ()))]:
        booster: Any = getattr(step, "booster_", None)
        if hasattr(booster, "pandas_categorical"):
            require_numbers_only(booster)


def import_estimator(estimator: Any, samples: Any, *, library: str = "sklearn") -> Imported:
    """Draw a fitted classifier or regressor as a graph over the columns of a DataFrame or over a matrix.

    Raises:
        ExportError: it is not fitted, neither classifier nor regressor, or has a step that the converter does not know.
        DataError: the samples do not fit it.
    """
    if hasattr(estimator, "fit"):  # a booster dressed as an estimator has been fitted elsewhere
        _require_fitted(estimator)
    taken = _samples_for(estimator, samples)
    task, classes = _task_and_classes(estimator)
    original = _FittedEstimator(estimator, taken.specs, task, classes)
    model, signature = to_onnx(original, taken.specs)
    return Imported(
        library=library,
        task=task,
        model=model,
        signature=signature,
        original=lambda rows: named_outputs(original.predict(rows), signature),
        samples=taken,
    )


@dataclass(frozen=True)
class _FittedEstimator:
    """Answers as the estimator itself does, its own predict() included."""

    estimator: Any
    specs: tuple[TensorSpec, ...]
    task: ModelTask
    classes: tuple[str | int, ...]

    def predict(self, inputs: Arrays) -> Answers:
        is_matrix = self.specs[0].name == FEATURES and len(self.specs[0].shape) == 2
        tables = [part[FEATURES] if is_matrix else to_frame(part, self.specs) for part in in_parts(inputs)]
        raw = np.concatenate([raw_answers(self.estimator, table) for table in tables]).astype(np.float32)
        if not self.classes:
            return Answers(values=raw)
        names = dict(zip(self.estimator.classes_.tolist(), class_array(self.classes), strict=True))
        said = np.concatenate([self.estimator.predict(table) for table in tables]).tolist()
        labels = np.array([names[label] for label in said], dtype=class_array(self.classes).dtype)
        return Answers(labels=labels, scores=raw, classes=self.classes)

    def add_to(self, graph: GraphBuilder) -> str:
        first = self.specs[0]
        if len(first.shape) == 1:
            return FramePipeline(self.estimator, self.specs, self.task, self.classes).add_to(graph)
        core = convert_estimator(self.estimator, int(first.shape[1]))
        return embed_estimator(graph, core, {core.graph.input[0].name: first.name}, self.classes)


def _require_fitted(estimator: Any) -> None:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(estimator)
    except NotFittedError as exc:
        raise ExportError(f"{type(estimator).__name__} is not fitted; call fit() before importing it") from exc


def _samples_for(estimator: Any, samples: Any) -> Samples:
    """Return the samples with the columns that the estimator was fitted on, in its order."""
    fitted: Sequence[str] | None = getattr(estimator, "feature_names_in_", None)
    if hasattr(samples, "columns"):
        if fitted is not None:
            absent = [name for name in fitted if name not in samples.columns]
            if absent:
                raise DataError(
                    f"samples: no column {absent[0]!r}, which {type(estimator).__name__} was fitted on; its columns are "
                    f"{list(fitted)[:30]}: give them all"
                )
            return frame_samples(samples[list(fitted)])
        taken = frame_samples(samples)
        n_given = len(taken.specs)
    elif fitted is not None:
        raise DataError(
            f"samples must be a DataFrame with the columns {list(fitted)[:30]} that {type(estimator).__name__} was fitted on, got "
            f"{type(samples).__name__}"
        )
    else:
        taken = matrix_samples(samples)
        n_given = taken.inputs[FEATURES].shape[1]
    n_wanted = getattr(estimator, "n_features_in_", n_given)
    if n_given != n_wanted:
        raise DataError(
            f"samples have {n_given} columns, {type(estimator).__name__} was fitted on {n_wanted}; give those"
        )
    return taken


def _task_and_classes(estimator: Any) -> tuple[ModelTask, tuple[str | int, ...]]:
    from sklearn.base import is_classifier, is_regressor

    name = type(estimator).__name__
    if is_regressor(estimator):
        return "regression", ()
    if not is_classifier(estimator):
        raise ExportError(f"{name} is neither a classifier nor a regressor; import the model at the end of a pipeline")
    if not hasattr(estimator, "predict_proba"):
        raise ExportError(
            f"{name} has no predict_proba(), and classes need scores; wrap it in sklearn.calibration.CalibratedClassifierCV"
        )
    return "classification", _class_names(estimator.classes_, name)


def _class_names(classes: Any, estimator_name: str) -> tuple[str | int, ...]:
    """Return text as it is; booleans and whole numbers, also those kept as floats, as int."""
    if isinstance(classes, list):
        raise ExportError(f"{estimator_name} predicts several labels a row; import one model per label")
    names = np.asarray(classes)
    if names.dtype.kind in "US" or all(isinstance(name, str) for name in names):
        return tuple(str(name) for name in names)
    if names.dtype.kind in "biu" or (names.dtype.kind == "f" and bool((names == np.floor(names)).all())):
        return tuple(int(name) for name in names)
    raise ExportError(
        f"{estimator_name} has the classes {names.tolist()[:10]}; fit it with text or whole numbers as labels"
    )
