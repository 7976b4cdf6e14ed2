"""Models that give their inputs back, as bundles in a store: through them every value can be sent to a server and seen again.

plain    INT64, FP32 and BYTES, and scores to classify: what most checks need
single   one input of FP32, for raw binary requests
every    an input and an output of every datatype but 16-bit floats, which have no typed contents over gRPC
    halves   16-bit floats
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, NUMPY_DTYPES, Signature, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.bundle.store import open_store
from modelyard.inference.values import bfloat16_bits
from modelyard.testing.bundles import LINEAGE

WIDTH = 2
ONNX_KINDS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
MODELS: dict[str, tuple[str, ...]] = {
    "plain": ("INT64", "FP32", "BYTES"),
    "single": ("FP32",),
    "every": tuple(datatype for datatype in ONNX_KINDS if datatype not in ("FP16", "BF16")),
    "halves": ("FP16", "BF16"),
}


def echo_model(datatypes: Iterable[str]) -> bytes:
    """Return an ONNX model with an input and an output for each datatype: "fp32_in" comes back as "fp32_out"."""
    names = [(datatype.lower(), ONNX_KINDS[datatype]) for datatype in datatypes]
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"{name}_in"], [f"{name}_out"]) for name, _ in names],
        "echo",
        [helper.make_tensor_value_info(f"{name}_in", kind, [BATCH, WIDTH]) for name, kind in names],
        [helper.make_tensor_value_info(f"{name}_out", kind, [BATCH, WIDTH]) for name, kind in names],
    )
    opset = helper.make_opsetid("", 17)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    return model


def publish_echo(store: Path, name: str, datatypes: Iterable[str]) -> None:
    """Publish the model of these datatypes as a bundle in `store`."""
    datatypes = tuple(datatypes)
    inputs = {f"{datatype.lower()}_in": _values(datatype) for datatype in datatypes}
    outputs = {key.replace("_in", "_out"): array for key, array in inputs.items()}

    def spec(name: str, datatype: Any) -> TensorSpec:
        return TensorSpec(name=name, datatype=datatype, shape=(BATCH, WIDTH), nullable=_nullable(datatype))

    signature = Signature(
        inputs=tuple(map(spec, inputs, datatypes)),
        outputs=tuple(map(spec, outputs, datatypes)),
    )
    content = BundleContent(
        name=name,
        task="classification",
        signature=signature,
        model=echo_model(datatypes),
        cases=CaseSet(inputs, outputs),
        cases_origin="generated",
        reference=summarise(inputs, outputs, signature),
        lineage=LINEAGE,
    )
    path = store.parent / f"bundle-{name}"
    write_bundle(path, content)
    open_store(store).publish(path)


def publish_all(store: Path) -> None:
    for name, datatypes in MODELS.items():
        publish_echo(store, name, datatypes)


def _nullable(datatype: str) -> bool:
    return datatype in ("FP16", "BF16", "FP32", "FP64", "BYTES")


def _values(datatype: str) -> NDArray[Any]:
    if datatype == "BYTES":
        return np.array([["a", "b"], ["", "naïve ✈"]], dtype=object)
    numbers = np.array([[0, 1], [1, 0]])
    return bfloat16_bits(numbers.astype(np.float32)) if datatype == "BF16" else numbers.astype(NUMPY_DTYPES[datatype])
