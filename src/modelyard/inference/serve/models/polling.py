"""What a store holds of the models that are served, looked up again and again; the edge towards the store.

    store → `Library.look` (on a thread) → `Listing` per model → versions.py → repository.py

Looking lists names, versions and tags and reads no bundle. In a local folder a look that finds the folders' times unchanged
lists nothing: 200 models cost about 2 ms.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from modelyard.bundle.format import CASES, MANIFEST, PROFILE, REFERENCE, read_manifest
from modelyard.bundle.manifest import Signature
from modelyard.bundle.store import TAGS, LocalStore, Store
from modelyard.errors import ModelyardError, NotInStore, StoreError
from modelyard.inference.serve.models.loading import ModelSettings
from modelyard.inference.serve.models.versions import Listing, VersionPolicy, Wanted, wanted

_SETTLED_S = 2.0
"""A folder changed less than this before a look may change again without a newer time: file systems count in ticks."""
_LIST_ANYWAY_S = 60.0
"""Files copied into a version's folder one by one change no folder that is looked at."""

_NOT_LOADED = frozenset({MANIFEST, CASES, REFERENCE, PROFILE})

Stamp = tuple[tuple[str, int], ...]
"""Folders and when their entries last changed, in nanoseconds since 1970."""


def _default_settings(name: str) -> ModelSettings:
    return ModelSettings()


class Library:
    """A store and what is to be served of it. `look` is for one caller at a time, on any thread; it blocks."""

    def __init__(
        self,
        store: Store,
        policies: Mapping[str, VersionPolicy] | None = None,
        *,
        all_models: bool = True,
        settings: Callable[[str], ModelSettings] = _default_settings,
    ) -> None:
        """
        Args:
            policies: by model; others are served by the default policy.
            all_models: whether models without a policy of their own are served too.
            settings: how a model is run, by its name.
        """
        self.store = store
        self._policies = dict(policies or {})
        self._all_models = all_models
        self.settings = settings
        self._stamp: Stamp | None = None
        self._listed_s = 0.0
        self._listings: dict[str, Listing] = {}

    def policy(self, name: str) -> VersionPolicy:
        return self._policies.get(name, VersionPolicy())

    def wanted(self, name: str, listing: Listing, policy: VersionPolicy | None = None) -> Wanted:
        """Return which versions of a model to serve, by its own policy unless another is given."""
        return wanted(policy or self.policy(name), listing)

    def look(self) -> Mapping[str, Listing]:
        """Return what the store has of the models to be served. One that has gone is left out.

        Raises:
            StoreError, OSError: the store cannot be read.
        """
        now_s = time.time()
        stamp = self._stamp_of_folders(now_s)
        if stamp is None or stamp != self._stamp or now_s - self._listed_s > _LIST_ANYWAY_S:
            self._listings = self._list()
            self._stamp, self._listed_s = stamp, now_s
        return self._listings

    def look_at(self, name: str) -> Listing:
        """Return what the store has of one model, served or not.

        Raises:
            NotInStore: nothing.
            StoreError, OSError: as above.
        """
        self._require_folder()
        versions = self.store.versions(name)
        if not versions:
            raise NotInStore(f"no model {name[:200]!r} is in the store; publish it, or correct the name", name=name)
        return Listing(versions, self.store.tags(name))

    def fingerprint(self, name: str, version: int) -> Stamp:
        """Return what tells whether a version's files were touched; empty where the store cannot tell. Raises nothing."""
        if not isinstance(self.store, LocalStore):
            return ()
        folder = self.store.root / name / str(version)
        try:
            files = sorted(Path(at) / file for at, _, names in os.walk(folder) for file in names)
            return tuple((str(file), file.stat().st_mtime_ns) for file in files)
        except OSError:
            return ()

    def expected_bytes(self, name: str, version: int) -> int:
        """Return what a version will take in memory, as far as is known before it is loaded: what its settings say, else the
        size of its graph and weights on disk, else 0. Raises nothing.
        """
        said_bytes = self.settings(name).memory_bytes
        if said_bytes is not None:
            return said_bytes
        if not isinstance(self.store, LocalStore):
            return 0
        folder = self.store.root / name / str(version)
        try:
            return sum(
                file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name not in _NOT_LOADED
            )
        except OSError:
            return 0

    def signature(self, name: str, version: int) -> Signature | None:
        """Return what the manifest of a version that lies in a local folder says; None where it must be loaded to tell."""
        if not isinstance(self.store, LocalStore):
            return None
        try:
            return read_manifest(self.store.root / name / str(version)).signature
        except (ModelyardError, OSError):
            return None

    def _list(self) -> dict[str, Listing]:
        self._require_folder()
        store = self.store
        names = store.names() if self._all_models else tuple(self._policies)
        listings = {}
        for name in names:
            versions = store.versions(name)
            if versions:
                listings[name] = Listing(versions, store.tags(name))
        return listings

    def _require_folder(self) -> None:
        """An empty listing must not be mistaken for an empty store."""
        if isinstance(self.store, LocalStore) and not self.store.root.is_dir():
            raise StoreError(f"{self.store.root}: the store's folder is not there; mount it, or bring it back")

    def _stamp_of_folders(self, now_s: float) -> Stamp | None:
        """Return the times of all folders that a listing reads; None where they cannot prove that nothing changed."""
        if not isinstance(self.store, LocalStore):
            return None
        root = self.store.root
        found: list[tuple[str, int]] = []
        try:
            found.append((str(root), root.stat().st_mtime_ns))
            for model in os.scandir(root):
                found.append((model.path, model.stat().st_mtime_ns))
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    tags = Path(model.path, TAGS)
                    found.append((str(tags), tags.stat().st_mtime_ns))
                    found += [(tag.path, tag.stat().st_mtime_ns) for tag in os.scandir(tags)]
        except OSError:
            return None
        newest_s = max(changed_ns for _, changed_ns in found) / 1e9
        return tuple(sorted(found)) if newest_s < now_s - _SETTLED_S else None


def is_passing(error: Exception) -> bool:
    """Whether what failed may succeed by itself later: a store out of reach, a full disk, want of memory; not a bad bundle."""
    return isinstance(error, StoreError | OSError | MemoryError) and not (
        isinstance(error, ModelyardError) and isinstance(error, NotInStore)
    )
