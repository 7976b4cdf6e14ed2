"""The models served: which versions, in which state, and how one is loaded: fetched, verified, checked, only then ready."""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor as Pool
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import read_bundle
from modelyard.bundle.manifest import Signature
from modelyard.bundle.store import Store
from modelyard.errors import ConfigError, ModelyardError, NotReady, UnknownModel
from modelyard.inference.rows import example_row
from modelyard.inference.runtime import Engine, open_engine
from modelyard.inference.serve.executor import Executor
from modelyard.inference.serve.latency_model import LatencyModel
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.scheduling import Policy, Scheduler

State = Literal["loading", "ready", "failed", "draining"]
T = TypeVar("T")


@dataclass(frozen=True)
class Pick:
    """A version to serve."""

    name: str
    version: int


@dataclass(frozen=True)
class ModelSettings:
    """How a version is run. None is derived from the bundle and from what is measured at loading."""

    target_s: float | None = None
    """Latency the scheduler aims at; else the bundle's latency_p99_s, else 1 s."""
    n_instances: int | None = None
    n_threads: int = 1
    """Of one run."""
    max_batch_size: int = 64
    max_queued_rows: int = 100_000
    batch_sizes: tuple[int, ...] | None = None
    """Batches are padded to one of these; None where any size will do."""


@dataclass(frozen=True)
class Loaded:
    """A version that has passed its golden cases on this machine."""

    name: str
    version: int
    signature: Signature
    executor: Executor
    target_s: float
    example: Mapping[str, Any]
    """The first golden case as a row that a client could send."""
    load_s: float
    _codecs: dict[Any, Any] = field(default_factory=dict)

    def codec(self, kind: Callable[[Signature], T]) -> T:
        """Return the one `kind` made for this signature; protocols keep what they prepare for a version here."""
        codec: T | None = self._codecs.get(kind)
        if codec is None:
            codec = self._codecs[kind] = kind(self.signature)
        return codec


@dataclass(frozen=True)
class Entry:
    """What is known of one version; `loaded` is there exactly when it is ready or draining."""

    name: str
    version: int
    state: State
    reason: str = ""
    loaded: Loaded | None = None


def choose(store: Store, wanted: Iterable[str] = ()) -> tuple[Pick, ...]:
    """Return the versions to serve: of every model its champion, else its latest; or those `wanted`, NAME[=VERSION|TAG].

    Raises:
        NotInStore: no such model, version or tag.
        ConfigError: there is nothing to serve.
    """
    asked = [text.partition("=") for text in wanted] or [(name, "", "") for name in store.names()]
    if not asked:
        raise ConfigError(
            "there is no model in the store; publish one with modelyard run, train or import, or correct the path"
        )
    picks = [Pick(name, store.resolve(name, ref or None)) for name, _, ref in asked]
    return tuple(dict.fromkeys(picks))


def load(
    store: Store, pick: Pick, settings: ModelSettings = ModelSettings(), *, allow_domains: Iterable[str] = ()
) -> Loaded:
    """Fetch, verify and load a version and run its golden cases; blocks.

    Raises:
        BundleError, StoreError: why this version must not, or cannot, be served.
    """
    start_s = time.perf_counter()
    bundle = read_bundle(store.fetch(pick.name, pick.version), allow_domains=allow_domains)
    engine = open_engine(bundle, n_threads=settings.n_threads)
    cases, signature = bundle.cases(), bundle.signature
    target_s = settings.target_s or (bundle.manifest.targets.latency_p99_s or 1.0)
    row_s = measure_row_s(engine, cases, signature)
    specs = (*signature.inputs, *signature.outputs)
    batches = bundle.manifest.rows_independent and all(spec.batched for spec in specs)
    max_batch_size = settings.max_batch_size if batches else 1
    executor = Executor(
        engine,
        Packer(signature),
        Scheduler(
            Policy(
                target_s=target_s,
                n_instances=settings.n_instances or 1,
                max_batch_size=max_batch_size,
                max_queued_rows=settings.max_queued_rows,
            ),
            LatencyModel(max_batch_size, guess_row_s=row_s),
        ),
        name=f"{pick.name} version {pick.version}",
        max_batch_size=max_batch_size,
        splittable=batches,
    )
    example = example_row(cases.inputs, signature)
    return Loaded(pick.name, pick.version, signature, executor, target_s, example, time.perf_counter() - start_s)


def measure_row_s(engine: Engine, cases: CaseSet, signature: Signature, n_runs: int = 5) -> float:
    """Return the median seconds the first golden case takes alone."""
    row = {
        spec.name: cases.inputs[spec.name][:1] if spec.batched else cases.inputs[spec.name] for spec in signature.inputs
    }
    times_s = []
    for _ in range(n_runs):
        start_s = time.perf_counter()
        engine.run(row)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


class Repository:
    """The table of what is served. Belongs to the event loop; loading itself happens on another thread."""

    def __init__(self, picks: Iterable[Pick]) -> None:
        self._entries = {(pick.name, pick.version): Entry(pick.name, pick.version, "loading") for pick in picks}
        self._ready: dict[tuple[str, str | None, str | None], Loaded] = {}
        self._draining = False

    async def load_all(
        self, load_one: Callable[[Pick], Loaded], pool: Pool, on_change: Callable[[Entry], None]
    ) -> None:
        """Load every version, one after the other; one that cannot be loaded is marked failed and the others go on."""
        loop = asyncio.get_running_loop()
        for key, entry in self._entries.items():
            try:
                loaded = await loop.run_in_executor(pool, load_one, Pick(entry.name, entry.version))
            except (ModelyardError, OSError) as exc:
                entry = Entry(entry.name, entry.version, "failed", reason=str(exc))
            else:
                entry = Entry(entry.name, entry.version, "ready", loaded=loaded)
            self._entries[key] = entry
            on_change(entry)

    @property
    def ready(self) -> bool:
        """Nothing is loading, something can be served, and the server is not draining."""
        states = {entry.state for entry in self._entries.values()}
        return not self._draining and "loading" not in states and "ready" in states

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self._entries))

    def entries(self, name: str) -> tuple[Entry, ...]:
        """Return all versions of a model, the one served by default first; raises UnknownModel."""
        found = tuple(entry for entry in self._entries.values() if entry.name == name)
        if not found:
            known = ", ".join(self.names()[:20])
            raise UnknownModel(f"no model {name[:200]!r} is served here; there are: {known}", name=name)
        return found

    def entry(self, name: str, version: str | None = None, label: str | None = None) -> Entry:
        """Return one version, the default one for None; raises UnknownModel."""
        found = self.entries(name)
        if version is None:
            return found[0]
        for entry in found:
            if str(entry.version) == version:
                return entry
        known = ", ".join(str(entry.version) for entry in found)
        raise UnknownModel(
            f"version {version[:40]!r} of model {name!r} is not served here; there are: {known}",
            name=name,
            version=version,
        )

    def signature(self, entry: Entry) -> Signature:
        return self._loaded(entry).signature

    def pick(self, name: str, version: str | None = None, label: str | None = None, key: bytes = b"") -> Loaded:
        """Return the version that answers this request; raises UnknownModel, or NotReady with the reason."""
        loaded = self._ready.get((name, version, label))
        if loaded is None:
            loaded = self._ready[name, version, label] = self._loaded(self.entry(name, version, label))
        return loaded

    def _loaded(self, entry: Entry) -> Loaded:
        if entry.loaded is None:
            if entry.state == "failed":
                raise NotReady(
                    f"model {entry.name!r} version {entry.version} failed to load and will not become ready by itself: {entry.reason}",
                    retry=False,
                )
            raise NotReady(f"model {entry.name!r} version {entry.version} is {entry.state}; try again later")
        return entry.loaded

    def observe(self) -> None:
        """Show what the schedulers believe in the metrics; called about once a second."""
        for entry in self._entries.values():
            if entry.loaded is not None:
                entry.loaded.executor.observe()

    def drain(self) -> None:
        """Report everything as draining from now on; what is loaded goes on answering."""
        self._draining = True
        self._entries = {
            key: Entry(entry.name, entry.version, "draining", loaded=entry.loaded) if entry.loaded else entry
            for key, entry in self._entries.items()
        }

    def close(self) -> None:
        for entry in self._entries.values():
            if entry.loaded is not None:
                entry.loaded.executor.close()
