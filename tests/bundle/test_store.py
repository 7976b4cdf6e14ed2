"""Both stores pass the published suite; what only one of them can do is tested below."""

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modelyard.bundle.format import read_bundle
from modelyard.bundle.fsspec_store import FsspecStore
from modelyard.bundle.store import LocalStore, Store, create_exclusively, open_store
from modelyard.errors import MissingFile, NotInStore, ReadOnlyStore, StoreError, TagConflict, UnsafePath
from modelyard.testing.bundles import late_bundle
from modelyard.testing.stores import OpenStore, StoreTests

fsspec = pytest.importorskip("fsspec")


class TestLocalStore(StoreTests):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenStore:
        return lambda: LocalStore(tmp_path / "store")


class TestFsspecMemoryStore(StoreTests):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenStore:
        url = f"memory://{tmp_path}/store"  # memory is shared by all tests of a process; the folder makes it ours
        return lambda: FsspecStore(url, cache=tmp_path / "cache")


class TestFsspecFileStore(StoreTests):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenStore:
        return lambda: FsspecStore(f"file://{tmp_path}/store", cache=tmp_path / "cache")


def _store(kind: str, root: Path) -> Store:
    return LocalStore(root / "store") if kind == "local" else FsspecStore(f"file://{root}/store", cache=root / "cache")


def _publish(kind: str, root: Path, i: int) -> tuple[int, str]:
    bundle = late_bundle(root / f"from-{os.getpid()}-{i}", weight=float(i))
    return _store(kind, root).publish(bundle.path), bundle.digest


def _move(kind: str, root: Path, version: int) -> bool:
    try:
        _store(kind, root).tag("late", "champion", version, expected=None)
    except TagConflict:
        return False
    return True


@pytest.mark.parametrize("kinds", [("local",), ("fsspec",), ("local", "fsspec")], ids="+".join)
def test_publishers_and_movers_in_several_processes_lose_nothing(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """A folder and file:// on the same folder may even be mixed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=spawn) as pool:
        running = [pool.submit(_publish, kinds[i % len(kinds)], tmp_path, i) for i in range(6)]
        published = dict(future.result() for future in running)
        assert len(published) == 6
        moving = [pool.submit(_move, kinds[i % len(kinds)], tmp_path, version) for i, version in enumerate(published)]
        assert sum(future.result() for future in moving) == 1
    for kind in kinds:
        store = _store(kind, tmp_path)
        assert store.versions("late") == tuple(sorted(published))
        for version, digest in published.items():
            assert read_bundle(store.fetch("late", version)).digest == digest
        assert len(store.tag_history("late", "champion")) == 1


def test_a_version_in_a_local_store_is_a_plain_bundle_folder(tmp_path: Path) -> None:
    made = late_bundle(tmp_path / "bundle")
    store = LocalStore(tmp_path / "store")
    assert store.fetch("late", store.publish(made.path)) == tmp_path / "store" / "late" / "1"
    assert {file.name for file in (tmp_path / "store" / "late" / "1").iterdir()} == {
        "bundle.json", "model.onnx", "cases.npz", "reference.npz"
    }  # fmt: skip


def test_what_a_killed_publisher_left_is_never_a_version(tmp_path: Path) -> None:
    made = late_bundle(tmp_path / "bundle")
    home = tmp_path / "store" / "late"
    late_bundle(home / ".publishing-0123456789abcdef")
    (home / "1").mkdir()  # claimed by a publisher that went no further
    (home / "1" / ".claim").write_bytes(b"")
    for store in (LocalStore(tmp_path / "store"), FsspecStore(f"file://{tmp_path}/store", cache=tmp_path / "cache")):
        assert store.names() == ()
    assert LocalStore(tmp_path / "store").publish(made.path) == 2
    assert LocalStore(tmp_path / "store").versions("late") == (2,)


def test_a_killed_mover_leaves_the_tag_where_it_was(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.publish(late_bundle(tmp_path / "bundle").path)
    store.tag("late", "champion", 1)
    (tmp_path / "store" / "late" / "tags" / "champion" / ".2.json.0123456789abcdef").write_bytes(b'{"version": ')
    assert store.tags("late") == {"champion": 1}
    assert len(store.tag_history("late", "champion")) == 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.publish(late_bundle(tmp_path / "bundle").path)
    record = tmp_path / "store" / "late" / "tags" / "champion" / "1.json"
    create_exclusively(record, b'{"version": 1, "version": 2}')
    with pytest.raises(StoreError, match=r"champion/1.json: key 'version' stands twice"):
        store.resolve("late")


def test_a_file_is_created_once(tmp_path: Path) -> None:
    create_exclusively(tmp_path / "a" / "b", b"first")
    with pytest.raises(FileExistsError):
        create_exclusively(tmp_path / "a" / "b", b"second")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b").read_bytes() == b"first"


def test_paths_and_file_urls_are_folders_and_other_schemes_go_through_fsspec(tmp_path: Path) -> None:
    for text in (str(tmp_path), f"file://{tmp_path}", f"file://localhost{tmp_path}"):
        opened = open_store(text)
        assert isinstance(opened, LocalStore)
        assert opened.root == tmp_path
    assert isinstance(open_store(f"memory://{tmp_path}"), FsspecStore)
    with pytest.raises(StoreError, match="has no host"):
        open_store("file://server/share")
    with pytest.raises(StoreError, match="nosuchscheme"):
        open_store("nosuchscheme://bucket")


def _in_memory(tmp_path: Path) -> FsspecStore:
    store = FsspecStore(f"memory://{tmp_path}/store", cache=tmp_path / "cache")
    store.publish(late_bundle(tmp_path / "bundle").path)
    return store


def test_a_backend_without_exclusive_creation_is_read_only(tmp_path: Path) -> None:
    """simplecache:: promises nothing of the kind; what is in it can be read all the same."""
    published = _in_memory(tmp_path)
    store = FsspecStore(f"simplecache::memory://{tmp_path}/store", cache=tmp_path / "cache")
    assert store.versions("late") == (1,)
    assert store.fetch("late", 1) == published.fetch("late", 1)
    with pytest.raises(ReadOnlyStore, match="read-only; publish to"):
        store.publish(tmp_path / "bundle")
    with pytest.raises(ReadOnlyStore):
        store.tag("late", "champion", 1)
    assert published.versions("late") == (1,)


def test_a_server_that_ignores_the_condition_is_found_out_before_anything_is_published(tmp_path: Path) -> None:
    class Careless(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]  # fsspec ships no types
        protocol = "s3"  # as some servers that speak S3

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
            super().pipe_file(path, value, **options)

    store = FsspecStore(f"memory://{tmp_path}/store", cache=tmp_path / "cache")
    store._fs, store._protocols = Careless(), frozenset({"s3"})
    with pytest.raises(ReadOnlyStore, match="created one file twice"):
        store.publish(late_bundle(tmp_path / "bundle").path)
    assert store.names() == ()


def test_the_cache_is_by_digest_and_heals_itself(tmp_path: Path) -> None:
    store = _in_memory(tmp_path)
    fetched = store.fetch("late", 1)
    assert fetched == tmp_path / "cache" / read_bundle(fetched).digest
    (fetched / "model.onnx").write_bytes(b"damaged on this disk")
    assert read_bundle(store.fetch("late", 1)).digest == fetched.name
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [fetched.name]


def test_a_hostile_manifest_in_a_remote_store_writes_nothing_outside(tmp_path: Path) -> None:
    from modelyard.bundle.jsonfile import write_digested
    from modelyard.schema import to_builtins

    store = _in_memory(tmp_path)
    data = to_builtins(read_bundle(tmp_path / "bundle").manifest)
    data["files"] = [*data["files"], {"path": "../../escaped", "size_bytes": 3, "sha256": "0" * 64}]
    write_digested(tmp_path / "hostile.json", data)
    store._fs.pipe_file(store._path("late", "1", "bundle.json"), (tmp_path / "hostile.json").read_bytes())
    with pytest.raises(UnsafePath, match="escaped"):
        store.fetch("late", 1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_vanished_from_a_remote_store_is_named(tmp_path: Path) -> None:
    store = _in_memory(tmp_path)
    store._fs.rm(store._path("late", "1", "cases.npz"))
    with pytest.raises(MissingFile, match=r"cases.npz.*publish it again"):
        store.fetch("late", 1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_version_that_was_deleted_is_missed_by_its_tag(tmp_path: Path) -> None:
    import shutil

    store = LocalStore(tmp_path / "store")
    made = late_bundle(tmp_path / "bundle")
    store.publish(made.path)
    store.publish(made.path)
    store.tag("late", "champion", 1)
    shutil.rmtree(tmp_path / "store" / "late" / "1")
    with pytest.raises(NotInStore, match="no version 1; there are versions 2"):
        store.resolve("late")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/store", "zip:///nowhere/store.zip", "nosuch://store"])
def test_a_store_that_cannot_be_reached_is_a_store_error_naming_its_url(url: str) -> None:
    with pytest.raises(StoreError, match=re.escape(url)):
        open_store(url).names()
