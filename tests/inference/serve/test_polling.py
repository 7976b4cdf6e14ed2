"""A look at a store finds what changed, and costs little where nothing did."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelyard.bundle.store import LocalStore
from modelyard.errors import NotInStore, StoreError
from modelyard.inference.serve.models.loading import ModelSettings
from modelyard.inference.serve.models.polling import Library
from modelyard.inference.serve.models.versions import Listing, VersionPolicy
from modelyard.testing.bundles import late_bundle

LONG_AGO_S = time.time() - 3600


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    late_bundle(tmp_path / "bundle")
    for name in ("a", "b"):
        store.publish(tmp_path / "bundle", name)
    store.publish(tmp_path / "bundle", "a")
    store.tag("a", "champion", 1)
    return store


class Counting(LocalStore):
    """Counts listings."""

    n_listings = 0

    def names(self) -> tuple[str, ...]:
        self.n_listings += 1
        return super().names()


def settle(root: Path) -> None:
    """Make everything look as if it had not been touched for an hour."""
    for at, _, files in os.walk(root):
        for file in files:
            os.utime(Path(at) / file, (LONG_AGO_S, LONG_AGO_S))
        os.utime(at, (LONG_AGO_S, LONG_AGO_S))


def test_a_look_lists_versions_and_tags(store: LocalStore) -> None:
    assert Library(store).look() == {"a": Listing((1, 2), {"champion": 1}), "b": Listing((1,), {})}
    assert Library(store, {"b": VersionPolicy(all=True)}, all_models=False).look() == {"b": Listing((1,), {})}


def test_where_nothing_was_touched_nothing_is_listed_again(store: LocalStore, tmp_path: Path) -> None:
    counting = Counting(store.root)
    library = Library(counting)
    settle(store.root)
    first = library.look()
    assert library.look() is first
    assert counting.n_listings == 1
    store.publish(tmp_path / "bundle", "b")
    assert library.look()["b"].versions == (1, 2)
    # What was touched just now may be touched again within one tick of the file system's clock.
    n_before = counting.n_listings
    library.look()
    assert counting.n_listings == n_before + 1


def changes(store: LocalStore, bundle: Path) -> Mapping[str, Any]:
    return {
        "a new model": lambda: store.publish(bundle, "c"),
        "a new version": lambda: store.publish(bundle, "a"),
        "a first tag": lambda: store.tag("b", "challenger", 1),
        "a moved tag": lambda: store.tag("a", "champion", 2),
        "a removed tag": lambda: store.tag("a", "champion", None),
    }


@pytest.mark.parametrize("change", changes(LocalStore(Path()), Path()))
def test_every_kind_of_change_is_seen(store: LocalStore, tmp_path: Path, change: str) -> None:
    library = Library(store)
    settle(store.root)
    before = library.look()
    assert library.look() is before
    changes(store, tmp_path / "bundle")[change]()
    assert library.look() != before


def test_a_folder_that_is_not_there_is_an_error_and_not_an_empty_store(store: LocalStore) -> None:
    library = Library(store)
    library.look()
    store.root.rename(store.root.with_name("elsewhere"))
    with pytest.raises(StoreError, match="the store's folder is not there; mount it"):
        library.look()


def test_one_model_is_looked_at_by_name_served_or_not(store: LocalStore) -> None:
    library = Library(store, {"b": VersionPolicy()}, all_models=False)
    assert library.look_at("a") == Listing((1, 2), {"champion": 1})
    with pytest.raises(NotInStore, match="no model 'nobody' is in the store"):
        library.look_at("nobody")


def test_touched_files_change_the_fingerprint_of_their_version(store: LocalStore) -> None:
    library = Library(store)
    before = library.fingerprint("a", 1)
    assert before == library.fingerprint("a", 1) != ()
    os.utime(store.root / "a" / "1" / "model.onnx", (LONG_AGO_S, LONG_AGO_S))
    assert library.fingerprint("a", 1) != before
    assert library.fingerprint("a", 7) == ()


def test_a_version_is_expected_to_take_what_its_settings_say_else_what_its_weights_do(store: LocalStore) -> None:
    said = Library(store, settings=lambda name: ModelSettings(memory_bytes=7 if name == "a" else None))
    assert said.expected_bytes("a", 1) == 7
    assert said.expected_bytes("b", 1) == (store.root / "b" / "1" / "model.onnx").stat().st_size
    assert said.expected_bytes("b", 9) == 0
