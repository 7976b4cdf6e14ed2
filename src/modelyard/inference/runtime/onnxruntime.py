"""The default engine: onnxruntime on the CPU."""

import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelyard.errors import MalformedGraph, RequestError
from modelyard.inference.runtime._base import Arrays

# onnxruntime's builds carry telemetry that starts a thread at import: nothing is to leave the machine unasked, and a process
# that is to fork must have no threads. Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from modelyard.inference.runtime.bfloat16 import Bfloat16Session

_FATAL_ONLY = 4
_MEMORY_IS_SHORT = ("Failed to allocate memory", "std::bad_alloc")


class OnnxRuntimeEngine:
    """One session on the CPU. The interpreter lock is released while it computes; any thread may call `run`."""

    def __init__(self, model: Path | bytes, *, n_threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY  # errors come as exceptions; stderr stays ours
        # Threads that spin while idle take the cores that requests and other models need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = model if isinstance(model, bytes) else str(model)
        where = "the graph" if isinstance(model, bytes) else str(model)
        try:
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            self._session = Bfloat16Session(session) if Bfloat16Session.wanted(session) else session
        except Exception as exc:  # onnxruntime's exceptions share no base but Exception
            if _is_of_memory(exc):
                raise MemoryError(f"{where}: too little memory to load it: {exc}") from exc
            raise MalformedGraph(f"{where}: onnxruntime {ort.__version__} refuses it: {exc}") from exc
        self.name = f"onnxruntime {ort.__version__}"
        self._run_options = ort.RunOptions()  # one for all runs; they only read it
        self._run_options.log_severity_level = _FATAL_ONLY
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        try:
            answers = self._session.run(self._outputs, dict(inputs), self._run_options)
        except Exception as exc:  # as above
            if _is_of_memory(exc):
                raise MemoryError(f"too little memory to compute this input: {exc}") from exc
            raise RequestError(f"onnxruntime could not compute this input: {exc}") from exc
        return dict(zip(self._outputs, answers, strict=True))

    def interrupt(self) -> None:
        """End the runs in progress, also within a loop of the graph, and all later ones, with a RequestError."""
        self._run_options.terminate = True

    def close(self) -> None:
        del self._session


def _is_of_memory(exc: Exception) -> bool:
    """Whether it is this machine that fails, and not the graph or the data; onnxruntime has no class of its own for that."""
    return isinstance(exc, MemoryError) or any(text in str(exc) for text in _MEMORY_IS_SHORT)
