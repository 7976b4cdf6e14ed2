"""Serve a version with the real server and ask it the held-out rows, as a plain HTTP client would."""

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from modelyard.cli.progress import Progress, duration
from modelyard.errors import ModelyardError, SkewDetected

if TYPE_CHECKING:
    from modelyard.bundle.format import Bundle
    from modelyard.training.data import Dataset

ROWS_PER_REQUEST = 100
SINGLE_REQUESTS = 500
START_WITHIN_S = 60.0


@dataclass(frozen=True)
class Served:
    """What a plain HTTP client saw. All requests were sent one after the other."""

    version: int
    n_rows: int
    """Held-out rows, each of them answered as the bundle answers it."""
    worst_difference: float
    n_single: int
    """Requests of one row, of which these are the quantiles."""
    p50_s: float
    p99_s: float
    rows_per_request: int
    rows_per_s: float
    """In requests of so many rows."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def serve_and_ask(
    store: str, name: str, version: int, bundle: "Bundle", dataset: "Dataset", progress: Progress
) -> Served:
    """Start `modelyard serve` on one version, ask it every held-out row, and stop it.

    Raises:
        ModelyardError: the server does not start in time, or refuses a row.
        SkewDetected: a served label differs, or a served number is off by more than 1e-5.
    """
    with _server(store, name, version) as url:
        return _ask(url, name, version, bundle, dataset, progress)


@contextlib.contextmanager
def _server(store: str, name: str, version: int) -> Iterator[str]:
    """Run `modelyard serve` as a process of its own, as anybody would; yield its URL."""
    model = f"{name}={version}"
    command = [sys.executable, "-m", "modelyard", "serve", store, "--model", model, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # asked for above
            readable, _, _ = select.select([process.stdout], [], [], START_WITHIN_S)
            if not readable:
                raise ModelyardError(
                    f"modelyard serve {store} was not ready within {START_WITHIN_S:.0f} s; try it by hand"
                )
            ready = process.stdout.readline()
            if not ready:
                _, complaint = process.communicate(timeout=START_WITHIN_S)
                raise ModelyardError(f"modelyard serve {store} did not start: {complaint.strip()}")
            yield json.loads(ready)["url"]
        finally:
            process.terminate()
            try:
                process.communicate(timeout=START_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _ask(url: str, name: str, version: int, bundle: "Bundle", dataset: "Dataset", progress: Progress) -> Served:
    import numpy as np

    from modelyard.compress.search import run_rows
    from modelyard.inference.rows import example_row, predictions
    from modelyard.inference.runtime import open_engine

    inputs = dataset.take(dataset.split.test)
    n_rows = len(dataset.split.test)
    engine = open_engine(bundle, check=False)
    expected = predictions(run_rows(engine, inputs), bundle.signature)
    engine.close()
    rows = [
        example_row({column: array[i : i + 1] for column, array in inputs.items()}, bundle.signature)
        for i in range(n_rows)
    ]
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname or "", address.port)
    worst = asking_s = 0.0
    started_s = time.perf_counter()
    for start in range(0, n_rows, ROWS_PER_REQUEST):
        body = json.dumps({"instances": rows[start : start + ROWS_PER_REQUEST]})
        before_s = time.perf_counter()
        answers = _post(connection, name, body)
        asking_s += time.perf_counter() - before_s
        worst = max(worst, *(_difference(answer, expected[i], i) for i, answer in enumerate(answers, start)))
        progress.detail(f"{start + len(answers):,} of {n_rows:,} rows answered alike")
    single_s = []
    for row in rows[:SINGLE_REQUESTS]:
        body = json.dumps({"instances": [row]})
        before_s = time.perf_counter()
        _post(connection, name, body)
        single_s.append(time.perf_counter() - before_s)
    connection.close()
    progress.detail(f"{n_rows:,} of {n_rows:,} rows answered alike in {duration(time.perf_counter() - started_s)}")
    p50_s, p99_s = np.quantile(single_s, [0.5, 0.99]).tolist()
    return Served(
        version=version,
        n_rows=n_rows,
        worst_difference=worst,
        n_single=len(single_s),
        p50_s=p50_s,
        p99_s=p99_s,
        rows_per_request=min(ROWS_PER_REQUEST, n_rows),
        rows_per_s=n_rows / asking_s,
    )


def _post(connection: HTTPConnection, name: str, body: str) -> list[Any]:
    connection.request("POST", f"/v1/models/{name}:predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        raise ModelyardError(f"the server answered {response.status} to a held-out row: {answer}")
    rows: list[Any] = answer["predictions"]
    return rows


def _difference(answer: Any, expected: Any, row: int) -> float:
    """Return the largest difference of two answers' numbers; raise where anything else differs."""
    if isinstance(expected, dict) and isinstance(answer, dict) and expected.keys() == answer.keys():
        return max(_difference(answer[key], value, row) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(answer, list) and len(expected) == len(answer):
        return max((_difference(*pair, row) for pair in zip(answer, expected, strict=True)), default=0.0)
    numbers = isinstance(expected, float) and isinstance(answer, float)
    if numbers and abs(answer - expected) <= 1e-5 * (1 + abs(expected)):
        return float(abs(answer - expected))
    if answer == expected:
        return 0.0
    raise SkewDetected(
        f"held-out row {row}: the server answers {answer}, the bundle {expected}; do not use this server", row=row
    )
