"""Our server with an engine that sleeps: it takes l(b) = 5 + 0.25 b ms for b rows, costs no CPU, and answers what it was asked.

    python -m serve.synthetic_server --store STORE --port 8000 --target 0.02 --instances 8

Everything but the engine is what `modelyard serve` runs, sockets and processes included.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelyard.bundle.format import Bundle
from modelyard.bundle.store import LocalStore
from modelyard.inference.runtime import Engine
from modelyard.inference.serve.models.loading import ModelSettings, Turns, load
from modelyard.inference.serve.models.repository import Repository, choose
from modelyard.inference.serve.processes.seat import Seat
from modelyard.inference.serve.processes.server import ServerSettings, bind, serve
from modelyard.inference.serve.processes.supervisor import SupervisorSettings
from modelyard.inference.serve.processes.worker import Models, run_worker

from .workloads import SLEEP


class SleepingEngine:
    """Sleeps, then returns its input; the time does not depend on who else runs."""

    name = "sleep 1"

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        x = inputs[SLEEP.input]
        time.sleep((5 + 0.25 * len(x)) * 1e-3)
        return {SLEEP.output: x}

    def close(self) -> None:
        """There is nothing to give back."""


def sleeping(bundle: Bundle, *, n_threads: int = 1, check: bool = True) -> Engine:
    """Return the engine of any bundle, as `open_engine` would."""
    return SleepingEngine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--instances", type=int, required=True)
    options = parser.parse_args()
    store = LocalStore(options.store)
    bound = {"http": bind("127.0.0.1", options.port)}
    settings = ServerSettings(processes=SupervisorSettings(n_workers=1))
    model = ModelSettings(target_s=options.target, n_instances=options.instances, n_threads=1)
    load_one = partial(load, store, settings=model, make_engine=sleeping)

    models = Models(partial(Repository, choose(store)), load_one, lambda loaded: loaded.name, Turns())

    def worker(seat: Seat) -> int:
        return run_worker(seat, settings, models)

    said = partial(print, file=sys.stderr)
    return serve(bound, settings, worker, on_ready=lambda reports: said("ready"), on_event=said)


if __name__ == "__main__":
    sys.exit(main())
