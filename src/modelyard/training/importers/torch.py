"""torch modules → ONNX, by torch's own exporter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays
from modelyard.bundle.manifest import BATCH, NUMPY_DTYPES, Signature, TensorSpec
from modelyard.errors import ConfigError, ExportError, MissingExtra
from modelyard.metrics import Answers
from modelyard.training.export import named_outputs, to_onnx
from modelyard.training.importers._base import Imported, Samples, Task, tensor_samples
from modelyard.training.models import Task as ModelTask
from modelyard.training.models import answered, in_parts
from modelyard.training.onnx_graph import OPSET, GraphBuilder

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
def _quiet_torch() -> Iterator[None]:
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


def import_module(
    module: "torch.nn.Module", samples: Any, labels: tuple[str | int, ...] | None, task: Task | None
) -> Imported:
    """Draw a module with one input and one output as a graph; the module is left in the mode it was in.

    Without labels its output is served as it is, called "output" (or "prediction", where the task is regression). With labels
    there is one column per label: as it is where rows are probabilities, through a softmax where they are logits.

    Raises:
        ConfigError: labels or task do not fit the output.
        DataError: the samples are no tensor.
        ExportError: torch cannot run the module on the samples, or cannot express it.
    """
    import torch

    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu().numpy()
    taken = tensor_samples(np.asarray(samples), _float_dtype(module))
    name = taken.specs[0].name
    with _evaluating(module):
        out = _run(module, taken.inputs[name])
        task = task or _guessed_task(out, labels)
        if task == "other":
            return _import_plain(module, taken, out)
        classes = _checked_labels(out, labels, task)
        original = _ModulePipeline(
            module=module,
            input_name=name,
            example=_two_rows(taken.inputs[name]),
            softmax=bool(classes) and not _are_probabilities(out),
            task=task,
            classes=classes,
        )
        model, signature = to_onnx(original, taken.specs)
    return Imported(
        library="torch",
        task=task,
        model=model,
        signature=signature,
        original=lambda rows: named_outputs(original.predict(rows), signature),
        samples=taken,
        notes=("the module's outputs are taken for logits: the graph ends in a softmax",) if original.softmax else (),
    )


@dataclass(frozen=True)
class _ModulePipeline:
    """A module whose output is scores or values."""

    module: "torch.nn.Module"
    input_name: str
    example: NDArray[Any]
    softmax: bool
    task: ModelTask
    classes: tuple[str | int, ...]

    def predict(self, inputs: Arrays) -> Answers:
        import torch

        with _evaluating(self.module):
            raw = _run(self.module, inputs[self.input_name])
        if self.softmax:
            raw = torch.from_numpy(raw).softmax(1).numpy()
        return answered(raw if self.classes else raw.reshape(-1), self.classes)

    def add_to(self, graph: GraphBuilder) -> str:
        out = _embed(graph, self.module, self.example, self.input_name)
        out = graph.add("Softmax", out, axis=1) if self.softmax else out
        return graph.add("Cast", out, to=1)  # of a module that computes in float64


def _import_plain(module: "torch.nn.Module", taken: Samples, out: NDArray[Any]) -> Imported:
    """Serve the module's output as it is."""
    name = taken.specs[0].name
    datatypes = {dtype: datatype for datatype, dtype in NUMPY_DTYPES.items()}
    output = TensorSpec(
        name="output",
        datatype=datatypes[out.dtype],  # type: ignore[arg-type]  # its values are the literals
        shape=(BATCH, *out.shape[1:]),
    )
    graph = GraphBuilder(reserved=[name])
    graph.add("Identity", _embed(graph, module, _two_rows(taken.inputs[name]), name), output=output.name)

    def original(rows: Arrays) -> Arrays:
        with _evaluating(module):
            return {output.name: _run(module, rows[name])}

    return Imported(
        library="torch",
        task="other",
        model=graph.build(taken.specs, [output]).SerializeToString(),
        signature=Signature(inputs=taken.specs, outputs=(output,)),
        original=original,
        samples=taken,
    )


def _embed(graph: GraphBuilder, module: "torch.nn.Module", example: NDArray[Any], source: str) -> str:
    core = export_module(module, example)
    (out,) = graph.embed(core, {core.graph.input[0].name: source}).values()
    return out


def _run(module: "torch.nn.Module", x: NDArray[Any]) -> NDArray[Any]:
    """Return what the module answers to n rows, in parts.

    Raises:
        ExportError: it fails on them, or answers with anything but one tensor of n rows.
    """
    import torch

    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    parts = []
    with torch.no_grad():
        for part in in_parts({"x": x}):
            try:
                out = module(torch.from_numpy(part["x"].copy()).to(device))
            except (RuntimeError, TypeError, ValueError, IndexError) as exc:  # what torch raises for shapes and types
                raise ExportError(
                    f"{type(module).__name__} cannot answer samples of {x.dtype} {list(x.shape)}: {_first_line(exc)}; give rows as "
                    "the module takes them"
                ) from exc
            if not isinstance(out, torch.Tensor) or out.ndim == 0 or len(out) != len(part["x"]):
                found = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
                raise ExportError(
                    f"{type(module).__name__} answers {len(part['x'])} rows with {found}; it must return one tensor with one row per "
                    "sample: wrap it in a module that does"
                )
            parts.append(out.cpu().numpy())
    return np.concatenate(parts)


def _guessed_task(out: NDArray[Any], labels: tuple[str | int, ...] | None) -> Task:
    if labels:
        return "classification"
    return "regression" if out.dtype.kind == "f" and out.shape[1:] in ((), (1,)) else "other"


def _checked_labels(out: NDArray[Any], labels: tuple[str | int, ...] | None, task: ModelTask) -> tuple[str | int, ...]:
    shape = ["n", *out.shape[1:]]
    if task == "regression":
        if labels or out.dtype.kind != "f" or out.shape[1:] not in ((), (1,)):
            raise ConfigError(
                f'task = "regression" needs one float per row and no labels, got {out.dtype} {shape} and labels {labels}; set task = '
                '"other" to serve the output as it is'
            )
        return ()
    if not labels or len(set(labels)) != len(labels) or out.dtype.kind != "f" or out.shape[1:] != (len(labels),):
        raise ConfigError(
            f"labels must name each column of the module's output once, got {list(labels or ())} for {out.dtype} {shape}; end the module "
            "in one column per class"
        )
    return labels


def _are_probabilities(out: NDArray[Any]) -> bool:
    return bool((out >= 0).all() and np.allclose(out.sum(axis=1), 1, atol=1e-4))


def _float_dtype(module: "torch.nn.Module") -> np.dtype[Any]:
    """Return the datatype of the module's own floats, float32 where it has none."""
    import torch

    floats = (tensor for tensor in module.state_dict().values() if tensor.is_floating_point())
    double = next((tensor.dtype == torch.float64 for tensor in floats), False)
    return np.dtype(np.float64 if double else np.float32)


def _two_rows(x: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([x, x])[:2] if len(x) == 1 else x[:2].copy()


@contextlib.contextmanager
def _evaluating(module: "torch.nn.Module") -> Iterator[None]:
    """Put every part of the module into evaluation inside the block, and into the mode it had after it."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
