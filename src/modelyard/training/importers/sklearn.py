"""scikit-learn and LightGBM estimators → ONNX, by skl2onnx and onnxmltools."""

from typing import TYPE_CHECKING, Any

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import ExportError, MissingExtra
from modelyard.training.importers.lightgbm import register_lightgbm
from modelyard.training.onnx_graph import ML_OPSET, OPSET

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

    if not hasattr(estimator, "steps"):
        from sklearn.pipeline import Pipeline

        estimator = Pipeline([("estimator", estimator)])  # stacks the columns for an estimator that takes one matrix

    def column(spec: TensorSpec) -> Any:
        kind = data_types.StringTensorType if spec.datatype == "BYTES" else data_types.FloatTensorType
        return kind([None, 1])

    return _convert(estimator, [(spec.name, column(spec)) for spec in specs])


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
