"""Small real models in a store, and real servers started as a user would: `python -m modelyard serve`."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.bundle.store import open_store
from modelyard.testing.bundles import LINEAGE

Arrays = dict[str, NDArray[Any]]
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]


@dataclass(frozen=True)
class SmallModel:
    """A graph, what a bundle says of it, and rows to ask it."""

    name: str
    onnx: bytes
    signature: Signature
    rows: Arrays

    def answer(self, rows: Arrays | None = None) -> Arrays:
        """Return what onnxruntime computes in this process."""
        session = ort.InferenceSession(self.onnx, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(rows or self.rows)), strict=True))

    def content(self, name: str | None = None) -> BundleContent:
        outputs = self.answer()
        return BundleContent(
            name=name or self.name,
            task="classification",
            signature=self.signature,
            model=self.onnx,
            cases=CaseSet(self.rows, outputs),
            cases_origin="generated",
            reference=summarise(self.rows, outputs, self.signature),
            lineage=LINEAGE,
        )


def model(nodes: list[Any], signature: Signature, constants: Mapping[str, NDArray[Any]]) -> ModelProto:
    kinds = {
        "FP32": TensorProto.FLOAT,
        "INT64": TensorProto.INT64,
        "UINT8": TensorProto.UINT8,
        "BYTES": TensorProto.STRING,
    }

    def info(spec: TensorSpec) -> Any:
        return helper.make_tensor_value_info(spec.name, kinds[spec.datatype], spec.shape)

    graph = helper.make_graph(
        nodes,
        "small",
        [info(spec) for spec in signature.inputs],
        [info(spec) for spec in signature.outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=8)


def tabular() -> SmallModel:
    """30 floats → scores of two labels."""
    rng = np.random.default_rng(1)
    signature = Signature(
        inputs=(TensorSpec(name="features", datatype="FP32", shape=(BATCH, 30)),),
        outputs=(TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 2), labels=("benign", "malignant")),),
    )
    nodes = [
        helper.make_node("Gemm", ["features", "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"]),
    ]
    constants = {
        "w1": rng.normal(size=(30, 16)).astype(np.float32),
        "b1": rng.normal(size=16).astype(np.float32),
        "w2": rng.normal(size=(16, 2)).astype(np.float32),
        "b2": rng.normal(size=2).astype(np.float32),
    }
    rows = {"features": rng.normal(size=(7, 30)).astype(np.float32)}
    return SmallModel("tabular", model(nodes, signature, constants).SerializeToString(), signature, rows)


def flights() -> SmallModel:
    """An integer, a float that may be missing and a category → a label and its probabilities."""
    signature = Signature(
        inputs=(
            TensorSpec(name="dep_hour", datatype="INT64", shape=(BATCH,)),
            TensorSpec(name="distance", datatype="FP32", shape=(BATCH,), nullable=True),
            TensorSpec(name="carrier", datatype="BYTES", shape=(BATCH,), nullable=True, categories=("UA", "DL", "B6")),
        ),
        outputs=(
            TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=("late", "on_time")),
            TensorSpec(name="probabilities", datatype="FP32", shape=(BATCH, 2), labels=("late", "on_time")),
        ),
    )
    nodes = [
        helper.make_node("Cast", ["dep_hour"], ["hour"], to=TensorProto.FLOAT),
        helper.make_node("IsNaN", ["distance"], ["is_missing"]),
        helper.make_node("Where", ["is_missing", "mean_distance", "distance"], ["miles"]),
        helper.make_node(
            "LabelEncoder", ["carrier"], ["by_carrier"], domain="ai.onnx.ml",
            keys_strings=["UA", "DL", "B6", ""], values_floats=[0.5, -0.5, 1.0, 0.1], default_float=0.0,
        ),
        *[helper.make_node("Unsqueeze", [name, "one"], [f"{name}_column"]) for name in ("hour", "miles", "by_carrier")],
        helper.make_node("Concat", ["hour_column", "miles_column", "by_carrier_column"], ["columns"], axis=1),
        helper.make_node("Gemm", ["columns", "w", "b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("ArgMax", ["probabilities"], ["index"], axis=1, keepdims=0),
        helper.make_node(
            "LabelEncoder", ["index"], ["label"], domain="ai.onnx.ml",
            keys_int64s=[0, 1], values_strings=["late", "on_time"], default_string="on_time",
        ),
    ]  # fmt: skip
    constants: Arrays = {
        "mean_distance": np.array(1000, dtype=np.float32),
        "one": np.array([1], dtype=np.int64),
        "w": np.array([[0.1, -0.1], [0.001, -0.001], [1, -1]], dtype=np.float32),
        "b": np.array([-2.5, 2.5], dtype=np.float32),
    }
    rows: Arrays = {
        "dep_hour": np.array([5, 12, 19, 23, 8], dtype=np.int64),
        "distance": np.array([200.5, np.nan, 2475, 733, 0], dtype=np.float32),
        "carrier": np.array(["UA", "DL", "B6", "", "Zephyr ✈"], dtype=object),
    }
    return SmallModel("flights", model(nodes, signature, constants).SerializeToString(), signature, rows)


def images() -> SmallModel:
    """A grey image of 28 × 28 bytes → a digit and its probabilities."""
    rng = np.random.default_rng(2)
    signature = Signature(
        inputs=(TensorSpec(name="image", datatype="UINT8", shape=(BATCH, 28, 28, 1)),),
        outputs=(
            TensorSpec(name="label", datatype="INT64", shape=(BATCH,), labels=tuple(range(10))),
            TensorSpec(name="probabilities", datatype="FP32", shape=(BATCH, 10), labels=tuple(range(10))),
        ),
    )
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    constants = {
        "scale": np.array(1 / 255, dtype=np.float32),
        "w": rng.normal(scale=0.1, size=(784, 10)).astype(np.float32),
    }
    rows = {"image": rng.integers(0, 256, size=(5, 28, 28, 1), dtype=np.uint8)}
    return SmallModel("images", model(nodes, signature, constants).SerializeToString(), signature, rows)


def patient() -> SmallModel:
    """As many matrix products as the row says: an inference as long as a test needs it."""
    signature = Signature(
        inputs=(TensorSpec(name="n_steps", datatype="INT64", shape=(BATCH,)),),
        outputs=(TensorSpec(name="value", datatype="FP32", shape=(256, 256)),),
    )
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "identity"], ["next"]),
            helper.make_node("Identity", ["condition"], ["go_on"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [256, 256]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["n_steps"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "", "identity"], ["value"], body=body),
    ]
    constants = {"identity": np.eye(256, dtype=np.float32)}
    rows = {"n_steps": np.array([3], dtype=np.int64)}
    return SmallModel("patient", model(nodes, signature, constants).SerializeToString(), signature, rows)


MAKERS: dict[str, Callable[[], SmallModel]] = {
    "tabular": tabular,
    "flights": flights,
    "images": images,
    "patient": patient,
}


@pytest.fixture(scope="session")
def small_models() -> dict[str, SmallModel]:
    return {name: make() for name, make in MAKERS.items()}


class Publish(Protocol):
    """Writes a bundle and publishes it in a store; returns its version."""

    def __call__(self, store: Path, small: SmallModel, name: str | None = None, *, broken: bool = False) -> int: ...


@pytest.fixture(scope="session")
def publish(tmp_path_factory: pytest.TempPathFactory) -> Publish:
    def published(store: Path, small: SmallModel, name: str | None = None, *, broken: bool = False) -> int:
        content = small.content(name)
        if broken:  # its golden cases expect other answers than any machine computes
            outputs = {
                key: array + 1 if array.dtype.kind == "f" else array for key, array in content.cases.outputs.items()
            }
            content = replace(content, cases=CaseSet(content.cases.inputs, outputs))
        path = tmp_path_factory.mktemp("bundles") / "bundle"
        write_bundle(path, content)
        return open_store(store).publish(path)

    return published


@dataclass
class RunningServer:
    """A server process, ready."""

    process: "subprocess.Popen[str]"
    url: str
    models: list[dict[str, Any]]
    log: Path
    """What it wrote to stderr."""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serving(store: Path, log: Path, *options: str) -> Iterator[RunningServer]:
    """Serve `store` until the block ends."""
    command = [sys.executable, "-m", "modelyard", "serve", str(store), "--port", "0", "--json", *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}: {log.read_text()}"
        ready = json.loads(line)
        yield RunningServer(process, ready["url"], ready["models"], log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


Serving = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path) -> Serving:
    """`with serve(store, *options) as server`: a server of the test's own."""

    def served(store: Path, *options: str) -> Any:
        return serving(store, tmp_path / "server.log", *options)

    return served


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, publish: Publish, small_models: dict[str, SmallModel]) -> Path:
    """A store with every small model."""
    path = tmp_path_factory.mktemp("store")
    for small in small_models.values():
        publish(path, small)
    return path


@pytest.fixture(scope="session")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server of all small models, for tests that leave it as it is."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serving(store, log, "--max-body-bytes", "200000") as running:
        yield running
        assert running.process.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
