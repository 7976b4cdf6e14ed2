"""What an engine is, and the one place where a bundle becomes one."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import check_cases
from modelyard.bundle.format import Bundle

Arrays = Mapping[str, NDArray[Any]]


class Engine(Protocol):
    """Computes a graph's outputs from its inputs.

    `run` is safe to call from several threads at once; `close` is called once, by the owner, after the last run.
    """

    name: str
    """Library and version, e.g. "onnxruntime 1.32.0"; part of the hardware fingerprint of a profile."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Return every output by name for named inputs of n rows. BYTES are object arrays of str."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class RowByRow:
    """Runs an engine one row at a time: for graphs whose answers depend on their batch mates."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        n_rows = max((len(array) for array in inputs.values() if array.ndim), default=1)
        if n_rows <= 1:
            return self._engine.run(inputs)
        answers = [self._engine.run({name: array[i : i + 1] for name, array in inputs.items()}) for i in range(n_rows)]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def close(self) -> None:
        self._engine.close()


def open_engine(bundle: Bundle, *, n_threads: int = 1, check: bool = True) -> Engine:
    """Return an engine that has passed the bundle's golden cases.

    Args:
        n_threads: threads one run may use; 0 lets the engine take every core.
        check: False skips the golden cases, for a caller that has just computed them.

    Raises:
        GoldenCaseFailed: this machine computes other answers.
        BundleError: the engine refuses the graph.
    """
    from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine

    engine: Engine = OnnxRuntimeEngine(bundle.model_path, n_threads=n_threads)
    if not bundle.manifest.rows_independent:
        engine = RowByRow(engine)
    if check:
        check_cases(bundle.cases(), bundle.manifest.cases, bundle.signature, engine.run, source=str(bundle.path))
    return engine
