"""What counting costs: our metrics in shared memory beside prometheus_client, in one process and in its multiprocess mode.

Bars: what a request and its batch of one record takes under 2 us; a scrape of 200 models and two workers under 100 ms.
prometheus_client reads its mode from the environment when imported, so each mode runs in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable

from machine import bar, heading

from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.metrics.vocabulary import QUEUE_SECONDS, SECONDS

N_RUNS = 100_000
N_MODELS = 200


def ns(work: Callable[[], object], n_runs: int = N_RUNS) -> float:
    """Return nanoseconds per run, the best of five, without what an empty call takes."""
    empty_s, work_s = (min(timeit.repeat(one, number=n_runs, repeat=5)) for one in (lambda: None, work))
    return (work_s - empty_s) / n_runs * 1e9


def theirs() -> dict[str, float]:
    import prometheus_client

    counter = prometheus_client.Counter("seen", "Seen.", ["model"]).labels("late")
    histogram = prometheus_client.Histogram("took_seconds", "Took.", ["model"], buckets=SECONDS).labels("late")
    return {"count": ns(counter.inc), "observe": ns(lambda: histogram.observe(0.003))}


def theirs_in_a_process_of_their_own(*, multiprocess: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({"PROMETHEUS_MULTIPROC_DIR": folder} if multiprocess else {})
        done = subprocess.run(
            [sys.executable, __file__, "theirs"], env=environment, capture_output=True, text=True, check=True
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def scrape_ms() -> float:
    """Return the milliseconds that a page for `N_MODELS` models, each in three protocols and two workers, takes."""
    slabs = new_slabs(2)
    workers = [ServerMetrics(slabs, worker) for worker in range(2)]
    for worker in workers:
        for number in range(N_MODELS):
            model = worker.model(f"model-{number}", 1)
            for protocol in ("rest-v1", "rest-v2", "grpc"):
                model.answered(protocol, 0.003, 0.001)
            model.batch(3, 3, 0.001, "instance free")
            model.compute("", 0.001)
            model.loaded(0.1, 1e6)
    return ns(workers[0].exposition, 5) / 1e6


def main() -> int:
    heading("what counting costs", "prometheus_client")
    metrics = ServerMetrics(new_slabs())
    late = metrics.model("late", 3)
    count_ns = ns(metrics.received_bytes("http").add)
    histogram = metrics.registry.histogram(QUEUE_SECONDS, "late", "3")
    observe_ns = ns(lambda: histogram.observe(0.003))
    print(f"  ours in shared memory: count {count_ns:.0f} ns, observe {observe_ns:.0f} ns")
    for title, multiprocess in (("in one process", False), ("in multiprocess mode", True)):
        found = theirs_in_a_process_of_their_own(multiprocess=multiprocess)
        print(f"  prometheus_client {title}: count {found['count']:.0f} ns, observe {found['observe']:.0f} ns")
    answered_ns = ns(lambda: late.answered("rest-v2", 0.003, 0.001))
    batch_ns = ns(lambda: late.batch(1, 1, 0.001, "instance free"))
    compute_ns = ns(lambda: late.compute("", 0.001))
    total_us = (answered_ns + batch_ns + compute_ns) / 1e3
    met = bar(
        f"a request {answered_ns:.0f} ns, its batch {batch_ns:.0f} ns, its cost {compute_ns:.0f} ns: {total_us:.2f} us; under 2",
        total_us < 2,
    )
    took_ms = scrape_ms()
    met &= bar(f"a scrape of {N_MODELS} models, two workers: {took_ms:.0f} ms; under 100", took_ms < 100)
    return 0 if met else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["theirs"]:
        sys.stdout.write(json.dumps(theirs()))
    else:
        sys.exit(main())
