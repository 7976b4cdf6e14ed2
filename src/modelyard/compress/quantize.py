"""int8 by onnxruntime's own quantizer: static (ranges from calibration rows) and dynamic (ranges from each batch).

Bundle in, bundle out; the parent is only read. Facts about int8 on CPUs: with VNNI, uint8 activations times int8 weights
are exact; without it (AVX2, AVX-512F) their sums saturate, so weights are held to 7 bits there
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays
from modelyard.bundle.format import Bundle
from modelyard.bundle.profile import fingerprint
from modelyard.errors import CompressionError, MissingExtra

Technique = Literal["static-int8", "dynamic-int8"]
TECHNIQUES: tuple[Technique, ...] = ("static-int8", "dynamic-int8")

CALIBRATION_BATCH = 64
# What is worth computing in integers, and what may stay in integers between two of those.
_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CARRIERS = ("Add", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool")
_INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DequantizeLinear", "QGemm")


def quantize(bundle: Bundle, technique: Technique, calibration: Arrays) -> bytes:
    """Return the int8 model of `bundle`'s graph.

    Args:
        calibration: training rows by input name, a few hundred; dynamic-int8 uses none.

    Raises:
        CompressionError: nothing in the graph can be quantized, it is quantized already, or the quantizer fails.
    """
    _require_applicable(bundle)
    quantizer = _static if technique == "static-int8" else _dynamic
    with tempfile.TemporaryDirectory(prefix="modelyard-") as folder, _quiet():
        prepared, target = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        try:
            _prepare(bundle, prepared)
            quantizer(prepared, target, calibration)
        except MissingExtra:
            raise
        except Exception as exc:  # the quantizer raises many kinds
            raise CompressionError(
                f"{technique} failed: {(str(exc).strip() or type(exc).__name__).splitlines()[0]}"
            ) from exc
        return _without_unused_domains(target)


def _require_applicable(bundle: Bundle) -> None:
    kinds = {operator.rpartition(":")[2] for operator in bundle.graph.operators}
    already = sorted(kinds & set(_INTEGER_OPERATORS))
    if already:
        raise CompressionError(f"the graph is quantized already ({', '.join(already)}); start from its parent")
    if not kinds & set(_HEAVY):
        raise CompressionError(f"the graph has no {', '.join(_HEAVY)} to quantize; int8 does nothing for it")


def _prepare(bundle: Bundle, target: Path) -> None:
    """Infer the shapes the quantizer needs; fold batch norms that an exporter left beside their convolutions."""
    try:
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as exc:
        raise MissingExtra("onnx", "compress", "quantizing") from exc
    folded = "ai.onnx:BatchNormalization" not in bundle.graph.operators
    quant_pre_process(bundle.model_path, str(target), skip_symbolic_shape=True, skip_optimization=folded)


def _without_unused_domains(model: Path) -> bytes:
    """Return the model without the operator sets that onnxruntime's tools list but no node uses."""
    import onnx

    graph = onnx.load(model)
    used = {node.domain or "" for node in graph.graph.node}
    kept = [opset for opset in graph.opset_import if opset.domain in used | {"", "ai.onnx"}]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    content: bytes = graph.SerializeToString()
    return content


def _static(model: Path, target: Path, calibration: Arrays) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    n_rows = len(next(iter(calibration.values()), ()))
    if not n_rows:
        raise CompressionError("static-int8 needs calibration rows, got none; give training rows")
    quantize_static(
        str(model),
        str(target),
        _batches(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=[*_HEAVY, *_CARRIERS],
        per_channel=True,
        reduce_range=not _exact_uint8_int8(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "ActivationSymmetric": False,
            "WeightSymmetric": True,
            "QuantizeBias": True,
            "CalibMaxIntermediateOutputs": 16,  # ranges are folded as they come, so that memory stays flat
        },
    )


def _dynamic(model: Path, target: Path, calibration: Arrays) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(model), str(target), weight_type=QuantType.QInt8, per_channel=True, reduce_range=not _exact_uint8_int8()
    )


def _exact_uint8_int8() -> bool:
    """Whether this processor multiplies uint8 by int8 without saturating."""
    features = fingerprint("").features
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"} & set(features))


def _batches(rows: Arrays) -> Any:
    """Feed the quantizer's calibration, a batch at a time, in the order of the rows."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        def __init__(self) -> None:
            self._iterator = iterate()

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self._iterator, None)

    def iterate() -> Iterator[dict[str, NDArray[Any]]]:
        n_rows = len(next(iter(rows.values())))
        for start in range(0, n_rows, CALIBRATION_BATCH):
            yield {name: array[start : start + CALIBRATION_BATCH] for name, array in rows.items()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice about options away from the reader's terminal."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
