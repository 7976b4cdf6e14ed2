"""Keeps what is in memory in step with what is wanted: loads what is missing, switches when it is ready, frees what is not.

    store → polling.py → `Keeper.look` → versions.py (what is wanted) → `reconcile` → memory.py → switch

A new version is loaded beside the old one and passes its golden cases; then the routes move to it in one step, and the old
one finishes its calls and leaves. Where the new one fails, the old one keeps answering and the new one's entry says why.
"""

import asyncio
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor as Pool
from dataclasses import replace
from typing import Protocol

from modelyard.bundle.manifest import Signature
from modelyard.errors import ModelyardError, NotReady
from modelyard.inference.serve.models.loading import Loaded, Pick
from modelyard.inference.serve.models.memory import Memory
from modelyard.inference.serve.models.polling import Library, is_passing
from modelyard.inference.serve.models.residency import Key
from modelyard.inference.serve.models.served_model import Entry, Failure, ServedModel
from modelyard.inference.serve.models.shadow import Mirror, Shadow, same_inputs
from modelyard.inference.serve.models.versions import Listing, Wanted

FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 300.0
_UNKNOWN_LOAD_S = 1.0
_SHORTEST_LOAD_S = 0.1


class Listener(Protocol):
    """Who is told what happens to versions; on the event loop."""

    def before_ready(self, entry: Entry) -> None:
        """It is loaded, and no request has met it yet."""

    def ready_now(self, key: Key, loaded: Loaded) -> None:
        """It may be asked from now on."""

    def failed(self, entry: Entry, error: NotReady) -> None: ...

    def freed(self, key: Key, cause: str) -> None:
        """It has left memory: "replaced", "requested" or "evicted"."""

    def changed(self) -> None:
        """What answers whom may have changed."""


class Keeper:
    """The models and their versions in memory. Belongs to the event loop; `start` before anything is loaded."""

    def __init__(
        self,
        picks: Iterable[Pick],
        listener: Listener,
        *,
        library: Library | None,
        lazy: bool,
        memory_budget_bytes: int | None,
        log: Callable[[str], None],
    ) -> None:
        """See `Repository` for the arguments."""
        self.library = library
        self._listener = listener
        self._lazy = lazy
        self._log = log
        versions: dict[str, list[int]] = {}
        for pick in picks:
            versions.setdefault(pick.name, []).append(pick.version)
        self.models = {name: ServedModel(name, Wanted(tuple(found), {})) for name, found in versions.items()}
        for model in self.models.values():
            model.routes = model.targets()
        self.memory = Memory(
            memory_budget_bytes,
            is_kept=self._is_kept,
            expected_bytes=self._expected_bytes,
            on_loaded=self._on_loaded,
            on_failed=self._on_failed,
            on_cold=self._on_cold,
            on_evicted=self._on_evicted,
            on_freed=self._on_freed,
            free=self._free,
        )
        self._mirror = Mirror()
        self._cold: set[Key] = set()
        """Wanted, and in memory only when asked for: after an eviction, for want of room, or with `lazy`."""
        self._measured: dict[Key, tuple[int, float]] = {}
        """Bytes and seconds that a version took when it was last loaded."""
        self._signatures: dict[Key, Signature] = {}
        self._looking = asyncio.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        self.started = False
        """The first loads are done."""
        self.frozen = False
        """Nothing is loaded or freed any more."""
        self.trouble = ""
        """Why the store cannot be read at present; what is loaded keeps answering."""

    async def start(
        self, load_one: Callable[[Pick], Loaded], pool: Pool, load_beside: Callable[[Pick], Loaded] | None = None
    ) -> None:
        """Look at the store, load what is wanted, and return when that is done."""
        self._loop = asyncio.get_running_loop()
        self.memory.start(load_one, pool, load_beside)
        if self.library is not None:
            await self.look()
        for model in self.models.values():
            self.reconcile(model)
        await self.until(lambda: not any(map(self.is_pending, self.models.values())))
        self.started = self.memory.serving = True

    # What is known.

    def entry(self, model: ServedModel, version: int) -> Entry:
        """Return what is known of a version, wanted or not."""
        name, key = model.name, (model.name, version)
        loaded = self.memory.resident.get(key)
        if loaded is not None:
            return Entry(name, version, "ready", loaded=loaded)
        failure, is_needed = model.failures.get(version), version in model.needed()
        on_demand = key in self._cold and is_needed and failure is None
        loaded = self.memory.draining.get(key)
        if loaded is not None:
            return Entry(name, version, "draining", "finishes its calls, then leaves memory", loaded, on_demand)
        is_due = not self.started and is_needed and failure is None and not on_demand and not self._lazy
        if self.memory.is_pending(key) or is_due:
            return Entry(name, version, "loading", on_demand=on_demand)
        if failure is not None:
            return Entry(name, version, "failed", failure.reason)
        return Entry(name, version, "unloaded", on_demand=on_demand)

    def is_pending(self, model: ServedModel) -> bool:
        """Whether something of it is being loaded, or will be."""
        return any(self.memory.is_pending((model.name, version)) for version in model.needed())

    def in_memory(self, name: str) -> Iterator[int]:
        """Yield the versions of a model that are in memory, draining ones included."""
        return (version for of, version in (*self.memory.resident, *self.memory.draining) if of == name)

    def signature(self, key: Key) -> Signature | None:
        """Return the inputs and outputs of a version that is not in memory; None where it must be loaded to tell."""
        known = self._signatures.get(key)
        if known is None and self.library is not None:
            known = self.library.signature(*key)
            if known is not None:
                self._signatures[key] = known
        return known

    def expected_load_s(self, key: Key) -> float:
        return max(self._measured.get(key, (0, _UNKNOWN_LOAD_S))[1], _SHORTEST_LOAD_S)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Return when it is so, having looked whenever a load or a drain ended."""
        while not is_so():
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(future)
            await future

    # The store.

    async def look(self) -> Mapping[str, Listing] | None:
        """Take over what the store has now and what that means for every model; `reconcile` acts on it.

        Returns None where the store cannot be read: everything stays as it is, and `trouble` says why. A model that has gone
        from the store is still good, and answers until it is unloaded by a call.
        """
        found = await self.look_only()
        for name, listing in (found or {}).items():
            model = self.models.setdefault(name, ServedModel(name))
            model.listing = listing
            self.plan(model)
        for model in self.models.values():
            self.retry(model)
        return found

    async def look_only(self) -> Mapping[str, Listing] | None:
        """Return what the store has now, and change nothing but `trouble`."""
        assert self.library is not None
        async with self._looking:
            try:
                found = await asyncio.to_thread(self.library.look)
            except (ModelyardError, OSError) as exc:
                self._say_trouble(f"the store cannot be read, what is loaded keeps answering: {exc}")
                return None
        self._say_trouble("")
        return found

    async def look_at(self, name: str) -> Listing | None:
        """Return what the store has of one model, None where there is no store; raises as `Library.look_at` does."""
        if self.library is None:
            return None
        async with self._looking:
            return await asyncio.to_thread(self.library.look_at, name)

    def plan(self, model: ServedModel) -> None:
        """Apply the policy to what the store has."""
        if self.library is None or model.listing is None:
            return
        wanted = self.library.wanted(model.name, model.listing, model.policy)
        if wanted.versions or not model.wanted.versions:
            model.wanted = wanted
        elif wanted.missing != model.wanted.missing:  # a tag that was taken away is no reason to stop answering
            model.wanted = replace(model.wanted, missing=wanted.missing)
            missing = ", ".join(map(str, wanted.missing))
            self._log(f"{model.name}: the store has no {missing}; what was served keeps answering")

    def retry(self, model: ServedModel, *, everything: bool = False) -> None:
        """Forget the failures of versions whose files were touched since, or all: they are tried again."""
        touched = [v for v, failure in model.failures.items() if everything or self._is_touched(model, v, failure)]
        model.forget_failures(touched)

    def has_touched_failures(self) -> bool:
        """Whether files of a version that failed were touched since; on any thread."""
        return any(
            self._is_touched(model, version, failure)
            for model in tuple(self.models.values())
            for version, failure in tuple(model.failures.items())
        )

    def _is_touched(self, model: ServedModel, version: int, failure: Failure) -> bool:
        return self.library is not None and self.library.fingerprint(model.name, version) != failure.fingerprint

    def _say_trouble(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            self._log(trouble or "the store can be read again")

    # In step.

    def reconcile(self, model: ServedModel, *, urgent: bool = False, cause: str = "replaced") -> None:
        """Switch to what is ready, load what is missing, release what nobody needs any more.

        Args:
            urgent: load before other models, also what is in memory only when asked for.
            cause: why versions are released.
        """
        if self.frozen:
            return
        self._switch(model)
        needed = model.needed()
        self._load_missing(model, needed, urgent=urgent)
        for version in tuple(self.in_memory(model.name)):
            if version not in needed and (model.name, version) in self.memory.resident:
                self.memory.release((model.name, version), cause)
        for key in (*self._cold, *self.memory.pending()):
            if key[0] == model.name and key[1] not in needed:
                self._cold.discard(key)
                self.memory.unwant(key)
        model.forget_failures([version for version in model.failures if version not in needed])
        self._cast_shadows(model)
        self._listener.changed()

    def _switch(self, model: ServedModel) -> None:
        """Move each route to its target, if the target is ready or there is nothing better than to wait for it."""
        resident, targets = self.memory.resident, model.targets()
        for label in model.routes.keys() - targets.keys():
            del model.routes[label]
        for label, target in targets.items():
            current = model.routes.get(label)
            is_ready = (model.name, target) in resident
            stands_in = current is not None and ((model.name, current) in resident or target in model.failures)
            if is_ready or not stands_in:
                model.routes[label] = target

    def _load_missing(self, model: ServedModel, needed: tuple[int, ...], *, urgent: bool) -> None:
        name, memory = model.name, self.memory
        answers = any((name, version) in memory.resident for version in needed)
        for version in needed:
            key = (name, version)
            if key in memory.resident or version in model.failures:
                continue
            if key in self._cold:
                if urgent:
                    memory.want(key, urgent=True)
            elif self._lazy and not urgent and not answers and not self._is_pinned(name):
                self._cold.add(key)
            else:  # nobody is driven out for a model that nobody has asked, but for the next version of one that answers
                memory.want(key, urgent=urgent, may_evict=urgent or answers)

    def _cast_shadows(self, model: ServedModel) -> None:
        """Have the versions in memory repeat their calls on the shadow, or not."""
        name, traffic, resident = model.name, model.traffic, self.memory.resident
        second = None if traffic.shadow is None else resident.get((name, traffic.shadow))
        model.shadow_trouble = ""
        for first in [loaded for key, loaded in resident.items() if key[0] == name]:
            if second is None or first is second:
                first.shadow = None
            elif not same_inputs(first.signature, second.signature):
                first.shadow = None
                model.shadow_trouble = f"version {second.version} takes other inputs than version {first.version}"
            elif first.shadow is None or not first.shadow.is_on(second, traffic.shadow_share, model.shadow_counts):
                first.shadow = Shadow(first, second, traffic.shadow_share, model.shadow_counts, self._mirror)

    def _is_pinned(self, name: str) -> bool:
        return self.library is not None and self.library.settings(name).pinned

    # Of memory.py.

    def _is_kept(self, key: Key) -> bool:
        """Whether a version must stay in memory: part of a split or a shadow, or answering while its successor loads."""
        name, version = key
        model, loading = self.models[name], self.memory.loading
        return version in model.traffic.versions or (
            loading is not None and loading[0] == name and version in model.routes.values()
        )

    def _expected_bytes(self, key: Key) -> int:
        measured = self._measured.get(key)
        if measured is not None:
            return measured[0]
        return 0 if self.library is None else self.library.expected_bytes(*key)

    def _on_loaded(self, key: Key, loaded: Loaded) -> None:
        name, version = key
        model = self.models[name]
        self._measured[key] = (loaded.memory_bytes, loaded.load_s)
        self._signatures[key] = loaded.signature
        self._cold.discard(key)
        model.forget_failures((version,))
        self._listener.before_ready(Entry(name, version, "ready", loaded=loaded))
        before = model.default
        self.reconcile(model)
        if self.started:
            replaces = before not in (None, version) and model.default == version
            told = f", answers in the place of version {before}" if replaces else ""
            self._log(f"{name} version {version}: loaded in {loaded.load_s:.3f} s{told}")
        if key in self.memory.resident and not self.memory.shrink(spare=(key,)):
            self._log(
                f"{name} version {version}: takes more memory than expected and nothing may leave for it; raise --memory-budget"
            )
        self._listener.ready_now(key, loaded)
        self._tell()

    def _on_failed(self, key: Key, error: Exception) -> None:
        name, version = key
        model, passing = self.models[name], is_passing(error)
        reason = str(error)
        if not isinstance(error, ModelyardError | OSError):
            reason = f"internal error, see the server's log: {type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
            sys.stderr.write(f"bug: loading {name} version {version} failed:\n{trace}")
        earlier = model.failures.get(version)
        n_tries = 1 if earlier is None else earlier.n_tries + 1
        fingerprint = () if self.library is None else self.library.fingerprint(name, version)
        failure = model.failures[version] = Failure(reason, passing, fingerprint, n_tries)
        if passing and not self.frozen:
            wait_s = min(FIRST_RETRY_S * 2 ** (n_tries - 1), _LAST_RETRY_S)
            failure.retry = self._loop.call_later(wait_s, self.memory.want, key)
        self._cold.discard(key)
        self.reconcile(model)
        if self.started:
            standing_in = (name, model.default) in self.memory.resident and model.default != version
            told = f"; version {model.default} keeps answering" if standing_in else ""
            self._log(f"{name} version {version}: cannot be loaded: {reason}{told}")
        self._listener.failed(Entry(name, version, "failed", reason), not_ready(name, version, failure))
        self._tell()

    def _on_cold(self, key: Key) -> None:
        self._cold.add(key)
        self._tell()

    def _on_evicted(self, key: Key) -> None:
        self._cold.add(key)
        self._listener.changed()

    def _on_freed(self, key: Key, cause: str) -> None:
        name, version = key
        model = self.models[name]
        if self.started:
            self._log(f"{name} version {version}: left memory, {cause}")
        self._listener.freed(key, cause)
        self.reconcile(model)
        self._tell()

    def _free(self, loaded: Loaded) -> None:
        """On the loader's thread."""
        loaded.compute = None
        self._mirror.wait()
        loaded.close()

    def _tell(self) -> None:
        """Wake who waits in `until`."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Free everything; nothing may be asked any more."""
        self.frozen = True
        for model in self.models.values():
            model.forget_failures(model.failures)
        self._mirror.close()
        self.memory.close()


def not_ready(name: str, version: int, failure: Failure) -> NotReady:
    """Return what a request for a version that failed to load is answered with."""
    hope = "is tried again now and then" if failure.passing else "will not become ready by itself"
    return NotReady(
        f"model {name!r} version {version} failed to load and {hope}: {failure.reason}",
        retry=failure.passing,
        retry_after_s=FIRST_RETRY_S,
    )
