"""A version into memory and out again: fetched, verified, checked with its golden cases, measured; and its memory given back.

    store → `load` → `Loaded` → repository.py → front.py … → `Loaded.close`

Blocks, so the server calls it on the one thread of a `loader_pool`, which gives way to everything that serves, and by way of
`load_quietly` while another version answers.
"""

import ctypes
import fcntl
import functools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import Bundle, read_bundle
from modelyard.bundle.manifest import Signature
from modelyard.bundle.profile import Latency, fingerprint
from modelyard.bundle.store import Store
from modelyard.inference.rows import example_row
from modelyard.inference.runtime import Engine, open_engine
from modelyard.inference.serve.executor import Executor
from modelyard.inference.serve.models.cache import ResponseCache
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.placement import placement_for
from modelyard.inference.serve.scheduling.scheduling import Policy, Scheduler

if TYPE_CHECKING:
    from modelyard.inference.serve.models.shadow import Shadow

T = TypeVar("T")

_NICENESS = 10
"""Of the loader's thread: it has a tenth of a core's time where serving wants all of it, and never starves."""
_LOWEST = 19
"""Of a load that nobody waits for. The idle class below it would starve the load where every processor is busy."""
_MEASURE_S = 0.2
_TARGET_S = 1.0
_REPLY_S = 200e-6
"""From the end of a run to its answer on the wire."""
_TIMER_SLACK_S = 1e-3
"""The event loop's timers count in milliseconds."""
_TRIM_FROM_BYTES = 2**22
"""Smaller models leave too little behind to be worth looking for."""


@dataclass(frozen=True)
class Pick:
    """A version to serve."""

    name: str
    version: int


@dataclass(frozen=True)
class ModelSettings:
    """How the versions of a model are run. None is derived from the bundle and from what is measured at loading."""

    target_s: float | None = None
    """Latency the scheduler aims at; else the bundle's latency_p99_s, else 1 s."""
    n_instances: int | None = None
    n_threads: int | None = None
    """Of one run; 0 takes every core."""
    max_batch_size: int = 64
    max_rows: int = 100_000
    """Of one request; more are refused."""
    max_queued_rows: int = 100_000
    batch_sizes: tuple[int, ...] | None = None
    """Batches are padded to one of these, the last of which is the largest batch; None where any size will do."""
    priority_weights: tuple[float, ...] = (1.0,)
    cache_bytes: int = 0
    """Of answers kept for equal calls; 0 keeps none. Only where rows do not depend on their batch mates."""
    pinned: bool = False
    """Loaded at the start and never evicted."""
    memory_bytes: int | None = None
    """What it takes in memory, where that is known better than measuring tells."""


@dataclass(eq=False, slots=True)
class Loaded:
    """A version that has passed its golden cases on this machine. Belongs to the event loop but for `close`."""

    name: str
    version: int
    signature: Signature
    executor: Executor
    target_s: float
    example: Mapping[str, Any]
    """The first golden case as a row that a client could send."""
    load_s: float
    max_rows: int = 100_000
    """Of one request."""
    row_s: float = 0.0
    """What one row took alone, on one thread, when it was loaded."""
    digest: str = ""
    """The bundle's identity."""
    memory_bytes: int = 0
    """What loading it added to the process, at least the size of its weights."""
    pinned: bool = False
    cache: ResponseCache | None = None
    compute: Callable[..., Any] | None = None
    """Inputs → outputs, for who does not go by way of the executor."""
    packer: Packer | None = None
    shadow: "Shadow | None" = None
    """Told of every call that was answered, where a share of them is repeated on another version."""
    touched: bool = False
    """Asked since the repository last looked: what "recently used" is made of."""
    too_late: dict[Any, Any] = field(default_factory=dict)
    """By adapter, the call that stands for all that were read too late to be answered."""
    _codecs: dict[Any, Any] = field(default_factory=dict)

    def codec(self, kind: Callable[[Signature], T]) -> T:
        """Return the one `kind` made for this signature; protocols keep what they prepare for a version here."""
        codec: T | None = self._codecs.get(kind)
        if codec is None:
            codec = self._codecs[kind] = kind(self.signature)
        return codec

    @property
    def busy(self) -> bool:
        """Whether calls wait or run; their answers may still be on their way to the loop when none does."""
        scheduler = self.executor.scheduler
        return scheduler.queued_rows > 0 or scheduler.n_free < scheduler.policy.n_instances

    def close(self) -> None:
        """Finish what runs and give the memory back, to the system; on any thread but the loop's, once. May take a run's time."""
        self.executor.close()
        self.compute = self.packer = None
        self._codecs.clear()
        self.too_late.clear()
        if self.cache is not None:
            self.cache.clear()
        if self.memory_bytes >= _TRIM_FROM_BYTES:
            trim_memory()


def load(
    store: Store,
    pick: Pick,
    settings: ModelSettings = ModelSettings(),
    *,
    allow_domains: Iterable[str] = (),
    n_workers: int = 1,
    make_engine: Callable[..., Engine] = open_engine,
) -> Loaded:
    """Fetch, verify and load a version and run its golden cases; blocks.

    Args:
        n_workers: processes that share the cores.
        make_engine: makes the engine of a bundle, as `open_engine` does.

    Raises:
        BundleError, StoreError: why this version must not, or cannot, be served.
        ConfigError: the settings do not fit together.
    """
    start_s = time.perf_counter()
    bundle = read_bundle(store.fetch(pick.name, pick.version), allow_domains=allow_domains)
    _warm_up()
    before_bytes = resident_bytes()
    target_s = settings.target_s or bundle.manifest.targets.latency_p99_s or _TARGET_S
    engine = make_engine(bundle, n_threads=1 if settings.n_threads is None else settings.n_threads)
    try:
        row_s = measure_row_s(engine, bundle.cases(), bundle.signature)
        placement = placement_for(
            row_s,
            target_s,
            n_cores=n_cores(),
            n_workers=n_workers,
            n_instances=settings.n_instances,
            n_threads=settings.n_threads,
        )
        if settings.n_threads is None and placement.n_threads > 1:
            faster = make_engine(bundle, n_threads=placement.n_threads, check=False)
            engine.close()
            engine = faster
        settings = replace(
            settings, target_s=target_s, n_instances=placement.n_instances, n_threads=placement.n_threads
        )
        return _loaded(pick, bundle, engine, settings, row_s, before_bytes, start_s)
    except BaseException:
        engine.close()
        raise


def _loaded(
    pick: Pick,
    bundle: Bundle,
    engine: Engine,
    settings: ModelSettings,
    row_s: float,
    before_bytes: int,
    start_s: float,
) -> Loaded:
    """Return the version; all of `settings` are decided by now."""
    cases, signature = bundle.cases(), bundle.signature
    assert settings.target_s is not None
    assert settings.n_instances is not None
    assert settings.n_threads is not None
    batches = bundle.manifest.rows_independent and all(spec.batched for spec in (*signature.inputs, *signature.outputs))
    sizes = settings.batch_sizes if batches and settings.batch_sizes else ()
    max_batch_size = (sizes[-1] if sizes else settings.max_batch_size) if batches else 1
    policy = Policy(
        target_s=settings.target_s,
        n_instances=settings.n_instances,
        max_batch_size=max_batch_size,
        max_queued_rows=settings.max_queued_rows,
        reply_s=min(_REPLY_S, settings.target_s / 20),
        timer_slack_s=_TIMER_SLACK_S,
        allowed_sizes=sizes,
        priority_weights=settings.priority_weights,
    )
    profile = profiled(bundle, engine.name, settings.n_threads)
    packer = Packer(signature)
    executor = Executor(
        engine,
        packer,
        Scheduler(policy, LatencyModel(max_batch_size, profile, row_s), time.perf_counter()),
        name=f"{pick.name} version {pick.version}",
        max_batch_size=max_batch_size,
        row_s=row_s,
        splittable=batches,
    )
    if bundle.size_bytes >= _TRIM_FROM_BYTES:
        trim_memory()  # what reading left behind is not the model's
    taken_bytes = max(resident_bytes() - before_bytes, bundle.graph.weight_bytes)
    return Loaded(
        pick.name,
        pick.version,
        signature,
        executor,
        settings.target_s,
        example_row(cases.inputs, signature),
        time.perf_counter() - start_s,
        max_rows=settings.max_rows,
        row_s=row_s,
        digest=bundle.digest,
        memory_bytes=settings.memory_bytes or taken_bytes,
        pinned=settings.pinned,
        cache=ResponseCache(settings.cache_bytes)
        if settings.cache_bytes and bundle.manifest.rows_independent
        else None,
        compute=engine.run,
        packer=packer,
    )


def profiled(bundle: Bundle, engine_name: str, n_threads: int) -> tuple[Latency, ...]:
    """Return the latencies measured on hardware like this with so many threads; empty where none were."""
    profiles = bundle.profiles()
    if not profiles:
        return ()
    here = _fingerprint(engine_name)
    return tuple(
        latency
        for profile in profiles
        if profile.hardware == here
        for latency in profile.latencies
        if latency.n_threads == n_threads
    )


_fingerprint = functools.lru_cache(maxsize=8)(fingerprint)


def measure_row_s(engine: Engine, cases: CaseSet, signature: Signature, n_runs: int = 5) -> float:
    """Return the median seconds the first golden case takes alone; of fewer runs where they take long."""
    row = {
        spec.name: cases.inputs[spec.name][:1] if spec.batched else cases.inputs[spec.name] for spec in signature.inputs
    }
    times_s: list[float] = []
    while len(times_s) < n_runs and sum(times_s) < _MEASURE_S:
        start_s = time.perf_counter()
        engine.run(row)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def n_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_pool() -> ThreadPoolExecutor:
    """Return the pool of one thread that loads, one version after the other, at a low priority."""
    return ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=give_way)


class Turns:
    """Taken by one process at a time of those forked after it was made; one that dies gives its turn back."""

    def __init__(self) -> None:
        self._fd, path = tempfile.mkstemp(prefix="modelyard-turns-")  # stays open as long as the processes live
        os.unlink(path)  # noqa: PTH108

    def __enter__(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)


def load_quietly(load_one: Callable[[Pick], Loaded], turns: Turns, pick: Pick) -> Loaded:
    """Load beside others that answer: on a thread of the lowest priority, one process at a time."""
    with turns, ThreadPoolExecutor(1, "quiet-loader", give_way, (_LOWEST,)) as pool:
        return pool.submit(load_one, pick).result()


def give_way(niceness: int = _NICENESS) -> None:
    """Lower the calling thread's priority, for good; where the system gives threads none of their own, nothing happens."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


@functools.cache
def _warm_up() -> None:
    """Have the engine set itself up, once in a process: over 20 MiB, which would else count as the first model's."""
    from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine(_IDENTITY)
    engine.run({"x": np.zeros((), np.float32)})
    engine.close()


_IDENTITY = (
    b'\x08\x08B\x04\n\x00\x10\x11:2\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x04warmZ\x0b\n\x01x\x12\x06\n\x04\x08\x01'
    b"\x12\x00b\x0b\n\x01y\x12\x06\n\x04\x08\x01\x12\x00"
)
"""y = Identity(x), a number, as ONNX; written out, for the package that makes such graphs is not on a serving machine."""


def resident_bytes() -> int:
    """Return the resident memory of this process that is its own; 0 where the system does not say.

    Pages of files are left out: a library's code comes in when a model first needs it and then serves all models.
    """
    try:
        _, resident, shared = map(int, Path("/proc/self/statm").read_bytes().split()[:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def trim_memory() -> None:
    """Have the C library give free memory back to the system, which it otherwise keeps for later."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's; others give memory back by themselves
    except (OSError, AttributeError):
        return None
