"""Ray Serve: a deployment with its batching, one replica for each core."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import ray  # type: ignore[import-not-found, unused-ignore]  # in its own environment
from numpy.typing import NDArray
from ray import serve  # type: ignore[import-not-found, unused-ignore]  # as above
from starlette.responses import Response  # type: ignore[import-not-found, unused-ignore]  # as above

from serve.apps.common import MAX_BATCH, PORT, WAIT_MS, WORKERS, Runner, row, row_from_bytes


@serve.deployment(  # type: ignore[untyped-decorator, unused-ignore]
    num_replicas=WORKERS, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5}
)
class Model:
    """One replica."""

    def __init__(self) -> None:
        self.runner = Runner()

    @serve.batch(  # type: ignore[untyped-decorator, unused-ignore]
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_MS / 1e3
    )
    async def predict(self, rows: list[NDArray[Any]]) -> list[NDArray[Any]]:
        return list(self.runner(np.stack(rows)))

    async def __call__(self, request: Any) -> Response:
        data = await request.body()
        x = row(orjson.loads(data)["inputs"]) if request.url.path == "/predict" else row_from_bytes(data)
        y = await self.predict(x)
        body = orjson.dumps({"outputs": y}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")


if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="warning",
        object_store_memory=200 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"enable_access_log": False})
    model: Any = Model
    serve.run(model.bind(), route_prefix="/")
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
