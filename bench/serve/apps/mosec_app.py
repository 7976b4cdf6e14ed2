"""Mosec: a Rust front-end, Python workers with dynamic batching. Takes a JSON object or raw bytes."""

from typing import Any

import numpy as np
import orjson
from mosec import Server, Worker  # type: ignore[import-not-found, unused-ignore]  # in its own environment
from numpy.typing import NDArray

from serve.apps.common import MAX_BATCH, WAIT_MS, WORKERS, Runner, row, row_from_bytes


class Model(Worker):  # type: ignore[misc, unused-ignore]
    """One worker process."""

    def __init__(self) -> None:
        self.runner = Runner()

    def deserialize(self, data: bytes) -> NDArray[Any]:
        is_json = data[:1] == b"{" and data[-1:] == b"}"
        return row(orjson.loads(data)["inputs"]) if is_json else row_from_bytes(data)

    def forward(self, data: Any) -> Any:
        return list(self.runner(np.stack(data))) if MAX_BATCH > 1 else self.runner(data[None])[0]

    def serialize(self, data: NDArray[Any]) -> bytes:
        return orjson.dumps({"outputs": data}, option=orjson.OPT_SERIALIZE_NUMPY)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=int(WAIT_MS))
    server.run()
