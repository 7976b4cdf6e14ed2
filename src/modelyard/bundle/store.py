"""Where bundles are kept by name and version, with tags that move between versions: plain folders throughout.

    STORE/NAME/VERSION/             one bundle; versions are 1, 2, 3, … and never change
    STORE/NAME/tags/TAG/1.json      the first record of where TAG points; the highest number counts

A version and a record are each made in one exclusive step, so that publishers and movers need no lock and lose nothing.
Training publishes here; serving, compression and the lifecycle read. Folders live in this file, URLs in fsspec_store.py.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Protocol
from urllib.parse import unquote, urlsplit

from msgspec import Meta

from modelyard.bundle.format import MANIFEST, PROFILE, Bundle, read_bundle
from modelyard.bundle.jsonfile import strict_json
from modelyard.bundle.manifest import NAME_PATTERN
from modelyard.errors import NotInStore, ReadOnlyStore, StoreError, TagConflict
from modelyard.schema import Frozen, convert, to_builtins

CHAMPION = "champion"
"""The tag that is served."""
CHALLENGER = "challenger"
"""The tag that is compared with it."""
TAGS = "tags"

_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_RECORD = re.compile(r"([1-9][0-9]{0,8})\.json")


class Unset(Enum):
    """Tells "nothing was said" from None, which says "the tag is not set"."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


class TagRecord(Frozen, frozen=True, omit_defaults=True):
    """One move of a tag."""

    version: Annotated[int, Meta(ge=1)] | None
    """None: the tag was removed."""
    moved_at: str
    """UTC, ISO 8601."""
    by: str
    """Who moved it, user@host unless the mover said otherwise."""
    reason: str | None = None


class Store(Protocol):
    """Bundles by name and version.

    Every method may be called from any thread and any process at once; nothing is locked and nothing is kept open. The store
    owns its files: what `fetch` returns is read, never written to (measured profiles excepted), and outlives the call.
    """

    def names(self) -> tuple[str, ...]:
        """Return the names that have at least one version, sorted."""
        ...

    def versions(self, name: str) -> tuple[int, ...]:
        """Return the complete versions of `name`, ascending; empty for a name that is not here."""
        ...

    def publish(self, bundle_path: Path, name: str | None = None, *, allow_domains: Iterable[str] = ()) -> int:
        """Verify the bundle, copy it in and return its new version. Readers see the whole of it or nothing.

        Args:
            name: where to put it; None takes the name in its manifest.
            allow_domains: operator domains consented to, as in `read_bundle`.

        Raises:
            BundleError: the bundle is not sound; nothing was published.
            ReadOnlyStore: the store cannot tell two publishers apart.
        """
        ...

    def fetch(self, name: str, version: int) -> Path:
        """Return a local folder that holds the bundle; raises NotInStore. `read_bundle` still has to verify it."""
        ...

    def resolve(self, name: str, ref: str | int | None = None) -> int:
        """Return the version that `ref` means: a version, a tag, or None for the champion, else the latest version.

        Raises:
            NotInStore: lists what there is.
        """
        ...

    def tag(
        self,
        name: str,
        tag: str,
        version: int | None,
        *,
        expected: int | Unset | None = UNSET,
        by: str | None = None,
        reason: str | None = None,
    ) -> TagRecord:
        """Point `tag` at `version`, or remove it with None.

        Args:
            expected: the version the caller believes the tag has now, None for "not set"; left out, any is fine.

        Raises:
            TagConflict: the tag is not where it was expected, or somebody moved it in the same moment.
            NotInStore: there is no such version.
        """
        ...

    def tag_history(self, name: str, tag: str) -> tuple[TagRecord, ...]:
        """Return every record of the tag, oldest first; empty for a tag that never was."""
        ...

    def tags(self, name: str) -> dict[str, int]:
        """Return tag → version for the tags that are set, sorted."""
        ...


class RecordedStore(ABC):
    """What every store does the same way, on four operations that each backend brings."""

    url: str
    """How a person names this store."""

    @abstractmethod
    def _list(self, *parts: str) -> tuple[str, ...]:
        """Return the names in a folder, in any order; empty when there is no such folder."""

    @abstractmethod
    def _read(self, *parts: str) -> bytes:
        """Return a whole file."""

    @abstractmethod
    def _create(self, data: bytes, *parts: str) -> None:
        """Make a file that appears whole or not at all, with its folders; raises FileExistsError when it is there already."""

    @abstractmethod
    def _has(self, *parts: str) -> bool:
        """Return whether there is such a file."""

    @abstractmethod
    def publish(self, bundle_path: Path, name: str | None = None, *, allow_domains: Iterable[str] = ()) -> int:
        """See Store."""

    @abstractmethod
    def fetch(self, name: str, version: int) -> Path:
        """See Store."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._list() if _NAME.search(name) and self.versions(name)))

    def versions(self, name: str) -> tuple[int, ...]:
        checked_name(name, "name")
        return tuple(v for v in self._numbers(name) if self._has(name, str(v), MANIFEST))

    def resolve(self, name: str, ref: str | int | None = None) -> int:
        versions = self._require(name)
        if ref is None:
            ref = self.tags(name).get(CHAMPION, versions[-1])
        if isinstance(ref, str) and not _VERSION.fullmatch(ref):
            tags = self.tags(name)
            if ref not in tags:
                raise NotInStore(
                    f"{self.url}: {name} has no version or tag {ref!r}; there are versions {_listed(versions)} and tags "
                    f"{_listed(tags)}"
                )
            ref = tags[ref]
        version = int(ref)
        if version not in versions:
            raise NotInStore(f"{self.url}: {name} has no version {version}; there are versions {_listed(versions)}")
        return version

    def tag(
        self,
        name: str,
        tag: str,
        version: int | None,
        *,
        expected: int | Unset | None = UNSET,
        by: str | None = None,
        reason: str | None = None,
    ) -> TagRecord:
        checked_tag(tag)
        versions = self._require(name)
        if version is not None and version not in versions:
            raise NotInStore(f"{self.url}: {name} has no version {version}; there are versions {_listed(versions)}")
        number = self._last_record(name, tag)
        current = self._record(name, tag, number).version if number else None
        if expected is not UNSET and current != expected:
            raise self._conflict(name, tag, number, f"was expected at {_where(expected)}")
        record = TagRecord(version=version, moved_at=_now(), by=by or _mover(), reason=reason)
        try:
            self._create(json.dumps(to_builtins(record), indent=2).encode(), name, TAGS, tag, f"{number + 1}.json")
        except FileExistsError:
            raise self._conflict(name, tag, number + 1, "was moved by somebody else in this moment") from None
        return record

    def tag_history(self, name: str, tag: str) -> tuple[TagRecord, ...]:
        checked_name(name, "name")
        checked_tag(tag)
        return tuple(self._record(name, tag, number) for number in range(1, self._last_record(name, tag) + 1))

    def tags(self, name: str) -> dict[str, int]:
        checked_name(name, "name")
        found = {}
        for tag in sorted(tag for tag in self._list(name, TAGS) if _NAME.search(tag)):
            last = self._last_record(name, tag)
            version = self._record(name, tag, last).version if last else None
            if version is not None:
                found[tag] = version
        return found

    def _numbers(self, name: str) -> list[int]:
        """Return the numbers taken by versions, complete or not, ascending."""
        return sorted(int(entry) for entry in self._list(name) if _VERSION.fullmatch(entry))

    def _last_record(self, name: str, tag: str) -> int:
        """Return the highest record number, 0 when there is none."""
        return max((int(m[1]) for entry in self._list(name, TAGS, tag) if (m := _RECORD.fullmatch(entry))), default=0)

    def _record(self, name: str, tag: str, number: int) -> TagRecord:
        source = f"{self.url}/{name}/{TAGS}/{tag}/{number}.json"
        try:
            raw = self._read(name, TAGS, tag, f"{number}.json")
        except FileNotFoundError as exc:
            raise StoreError(f"{source}: is missing though records follow it; restore it from a backup") from exc
        return convert(strict_json(raw, source, StoreError), TagRecord, source=source, error=StoreError)

    def _conflict(self, name: str, tag: str, number: int, what: str) -> TagConflict:
        winner = self._record(name, tag, number) if number else None
        now = (
            f"{winner.by} set it to {_where(winner.version)} at {winner.moved_at}"
            if winner
            else "nobody has set it yet"
        )
        return TagConflict(
            f"{self.url}: tag {tag!r} of {name} {what}: {now}; look at its history and decide again", winner=winner
        )

    def _require(self, name: str) -> tuple[int, ...]:
        versions = self.versions(name)
        if not versions:
            raise NotInStore(f"{self.url}: no model {name!r}; there are {_listed(self.names())}")
        return versions

    def _verified(self, bundle_path: Path, name: str | None, allow_domains: Iterable[str]) -> tuple[str, Bundle]:
        """Return the name to publish under and the bundle, read in full."""
        bundle = read_bundle(bundle_path, allow_domains=allow_domains)
        bundle.cases()
        bundle.reference()
        bundle.profiles()
        return checked_name(bundle.manifest.name if name is None else name, "name"), bundle


class LocalStore(RecordedStore):
    """A store in a local folder, which need not exist before the first bundle is published.

    A bundle is copied into a hidden folder beside the versions and renamed to the next number; a rename onto a number that
    somebody else has just taken fails, and the next one is tried. What a killed publisher leaves stays hidden.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def publish(self, bundle_path: Path, name: str | None = None, *, allow_domains: Iterable[str] = ()) -> int:
        name, bundle = self._verified(bundle_path, name, allow_domains)
        home = self.root / name
        try:
            home.mkdir(parents=True, exist_ok=True)
            beside = home / f".publishing-{secrets.token_hex(8)}"
            beside.mkdir()
        except OSError as exc:
            raise ReadOnlyStore(f"{home}: cannot be written to ({exc.strerror}); choose another store") from exc
        try:
            for file in files_of(bundle):
                (beside / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path / file, beside / file)
            while True:
                version = max(self._numbers(name), default=0) + 1
                try:
                    beside.rename(home / str(version))
                    return version
                except OSError as exc:
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # nothing is left of it after the rename

    def fetch(self, name: str, version: int) -> Path:
        self.resolve(name, version)
        return self.root / name / str(version)

    def _list(self, *parts: str) -> tuple[str, ...]:
        folder = self.root.joinpath(*parts)
        return tuple(entry.name for entry in folder.iterdir()) if folder.is_dir() else ()

    def _read(self, *parts: str) -> bytes:
        return self.root.joinpath(*parts).read_bytes()

    def _create(self, data: bytes, *parts: str) -> None:
        create_exclusively(self.root.joinpath(*parts), data)

    def _has(self, *parts: str) -> bool:
        return self.root.joinpath(*parts).is_file()


def open_store(url_or_path: str | Path) -> Store:
    """Return the store at a path or URL: a local folder for paths and file://, fsspec for any other scheme.

    Raises:
        MissingExtra: the URL needs fsspec or the package of its backend.
    """
    text = str(url_or_path)
    if "://" not in text:
        return LocalStore(Path(text))
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"{text}: a file URL has no host; write file:///{parts.netloc}{parts.path}")
        return LocalStore(Path(unquote(parts.path)))
    from modelyard.bundle.fsspec_store import FsspecStore

    return FsspecStore(text)


def files_of(bundle: Bundle) -> tuple[str, ...]:
    """Return the files that are copied with a bundle: those of its manifest, its profile, and bundle.json last."""
    profile = (PROFILE,) if (bundle.path / PROFILE).is_file() else ()
    return (*(entry.path for entry in bundle.manifest.files), *profile, MANIFEST)


def create_exclusively(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; raises FileExistsError when there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        beside.write_bytes(data)
        os.link(beside, path)  # unlike a rename, a link never replaces
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with path.open("xb") as stream:  # file systems without links; whole in one write
            stream.write(data)
    finally:
        beside.unlink(missing_ok=True)


def checked_name(text: str, what: str) -> str:
    """Return `text`, or raise StoreError when it cannot be a folder's name in a store."""
    if not _NAME.search(text):
        raise StoreError(
            f"{what} {text[:80]!r} must be 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit; "
            "choose such a name"
        )
    return text


def checked_tag(text: str) -> str:
    """Return `text`, or raise StoreError when it cannot be a tag."""
    if text.isdigit():
        raise StoreError(f"tag {text[:80]!r} would be taken for a version; choose a name with a letter in it")
    return checked_name(text, "tag")


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"


def _where(version: int | Unset | None) -> str:
    return "no version" if version is None else f"version {version}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _mover() -> str:
    """Return user@host; the user's number where the system knows no name for it."""
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
