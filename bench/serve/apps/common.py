"""What every server under test shares: one onnxruntime session, and the plain body formats.

Settings come as environment variables: MODEL, MODEL_PATH, PORT, GRPC_PORT, WORKERS, THREADS (0: onnxruntime's default, every
core), MAX_BATCH, WAIT_MS. FOLDER is free for a server's own files.
"""

import base64
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serve.workloads import MID, TINY

MODEL = {"tiny": TINY, "mid": MID}[os.environ["MODEL"]]
PORT = int(os.environ["PORT"])
GRPC_PORT = int(os.environ["GRPC_PORT"])
WORKERS = int(os.environ.get("WORKERS", "1"))
THREADS = int(os.environ.get("THREADS", "1"))
MAX_BATCH = int(os.environ.get("MAX_BATCH", "32"))
WAIT_MS = float(os.environ.get("WAIT_MS", "1"))


class Runner:
    """A batch in, a batch out."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        if THREADS:
            options.intra_op_num_threads = THREADS
            options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL_PATH"], options, providers=["CPUExecutionProvider"])

    def __reduce__(self) -> tuple[type["Runner"], tuple[()]]:
        return Runner, ()  # a spawned worker gets a session of its own, which cannot be pickled

    def __call__(self, batch: NDArray[Any]) -> NDArray[Any]:
        answer: NDArray[Any] = self.session.run([MODEL.output], {MODEL.input: batch})[0]
        return answer


def row(values: Sequence[float]) -> NDArray[Any]:
    """Return one row of the model from a flat list."""
    return np.asarray(values, np.float32).reshape(MODEL.shape)


def row_from_bytes(data: bytes) -> NDArray[Any]:
    return np.frombuffer(data, np.float32).reshape(MODEL.shape)


def row_from_b64(text: str) -> NDArray[Any]:
    return row_from_bytes(base64.b64decode(text))
