"""A store behind any fsspec URL: s3://, gs://, abfs://, memory:// …, laid out like a local one (store.py).

Object stores cannot rename a folder, so a version is published in three steps: its number is claimed by creating
NAME/VERSION/.claim exclusively, the files are uploaded, bundle.json comes last. A version without bundle.json is not seen by
any reader; a publisher that dies leaves a number unused and nothing else.

Everything hangs on exclusive creation. fsspec spells it `pipe_file(..., mode="create")`, but its default for that looks and
then writes, which two writers can both survive. So only backends that are known to leave the decision to their server or
kernel may be written to; each is also asked to refuse a second creation before the first write, since some servers that
speak S3 ignore the condition. Every other backend is read-only.

    file, local      a link from a temporary file, as in LocalStore
    memory           under a lock: this process is all there is
    s3, s3a          s3fs: If-None-Match on the request
    gs, gcs          gcsfs: ifGenerationMatch=0
    abfs, abfss, az  adlfs: upload without overwrite
"""

import contextlib
import errno
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from modelyard.bundle.format import MANIFEST, PROFILE, read_manifest, verify_files
from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.bundle.store import RecordedStore, checked_name, create_exclusively, files_of
from modelyard.errors import (
    BundleError,
    MissingExtra,
    MissingFile,
    ModelyardError,
    ReadOnlyStore,
    StoreError,
    TruncatedFile,
)

CLAIM = ".claim"
PROBE = ".exclusive"
"""A file at the store's root that every writer tries to create again: the refusal proves exclusive creation."""

_LOCAL = frozenset({"file", "local"})
_EXCLUSIVE = _LOCAL | {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_CHUNK_BYTES = 2**22
_MEMORY_LOCK = threading.RLock()


class FsspecStore(RecordedStore):
    """A store at an fsspec URL. Bundles are fetched into `cache`, a folder by digest, once for all stores and names.

    A cached bundle keeps the profile it came with and those that are measured here; it may be deleted while not in use.
    """

    def __init__(self, url: str, *, cache: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        scheme = url.partition("://")[0]
        try:
            import fsspec
        except ImportError as exc:
            raise MissingExtra("fsspec", "fsspec", f"the store {url}") from exc
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if scheme in _LOCAL else {}))
        except ImportError as exc:
            raise StoreError(f"{url}: the package of this backend is missing: {exc}") from exc
        except ValueError as exc:
            raise StoreError(f"{url}: {exc}; use a path, or a URL that fsspec knows") from exc
        except Exception as exc:
            raise _unreachable(url, exc) from exc
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        protocol = self._fs.protocol
        self._protocols = frozenset((protocol,) if isinstance(protocol, str) else protocol)
        self._proven = False
        self._cache = Path.home() / ".cache" / "modelyard" / "bundles" if cache is None else cache
        self._limits = limits

    def publish(self, bundle_path: Path, name: str | None = None, *, allow_domains: Iterable[str] = ()) -> int:
        name, bundle = self._verified(bundle_path, name, allow_domains)
        version = self._claim(name)
        for file in files_of(bundle)[:-1]:
            with self._talking():
                self._fs.put_file(str(bundle.path / file), self._path(name, str(version), file))
        self._create((bundle.path / MANIFEST).read_bytes(), name, str(version), MANIFEST)
        return version

    def _claim(self, name: str) -> int:
        version = 0
        while True:
            version = max(version, *self._numbers(name), 0) + 1
            try:
                self._create(secrets.token_hex(16).encode(), name, str(version), CLAIM)
            except FileExistsError:
                continue
            if not self._has(name, str(version), MANIFEST):  # a folder copied in by other means has no claim
                return version

    def fetch(self, name: str, version: int) -> Path:
        checked_name(name, "name")
        if not self._has(name, str(version), MANIFEST):
            self.resolve(name, version)  # says what there is
        self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = self._cache / f".fetching-{secrets.token_hex(8)}"
        beside.mkdir()
        try:
            source = self._path(name, str(version))
            self._download(f"{source}/{MANIFEST}", beside / MANIFEST, self._limits.max_manifest_bytes)
            manifest = read_manifest(
                beside, self._limits
            )  # from here on its paths are safe and its sizes within limits
            target = self._cache / manifest.digest
            if target.exists():
                try:
                    verify_files(target, manifest)
                    return target
                except BundleError:
                    shutil.rmtree(target)
            for entry in manifest.files:
                self._download(f"{source}/{entry.path}", beside / entry.path, entry.size_bytes)
            verify_files(beside, manifest)
            if self._has(name, str(version), PROFILE):
                self._download(f"{source}/{PROFILE}", beside / PROFILE, self._limits.max_manifest_bytes)
            try:
                beside.rename(target)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another fetch of the same bundle came first
                    raise
            return target
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _download(self, source: str, target: Path, max_bytes: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._talking(), self._fs.open(source, "rb") as remote, target.open("wb") as local:
                n_bytes = _copy(remote, local, max_bytes)
        except FileNotFoundError as exc:
            raise MissingFile(f"{source}: named in its manifest but missing in {self.url}; publish it again") from exc
        if n_bytes > max_bytes:
            raise TruncatedFile(f"{source}: longer than the {max_bytes} bytes it may have; publish the bundle again")

    def _list(self, *parts: str) -> tuple[str, ...]:
        with self._talking():
            self._fs.invalidate_cache()  # others publish too
            try:
                entries = self._fs.ls(self._path(*parts), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return ()
        return tuple(name for entry in entries if (name := entry.rstrip("/").rpartition("/")[2]))

    def _read(self, *parts: str) -> bytes:
        with self._talking():
            raw: bytes = self._fs.cat_file(self._path(*parts))
        return raw

    def _has(self, *parts: str) -> bool:
        with self._talking():
            self._fs.invalidate_cache()
            return bool(self._fs.isfile(self._path(*parts)))

    def _create(self, data: bytes, *parts: str) -> None:
        if not self._proven:
            self._prove()
        self._create_unproven(data, *parts)

    def _prove(self) -> None:
        """Raise ReadOnlyStore unless a file that is there cannot be created again."""
        remedy = "publish to a folder, memory://, s3://, gs:// or abfs://"
        if not self._protocols & _EXCLUSIVE:
            raise ReadOnlyStore(
                f"{self.url}: {sorted(self._protocols)} is not known to create files exclusively, so the store is read-only; {remedy}"
            )
        for _ in range(2):
            try:
                self._create_unproven(b"", PROBE)
            except FileExistsError:
                self._proven = True
                return
        raise ReadOnlyStore(f"{self.url}: the server created one file twice, so the store is read-only; {remedy}")

    def _create_unproven(self, data: bytes, *parts: str) -> None:
        path = self._path(*parts)
        if self._protocols & _LOCAL:
            create_exclusively(Path(path), data)
        else:
            with self._talking():
                self._fs.pipe_file(path, data, mode="create")

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Around every call of the backend: its own kinds of errors become StoreError, what a file system says stays.

        fsspec's memory backend is plain dictionaries, so its callers take turns.
        """
        with _MEMORY_LOCK if "memory" in self._protocols else contextlib.nullcontext():
            try:
                yield
            except (FileExistsError, FileNotFoundError, NotADirectoryError, ModelyardError):
                raise
            except Exception as exc:  # every backend brings exceptions of its own
                raise _unreachable(self.url, exc) from exc


def _unreachable(url: str, exc: Exception) -> StoreError:
    why = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return StoreError(f"{url}: the store cannot be used: {why}; check the URL, the network and your credentials")


def _copy(source: IO[bytes], target: IO[bytes], max_bytes: int) -> int:
    """Copy until the end or until more than `max_bytes` have come; return how many came."""
    n_bytes = 0
    while n_bytes <= max_bytes and (chunk := source.read(_CHUNK_BYTES)):
        target.write(chunk)
        n_bytes += len(chunk)
    return n_bytes
