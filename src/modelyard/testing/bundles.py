"""A small, real bundle in a few milliseconds: for tests that need one and do not care which."""

from pathlib import Path
from typing import Any

import numpy as np

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import Bundle, BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, Lineage, Score, Signature, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.errors import MissingExtra

AIRPORT_WEIGHTS = {"EWR": 0.5, "JFK": -0.25, "LGA": 0.125}
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="delay", datatype="FP32", shape=(BATCH,), nullable=True, unit="min"),
        TensorSpec(name="origin", datatype="BYTES", shape=(BATCH,), nullable=True, categories=tuple(AIRPORT_WEIGHTS)),
    ),
    outputs=(
        TensorSpec(name="probability", datatype="FP32", shape=(BATCH,)),
        TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=("late", "on_time")),
    ),
)
LINEAGE = Lineage(
    created_at="2026-01-01T00:00:00+00:00",
    made_by="modelyard.testing",
    scores=(Score(metric="accuracy", value=0.75, low=0.5, high=0.9, n_samples=4),),
)


def late_model(weight: float = 0.0625) -> bytes:
    """Return an ONNX logistic model of a delay in minutes (NaN counts as 0) and an airport (an unknown one counts as 0).

    Raises:
        MissingExtra: building a graph needs the onnx package.
    """
    try:
        from onnx import TensorProto, helper
    except ImportError as exc:
        raise MissingExtra("onnx", "train", "building a model for a test") from exc

    def constant(name: str, kind: int, value: Any) -> Any:
        return helper.make_tensor(name, kind, [], [value])

    nodes = [
        helper.make_node("IsNaN", ["delay"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "delay"], ["minutes"]),
        helper.make_node("Mul", ["minutes", "weight"], ["by_delay"]),
        helper.make_node(
            "LabelEncoder",
            ["origin"],
            ["by_origin"],
            domain="ai.onnx.ml",
            keys_strings=list(AIRPORT_WEIGHTS),
            values_floats=list(AIRPORT_WEIGHTS.values()),
            default_float=0.0,
        ),
        helper.make_node("Add", ["by_delay", "by_origin"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
        helper.make_node("Greater", ["probability", "half"], ["is_late"]),
        helper.make_node("Where", ["is_late", "late", "on_time"], ["label"]),
    ]
    graph = helper.make_graph(
        nodes,
        "late",
        [
            helper.make_tensor_value_info("delay", TensorProto.FLOAT, [BATCH]),
            helper.make_tensor_value_info("origin", TensorProto.STRING, [BATCH]),
        ],
        [
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, [BATCH]),
            helper.make_tensor_value_info("label", TensorProto.STRING, [BATCH]),
        ],
        [
            constant("zero", TensorProto.FLOAT, 0.0),
            constant("weight", TensorProto.FLOAT, weight),
            constant("half", TensorProto.FLOAT, 0.5),
            constant("late", TensorProto.STRING, b"late"),
            constant("on_time", TensorProto.STRING, b"on_time"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model


def late_cases(weight: float = 0.0625) -> CaseSet:
    """Return six rows, missing and unknown values among them, with their answers computed by NumPy."""
    delay = np.array([0.0, 30.0, -12.0, np.nan, 5.0, 0.0], dtype=np.float32)
    origin = np.array(["EWR", "JFK", "LGA", "JFK", "", "ORD"], dtype=object)
    logit = np.nan_to_num(delay) * np.float32(weight)
    logit = logit + np.array([AIRPORT_WEIGHTS.get(airport, 0.0) for airport in origin], dtype=np.float32)
    probability = 1 / (1 + np.exp(-logit))
    label = np.where(probability > 0.5, "late", "on_time").astype(object)
    return CaseSet(inputs={"delay": delay, "origin": origin}, outputs={"probability": probability, "label": label})


def late_content(*, name: str = "late", weight: float = 0.0625) -> BundleContent:
    """Return what `late_bundle` writes; another `weight` makes another identity."""
    cases = late_cases(weight)
    return BundleContent(
        name=name,
        task="classification",
        signature=SIGNATURE,
        model=late_model(weight),
        cases=cases,
        cases_origin="held-out",
        reference=summarise(cases.inputs, cases.outputs, SIGNATURE),
        lineage=LINEAGE,
        description="Says whether a flight will be late.",
    )


def late_bundle(path: Path, *, name: str = "late", weight: float = 0.0625) -> Bundle:
    """Write the bundle at `path`, which must not exist."""
    return write_bundle(path, late_content(name=name, weight=weight))
