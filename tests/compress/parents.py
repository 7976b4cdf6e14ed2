"""A parent that can be quantized: a small MLP over a column of text and eight numbers, trained nowhere, true by construction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from modelyard.bundle.answers import choose_cases
from modelyard.bundle.format import Bundle, BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, Lineage, Signature, Targets, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.compress.search import LabelledRows
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine

N_NUMBERS = 8


@dataclass(frozen=True)
class Parent:
    """A bundle and labelled rows for every purpose."""

    bundle: Bundle
    calibration: dict[str, NDArray[Any]]
    selection: LabelledRows
    test: LabelledRows


def make_rows(n: int, seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "numbers": rng.normal(size=(n, N_NUMBERS)).astype(np.float32),
        "kind": rng.choice(np.array(["a", "b"], dtype=object), n),
    }


def mlp(width: int, seed: int = 0) -> tuple[bytes, Signature]:
    """Return a graph whose hidden layers are wide enough for int8 to be smaller, with string labels at its end."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(size=(N_NUMBERS, width)).astype(np.float32),
        "w2": (rng.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32),
        "w3": (rng.normal(size=(width, 2)) / np.sqrt(width)).astype(np.float32),
        "classes": np.array(["no", "yes"], dtype=object),
    }
    nodes = [
        helper.make_node(
            "LabelEncoder", ["kind"], ["code"], domain="ai.onnx.ml", keys_strings=["a", "b"], values_floats=[0.0, 1.0]
        ),
        helper.make_node("Unsqueeze", ["code", "one"], ["column"]),
        helper.make_node("Add", ["numbers", "column"], ["x"]),
        helper.make_node("MatMul", ["x", "w1"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["a2"]),
        helper.make_node("Relu", ["a2"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w3"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["classes", "best"], ["label"]),
    ]
    signature = Signature(
        inputs=(
            TensorSpec(name="numbers", datatype="FP32", shape=(BATCH, N_NUMBERS)),
            TensorSpec(name="kind", datatype="BYTES", shape=(BATCH,), categories=("a", "b")),
        ),
        outputs=(
            TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=("no", "yes")),
            TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 2), labels=("no", "yes")),
        ),
    )
    kinds = {"FP32": 1, "BYTES": 8}
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info(spec.name, kinds[spec.datatype], spec.shape) for spec in signature.inputs],
        [helper.make_tensor_value_info(spec.name, kinds[spec.datatype], spec.shape) for spec in signature.outputs],
        [
            *(numpy_helper.from_array(array, name) for name, array in weights.items()),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), signature


def make_parent(folder: Path, width: int = 128, *, keep: float = 0.97) -> Parent:
    model, signature = mlp(width)
    engine = OnnxRuntimeEngine(model)
    rows = {
        name: make_rows(n, seed)
        for seed, (name, n) in enumerate({"train": 300, "selection": 1000, "test": 2000}.items())
    }
    answers = {name: engine.run(inputs) for name, inputs in rows.items()}

    def labelled(name: str) -> LabelledRows:
        """The parent is right nine times of ten."""
        truth = answers[name]["label"].copy()
        wrong = np.random.default_rng(9).random(len(truth)) < 0.1
        truth[wrong] = np.where(truth[wrong] == "no", "yes", "no")
        return LabelledRows(rows[name], truth)

    bundle = write_bundle(
        folder / "parent",
        BundleContent(
            name="mlp",
            task="classification",
            signature=signature,
            model=model,
            cases=choose_cases(rows["test"], answers["test"], signature, margin=1e-3),
            cases_origin="held-out",
            reference=summarise(rows["train"], answers["train"], signature),
            lineage=Lineage(created_at="2026-01-01T00:00:00+00:00", made_by="a test"),
            targets=Targets(metric="accuracy", keep=keep),
        ),
    )
    return Parent(bundle, rows["train"], labelled("selection"), labelled("test"))
