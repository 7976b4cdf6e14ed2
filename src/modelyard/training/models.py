"""What can be trained: built-in networks, boosted trees, a linear model, or an estimator of the user's own.

A pipeline is a trained model with its preprocessing: it answers named inputs, and it can be drawn into an ONNX graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from msgspec import Meta, field
from numpy.typing import NDArray

from modelyard.bundle.cases import Arrays
from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import ConfigError
from modelyard.metrics import Answers
from modelyard.schema import Frozen
from modelyard.training.onnx_graph import GraphBuilder
from modelyard.training.preprocess import Preprocessor

if TYPE_CHECKING:
    import pandas
    import torch

PREDICT_ROWS = 8192
"""Rows a pipeline answers at once, so that memory stays flat."""


Task = Literal["classification", "regression"]


class ModelConfig(Frozen, frozen=True):
    """[model] in yard.toml."""

    kind: Literal["network", "lightgbm", "linear", "sklearn", "torch"] = "network"
    """A built-in network, boosted trees, a linear model, or what `callable` returns: an estimator or a module."""
    hidden: tuple[Annotated[int, Meta(ge=1)], ...] = (128, 64)
    """Layers of the network for tables."""
    channels: tuple[Annotated[int, Meta(ge=1)], ...] = (32, 64, 128)
    """Stages of the network for images; each halves the picture."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    parameters: dict[str, Any] = field(default_factory=dict)
    """Passed to LightGBM as they are."""
    callable: str | None = None
    """For sklearn: "module:function", called without arguments, returns an unfitted estimator that is given a DataFrame.
    For torch: called with the shape of one row and the number of outputs, returns a module over batches of such rows."""

    def __post_init__(self) -> None:
        if (self.kind in ("sklearn", "torch")) != (self.callable is not None):
            raise ValueError('kind = "sklearn" or "torch" needs callable = "module:function", and no other kind has it')


class Pipeline(Protocol):
    """A trained model; `predict` may be called from one thread at a time."""

    @property
    def task(self) -> Task: ...

    @property
    def classes(self) -> tuple[str | int, ...]: ...

    def predict(self, inputs: Arrays) -> Answers:
        """Answer n rows: labels and scores (n, classes), or values (n,)."""
        ...

    def add_to(self, graph: GraphBuilder) -> str:
        """Draw the computation; return the name of scores (n, classes) that sum to 1, or of values (n, 1)."""
        ...


def answered(raw: NDArray[Any], classes: tuple[str | int, ...]) -> Answers:
    """Return scores with the label of the highest one, in float32 as in the graph; or values where there are no classes."""
    raw = raw.astype(np.float32)
    if not classes:
        return Answers(values=raw)
    return Answers(labels=class_array(classes)[raw.argmax(axis=1)], scores=raw, classes=classes)


def class_array(classes: tuple[str | int, ...]) -> NDArray[Any]:
    """Return the classes as int64 or as objects of str."""
    return np.array(classes, dtype=np.int64 if all(isinstance(name, int) for name in classes) else object)


def class_codes(labels: NDArray[Any], classes: tuple[str | int, ...]) -> NDArray[np.int64]:
    """Return the position of each label in `classes`."""
    codes: Mapping[str | int, int] = {name: code for code, name in enumerate(classes)}
    return np.fromiter((codes[label] for label in labels.tolist()), dtype=np.int64, count=len(labels))


def in_parts(inputs: Arrays) -> "list[Arrays]":
    """Cut named arrays into runs of at most `PREDICT_ROWS` rows."""
    n_rows = len(next(iter(inputs.values())))
    return [
        {name: array[start : start + PREDICT_ROWS] for name, array in inputs.items()}
        for start in range(0, n_rows, PREDICT_ROWS)
    ]


@dataclass(frozen=True)
class NetworkPipeline:
    """A torch module over the preprocessed matrix, or over the pixels of one image input."""

    module: "torch.nn.Module"
    preprocessor: Preprocessor | None
    """None: the module takes the input itself."""
    input_name: str
    example: NDArray[Any]
    """Two rows of what the module takes; tracing needs them."""
    task: Task
    classes: tuple[str | int, ...]

    def predict(self, inputs: Arrays) -> Answers:
        import torch

        self.module.eval()
        parts = []
        with torch.no_grad():
            for part in in_parts(inputs):
                x = part[self.input_name] if self.preprocessor is None else self.preprocessor.apply(part)
                out = self.module(torch.from_numpy(x))
                parts.append((out.softmax(1) if self.classes else out.reshape(-1)).numpy())
        return answered(np.concatenate(parts), self.classes)

    def add_to(self, graph: GraphBuilder) -> str:
        from modelyard.training.importers.torch import export_module

        source = self.input_name if self.preprocessor is None else self.preprocessor.add_to(graph)
        core = export_module(self.module, self.example)
        (out,) = graph.embed(core, {core.graph.input[0].name: source}).values()
        return graph.add("Softmax", out, axis=1) if self.classes else out


@dataclass(frozen=True)
class EstimatorPipeline:
    """A scikit-learn or LightGBM estimator over the preprocessed matrix; its classes are codes 0 to k-1."""

    estimator: Any
    preprocessor: Preprocessor
    n_features: int
    task: Task
    classes: tuple[str | int, ...]

    def predict(self, inputs: Arrays) -> Answers:
        matrices = (self.preprocessor.apply(part) for part in in_parts(inputs))
        return answered(np.concatenate([raw_answers(self.estimator, x) for x in matrices]), self.classes)

    def add_to(self, graph: GraphBuilder) -> str:
        from modelyard.training.importers.sklearn import convert_estimator

        core = convert_estimator(self.estimator, self.n_features)
        return embed_estimator(graph, core, {core.graph.input[0].name: self.preprocessor.add_to(graph)}, self.classes)


@dataclass(frozen=True)
class FramePipeline:
    """A scikit-learn estimator of the user's own that is given a DataFrame of the columns, preprocessing inside it."""

    estimator: Any
    specs: tuple[TensorSpec, ...]
    task: Task
    classes: tuple[str | int, ...]

    def predict(self, inputs: Arrays) -> Answers:
        parts = [raw_answers(self.estimator, to_frame(part, self.specs)) for part in in_parts(inputs)]
        return answered(np.concatenate(parts), self.classes)

    def add_to(self, graph: GraphBuilder) -> str:
        from modelyard.training.importers.sklearn import convert_frame_estimator

        core = convert_frame_estimator(self.estimator, self.specs)
        axis = graph.constant(np.array([1], dtype=np.int64))
        columns = {}
        for theirs, spec in zip(core.graph.input, self.specs, strict=True):  # the converter renames a column "label"
            column = spec.name if spec.datatype == "BYTES" else graph.add("Cast", spec.name, to=1)
            columns[theirs.name] = graph.add("Unsqueeze", column, axis)
        return embed_estimator(graph, core, columns, self.classes)


def raw_answers(estimator: Any, x: Any) -> NDArray[Any]:
    """Return scores (n, classes) of a classifier, values (n,) of a regressor."""
    answers = estimator.predict_proba(x) if hasattr(estimator, "classes_") else np.reshape(estimator.predict(x), -1)
    return np.asarray(answers)


def embed_estimator(graph: GraphBuilder, core: Any, inputs: Mapping[str, str], classes: tuple[str | int, ...]) -> str:
    """Embed a converted estimator; converters put the label first and the scores second, or the values alone."""
    return list(graph.embed(core, inputs).values())[1 if classes else 0]


def to_frame(inputs: Arrays, specs: tuple[TensorSpec, ...]) -> "pandas.DataFrame":
    """Return the columns as a DataFrame, text as objects; a tensor of several numbers a row is refused by name."""
    import pandas as pd

    for spec in specs:
        if len(spec.shape) != 1:
            raise ConfigError(f"input {spec.name!r} has {list(spec.shape)}: an estimator takes columns; use a network")
    columns = {spec.name: inputs[spec.name] for spec in specs}
    # Objects by name: some versions of pandas would make another datatype of text, which not every estimator takes.
    return pd.DataFrame({n: pd.Series(c, dtype=object) if c.dtype == object else c for n, c in columns.items()})
