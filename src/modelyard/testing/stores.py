"""The suite that every Store passes. Inherit from StoreTests and say how to make yours:

    class TestMyStore(StoreTests):
        @pytest.fixture
        def open_store(self, tmp_path):
            return lambda: MyStore(tmp_path)

Each call of `open_store` must give a new object for the same store, as another process would have one.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelyard.bundle.format import read_bundle
from modelyard.bundle.profile import Latency, Profile, add_profile, fingerprint
from modelyard.bundle.store import Store
from modelyard.errors import BundleError, NotInStore, StoreError, TagConflict
from modelyard.testing.bundles import late_bundle

OpenStore = Callable[[], Store]


class StoreTests:
    """What publishers, readers and movers of tags rely on."""

    @pytest.fixture
    def open_store(self) -> OpenStore:
        """Return a function that opens one empty store; override it."""
        raise NotImplementedError("override the fixture open_store")

    @pytest.fixture
    def store(self, open_store: OpenStore) -> Store:
        return open_store()

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Path:
        return late_bundle(tmp_path / "a-bundle").path

    def test_an_empty_store_has_no_names(self, store: Store) -> None:
        assert store.names() == ()
        assert store.versions("late") == ()
        assert store.tags("late") == {}

    def test_versions_count_from_one_and_are_seen_by_others(
        self, store: Store, open_store: OpenStore, bundle: Path
    ) -> None:
        assert [store.publish(bundle), store.publish(bundle), open_store().publish(bundle, "other")] == [1, 2, 1]
        assert open_store().names() == store.names() == ("late", "other")
        assert open_store().versions("late") == store.versions("late") == (1, 2)

    def test_what_is_fetched_is_the_bundle_that_was_published(self, store: Store, bundle: Path) -> None:
        add_profile(bundle / "profile.json", _profile())
        (bundle / "stray.txt").write_text("not listed in the manifest")
        version = store.publish(bundle)
        fetched = store.fetch("late", version)
        assert read_bundle(fetched).manifest == read_bundle(bundle).manifest
        assert read_bundle(fetched).profiles() == (_profile(),)
        assert not (fetched / "stray.txt").exists()
        assert store.fetch("late", version) == fetched

    def test_versions_keep_their_own_content(self, store: Store, tmp_path: Path) -> None:
        digests = []
        for weight in (1.0, 2.0):
            made = late_bundle(tmp_path / str(weight), weight=weight)
            digests.append(made.digest)
            store.publish(made.path)
        assert [read_bundle(store.fetch("late", version)).digest for version in (1, 2)] == digests

    def test_a_damaged_bundle_is_not_published(self, store: Store, bundle: Path) -> None:
        (bundle / "model.onnx").write_bytes(b"something else")
        with pytest.raises(BundleError, match=r"model.onnx"):
            store.publish(bundle)
        assert store.names() == ()

    @pytest.mark.parametrize("name", ["..", "../x", "a/b", "/a", "", ".hidden", "a\n", "a" * 129])
    def test_names_that_could_leave_the_store_are_refused(self, store: Store, bundle: Path, name: str) -> None:
        store.publish(bundle)
        for ask in (
            lambda: store.publish(bundle, name),
            lambda: store.versions(name),
            lambda: store.fetch(name, 1),
            lambda: store.tag(name, "champion", 1),
            lambda: store.tag("late", name, 1),
            lambda: store.tag_history("late", name),
        ):
            with pytest.raises(StoreError):
                ask()

    def test_what_is_not_there_is_answered_with_what_is(self, store: Store, bundle: Path) -> None:
        store.publish(bundle)
        store.tag("late", "champion", 1)
        with pytest.raises(NotInStore, match=r"no model 'early'; there are late"):
            store.resolve("early")
        with pytest.raises(NotInStore, match=r"no version 7; there are versions 1"):
            store.fetch("late", 7)
        with pytest.raises(NotInStore, match=r"tag 'challenger'; there are versions 1 and tags champion"):
            store.resolve("late", "challenger")
        with pytest.raises(NotInStore, match=r"no version 2"):
            store.tag("late", "champion", 2)

    def test_a_reference_is_a_version_a_tag_the_champion_or_the_latest(self, store: Store, bundle: Path) -> None:
        for _ in range(3):
            store.publish(bundle)
        assert store.resolve("late") == 3
        store.tag("late", "champion", 2)
        store.tag("late", "challenger", 1)
        assert store.resolve("late") == 2
        assert store.resolve("late", "challenger") == 1
        assert store.resolve("late", 3) == store.resolve("late", "3") == 3

    def test_a_tag_keeps_its_whole_history(self, store: Store, open_store: OpenStore, bundle: Path) -> None:
        for _ in range(2):
            store.publish(bundle)
        first = store.tag("late", "champion", 1, by="ana@laptop", reason="the first")
        second = open_store().tag("late", "champion", 2, expected=1)
        removed = store.tag("late", "champion", None)
        assert store.tags("late") == {}
        assert store.tag_history("late", "champion") == (first, second, removed)
        assert (first.version, first.by, first.reason) == (1, "ana@laptop", "the first")
        assert "@" in second.by
        assert store.resolve("late") == 2

    def test_a_tag_that_moved_meanwhile_is_not_moved_again(self, store: Store, bundle: Path) -> None:
        for _ in range(2):
            store.publish(bundle)
        store.tag("late", "champion", 1, expected=None, by="ana@laptop")
        with pytest.raises(TagConflict, match="ana@laptop set it to version 1") as caught:
            store.tag("late", "champion", 2, expected=None)
        assert caught.value.winner.version == 1
        assert store.tags("late") == {"champion": 1}

    def test_a_tag_is_not_a_number(self, store: Store, bundle: Path) -> None:
        store.publish(bundle)
        with pytest.raises(StoreError, match="would be taken for a version"):
            store.tag("late", "3", 1)

    def test_eight_publishers_at_once_get_eight_versions(self, open_store: OpenStore, tmp_path: Path) -> None:
        made = [late_bundle(tmp_path / f"from-{i}", weight=float(i)) for i in range(8)]
        barrier = threading.Barrier(8)

        def publish(i: int) -> int:
            store = open_store()
            barrier.wait()
            return store.publish(made[i].path)

        with ThreadPoolExecutor(8) as pool:
            versions = list(pool.map(publish, range(8)))
        store = open_store()
        assert len(set(versions)) == 8
        assert store.versions("late") == tuple(sorted(versions))
        fetched = [read_bundle(store.fetch("late", version)).digest for version in versions]
        assert fetched == [bundle.digest for bundle in made]

    def test_of_many_movers_at_once_exactly_one_wins(self, open_store: OpenStore, bundle: Path) -> None:
        for _ in range(8):
            open_store().publish(bundle)
        barrier = threading.Barrier(8)

        def move(version: int) -> int | str:
            store = open_store()
            barrier.wait()
            try:
                moved = store.tag("late", "champion", version, expected=None, by=f"mover-{version}")
            except TagConflict as exc:
                return str(exc.winner.by)
            assert moved.version is not None
            return moved.version

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(move, range(1, 9)))
        winners = [result for result in results if isinstance(result, int)]
        assert len(winners) == 1
        assert {result for result in results if isinstance(result, str)} == {f"mover-{winners[0]}"}
        assert open_store().tags("late") == {"champion": winners[0]}
        assert len(open_store().tag_history("late", "champion")) == 1


def _profile() -> Profile:
    at = Latency(batch_size=1, n_threads=1, n_runs=100, p50_s=0.001, p99_s=0.002, mean_s=0.0011)
    return Profile(hardware=fingerprint("an engine 1.0"), measured_at="2026-01-01T00:00:00+00:00", latencies=(at,))
