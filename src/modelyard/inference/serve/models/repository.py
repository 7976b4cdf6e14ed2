"""The models served: which of their versions answers a request, and in which state each is.

    Front → `Repository.pick` → Loaded → executor
          ↘ Cold → `when_ready` → waiting.py → a load → Loaded
    commands.py → keeper.py (loads, switches, frees) → the table that `pick` reads

Every worker has a repository of its own.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor as Pool
from time import perf_counter
from typing import Any

from modelyard.bundle.manifest import Signature
from modelyard.bundle.store import LocalStore, RecordedStore, Store
from modelyard.errors import Cold, ConfigError, NotReady, UnknownModel
from modelyard.inference.serve.models import commands
from modelyard.inference.serve.models.commands import REFRESH, RELOAD, STICKY, Broadcast, Json
from modelyard.inference.serve.models.keeper import Keeper, not_ready
from modelyard.inference.serve.models.loading import Loaded, ModelSettings, Pick, load, loader_pool
from modelyard.inference.serve.models.polling import Library
from modelyard.inference.serve.models.residency import Key
from modelyard.inference.serve.models.served_model import Entry, Fork, ServedModel, State
from modelyard.inference.serve.models.traffic import Traffic
from modelyard.inference.serve.models.versions import Ref, VersionPolicy
from modelyard.inference.serve.models.waiting import WaitingRoom

__all__ = [
    "REFRESH", "RELOAD", "STICKY", "Broadcast", "Entry", "Json", "Library", "Loaded", "ModelSettings", "Pick", "Repository", "State",
    "choose", "load", "loader_pool", "policies_of",
]  # fmt: skip

COLD_PATIENCE_S = 60.0
"""How long a request that brings no deadline of its own may wait for a model to be loaded."""

_TRITON_STATES = {
    "loading": "LOADING",
    "ready": "READY",
    "failed": "UNAVAILABLE",
    "draining": "UNLOADING",
    "unloaded": "UNAVAILABLE",
}


def choose(store: Store, wanted: Iterable[str] = ()) -> tuple[Pick, ...]:
    """Return the versions to serve: of every model its champion, else its latest; or those `wanted`, NAME[=VERSION|TAG].

    Raises:
        NotInStore: no such model, version or tag.
        ConfigError: there is nothing to serve.
    """
    asked = [text.partition("=") for text in wanted] or [(name, "", "") for name in store.names()]
    if not asked:
        raise ConfigError(_nothing_in(store))
    picks = [Pick(name, store.resolve(name, ref or None)) for name, _, ref in asked]
    return tuple(dict.fromkeys(picks))


def _nothing_in(store: Store) -> str:
    """Say that a store is empty, and which one below it may have been meant."""
    where = f"{store.url}: " if isinstance(store, RecordedStore) else ""
    below = sorted(store.root.iterdir()) if isinstance(store, LocalStore) and store.root.is_dir() else []
    meant = next((folder for folder in below if folder.is_dir() and LocalStore(folder).names()), None)
    remedy = "publish one with modelyard run, train or import, or correct the path"
    if meant is not None:
        remedy = f"give {meant}, which is a store with models"
    return f"{where}there is no model in the store; {remedy}"


def policies_of(wanted: Iterable[str]) -> dict[str, VersionPolicy]:
    """Return the policy of each model that is `wanted`, NAME[=VERSION|TAG]; versions and tags of one name add up."""
    refs: dict[str, list[Ref]] = {}
    for text in wanted:
        name, _, ref = text.partition("=")
        refs.setdefault(name, []).append(int(ref) if ref.isdigit() else ref)
    return {name: VersionPolicy(refs=tuple(found)) if any(found) else VersionPolicy() for name, found in refs.items()}


class Repository:
    """The table of what is served. Belongs to the event loop; loading itself happens on another thread."""

    def __init__(
        self,
        picks: Iterable[Pick],
        *,
        library: Library | None = None,
        lazy: bool = False,
        memory_budget_bytes: int | None = None,
        traffic: Mapping[str, Traffic] | None = None,
        log: Callable[[str], None] | None = None,
        on_unload: Callable[[str, int, str], None] | None = None,
    ) -> None:
        """
        Args:
            picks: what is served as long as the store has not been looked at; the first of a name is its default.
            library: the store and the policies that say what is served; None: the picks, for ever.
            lazy: a version is loaded when it is first asked for; pinned ones are loaded at the start all the same.
            memory_budget_bytes: for the models of this process.
            traffic: splits and shadows to begin with, by model.
            log: told in one line what changed after the start.
            on_unload: told name, version and cause ("requested", "replaced", "evicted") when a version has left memory.
        """
        self._on_unload = on_unload
        self._on_change: Callable[[Entry], None] = _nobody
        self._table: dict[tuple[str, str | None, str | None], Loaded | Fork] = {}
        self._keeper = Keeper(
            picks,
            self,
            library=library,
            lazy=lazy,
            memory_budget_bytes=memory_budget_bytes,
            log=log or _to_stderr,
        )
        self._models = self._keeper.models
        for name, shared in (traffic or {}).items():
            if name in self._models:
                self._models[name].share(shared)
        self._waiting = WaitingRoom(self._keeper.expected_load_s)
        self._draining = False

    async def load_all(
        self,
        load_one: Callable[[Pick], Loaded],
        pool: Pool,
        on_change: Callable[[Entry], None],
        load_beside: Callable[[Pick], Loaded] | None = None,
    ) -> None:
        """Load every version, one after the other; one that cannot be loaded is marked failed and the others go on.

        Args:
            load_one: loads a version; called on `pool`, which has one thread (`loader_pool`).
            on_change: told of each version that becomes ready, before the first request meets it, or fails; later ones too.
            load_beside: loads a version that nobody waits for while another answers; `load_one` where it is None.
        """
        self._on_change = on_change
        await self._keeper.start(load_one, pool, load_beside)

    # Requests.

    def pick(self, name: str, version: str | None = None, label: str | None = None, key: bytes = b"") -> Loaded:
        """Return the version that answers this request.

        Args:
            key: requests with the same one meet the same version while traffic is split.

        Raises:
            UnknownModel: there is no such model, version or label.
            Cold: it is not in memory yet; `when_ready` has it loaded and waits.
            NotReady: with the reason.
        """
        found = self._table.get((name, version, label))
        if found.__class__ is not Loaded:
            found = self._find(name, version, label, key)
        found.touched = True
        return found

    def _find(self, name: str, version: str | None, label: str | None, key: bytes) -> Loaded:
        """The same for what does not stand in the table, or is a fork there."""
        model = self._model(name)
        if model.fork is not None and version is None and label is None:
            self._table[name, version, label] = model.fork
            return self._of_fork(model, model.fork, key)
        loaded = self._table[name, version, label] = self._answering(self.entry(name, version, label))
        return loaded

    def _of_fork(self, model: ServedModel, fork: Fork, key: bytes) -> Loaded:
        """Return the version whose turn it is; the default one where it cannot answer."""
        version = fork.split.choose(key)
        loaded = self._keeper.memory.resident.get((model.name, version))
        if loaded is None:
            entry = self._entry(model, version)
            loaded = self._answering(entry if entry.on_demand else self.entry(model.name))
        fork.counts[loaded.version] = fork.counts.get(loaded.version, 0) + 1
        metrics = loaded.executor.metrics
        if metrics is not None:
            metrics.split()
        return loaded

    def when_ready(
        self,
        cold: Cold,
        deadline_s: float,
        then: Callable[[Loaded], None],
        otherwise: Callable[[Exception], None],
    ) -> Callable[[], object]:
        """Have a cold version loaded, and call `then` with it when it is; return what ends the wait without either.

        Many may wait for one load, which goes on when the last of them has given up.

        Args:
            deadline_s: on the clock of time.perf_counter(); `otherwise` is then called with DeadlineExceeded.
            otherwise: called with NotReady when the version cannot be loaded, Overloaded when too many wait already.
        """
        key: Key = (cold.name, cold.version)
        loaded = self._keeper.memory.resident.get(key)
        if loaded is not None:
            then(loaded)
            return _nothing
        leave = self._waiting.enter(key, deadline_s, then, otherwise)
        self._keeper.memory.want(key, urgent=True)
        return leave

    async def ready_one(
        self,
        name: str,
        version: str | None = None,
        label: str | None = None,
        key: bytes = b"",
        within_s: float = COLD_PATIENCE_S,
    ) -> Loaded:
        """Return what `pick` would, having waited for a cold version; raises as `pick` and `when_ready` do."""
        try:
            return self.pick(name, version, label, key)
        except Cold as cold:
            future: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
            leave = self.when_ready(cold, perf_counter() + within_s, future.set_result, future.set_exception)
            try:
                return await future
            finally:
                leave()

    # What there is.

    @property
    def ready(self) -> bool:
        """The first loads are done, something can be served, and the server is not draining."""
        return (
            self._keeper.started
            and not self._draining
            and any(
                self._entry(model, model.default).answers
                for model in self._models.values()
                if not model.is_off and model.default is not None
            )
        )

    @property
    def trouble(self) -> str:
        """Why the store cannot be read at present, "" where it can; what is loaded keeps answering."""
        return self._keeper.trouble

    @property
    def memory_bytes(self) -> int:
        """What the models in memory take."""
        return self._keeper.memory.used_bytes

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, model in self._models.items() if not model.is_off)

    def entries(self, name: str) -> tuple[Entry, ...]:
        """Return all versions of a model, the one served by default first; raises UnknownModel."""
        model = self._model(name)
        found = tuple(self._entry(model, version) for version in model.needed())
        if not found:
            missing = ", ".join(map(str, model.wanted.missing)) or "version"
            raise NotReady(
                f"model {name!r} has nothing to serve: the store has no {missing} of it; publish or tag one",
                retry=False,
            )
        return found

    def entry(self, name: str, version: str | None = None, label: str | None = None) -> Entry:
        """Return one version, the default one for None; raises UnknownModel."""
        found = self.entries(name)
        if label is not None:
            labels = self.labels(name)
            if label not in labels:
                known = ", ".join(labels) or "none"
                raise UnknownModel(
                    f"no served version of model {name!r} has the label {label[:40]!r}; there are the labels {known}",
                    name=name,
                    label=label,
                )
            return self._entry(self._models[name], labels[label])
        if version is None:
            return found[0]
        for entry in found:
            if str(entry.version) == version:
                return entry
        known = ", ".join(str(entry.version) for entry in found)
        listing = self._models[name].listing
        hint = ""
        if listing is not None and version in map(str, listing.versions):
            hint = (
                f"; the store has it: tag it champion, add it to versions of models.{name} in serve.toml, "
                f"or start with --model {name}={version}"
            )
        raise UnknownModel(
            f"version {version[:40]!r} of model {name!r} is not served here; there are: {known}{hint}",
            name=name,
            version=version,
        )

    def signature(self, entry: Entry) -> Signature:
        """Return the inputs and outputs of a version, be it in memory or loaded on demand; raises Cold or NotReady for others."""
        known = self._keeper.signature((entry.name, entry.version)) if entry.on_demand else None
        return known or self._answering(entry).signature

    def labels(self, name: str) -> Mapping[str, int]:
        """Return label → the version it means now; raises UnknownModel."""
        return {label: version for label, version in self._model(name).routes.items() if label}

    def index(self, *, only_ready: bool = False) -> list[Json]:
        """Return every version in the store and its state, in the words of the repository extension."""
        found = []
        for model in self._models.values():
            listed = () if model.listing is None else model.listing.versions
            for version in sorted({*listed, *model.needed(), *self._keeper.in_memory(model.name)}):
                entry = self._entry(model, version)
                if entry.state != "ready" and only_ready:
                    continue
                reason = entry.reason
                if entry.state == "unloaded":
                    reason = "is loaded with its first request" if entry.on_demand else "is not served"
                one = {"name": model.name, "version": str(version), "state": _TRITON_STATES[entry.state]}
                found.append(one | ({"reason": reason} if reason else {}))
        return found

    def observe(self) -> None:
        """Show in the metrics what the schedulers believe, and keep within the memory budget; called about once a second."""
        memory = self._keeper.memory
        for loaded in memory.resident.values():
            loaded.executor.observe()
        for model in self._models.values():
            model.shadow_counts.totals.tell()
        memory.note_use()
        memory.shrink()

    def _model(self, name: str) -> ServedModel:
        model = self._models.get(name)
        if model is None or model.is_off:
            known = ", ".join(self.names()[:20]) or "none"
            off = "; it was unloaded: load it with POST /v2/repository/models/NAME/load" if model is not None else ""
            raise UnknownModel(f"no model {name[:200]!r} is served here; there are: {known}{off}", name=name)
        return model

    def _entry(self, model: ServedModel, version: int) -> Entry:
        entry = self._keeper.entry(model, version)
        if self._draining and entry.loaded is not None:
            return Entry(entry.name, entry.version, "draining", loaded=entry.loaded)
        return entry

    def _answering(self, entry: Entry) -> Loaded:
        """Return the version in memory that an entry stands for; raises Cold or NotReady where there is none."""
        name, version = entry.name, entry.version
        if entry.loaded is not None and (entry.state == "ready" or self._draining):
            return entry.loaded
        if entry.state == "failed":
            raise not_ready(name, version, self._models[name].failures[version])
        if self._draining:
            raise NotReady(f"model {name!r} version {version} is not in memory and the server is draining; ask another")
        where = "loading" if entry.state == "loading" else "not in memory"
        raise Cold(
            f"model {name!r} version {version} is {where}; try again later",
            name=name,
            version=version,
            retry_after_s=self._keeper.expected_load_s((name, version)),
        )

    # Changes.

    async def apply(self, command: Json) -> Json:
        """Obey a command (commands.py) and return the answer."""
        return await commands.obey(self._keeper, command)

    async def watch(self, every_s: float, broadcast: Broadcast) -> None:
        """Look at the store every so many seconds, for ever; one worker of a server does it for all."""
        await commands.watch(self._keeper, every_s, broadcast)

    def drain(self) -> None:
        """Report everything as draining from now on; what is loaded goes on answering."""
        self._draining = True
        self._keeper.frozen = True

    def close(self) -> None:
        """Free everything; nothing may be asked any more."""
        self._keeper.close()

    # From keeper.py.

    def before_ready(self, entry: Entry) -> None:
        self._on_change(entry)

    def ready_now(self, key: Key, loaded: Loaded) -> None:
        self._waiting.ready(key, loaded)

    def failed(self, entry: Entry, error: NotReady) -> None:
        self._on_change(entry)
        self._waiting.failed((entry.name, entry.version), error)

    def freed(self, key: Key, cause: str) -> None:
        if self._on_unload is not None:
            self._on_unload(*key, cause)

    def changed(self) -> None:
        self._table.clear()


def _nobody(entry: Entry) -> None:
    """Nobody has asked to be told."""


def _nothing() -> Any:
    """Ends a wait that never began."""


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
