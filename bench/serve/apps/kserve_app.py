"""KServe's Python model server over the Open Inference Protocol. It has no batcher of its own."""

from typing import Any

import numpy as np
from kserve import (  # type: ignore[import-not-found, import-untyped, unused-ignore]  # in its own environment
    InferOutput,
    InferRequest,
    InferResponse,
    Model,
    ModelServer,
)

from serve.apps.common import GRPC_PORT, MODEL, PORT, WORKERS, Runner


class OnnxModel(Model):  # type: ignore[misc, unused-ignore]
    """The model in each worker."""

    def __init__(self) -> None:
        super().__init__(MODEL.name)
        self.load()

    def load(self) -> bool:
        self.runner = Runner()
        self.ready = True
        return True

    def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        y = self.runner(np.ascontiguousarray(payload.inputs[0].as_numpy(), np.float32).reshape(-1, *MODEL.shape))
        output = InferOutput(name=MODEL.output, shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=False)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    ModelServer(http_port=PORT, grpc_port=GRPC_PORT, workers=WORKERS, enable_latency_logging=False).start([OnnxModel()])
