"""Writes the benchmark's models and the rows they are asked.

tiny    30 floats → 64 → 64 → 2, softmax: a tabular classifier, 7 microseconds a row
mid     3 × 64 × 64 → a small residual network → 10: an image classifier, 3.4 ms a row
large   64 floats → 5,000 → 5,000 → 2: 100 MB of weights, to be loaded while another model serves
small   8 floats → 8 → 2: one of the two hundred that share a server
    sleep   1 float → the same: the bundle behind an engine that sleeps, see synthetic_server.py
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .places import MODELS
from .workloads import MID, SLEEP, SMALL, TINY, Model

N_VECTORS = 64


class Graph:
    """Collects nodes and random weights, then becomes a file."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def weight(self, array: NDArray[Any]) -> str:
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def dense(self, x: str, n_in: int, n_out: int) -> str:
        weights = self._rng.normal(0, (2 / n_in) ** 0.5, (n_in, n_out))
        return self.op("Gemm", x, self.weight(weights), self.weight(self._rng.normal(0, 0.1, n_out)))

    def conv(self, x: str, n_in: int, n_out: int, kernel: int = 3, stride: int = 1) -> str:
        weights = self._rng.normal(0, (2 / (n_in * kernel**2)) ** 0.5, (n_out, n_in, kernel, kernel))
        bias = self.weight(self._rng.normal(0, 0.05, n_out))
        window: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        return self.op("Conv", x, self.weight(weights), bias, **window)

    def save(self, path: Path, x: tuple[str, tuple[int, ...]], y: tuple[str, tuple[int, ...]]) -> None:
        """Write the graph; `x` and `y` are names and shapes without the batch axis."""
        inputs, outputs = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])] for name, shape in (x, y)
        )
        graph = helper.make_graph(self._nodes, path.stem, inputs, outputs, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)


def perceptron(path: Path, widths: tuple[int, ...], seed: int) -> None:
    """Write a multi-layer perceptron with softmax at its end, `features` in and `probs` out."""
    graph = Graph(np.random.default_rng(seed))
    x = "features"
    for n_in, n_out in pairwise(widths[:-1]):
        x = graph.op("Relu", graph.dense(x, n_in, n_out))
    graph.op("Softmax", graph.dense(x, *widths[-2:]), out="probs", axis=1)
    graph.save(path, ("features", widths[:1]), ("probs", widths[-1:]))


def residual_network(path: Path, seed: int) -> None:
    graph = Graph(np.random.default_rng(seed))
    x, width = graph.op("Relu", graph.conv("image", 3, 40, stride=2)), 40
    for stage, channels in enumerate((40, 80, 160)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            same = stride == 1 and width == channels
            skip = x if same else graph.conv(x, width, channels, kernel=1, stride=stride)
            x = graph.op("Relu", graph.conv(x, width, channels, stride=stride))
            x = graph.op("Add", graph.conv(x, channels, channels), skip)
            x = graph.op("Relu", graph.op("Mul", x, graph.weight(np.array([0.6]))))
            width = channels
    pooled = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    graph.op("Softmax", graph.dense(pooled, width, MID.width), out="probs", axis=1)
    graph.save(path, (MID.input, MID.shape), (MID.output, (MID.width,)))


def write_vectors(model: Model, seed: int, decimals: int) -> None:
    """Write distinct rows, rounded so that JSON carries them without loss, and in-process onnxruntime's answers."""
    x = np.random.default_rng(seed).normal(size=(N_VECTORS, *model.shape)).astype(np.float32).round(decimals)
    session = ort.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    y = np.concatenate([session.run(None, {model.input: x[i : i + 1]})[0] for i in range(N_VECTORS)])
    np.savez(model.vectors, x=x, y=y)


def make() -> None:
    """Write the models that are served and their rows, where they are not there yet."""
    if not TINY.vectors.exists():
        perceptron(TINY.path, (30, 64, 64, 2), seed=7)
        write_vectors(TINY, seed=8, decimals=4)
    if not MID.vectors.exists():
        residual_network(MID.path, seed=7)
        write_vectors(MID, seed=8, decimals=3)
    if not SMALL.vectors.exists():
        perceptron(SMALL.path, (8, 8, 2), seed=10)
        write_vectors(SMALL, seed=8, decimals=4)
    if not SLEEP.vectors.exists():
        graph = Graph(np.random.default_rng(11))
        graph.op("Identity", SLEEP.input, out=SLEEP.output)
        graph.save(SLEEP.path, (SLEEP.input, SLEEP.shape), (SLEEP.output, SLEEP.shape))
        x = np.arange(N_VECTORS, dtype=np.float32)[:, None]
        np.savez(SLEEP.vectors, x=x, y=x)


def large() -> Path:
    path = MODELS / "large.onnx"
    if not path.exists():
        perceptron(path, (64, 5000, 4900, 2), seed=9)
    return path
