"""LightGBM estimators: onnxmltools' converter, made known to skl2onnx so that they may also stand inside pipelines."""

from modelyard.errors import MissingExtra


def register_lightgbm() -> None:
    """Make skl2onnx convert LightGBM estimators wherever both libraries are installed; repeating it changes nothing."""
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
    update_registered_converter(
        LGBMClassifier,
        "LightGbmLGBMClassifier",
        calculate_linear_classifier_output_shapes,
        convert_lightgbm,
        options={"nocl": [True, False], "zipmap": [True, False, "columns"]},
    )
    update_registered_converter(
        LGBMRegressor,
        "LightGbmLGBMRegressor",
        calculate_linear_regressor_output_shapes,
        convert_lightgbm,
        options={"split": None},
    )
