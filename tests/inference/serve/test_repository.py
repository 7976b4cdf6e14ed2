"""Versions come, fail, switch and go while others answer. Real bundles in real stores, on a running event loop."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from modelyard.bundle.format import write_bundle
from modelyard.bundle.store import LocalStore
from modelyard.errors import Cold, DeadlineExceeded, NotReady, RequestError, StoreError, UnknownModel
from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.models.polling import Library
from modelyard.inference.serve.models.repository import (
    REFRESH,
    RELOAD,
    Entry,
    Loaded,
    ModelSettings,
    Pick,
    Repository,
    choose,
    load,
    loader_pool,
    policies_of,
)
from modelyard.inference.serve.models.traffic import Traffic
from modelyard.inference.serve.models.versions import VersionPolicy
from modelyard.testing.bundles import late_content

DELAY = np.array([16.0], dtype=np.float32)
ORIGIN = np.array(["elsewhere"], dtype=object)
PATIENT_S = 60.0


class Shelf:
    """A store whose versions differ: version n of a model answers DELAY with the logit n."""

    def __init__(self, path: Path) -> None:
        self.path = path / "store"
        self.store = LocalStore(self.path)
        self._scratch = path / "scratch"

    def publish(self, name: str = "late") -> int:
        version = max(self.store.versions(name), default=0) + 1
        write_bundle(self._scratch, late_content(name=name, weight=version / 16))
        try:
            return self.store.publish(self._scratch)
        finally:
            shutil.rmtree(self._scratch)

    def publish_corrupt(self, name: str = "late") -> int:
        """Put a version there that nobody has ever seen sound."""
        version = max(self.store.versions(name)) + 1
        beside = shutil.copytree(self.path / name / str(version - 1), self.path / name / ".beside")
        (beside / "model.onnx").write_bytes(b"not what the manifest says")
        beside.rename(self.path / name / str(version))
        return version

    def corrupt(self, version: int, name: str = "late") -> None:
        (self.path / name / str(version) / "model.onnx").write_bytes(b"not what the manifest says")

    def repair(self, version: int, name: str = "late") -> None:
        content = late_content(name=name, weight=version / 16)
        assert isinstance(content.model, bytes)
        (self.path / name / str(version) / "model.onnx").write_bytes(content.model)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


class Gate:
    """Holds loads back until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.n_loads = 0

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def pass_through(self) -> None:
        self.n_loads += 1
        assert self._open.wait(PATIENT_S)


@asynccontextmanager
async def serving(
    shelf: Shelf,
    *,
    policies: dict[str, VersionPolicy] | None = None,
    settings: dict[str, ModelSettings] | None = None,
    gate: Gate | None = None,
    loaded_first: bool = True,
    **options: Any,
) -> AsyncIterator[Repository]:
    """Serve the shelf as a worker does."""

    def settings_of(name: str) -> ModelSettings:
        return (settings or {}).get(name, ModelSettings())

    library = Library(shelf.store, policies, all_models=policies is None, settings=settings_of)

    def load_one(pick: Pick) -> Loaded:
        if gate is not None:
            gate.pass_through()
        return load(shelf.store, pick, settings_of(pick.name))

    repository = Repository(choose(shelf.store, policies or ()), library=library, **options)
    pool = loader_pool()
    loading = asyncio.create_task(repository.load_all(load_one, pool, lambda entry: None))
    try:
        if loaded_first:
            await loading
        yield repository
    finally:
        if gate is not None:
            gate.open()
        loading.cancel()
        repository.close()
        pool.shutdown()


def logit(loaded: Loaded) -> float:
    """Which version's weights answer."""
    assert loaded.compute is not None
    probability = loaded.compute({"delay": DELAY, "origin": ORIGIN})["probability"][0]
    return round(float(np.log(probability / (1 - probability))), 3)


def states(repository: Repository, name: str = "late") -> dict[int, str]:
    return {entry.version: entry.state for entry in repository.entries(name)}


def never(what: object) -> None:
    """Must not be called."""
    pytest.fail(f"called with {what!r}")


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not is_so():
            await asyncio.sleep(0.001)


def call(on_done: Callable[[Call], None] | None = None) -> Call:
    """A call of the row above."""
    made = Call((DELAY.tobytes(), ["elsewhere"]), 1)
    made.arrived_s = perf_counter()
    made.deadline_s = made.arrived_s + PATIENT_S
    if on_done is not None:
        made.on_done = on_done
    return made


async def answer(loaded: Loaded) -> Call:
    """Send a call through the executor, as the front does."""
    future: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
    made = call(future.set_result)
    made.loaded = loaded
    loaded.executor.submit(made)
    return await future


# Versions and labels.


async def _the_default_policy(shelf: Shelf) -> None:
    for _ in range(3):
        shelf.publish()
    shelf.store.tag("late", "champion", 2)
    async with serving(shelf) as repository:
        assert repository.ready
        assert states(repository) == {2: "ready"}
        assert logit(repository.pick("late")) == 2
        assert logit(repository.pick("late", "2")) == 2
        assert logit(repository.pick("late", label="champion")) == 2
        with pytest.raises(UnknownModel, match="version '3' of model 'late' is not served here; there are: 2"):
            repository.pick("late", "3")
        with pytest.raises(UnknownModel, match="has the label 'stable'; there are the labels champion"):
            repository.pick("late", label="stable")
        with pytest.raises(UnknownModel, match="no model 'nobody' is served here; there are: late"):
            repository.pick("nobody")


def test_the_champion_answers_by_default_by_number_and_by_label(shelf: Shelf) -> None:
    asyncio.run(_the_default_policy(shelf))


async def _several_versions(shelf: Shelf) -> None:
    for _ in range(4):
        shelf.publish()
    shelf.store.tag("late", "champion", 2)
    shelf.store.tag("late", "challenger", 4)
    async with serving(shelf, policies={"late": VersionPolicy(all=True)}) as repository:
        assert list(states(repository)) == [2, 4, 3, 1]
        assert [logit(repository.pick("late", str(version))) for version in (1, 2, 3, 4)] == [1, 2, 3, 4]
        assert logit(repository.pick("late", label="challenger")) == 4
        assert repository.labels("late") == {"challenger": 4, "champion": 2}
    async with serving(shelf, policies=policies_of(["late=challenger", "late=1"])) as repository:
        assert list(states(repository)) == [4, 1]
        assert logit(repository.pick("late")) == 4


def test_several_versions_are_served_side_by_side(shelf: Shelf) -> None:
    asyncio.run(_several_versions(shelf))


# Hot reload.


async def _a_new_champion(shelf: Shelf) -> None:
    shelf.publish()
    said: list[str] = []
    gone: list[tuple[str, int, str]] = []
    async with serving(shelf, log=said.append, on_unload=lambda *what: gone.append(what)) as repository:
        first = repository.pick("late")
        shelf.publish()
        shelf.store.tag("late", "champion", 2)
        await repository.apply(REFRESH)
        await eventually(lambda: bool(gone))
        assert logit(repository.pick("late")) == 2
        assert states(repository) == {2: "ready"}
        assert gone == [("late", 1, "replaced")]
        assert first.compute is None
        assert "late version 2: loaded in" in said[0]
        assert "answers in the place of version 1" in said[0]
        # And back again: a tag moved to an older version is a rollback.
        shelf.store.tag("late", "champion", 1)
        answered = await repository.apply(RELOAD)
        assert answered["models"] == [{"name": "late", "version": 1, "state": "ready", "reason": ""}]
        assert logit(repository.pick("late")) == 1


def test_a_moved_tag_is_followed_and_the_old_version_leaves(shelf: Shelf) -> None:
    asyncio.run(_a_new_champion(shelf))


async def _beside(shelf: Shelf) -> None:
    shelf.publish()
    gate = Gate()
    gate.open()
    async with serving(shelf, gate=gate) as repository:
        gate.close()
        shelf.publish()
        reloading = asyncio.create_task(repository.apply(RELOAD))
        await eventually(lambda: gate.n_loads == 2)
        assert states(repository) == {1: "ready", 2: "loading"}
        assert repository.ready
        assert logit(repository.pick("late")) == 1
        with pytest.raises(Cold, match="version 2 is loading"):
            repository.pick("late", "2")
        gate.open()
        await reloading
        assert logit(repository.pick("late")) == 2


def test_a_version_loads_beside_the_one_that_answers(shelf: Shelf) -> None:
    asyncio.run(_beside(shelf))


class Slow:
    """Stands before an engine and holds its runs back."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.name = engine.name
        self.running = threading.Event()
        self.go_on = threading.Event()
        self.closed = False

    def run(self, inputs: Any) -> Any:
        self.running.set()
        assert self.go_on.wait(PATIENT_S)
        assert not self.closed
        return self._engine.run(inputs)

    def close(self) -> None:
        self.closed = True
        self._engine.close()


async def _drain(shelf: Shelf) -> None:
    shelf.publish()
    async with serving(shelf) as repository:
        old = repository.pick("late")
        slow = old.executor._engine = Slow(old.executor._engine)
        old.executor._inline_below_s = 0.0
        asked = asyncio.create_task(answer(old))
        queued = asyncio.create_task(answer(old))
        await eventually(slow.running.is_set)
        shelf.publish()
        answered = await repository.apply(RELOAD)
        assert "error" not in answered
        assert logit(repository.pick("late")) == 2
        assert repository.index()[0]["state"] == "UNLOADING"
        await asyncio.sleep(0.05)  # what waits for calls to end has had its chance to be hasty
        assert not slow.closed
        slow.go_on.set()
        for one in (await asked, await queued):
            assert one.error is None
            assert one.output("probability")[0] == pytest.approx(1 / (1 + np.exp(-1.0)))
        await eventually(lambda: slow.closed)
        await eventually(lambda: [one["version"] for one in repository.index(only_ready=True)] == ["2"])


def test_calls_in_flight_finish_on_the_version_they_began_on(shelf: Shelf) -> None:
    asyncio.run(_drain(shelf))


async def _rolling(shelf: Shelf) -> None:
    shelf.publish()
    async with serving(shelf) as repository:
        stop = asyncio.Event()
        picked: list[int] = []

        async def ask() -> None:
            while not stop.is_set():
                loaded = repository.pick("late")
                picked.append(loaded.version)
                done = await answer(loaded)
                assert done.error is None
                probability = float(done.output("probability")[0])
                assert round(float(np.log(probability / (1 - probability)))) == loaded.version

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for _ in range(5):
            shelf.publish()
            assert "error" not in await repository.apply(RELOAD)
        n_before = len(picked)
        await eventually(lambda: len(picked) > n_before + 8)
        stop.set()
        await asyncio.gather(*asking)
        assert picked == sorted(picked)  # each switch is one step and never goes back
        assert set(picked) >= {1, 6}


def test_no_call_fails_while_version_follows_version(shelf: Shelf) -> None:
    asyncio.run(_rolling(shelf))


# What goes wrong.


async def _a_corrupt_version(shelf: Shelf) -> None:
    shelf.publish()
    said: list[str] = []
    gate = Gate()
    gate.open()
    async with serving(shelf, log=said.append, gate=gate) as repository:
        shelf.publish()
        shelf.corrupt(2)
        answered = await repository.apply(RELOAD)
        assert "error" not in answered  # nothing was asked for by name; the state tells
        assert states(repository) == {1: "ready", 2: "failed"}
        assert logit(repository.pick("late")) == 1
        with pytest.raises(
            NotReady, match=r"version 2 failed to load and will not become ready by itself.*fetch the bundle"
        ):
            repository.pick("late", "2")
        (failed,) = [one for one in repository.index() if one["version"] == "2"]
        assert failed["state"] == "UNAVAILABLE"
        assert "fetch the bundle again" in failed["reason"]
        assert said == [f"late version 2: cannot be loaded: {failed['reason']}; version 1 keeps answering"]
        n_loads = gate.n_loads
        await repository.apply(REFRESH)
        await repository.apply(REFRESH)
        assert gate.n_loads == n_loads  # the same bytes would fail the same way
        shelf.repair(2)
        await repository.apply(REFRESH)
        await eventually(lambda: states(repository) == {2: "ready"})
        assert logit(repository.pick("late")) == 2


def test_a_corrupt_version_leaves_the_old_one_answering_until_it_is_repaired(shelf: Shelf) -> None:
    asyncio.run(_a_corrupt_version(shelf))


async def _a_failing_disk(shelf: Shelf) -> None:
    shelf.publish()
    shelf.publish()
    shelf.store.tag("late", "champion", 1)
    fails = [False]

    async def run() -> None:
        library = Library(shelf.store)

        def load_one(pick: Pick) -> Loaded:
            if fails[0]:
                raise OSError(28, "No space left on device")
            return load(shelf.store, pick)

        said: list[str] = []
        repository = Repository([Pick("late", 1)], library=library, log=said.append)
        with loader_pool() as pool:
            await repository.load_all(load_one, pool, lambda entry: None)
            fails[0] = True
            shelf.store.tag("late", "champion", 2)
            await repository.apply(RELOAD)
            assert states(repository) == {1: "ready", 2: "failed"}
            assert "No space left on device" in said[0]
            with pytest.raises(NotReady, match="is tried again now and then"):
                repository.pick("late", "2")
            assert logit(repository.pick("late")) == 1
            fails[0] = False
            await eventually(lambda: states(repository) == {2: "ready"})  # by itself
            repository.close()

    await run()


def test_a_full_disk_leaves_the_old_version_answering_and_is_tried_again(shelf: Shelf) -> None:
    asyncio.run(_a_failing_disk(shelf))


async def _a_lost_store(shelf: Shelf) -> None:
    shelf.publish()
    said: list[str] = []
    async with serving(shelf, log=said.append) as repository:
        away = shelf.path.rename(shelf.path.with_name("away"))
        answered = await repository.apply(REFRESH)
        assert answered["status"] == 503
        assert "the store's folder is not there" in answered["error"]
        assert repository.trouble == answered["error"]
        assert logit(repository.pick("late")) == 1
        shelf.path.mkdir()  # an empty mount point
        assert "error" not in await repository.apply(REFRESH)
        assert logit(repository.pick("late")) == 1
        shelf.path.rmdir()
        away.rename(shelf.path)
        shelf.publish()
        assert "error" not in await repository.apply(RELOAD)
        assert logit(repository.pick("late")) == 2
        assert said[0].startswith("the store cannot be read, what is loaded keeps answering")
        assert said[1] == "the store can be read again"


def test_a_store_out_of_reach_changes_nothing(shelf: Shelf) -> None:
    asyncio.run(_a_lost_store(shelf))


async def _a_removed_tag(shelf: Shelf) -> None:
    shelf.publish()
    shelf.store.tag("late", "stable", 1)
    async with serving(shelf, policies=policies_of(["late=stable"])) as repository:
        shelf.store.tag("late", "stable", None)
        await repository.apply(RELOAD)
        assert logit(repository.pick("late")) == 1


def test_a_tag_that_is_taken_away_does_not_end_the_service(shelf: Shelf) -> None:
    asyncio.run(_a_removed_tag(shelf))


async def _nothing_loads(shelf: Shelf) -> None:
    shelf.publish()
    shelf.corrupt(1)
    changes: list[Entry] = []
    repository = Repository(choose(shelf.store), library=Library(shelf.store))
    with loader_pool() as pool:
        await repository.load_all(lambda pick: load(shelf.store, pick), pool, changes.append)
        assert not repository.ready
        assert [change.state for change in changes] == ["failed"]
        repository.close()


def test_a_server_of_nothing_but_failures_is_not_ready(shelf: Shelf) -> None:
    asyncio.run(_nothing_loads(shelf))


async def _a_bug(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")

    def load_one(pick: Pick) -> Loaded:
        if pick.name == "a":
            raise ZeroDivisionError("a bug")
        return load(shelf.store, pick)

    repository = Repository(choose(shelf.store))
    with loader_pool() as pool:
        await repository.load_all(load_one, pool, lambda entry: None)
        assert repository.entry("a").reason.startswith("internal error, see the server's log: ZeroDivisionError")
        assert logit(repository.pick("b")) == 1
        repository.close()


def test_a_bug_in_loading_one_model_does_not_keep_others_from_it(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(_a_bug(shelf))
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


# Watching the store.


async def _watching(shelf: Shelf) -> None:
    shelf.publish()
    async with serving(shelf) as repository:
        n_broadcasts = 0

        async def broadcast(command: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
            nonlocal n_broadcasts
            n_broadcasts += 1
            return [(0, await repository.apply(command))]

        watching = asyncio.create_task(repository.watch(0.001, broadcast))
        await eventually(lambda: n_broadcasts == 1)
        shelf.publish()
        await eventually(lambda: logit(repository.pick("late")) == 2)
        shelf.publish("other")
        await eventually(
            lambda: repository.names() == ("late", "other") and states(repository, "other") == {1: "ready"}
        )
        shelf.publish_corrupt()
        await eventually(lambda: states(repository).get(3) == "failed")
        n_before = n_broadcasts
        shutil.copyfile(shelf.path / "late" / "2" / "model.onnx", shelf.path / "late" / "3" / "model.onnx")
        await eventually(lambda: repository.pick("late").version == 3)
        assert n_broadcasts > n_before
        watching.cancel()


def test_the_watch_follows_versions_models_tags_and_repairs(shelf: Shelf) -> None:
    asyncio.run(_watching(shelf))


# Load and unload by call.


async def _load_and_unload(shelf: Shelf) -> None:
    shelf.publish()
    async with serving(shelf) as repository:
        unloaded = await repository.apply({"command": "unload", "model": "late"})
        assert unloaded == {"models": []}
        assert repository.names() == ()
        with pytest.raises(UnknownModel, match="it was unloaded: load it with POST"):
            repository.pick("late")
        assert repository.index() == [
            {"name": "late", "version": "1", "state": "UNAVAILABLE", "reason": "is not served"}
        ]
        shelf.publish()
        await repository.apply(RELOAD)
        assert repository.names() == ()  # the store may say what it likes
        assert await repository.apply({"command": "unload", "model": "late"}) == {"models": []}
        for _ in range(2):
            answered = await repository.apply({"command": "load", "model": "late"})
            assert answered["models"] == [{"name": "late", "version": 2, "state": "ready", "reason": ""}]
        answered = await repository.apply({"command": "load", "model": "late", "policy": "all"})
        assert {model["version"] for model in answered["models"]} == {1, 2}
        shelf.publish()
        shelf.corrupt(3)
        answered = await repository.apply({"command": "load", "model": "late", "policy": {"latest": 1}})
        assert answered["status"] == 400
        assert answered["error"].startswith("failed to load 'late': version 3:")
        assert answered["error"].endswith("version 2 keeps answering")
        assert (await repository.apply({"command": "load", "model": "nobody"}))["status"] == 404
        assert (await repository.apply({"command": "unload", "model": "nobody"}))["status"] == 404
        assert (await repository.apply({"command": "sing"}))["status"] == 400


def test_models_are_loaded_and_unloaded_by_call_as_often_as_one_likes(shelf: Shelf) -> None:
    asyncio.run(_load_and_unload(shelf))


async def _unload_while_loading(shelf: Shelf) -> None:
    shelf.publish()
    gate = Gate()
    async with serving(shelf, gate=gate, loaded_first=False) as repository:
        await eventually(lambda: gate.n_loads == 1)
        unloading = asyncio.create_task(repository.apply({"command": "unload", "model": "late"}))
        await asyncio.sleep(0)
        assert not unloading.done()
        gate.open()
        assert await unloading == {"models": []}
        assert repository.index()[0]["state"] == "UNAVAILABLE"


def test_an_unload_outlasts_the_load_it_meets(shelf: Shelf) -> None:
    asyncio.run(_unload_while_loading(shelf))


# Cold models.


async def _lazy(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")
    gate = Gate()
    async with serving(shelf, gate=gate, lazy=True) as repository:
        assert repository.ready
        assert states(repository, "a") == {1: "unloaded"}
        assert repository.entry("a").answers
        assert [spec.name for spec in repository.signature(repository.entry("a")).inputs] == ["delay", "origin"]
        with pytest.raises(Cold) as caught:
            repository.pick("a")
        assert (caught.value.name, caught.value.version, caught.value.status) == ("a", 1, 503)
        got: list[Loaded] = []
        for _ in range(100):
            repository.when_ready(caught.value, perf_counter() + PATIENT_S, got.append, never)
        await eventually(lambda: gate.n_loads == 1)
        assert states(repository, "a") == {1: "loading"}
        assert repository.ready
        gate.open()
        await eventually(lambda: len(got) == 100)
        assert set(map(id, got)) == {id(repository.pick("a"))}
        assert gate.n_loads == 1
        assert states(repository, "b") == {1: "unloaded"}
        assert logit(await repository.ready_one("b")) == 1


def test_a_cold_model_is_loaded_once_for_all_who_wait(shelf: Shelf) -> None:
    asyncio.run(_lazy(shelf))


async def _late_for_a_load(shelf: Shelf) -> None:
    shelf.publish()
    gate = Gate()
    async with serving(shelf, gate=gate, lazy=True) as repository:
        with pytest.raises(Cold) as caught:
            repository.pick("late")
        errors: list[Exception] = []
        got: list[Loaded] = []
        repository.when_ready(caught.value, perf_counter() + 0.01, never, errors.append)
        forget = repository.when_ready(caught.value, perf_counter() + PATIENT_S, never, never)
        repository.when_ready(caught.value, perf_counter() + PATIENT_S, got.append, never)
        forget()
        await eventually(lambda: bool(errors))
        assert isinstance(errors[0], DeadlineExceeded)
        assert errors[0].retry_after_s > 0
        assert "is being loaded, which takes longer than this request may wait" in str(errors[0])
        gate.open()
        await eventually(lambda: bool(got))  # the load went on


def test_a_request_waits_for_a_load_no_longer_than_its_deadline(shelf: Shelf) -> None:
    asyncio.run(_late_for_a_load(shelf))


async def _cold_and_corrupt(shelf: Shelf) -> None:
    shelf.publish()
    shelf.corrupt(1)
    async with serving(shelf, lazy=True) as repository:
        with pytest.raises(NotReady, match=r"failed to load.*fetch the bundle again"):
            await repository.ready_one("late")
        with pytest.raises(NotReady, match="will not become ready by itself"):
            repository.pick("late")


def test_who_waits_for_a_version_that_cannot_be_loaded_is_told_why(shelf: Shelf) -> None:
    asyncio.run(_cold_and_corrupt(shelf))


async def _pinned_and_lazy(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")
    policies = {"a": VersionPolicy(), "b": VersionPolicy()}
    async with serving(shelf, policies=policies, settings={"a": ModelSettings(pinned=True)}, lazy=True) as repository:
        assert states(repository, "a") == {1: "ready"}
        assert states(repository, "b") == {1: "unloaded"}


def test_a_pinned_model_is_loaded_at_the_start_all_the_same(shelf: Shelf) -> None:
    asyncio.run(_pinned_and_lazy(shelf))


# The memory budget.

MIB = 2**20


def sized(**mib: int) -> dict[str, ModelSettings]:
    return {name: ModelSettings(memory_bytes=size * MIB) for name, size in mib.items()}


async def _budget(shelf: Shelf) -> None:
    for name in ("a", "b", "c"):
        shelf.publish(name)
    gone: list[tuple[str, int, str]] = []
    settings = sized(a=40, b=40, c=40)
    options: dict[str, Any] = {"memory_budget_bytes": 100 * MIB, "on_unload": lambda *what: gone.append(what)}
    async with serving(shelf, settings=settings, **options) as repository:
        # Two fit; nobody is driven out at the start for a third that nobody has asked.
        assert [states(repository, name)[1] for name in "abc"] == ["ready", "ready", "unloaded"]
        assert gone == []
        repository.pick("a")
        assert logit(await repository.ready_one("c")) == 1
        assert [states(repository, name)[1] for name in "abc"] == ["ready", "unloaded", "ready"]
        # Asked in turns, each drives out the one that was asked longest ago.
        for name in "abcabc":
            await repository.ready_one(name)
            repository.observe()
        await eventually(lambda: states(repository, "a") == {1: "unloaded"})
        assert states(repository, "b") == states(repository, "c") == {1: "ready"}
        assert {cause for _, _, cause in gone} == {"evicted"}
        assert repository.signature(repository.entry("a")).inputs[0].name == "delay"
        assert repository.ready


def test_the_least_recently_used_model_leaves_for_one_that_is_asked(shelf: Shelf) -> None:
    asyncio.run(_budget(shelf))


async def _busy_ones_stay(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")
    async with serving(shelf, settings=sized(a=60, b=60), memory_budget_bytes=100 * MIB, lazy=True) as repository:
        a = await repository.ready_one("a")
        await repository.ready_one("b")
        await eventually(lambda: states(repository, "a") == {1: "unloaded"})
        a = await repository.ready_one("a")
        slow = a.executor._engine = Slow(a.executor._engine)
        a.executor._inline_below_s = 0.0
        asked = asyncio.create_task(answer(a))
        await eventually(slow.running.is_set)
        waiting = asyncio.create_task(repository.ready_one("b"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert states(repository, "a") == {1: "ready"}
        slow.go_on.set()
        assert (await asked).error is None
        assert logit(await waiting) == 1
        assert states(repository, "a") == {1: "unloaded"}


def test_a_model_with_calls_in_flight_is_not_driven_out(shelf: Shelf) -> None:
    asyncio.run(_busy_ones_stay(shelf))


async def _on_its_way_out(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")
    async with serving(shelf, settings=sized(a=60, b=60), memory_budget_bytes=100 * MIB, lazy=True) as repository:
        a = await repository.ready_one("a")
        closing, go_on = threading.Event(), threading.Event()
        engine = a.executor._engine
        close = engine.close

        def slowly() -> None:
            closing.set()
            assert go_on.wait(PATIENT_S)
            close()

        engine.close = slowly  # type: ignore[method-assign]  # the real one, later
        waiting = asyncio.create_task(repository.ready_one("b"))
        await eventually(closing.is_set)
        assert states(repository, "a") == {1: "draining"}
        with pytest.raises(Cold):
            repository.pick("a")
        again = asyncio.create_task(repository.ready_one("a"))
        go_on.set()
        assert (await waiting).name == "b"  # which has to leave for a at once
        assert logit(await again) == 1


def test_a_version_that_leaves_for_another_is_asked_no_more(shelf: Shelf) -> None:
    asyncio.run(_on_its_way_out(shelf))


async def _too_large(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")
    policies = {"a": VersionPolicy(), "b": VersionPolicy()}
    settings = {"a": ModelSettings(memory_bytes=60 * MIB, pinned=True), "b": ModelSettings(memory_bytes=60 * MIB)}
    async with serving(
        shelf, policies=policies, settings=settings, memory_budget_bytes=100 * MIB, lazy=True
    ) as repository:
        with pytest.raises(NotReady, match=r"needs about 60 MiB beside 60 MiB that must stay.*raise --memory-budget"):
            await repository.ready_one("b")
        assert states(repository, "a") == {1: "ready"}


def test_what_cannot_fit_beside_the_pinned_is_told_so(shelf: Shelf) -> None:
    asyncio.run(_too_large(shelf))


# Traffic.


async def _split(shelf: Shelf) -> None:
    shelf.publish()
    shelf.publish()
    async with serving(shelf, policies=policies_of(["late=1"])) as repository:
        command = {"command": "traffic", "model": "late", "traffic": {"split": {"1": 0.75, "2": 0.25}}}
        for _ in range(2):
            answered = await repository.apply(command)
            assert answered["split"] == {"1": 0, "2": 0}
        assert states(repository) == {1: "ready", 2: "ready"}
        picked = [repository.pick("late").version for _ in range(400)]
        assert abs(picked.count(2) - 100) <= 2
        sticky = {key: repository.pick("late", key=key).version for key in (b"%d" % i for i in range(100))}
        assert set(sticky.values()) == {1, 2}
        assert all(repository.pick("late", key=key).version == version for key, version in sticky.items())
        assert {repository.pick("late", "1").version for _ in range(20)} == {1}
        counted = await repository.apply({"command": "traffic counts", "model": "late"})
        assert sum(counted["split"].values()) == 600
        await repository.apply({"command": "traffic", "model": "late", "traffic": {}})
        assert {repository.pick("late").version for _ in range(20)} == {1}
        await eventually(lambda: states(repository) == {1: "ready"})  # nobody needs the other any more
        answered = await repository.apply({"command": "traffic", "model": "late", "traffic": {"split": {"7": 1}}})
        assert (answered["status"], answered["error"]) == (404, "late has no version 7; there are versions 1, 2")
        answered = await repository.apply({"command": "traffic", "model": "late", "traffic": {"splits": {}}})
        assert answered["status"] == RequestError.status
        shelf.corrupt(2)
        answered = await repository.apply(command)
        assert answered["status"] == 400
        assert {repository.pick("late").version for _ in range(20)} == {1}


def test_requests_are_split_between_versions_and_sticky_by_key(shelf: Shelf) -> None:
    asyncio.run(_split(shelf))


async def _shadow(shelf: Shelf) -> None:
    shelf.publish()
    shelf.publish()
    async with serving(shelf, policies=policies_of(["late=1"]), traffic={"late": Traffic(shadow=2)}) as repository:
        first = repository.pick("late")
        assert first.shadow is not None
        for _ in range(10):
            done = await answer(first)
            assert done.output("probability")[0] == pytest.approx(1 / (1 + np.exp(-1.0)))
            first.shadow.offer(done)

        async def counts() -> Any:
            return (await repository.apply({"command": "traffic counts", "model": "late"}))["shadow"]

        while (await counts())["rows"] < 10:
            await asyncio.sleep(0.001)
        found = await counts()
        assert (found["agreed"], found["differed"], found["failed"], found["skipped"]) == (10, 0, 0, 0)
        assert found["max_abs_difference"] == pytest.approx(1 / (1 + np.exp(-2.0)) - 1 / (1 + np.exp(-1.0)))
        await repository.apply({"command": "traffic", "model": "late", "traffic": {}})
        assert first.shadow is None


def test_a_shadow_answers_nobody_and_its_differences_are_counted(shelf: Shelf) -> None:
    asyncio.run(_shadow(shelf))


# The end.


async def _draining(shelf: Shelf) -> None:
    shelf.publish()
    async with serving(shelf) as repository:
        repository.drain()
        assert not repository.ready
        assert states(repository) == {1: "draining"}
        assert logit(repository.pick("late")) == 1


def test_while_the_server_drains_what_is_loaded_goes_on_answering(shelf: Shelf) -> None:
    asyncio.run(_draining(shelf))


def test_a_store_error_is_not_confused_with_a_bad_bundle() -> None:
    from modelyard.errors import DigestMismatch, NotInStore
    from modelyard.inference.serve.models.polling import is_passing

    assert is_passing(StoreError("out of reach"))
    assert is_passing(OSError(28, "No space left on device"))
    assert not is_passing(NotInStore("gone"))
    assert not is_passing(DigestMismatch("wrong"))
