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

_FATAL_ONLY = 4


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
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's exceptions share no base but Exception
            where = "the graph" if isinstance(model, bytes) else str(model)
            raise MalformedGraph(f"{where}: onnxruntime {ort.__version__} refuses it: {exc}") from exc
        self.name = f"onnxruntime {ort.__version__}"
        self._run_options = ort.RunOptions()  # one for all runs; they only read it
        self._run_options.log_severity_level = _FATAL_ONLY
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        try:
            answers = self._session.run(self._outputs, dict(inputs), self._run_options)
        except Exception as exc:  # as above
            raise RequestError(f"onnxruntime could not compute this input: {exc}") from exc
        return dict(zip(self._outputs, answers, strict=True))

    def interrupt(self) -> None:
        """End the runs in progress, also within a loop of the graph, and all later ones, with a RequestError."""
        self._run_options.terminate = True

    def close(self) -> None:
        del self._session
