"""The models served: which versions, in which state, and how one is loaded: fetched, verified, checked, only then ready."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

from modelyard.bundle.format import read_bundle
from modelyard.bundle.manifest import Signature
from modelyard.bundle.store import Store
from modelyard.errors import ConfigError, ModelyardError, NotReady, UnknownModel
from modelyard.inference.rows import example_row
from modelyard.inference.runtime import open_engine
from modelyard.inference.serve.work import Instance, measure_row_s

State = Literal["loading", "ready", "failed", "draining"]


@dataclass(frozen=True)
class Pick:
    """A version to serve."""

    name: str
    version: int


@dataclass(frozen=True)
class Loaded:
    """A version that has passed its golden cases on this machine."""

    name: str
    version: int
    signature: Signature
    instance: Instance
    example: Mapping[str, Any]
    """The first golden case as a row that a client could send."""
    load_s: float


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


def load(store: Store, pick: Pick, *, n_threads: int = 1, allow_domains: Iterable[str] = ()) -> Loaded:
    """Fetch, verify and load a version and run its golden cases; blocks.

    Raises:
        BundleError, StoreError: why this version must not, or cannot, be served.
    """
    start_s = time.perf_counter()
    bundle = read_bundle(store.fetch(pick.name, pick.version), allow_domains=allow_domains)
    engine = open_engine(bundle, n_threads=n_threads)
    cases, signature = bundle.cases(), bundle.signature
    instance = Instance(engine, measure_row_s(engine, cases, signature), f"{pick.name}-{pick.version}")
    example = example_row(cases.inputs, signature)
    return Loaded(pick.name, pick.version, signature, instance, example, time.perf_counter() - start_s)


class Repository:
    """The table of what is served. Belongs to the event loop; loading itself happens on another thread."""

    def __init__(self, picks: Iterable[Pick]) -> None:
        self._entries = {(pick.name, pick.version): Entry(pick.name, pick.version, "loading") for pick in picks}
        self._draining = False

    async def load_all(
        self, load_one: Callable[[Pick], Loaded], executor: Executor, on_change: Callable[[Entry], None]
    ) -> None:
        """Load every version, one after the other; one that cannot be loaded is marked failed and the others go on."""
        loop = asyncio.get_running_loop()
        for key, entry in self._entries.items():
            try:
                loaded = await loop.run_in_executor(executor, load_one, Pick(entry.name, entry.version))
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

    def entry(self, name: str, version: str | None = None) -> Entry:
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

    def get(self, name: str, version: str | None = None) -> Loaded:
        """Return a version that can answer; raises UnknownModel, or NotReady with the reason."""
        entry = self.entry(name, version)
        if entry.loaded is None:
            if entry.state == "failed":
                raise NotReady(
                    f"model {name!r} version {entry.version} failed to load and will not become ready by itself: {entry.reason}",
                    retry=False,
                )
            raise NotReady(f"model {name!r} version {entry.version} is {entry.state}; try again later")
        return entry.loaded

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
                entry.loaded.instance.close()
