"""Builds one ONNX graph out of named inputs, our own nodes and whole models converted by libraries."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    import onnx

OPSET = 18
ML_OPSET = 3
IR_VERSION = 9
_ONLY_EXTENDED = ("TreeEnsembleClassifier", "TreeEnsembleRegressor")
"""Version 3 takes doubles too, and reads what version 1 wrote as it was meant."""

_ONNX_TYPES = {
    "FP32": 1, "UINT8": 2, "INT8": 3, "UINT16": 4, "INT16": 5, "INT32": 6, "INT64": 7, "BYTES": 8, "BOOL": 9, "FP16": 10,
    "FP64": 11, "UINT32": 12, "UINT64": 13, "BF16": 16,
}  # fmt: skip


class GraphBuilder:
    """Accumulates nodes and constants; `build` returns the model. One owner, not thread-safe.

    Args:
        reserved: names of inputs, which no value of our own may bear.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        try:
            import onnx
        except ImportError as exc:
            raise MissingExtra("onnx", "train", "building an ONNX graph") from exc
        self._onnx = onnx
        self._reserved = frozenset(reserved)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._opsets: dict[str, int] = {"": OPSET}

    def unused(self, name: str) -> str:
        """Return `name`, underscores behind it as long as an input is called so."""
        while name in self._reserved:
            name += "_"
        return name

    def constant(self, value: NDArray[Any] | list[Any]) -> str:
        """Add a constant and return its name."""
        array = np.asarray(value)
        name = self.unused(f"constant_{len(self._constants)}")
        tensor = self._onnx.numpy_helper.from_array(array.astype(object) if array.dtype.kind == "U" else array, name)
        self._constants.append(tensor)
        return name

    def add(self, operator: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        name = output or self.unused(f"value_{len(self._nodes)}")
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], domain=domain, **attributes))
        if domain == "ai.onnx.ml":
            self._opsets.setdefault(domain, ML_OPSET)
        return name

    def embed(self, model: "onnx.ModelProto", inputs: Mapping[str, str]) -> dict[str, str]:
        """Copy `model`'s graph in, fed by our values; return its output names → ours.

        Raises:
            ExportError: it needs another version of an operator set than the rest, or brings functions of its own.
        """
        if model.functions:
            raise ExportError("the converted model has local functions, which cannot be merged; inline them first")
        for opset in model.opset_import:
            domain = "" if opset.domain == "ai.onnx" else opset.domain
            ours_version = self._opsets.setdefault(domain, ML_OPSET if domain == "ai.onnx.ml" else opset.version)
            self._require_same_meaning(model, domain, opset.version, ours_version)
        prefix = f"part_{len(self._nodes)}/"
        while any(name.startswith(prefix) for name in self._reserved):
            prefix = f"_{prefix}"
        prefixed = self._onnx.compose.add_prefix(model, prefix).graph
        for theirs, ours in inputs.items():
            self.add("Identity", ours, output=prefix + theirs)
        self._nodes.extend(prefixed.node)
        self._constants.extend(prefixed.initializer)
        return {output.name: prefix + output.name for output in model.graph.output}

    def _require_same_meaning(self, model: "onnx.ModelProto", domain: str, theirs: int, ours: int) -> None:
        """Operators may move to another version of their set when none of them was redefined in between."""
        if theirs == ours:
            return
        for node in model.graph.node:
            if node.domain in (domain, "ai.onnx" if domain == "" else domain):
                then = self._onnx.defs.get_schema(node.op_type, theirs, domain).since_version
                now = self._onnx.defs.get_schema(node.op_type, ours, domain).since_version
                if then != now and node.op_type not in _ONLY_EXTENDED:
                    raise ExportError(
                        f"operator {node.op_type} of {domain or 'ai.onnx'!r} means another thing in version {ours} than in "
                        f"{theirs}; convert with target_opset {ours}"
                    )

    def build(self, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> "onnx.ModelProto":
        """Return the checked model with these inputs and outputs, whose names must be values of the graph."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes,
            "modelyard",
            [helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.datatype], spec.shape) for spec in inputs],
            [helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.datatype], spec.shape) for spec in outputs],
            self._constants,
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        model: onnx.ModelProto = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="modelyard"
        )
        self._onnx.checker.check_model(model)
        return model
