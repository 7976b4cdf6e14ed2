"""LitServe: its batching, CPU workers, its ZMQ queue. It takes no raw bytes, hence base64 in JSON."""

import os
from typing import Any

import litserve  # type: ignore[import-not-found, unused-ignore]  # in its own environment
import numpy as np
from numpy.typing import NDArray

from serve.apps.common import MAX_BATCH, PORT, WAIT_MS, WORKERS, Runner, row, row_from_b64


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """One worker."""

    def setup(self, device: str) -> None:
        self.runner = Runner()

    def decode_request(self, request: dict[str, Any]) -> NDArray[Any]:
        return row(request["inputs"]) if "inputs" in request else row_from_b64(request["b64"])

    def batch(self, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        return np.stack(inputs)

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        return self.runner(x)

    def unbatch(self, output: NDArray[Any]) -> list[NDArray[Any]]:
        return list(output)

    def encode_response(self, output: NDArray[Any]) -> dict[str, Any]:
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=WAIT_MS / 1e3)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=int(os.environ["API_SERVERS"]),
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
