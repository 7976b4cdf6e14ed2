"""The versions in memory: loaded one at a time, kept within a budget, drained of their calls, and freed.

    repository.py says which are wanted → `Memory` → loading.py, on the loader's thread → repository.py is told

What to evict is decided in residency.py. Everything here belongs to the event loop; loading and freeing happen on the pool.
"""

import asyncio
import contextlib
import sys
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Executor as Pool
from time import perf_counter

from modelyard.errors import ConfigError, NotReady
from modelyard.inference.serve.models.loading import Loaded, Pick
from modelyard.inference.serve.models.residency import Key, Resident, can_ever_fit, evictions

_LOOK_AGAIN_S = 0.02
_SWITCH_S = 5e-4
"""Python gives the interpreter lock to the next thread after 5 ms by default: half the target of a fast model."""
_ROOM_WITHIN_S = 60.0
"""How long a load waits for busy models to fall idle."""


class Memory:
    """Loads what is wanted, urgent ones first, and frees what is released. `start` before anything else."""

    def __init__(
        self,
        budget_bytes: int | None,
        *,
        is_kept: Callable[[Key], bool],
        expected_bytes: Callable[[Key], int],
        on_loaded: Callable[[Key, Loaded], None],
        on_failed: Callable[[Key, Exception], None],
        on_cold: Callable[[Key], None],
        on_evicted: Callable[[Key], None],
        on_freed: Callable[[Key, str], None],
        free: Callable[[Loaded], None] = Loaded.close,
    ) -> None:
        """
        Args:
            budget_bytes: for all models of this process; None: as much as there is.
            is_kept: whether a version must not leave for another.
            expected_bytes: what a version will need, as far as anybody knows before it is loaded.
            on_loaded, on_failed: told how each load ended.
            on_cold: told of a version that found no room, and would have had to drive out others; nothing is wrong with it.
            on_evicted: told when a version begins to leave for another; nobody may ask it from then on.
            on_freed: told when a version's memory has been given back, and the cause given to `release`.
            free: gives it back; called on the pool.
        """
        self.budget_bytes = budget_bytes
        self.resident: dict[Key, Loaded] = {}
        self.draining: dict[Key, Loaded] = {}
        self.loading: Key | None = None
        self.serving = False
        """The first loads are done, and what is loaded answers: later ones must not slow it down."""
        self._is_kept, self._expected_bytes = is_kept, expected_bytes
        self._on_loaded, self._on_failed, self._on_cold = on_loaded, on_failed, on_cold
        self._on_evicted, self._on_freed = on_evicted, on_freed
        self._free = free
        self._urgent: dict[Key, None] = {}
        self._patient: dict[Key, bool] = {}  # → whether others may be driven out for it
        self._used_s: dict[Key, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._freed = asyncio.Event()

    def start(
        self, load_one: Callable[[Pick], Loaded], pool: Pool, load_beside: Callable[[Pick], Loaded] | None = None
    ) -> None:
        """Begin to load what is wanted, and free what is not. All are called on `pool`.

        Args:
            load_beside: loads a version that nobody waits for while others answer, see `serving`.
        """
        self._loop = asyncio.get_running_loop()
        self._load_one, self._load_beside, self._pool = load_one, load_beside or load_one, pool
        self._spawn(self._work())

    # What is wanted.

    def want(self, key: Key, *, urgent: bool = False, may_evict: bool = True) -> None:
        """Have a version loaded, before others if `urgent`. One that is resident already stays so."""
        if key in self.resident or key == self.loading:
            return
        if urgent:
            self._patient.pop(key, None)
            self._urgent[key] = None
        elif key not in self._urgent:
            self._patient[key] = may_evict
        self._wake.set()

    def unwant(self, key: Key) -> None:
        """Load it no more, if that has not begun."""
        self._urgent.pop(key, None)
        self._patient.pop(key, None)

    def pending(self) -> tuple[Key, ...]:
        """Return what will be loaded, in order, but for what is being loaded."""
        return (*self._urgent, *self._patient)

    def is_pending(self, key: Key) -> bool:
        """Whether it is being loaded, or will be."""
        return key == self.loading or key in self._urgent or key in self._patient

    def release(self, key: Key, cause: str) -> None:
        """Let a resident version finish its calls and free its memory. Nobody may ask it any more."""
        loaded = self.resident.pop(key)
        self.draining[key] = loaded
        self._used_s.pop(key, None)
        self._spawn(self._drain(key, loaded, cause))

    def _evict(self, key: Key) -> None:
        self.release(key, "evicted")
        self._on_evicted(key)

    # Who stays.

    def note_use(self) -> None:
        """Take note of which versions were asked since the last time."""
        now_s = perf_counter()
        for key, loaded in self.resident.items():
            if loaded.touched:
                loaded.touched = False
                self._used_s[key] = now_s

    @property
    def used_bytes(self) -> int:
        return sum(loaded.memory_bytes for loaded in (*self.resident.values(), *self.draining.values()))

    def shrink(self, spare: Collection[Key] = ()) -> bool:
        """Drive out the least recently used until the rest fits the budget, but for `spare`; whether it does now."""
        if self.budget_bytes is None:
            return True
        leaving = evictions(self._residents(spare), 0, self.budget_bytes)
        for key in leaving or ():
            self._evict(key)
        return leaving is not None

    def _residents(self, spare: Collection[Key] = ()) -> list[Resident]:
        self.note_use()
        return [
            Resident(
                key,
                loaded.memory_bytes,
                self._used_s.get(key, 0.0),
                loaded.pinned or key in spare or self._is_kept(key),
                loaded.busy,
            )
            for key, loaded in self.resident.items()
        ]

    async def _make_room(self, key: Key, *, may_evict: bool) -> bool:
        """Wait until the version is expected to fit; False where it does not and may not drive out others.

        Raises:
            ConfigError: it never will.
            NotReady: those that could leave have been busy for too long.
        """
        budget_bytes = self.budget_bytes
        if budget_bytes is None:
            return True
        needed_bytes = self._expected_bytes(key)
        give_up_s = perf_counter() + _ROOM_WITHIN_S
        while True:
            residents = self._residents()
            if not can_ever_fit(residents, needed_bytes, budget_bytes):
                staying_bytes = sum(one.memory_bytes for one in residents if one.pinned)
                beside = f" beside {_shown(staying_bytes)} that must stay" if staying_bytes else ""
                or_else = ", or pin fewer models" if any(loaded.pinned for loaded in self.resident.values()) else ""
                raise ConfigError(
                    f"needs about {_shown(needed_bytes)}{beside}, and the memory budget is {_shown(budget_bytes)}; "
                    f"raise --memory-budget{or_else}"
                )
            leaving = evictions(residents, needed_bytes, budget_bytes)
            if leaving is not None and not leaving:
                if not self.draining:
                    return True
                self._freed.clear()
                await self._freed.wait()  # their memory counts until it is back
                continue
            if not may_evict:
                return False
            for other in leaving or ():
                self._evict(other)
            if leaving is None:
                if perf_counter() > give_up_s:
                    raise NotReady("every model that could leave memory for it has been busy for too long")
                await asyncio.sleep(_LOOK_AGAIN_S)

    # One after the other.

    async def _work(self) -> None:
        while True:
            key, may_evict, urgent = self._next()
            if key is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self.loading = key
            try:
                if not await self._make_room(key, may_evict=may_evict):
                    self.loading = None
                    self._on_cold(key)
                    continue
                loaded = await self._load(Pick(*key), urgent=urgent)
            except Exception as exc:  # noqa: BLE001  # one that cannot be loaded must not keep others from it
                self.loading = None
                self._on_failed(key, exc)
            else:
                self.loading = None
                self.resident[key] = loaded
                self._used_s[key] = perf_counter()
                self._on_loaded(key, loaded)

    async def _load(self, pick: Pick, *, urgent: bool) -> Loaded:
        """Load on the pool; meanwhile whoever waits for the interpreter lock asks for it sooner than by default."""
        usual_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        try:
            nobody_waits = not urgent or any(name == pick.name for name, _ in self.resident)
            load = self._load_beside if self.serving and nobody_waits else self._load_one
            return await self._loop.run_in_executor(self._pool, load, pick)
        finally:
            sys.setswitchinterval(usual_s)

    def _next(self) -> tuple[Key | None, bool, bool]:
        """Take the next version to load: whether it may evict, and is urgent; one still being freed has to wait for that."""
        for key in self._urgent:
            if key not in self.draining:
                del self._urgent[key]
                return key, True, True
        for key, may_evict in self._patient.items():
            if key not in self.draining:
                del self._patient[key]
                return key, may_evict, False
        return None, False, False

    async def _drain(self, key: Key, loaded: Loaded, cause: str) -> None:
        wait_s = 1e-3
        while loaded.busy:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 0.05)
        with contextlib.suppress(RuntimeError):  # the pool is shut down: the process ends
            await self._loop.run_in_executor(self._pool, self._free, loaded)
        del self.draining[key]
        self._freed.set()
        self._wake.set()
        self._on_freed(key, cause)

    def _spawn(self, coroutine: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:  # a bug
            sys.stderr.write("".join(traceback.format_exception(exc)))

    def close(self) -> None:
        """Free what is resident; runs in progress are finished first, no load is waited for."""
        for task in self._tasks:
            task.cancel()
        for loaded in self.resident.values():
            loaded.close()
        self.resident.clear()


def _shown(n_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.4g} {unit}"
    return f"{n_bytes} bytes"
