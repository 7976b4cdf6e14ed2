"""One model behind the front and its protocols, in this process and without a socket: for what a test wants to look inside of."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from numpy.typing import NDArray

from modelyard.bundle.manifest import Signature
from modelyard.inference.serve.app import App
from modelyard.inference.serve.executor import Executor
from modelyard.inference.serve.front import Front
from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.metrics.vocabulary import REQUESTS
from modelyard.inference.serve.models.repository import Loaded, Pick, Repository
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols import monitoring, open_inference, tensorflow
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Policy, Scheduler
from modelyard.inference.serve.transport.messages import Head, Request, Response

Compute = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


class Computing:
    """An engine made of a function."""

    name = "computing 1"

    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(self._compute(inputs))

    def close(self) -> None:
        """Nothing to give back."""


class Asked(Request):
    """A request whose answer can be awaited."""

    __slots__ = ("answered", "n_replies")

    def __init__(self, head: Head, body: bytes, waited_s: float = 0.0) -> None:
        super().__init__(head, body, perf_counter() - waited_s)
        self.answered = asyncio.Event()
        self.n_replies = 0

    def reply(self, response: Response) -> None:
        super().reply(response)
        self.n_replies += 1
        self.answered.set()


@dataclass
class Serving:
    """What a test may ask and look at."""

    loaded: Loaded
    app: App
    front: Front
    metrics: ServerMetrics
    waited_s: float = 0.0
    """How long requests have been here already when they are read."""

    def ask(self, path: str, body: bytes | Any, method: str = "POST", **headers: str) -> Asked:
        """Ask; the answer comes when the loop turns. Names of headers with "_" for "-"."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
        asked = Asked(Head(method, path, headers=named), raw, self.waited_s)
        self.app(asked)
        return asked

    async def answer(self, path: str, body: bytes | Any = b"", method: str = "POST", **headers: str) -> Response:
        asked = self.ask(path, body, method, **headers)
        await asyncio.wait_for(asked.answered.wait(), 60)
        assert asked.n_replies == 1
        assert asked.response is not None
        return asked.response

    def counted(self) -> dict[tuple[str, ...], float]:
        """Return how many requests ended how: (model, version, protocol, outcome, cause) → number."""
        series = self.metrics.snapshot().get(REQUESTS, {})
        return {labels: value for labels, value in series.items() if isinstance(value, float) and value}


@asynccontextmanager
async def serving(
    signature: Signature,
    compute: Compute,
    *,
    on_thread: bool = False,
    target_s: float = 30.0,
    **settings: Any,
) -> AsyncIterator[Serving]:
    """Serve version 1 of the model "m"; `settings` are those of `Loaded`."""
    scheduler = Scheduler(
        Policy(target_s=target_s, max_batch_size=8), LatencyModel(8, guess_row_s=1e-6), perf_counter()
    )
    executor = Executor(
        Computing(compute),
        Packer(signature),
        scheduler,
        name="m version 1",
        max_batch_size=8,
        inline_below_s=0.0 if on_thread else 1e9,
    )
    metrics = ServerMetrics(new_slabs())
    executor.metrics = metrics.model("m", 1)
    loaded = Loaded("m", 1, signature, executor, target_s, {}, 0.0, **settings)
    repository = Repository([Pick("m", 1)])
    with ThreadPoolExecutor(1) as pool:
        await repository.load_all(lambda pick: loaded, pool, lambda entry: None)
    front = Front(repository, metrics)
    routes = [
        *tensorflow.routes(front, repository),
        *open_inference.routes(front, repository),
        *monitoring.routes(metrics),
    ]
    yield Serving(loaded, App(routes), front, metrics)
    repository.close()
