"""torch modules → ONNX, by torch's own exporter."""

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from modelyard.errors import ExportError, MissingExtra
from modelyard.training.onnx_graph import OPSET

if TYPE_CHECKING:
    import onnx
    import torch


def export_module(module: "torch.nn.Module", example: NDArray[Any]) -> "onnx.ModelProto":
    """Return `module` as an ONNX model with one input and one output and a free batch axis.

    Args:
        example: at least two rows of the module's input, so that no axis is taken for a constant.

    Raises:
        ExportError: torch cannot express the module.
    """
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it and would fail late
        import torch
    except ImportError as exc:
        raise MissingExtra(exc.name or "torch", "torch", "exporting a torch module") from exc

    module.eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_torch():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        try:
            program = torch.onnx.export(
                module,
                (torch.from_numpy(example),),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["x"],
                output_names=["y"],
                external_data=False,
                verbose=False,
            )
        except Exception as exc:  # the exporter raises many kinds
            raise ExportError(f"torch cannot export {type(module).__name__}: {_first_line(exc)}") from exc
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return _plain(model)


def _plain(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Inline local functions and forget names of source lines, which tell where the model was built."""
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet_torch() -> Any:
    """Keep the exporter's own log lines to errors."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
