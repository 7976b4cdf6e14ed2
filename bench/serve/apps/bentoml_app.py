"""BentoML: a service with adaptive batching, or without it where BATCHABLE is 0."""

import os
from typing import Any

import bentoml  # type: ignore[import-not-found, unused-ignore]  # in its own environment
import numpy as np

from serve.apps.common import MAX_BATCH, MODEL, WORKERS, Runner, row_from_b64

BATCHING: dict[str, Any] = (
    {"batchable": True, "max_batch_size": MAX_BATCH, "max_latency_ms": 1000} if os.environ["BATCHABLE"] == "1" else {}
)


@bentoml.service(  # type: ignore[untyped-decorator, unused-ignore]
    workers=WORKERS,
    traffic={"timeout": 30, "max_concurrency": 1024},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Service:
    """One worker."""

    def __init__(self) -> None:
        self.runner = Runner()

    @bentoml.api(**BATCHING)  # type: ignore[untyped-decorator, unused-ignore]
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return self.runner(np.ascontiguousarray(inputs, np.float32).reshape(-1, *MODEL.shape))

    @bentoml.api(**BATCHING)  # type: ignore[untyped-decorator, unused-ignore]
    def b64(self, inputs: list[str]) -> np.ndarray:
        return self.runner(np.stack([row_from_b64(text) for text in inputs]))
