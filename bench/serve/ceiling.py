"""What onnxruntime does without any server: one process on each core, each running the model on one thread."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

import numpy as np
import onnxruntime as ort

from .generators import Cores, Patience
from .processes import machine_cpu_s
from .workloads import Model


@dataclass(frozen=True)
class Ceiling:
    """Rows per second of all processes together."""

    n_processes: int
    rate_per_s: float
    cores: Cores


def ceiling(model: Model, seconds: float, patience: Patience) -> Ceiling:
    """Measure `model`, one row at a time, on every core at once; again where something else disturbs it."""
    while True:
        found = _once(model, seconds)
        if patience.tried(found.cores, seconds):
            return found


def _once(model: Model, seconds: float) -> Ceiling:
    context = multiprocessing.get_context("spawn")
    cpus = sorted(os.sched_getaffinity(0))
    start, found = context.Barrier(len(cpus) + 1), context.Queue()
    processes = [context.Process(target=_run, args=(model, cpu, seconds, start, found)) for cpu in cpus]
    for process in processes:
        process.start()
    start.wait(timeout=60)
    machine_s, before_s = machine_cpu_s(), time.perf_counter()
    results = [found.get(timeout=seconds + 60) for _ in processes]
    wall_s, used_s = time.perf_counter() - before_s, machine_cpu_s() - machine_s
    for process in processes:
        process.join()
    own_s = sum(cpu_s for _, cpu_s in results)
    cores = Cores(client=0, server=round(own_s / wall_s, 2), foreign=round((used_s - own_s) / wall_s, 2))
    return Ceiling(len(cpus), sum(rate_per_s for rate_per_s, _ in results), cores)


def _run(model: Model, cpu: int, seconds: float, start: Barrier, found: "Queue[tuple[float, float]]") -> None:
    """Run the model on one core and put (rows per second, CPU seconds)."""
    os.sched_setaffinity(0, {cpu})
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    with np.load(model.vectors) as vectors:
        feed = {model.input: vectors["x"][:1]}
    for _ in range(3):
        session.run(None, feed)
    start.wait(timeout=60)
    n_runs, before_s, before_cpu_s = 0, time.perf_counter(), time.process_time()
    while (passed_s := time.perf_counter() - before_s) < seconds:
        session.run(None, feed)
        n_runs += 1
    found.put((n_runs / passed_s, time.process_time() - before_cpu_s))
