"""What an engine is, and the one place where a bundle becomes one."""

import threading
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.cases import check_cases
from modelyard.bundle.format import Bundle
from modelyard.errors import GoldenCaseFailed

Arrays = Mapping[str, NDArray[Any]]

GOLDEN_CASES_TIMEOUT_S = 60.0
"""For all golden cases of a bundle, at most 32 rows; a graph that takes longer may well loop for ever."""


class Engine(Protocol):
    """Computes a graph's outputs from its inputs.

    `run` is safe to call from several threads at once; `close` is called once, by the owner, after the last run.

    An engine may also have `interrupt()`, called from another thread: it ends the runs in progress with a RequestError, and the
    engine answers no more. Golden cases have a time limit on engines that have it.
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

    def interrupt(self) -> None:
        if isinstance(self._engine, _Interruptible):
            self._engine.interrupt()

    def close(self) -> None:
        self._engine.close()


@runtime_checkable
class _Interruptible(Protocol):
    def interrupt(self) -> None: ...


def open_engine(
    bundle: Bundle, *, n_threads: int = 1, check: bool = True, timeout_s: float = GOLDEN_CASES_TIMEOUT_S
) -> Engine:
    """Return an engine that has passed the bundle's golden cases.

    Args:
        n_threads: threads one run may use; 0 lets the engine take every core.
        check: False skips the golden cases, for a caller that has just computed them.
        timeout_s: for all golden cases together.

    Raises:
        GoldenCaseFailed: this machine computes other answers, or none in time.
        BundleError: the engine refuses the graph.
    """
    from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine

    engine: Engine = OnnxRuntimeEngine(bundle.model_path, n_threads=n_threads)
    if not bundle.manifest.rows_independent:
        engine = RowByRow(engine)
    if check:
        try:
            _check(bundle, engine, timeout_s)
        except BaseException:
            engine.close()
            raise
    return engine


def _check(bundle: Bundle, engine: Engine, timeout_s: float) -> None:
    """Run the golden cases, and end the run from a second thread when the time is over."""
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        if isinstance(engine, _Interruptible):
            engine.interrupt()

    timer = threading.Timer(timeout_s, interrupt)
    timer.daemon = True
    timer.start()
    try:
        check_cases(bundle.cases(), bundle.manifest.cases, bundle.signature, engine.run, source=str(bundle.path))
    except GoldenCaseFailed as exc:
        if not late.is_set():
            raise
        raise GoldenCaseFailed(
            f"{bundle.path}: the golden cases were not answered within {timeout_s:g} s, which is the limit; the graph may loop for "
            "ever: do not serve this bundle here, or use a faster machine",
            timeout_s=timeout_s,
        ) from exc
    finally:
        timer.cancel()
