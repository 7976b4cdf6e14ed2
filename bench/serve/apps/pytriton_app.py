"""PyTriton: Triton's front-end and dynamic batcher, Python callables behind its own proxy."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch  # type: ignore[import-not-found, unused-ignore]  # in its own environment
from pytriton.model_config import (  # type: ignore[import-not-found, unused-ignore]  # as above
    DynamicBatcher,
    ModelConfig,
    Tensor,
)
from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found, unused-ignore]  # as above

from serve.apps.common import GRPC_PORT, MAX_BATCH, MODEL, PORT, WAIT_MS, WORKERS, Runner


def instance() -> Callable[..., Any]:
    runner = Runner()

    def infer(**inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {MODEL.output: runner(inputs[MODEL.input])}

    decorated: Callable[..., Any] = batch(infer)
    return decorated


if __name__ == "__main__":
    addresses = {"http_address": "127.0.0.1", "grpc_address": "127.0.0.1"}
    config = TritonConfig(http_port=PORT, grpc_port=GRPC_PORT, allow_metrics=False, **addresses)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=MODEL.name,
            infer_func=[instance() for _ in range(WORKERS)],
            inputs=[Tensor(name=MODEL.input, dtype=np.float32, shape=MODEL.shape)],
            outputs=[Tensor(name=MODEL.output, dtype=np.float32, shape=(MODEL.width,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(WAIT_MS * 1000)),
            ),
        )
        triton.serve()
