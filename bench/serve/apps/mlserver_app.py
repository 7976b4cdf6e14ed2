"""MLServer: a custom runtime, and the two files of settings that it starts from, written to FOLDER."""

import json
import os
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel  # type: ignore[import-not-found, unused-ignore]  # in its own environment
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found, unused-ignore]  # as above
from mlserver.types import (  # type: ignore[import-not-found, unused-ignore]  # as above
    InferenceRequest,
    InferenceResponse,
)

from serve.apps.common import GRPC_PORT, MAX_BATCH, MODEL, PORT, WAIT_MS, WORKERS, Runner, row_from_b64


class OnnxModel(MLModel):  # type: ignore[misc, unused-ignore]
    """The model in each worker."""

    async def load(self) -> bool:
        self.runner = Runner()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (tensor,) = payload.inputs
        if tensor.datatype == "BYTES":
            batch = np.stack([row_from_b64(text) for text in StringCodec.decode_input(tensor)])
        else:
            batch = NumpyCodec.decode_input(tensor).astype(np.float32, copy=False).reshape(-1, *MODEL.shape)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output(MODEL.output, self.runner(batch))]
        )


if __name__ == "__main__":
    folder = Path(os.environ["FOLDER"])
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": PORT,
        "grpc_port": GRPC_PORT,
        "metrics_endpoint": None,
        "parallel_workers": WORKERS,
        "gzip_enabled": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    model_settings = {
        "name": MODEL.name,
        "implementation": "serve.apps.mlserver_app.OnnxModel",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": WAIT_MS / 1e3,
    }
    (folder / "model-settings.json").write_text(json.dumps(model_settings))
    program = str(Path(sys.executable).with_name("mlserver"))
    os.execv(program, [program, "start", str(folder)])
