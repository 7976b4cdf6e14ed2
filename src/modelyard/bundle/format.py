"""A bundle on disk: write it beside and rename, read it without executing anything, verify every byte.

    bundle.json      the manifest, with a digest per file and one of the whole
    model.onnx       the whole computation (+ external data, listed like every other file)
    cases.npz        golden inputs and outputs
    reference.npz    statistics of the training data
    profile.json     measured latencies; optional, replaceable, outside the identity

The specification is docs/bundle-format.md.
"""

import hashlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from modelyard.bundle.cases import CaseSet, read_cases, write_cases
from modelyard.bundle.graph import Graph, read_graph
from modelyard.bundle.jsonfile import BLANK, read_digested, write_digested
from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.bundle.manifest import (
    FORMAT_VERSION,
    Cases,
    FileEntry,
    Lineage,
    Manifest,
    Signature,
    Targets,
    TensorSpec,
)
from modelyard.bundle.paths import regular_file, safe_relative
from modelyard.bundle.profile import Profile, read_profiles
from modelyard.bundle.reference import Reference, read_reference, write_reference
from modelyard.errors import (
    BundleError,
    DigestMismatch,
    ForbiddenOperator,
    MalformedManifest,
    MissingFile,
    SignatureMismatch,
    TooLarge,
    TruncatedFile,
    UnknownFormatVersion,
    UnsafePath,
)
from modelyard.schema import convert, to_builtins

MANIFEST, MODEL, CASES, REFERENCE, PROFILE = "bundle.json", "model.onnx", "cases.npz", "reference.npz", "profile.json"
REQUIRED_FILES = (MODEL, CASES, REFERENCE)
_FLOATS = ("FP16", "BF16", "FP32", "FP64")
_PIECE_BYTES = 2**21


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified. The files it names must not change while it is in use."""

    path: Path
    manifest: Manifest
    graph: Graph
    limits: Limits = DEFAULT_LIMITS

    @property
    def digest(self) -> str:
        """The bundle's identity."""
        return self.manifest.digest

    @property
    def signature(self) -> Signature:
        return self.manifest.signature

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.manifest.files)

    def cases(self) -> CaseSet:
        """Return the golden cases; raises SignatureMismatch when they are not those the manifest announces."""
        cases = read_cases(self.path / CASES, self.signature, self.limits)
        announced = self.manifest.cases.n_samples
        if any(spec.batched for spec in self.signature.inputs) and cases.n_samples != announced:
            raise SignatureMismatch(
                f"{self.path / CASES}: holds {cases.n_samples} cases, the manifest says {announced}; write the bundle again"
            )
        return cases

    def reference(self) -> Reference:
        return read_reference(self.path / REFERENCE, self.limits)

    def profiles(self) -> tuple[Profile, ...]:
        return read_profiles(self.path / PROFILE, self.limits)


@dataclass(frozen=True)
class BundleContent:
    """Everything a bundle is written from. `model` is the ONNX bytes, or a file whose external data lies beside it."""

    name: str
    task: str
    signature: Signature
    model: bytes | Path
    cases: CaseSet
    cases_origin: str
    reference: Reference
    lineage: Lineage
    targets: Targets = field(default_factory=Targets)
    rtol: float = 1e-4
    atol: float = 1e-4
    rows_independent: bool = True
    extra_domains: tuple[str, ...] = ()
    description: str | None = None


def content_of(bundle: Bundle) -> BundleContent:
    """Return what `bundle` was written from, to be changed with `dataclasses.replace` and written as another bundle."""
    manifest = bundle.manifest
    return BundleContent(
        name=manifest.name,
        task=manifest.task,
        signature=manifest.signature,
        model=bundle.model_path,
        cases=bundle.cases(),
        cases_origin=manifest.cases.origin,
        reference=bundle.reference(),
        lineage=manifest.lineage,
        targets=manifest.targets,
        rtol=manifest.cases.rtol,
        atol=manifest.cases.atol,
        rows_independent=manifest.rows_independent,
        extra_domains=manifest.extra_domains,
        description=manifest.description,
    )


def require_free(target: Path) -> None:
    """Raise FileExistsError when there is something at `target`; asked before long work as well as before writing."""
    if target.exists():
        raise FileExistsError(f"{target} exists; a bundle is never overwritten: choose another path or remove it")


def write_bundle(target: Path, content: BundleContent, limits: Limits = DEFAULT_LIMITS) -> Bundle:
    """Write `content` as a bundle at `target`, which must not exist, and return it as read back.

    Raises:
        FileExistsError: `target` exists; nothing was written.
        BundleError: the content breaks the format.
    """
    require_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    beside.mkdir()
    try:
        external = _write_model(beside, content, limits)
        write_cases(beside / CASES, content.cases, content.signature)
        write_reference(beside / REFERENCE, content.reference)
        manifest = {
            "digest": BLANK,
            "format_version": FORMAT_VERSION,
            "name": content.name,
            "task": content.task,
            "signature": content.signature,
            "cases": Cases(
                n_samples=content.cases.n_samples,
                origin=content.cases_origin,  # type: ignore[arg-type]  # checked by the conversion below
                rtol=content.rtol,
                atol=content.atol,
            ),
            "files": tuple(_entry(beside, name) for name in (*REQUIRED_FILES, *external)),
            "lineage": content.lineage,
            "targets": content.targets,
            "rows_independent": content.rows_independent,
            "extra_domains": content.extra_domains,
        }
        if content.description is not None:
            manifest["description"] = content.description
        checked = convert(to_builtins(manifest), Manifest, source=str(target), error=MalformedManifest)
        write_digested(beside / MANIFEST, to_builtins(checked))
        written = read_bundle(beside, allow_domains=content.extra_domains, limits=limits)
        written.cases()
        written.reference()
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return replace(written, path=target)


def _write_model(beside: Path, content: BundleContent, limits: Limits) -> tuple[str, ...]:
    """Write model.onnx and its external data under `beside`; return the names of the external files."""
    if isinstance(content.model, bytes):
        (beside / MODEL).write_bytes(content.model)
        return ()
    graph = read_graph(content.model, extra_domains=content.extra_domains, limits=limits)
    shutil.copyfile(content.model, beside / MODEL)
    for name in graph.external_files:
        if name in (MANIFEST, PROFILE, *REQUIRED_FILES):
            raise BundleError(
                f"{content.model}: external data is called {name!r}, which the bundle needs itself; rename it"
            )
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(content.model.parent / name, beside / name)
    return graph.external_files


def read_bundle(path: Path, *, allow_domains: Iterable[str] = (), limits: Limits = DEFAULT_LIMITS) -> Bundle:
    """Read and verify the bundle at `path`: manifest, sizes, digests, graph, signature. Nothing is executed.

    Args:
        allow_domains: operator domains consented to beyond those every bundle may use.

    Raises:
        BundleError: one of its kinds, each naming the file and the remedy.
    """
    allowed = frozenset(allow_domains)
    manifest = read_manifest(path, limits)
    unconsented = sorted(set(manifest.extra_domains) - allowed)
    if unconsented:
        raise ForbiddenOperator(
            f"{path}: uses operators of {', '.join(unconsented)}; consent with --allow-domain {unconsented[0]} if you trust it"
        )
    verify_files(path, manifest)
    graph = read_graph(
        path / MODEL, listed=[entry.path for entry in manifest.files], extra_domains=allowed, limits=limits
    )
    _check_signature(manifest.signature, graph.signature, path)
    _check_labels(manifest.signature, path)
    return Bundle(path=path, manifest=manifest, graph=graph, limits=limits)


def verify_files(path: Path, manifest: Manifest) -> None:
    """Raise a BundleError unless every listed file lies under `path` as a regular file of the listed size and digest."""
    for entry in manifest.files:
        status = regular_file(path, entry.path)
        if status.st_size != entry.size_bytes:
            raise TruncatedFile(
                f"{path / entry.path}: has {status.st_size} bytes, the manifest says {entry.size_bytes}; fetch the bundle again",
                path=entry.path,
            )
    for entry in manifest.files:  # all sizes first: they cost nothing
        digest = sha256_of(path / entry.path)
        if digest != entry.sha256:
            raise DigestMismatch(
                f"{path / entry.path}: its SHA-256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}…; fetch the bundle again",
                path=entry.path,
            )


def read_manifest(path: Path, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Return the manifest of the bundle at `path`, its own digest and schema checked but none of the files it lists."""
    if not path.is_dir():
        raise MissingFile(f"{path}: no such bundle folder; give the path of a folder with a {MANIFEST}")
    regular_file(path, MANIFEST)
    data = read_digested(path / MANIFEST, limits.max_manifest_bytes)
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise UnknownFormatVersion(
            f"{path / MANIFEST}: format_version {version!r} is not known here (known: {FORMAT_VERSION}); install a newer modelyard",
            format_version=version,
        )
    manifest = convert(data, Manifest, source=str(path / MANIFEST), error=MalformedManifest)
    _check_time(manifest.lineage.created_at, path)
    _check_files(manifest, path, limits)
    return manifest


def _check_time(created_at: str, path: Path) -> None:
    try:
        datetime.fromisoformat(created_at)
    except ValueError as exc:
        raise MalformedManifest(
            f"{path / MANIFEST}: lineage.created_at must be a time in ISO 8601, such as 2026-01-31T12:00:00+00:00, got "
            f"{created_at[:80]!r}; correct this field and try again",
            field="lineage.created_at",
        ) from exc


def _check_files(manifest: Manifest, path: Path, limits: Limits) -> None:
    names = [entry.path for entry in manifest.files]
    for name in names:
        if safe_relative(name, f"{path / MANIFEST}: files") != name:
            raise UnsafePath(f"{path / MANIFEST}: files: path {name!r} is not in its shortest form; write it plainly")
        if name in (MANIFEST, PROFILE):
            raise MalformedManifest(f"{path / MANIFEST}: files: {name} must not be listed; remove the entry")
    if len(set(names)) != len(names):
        raise MalformedManifest(f"{path / MANIFEST}: files: a path stands twice; keep one")
    for required in REQUIRED_FILES:
        if required not in names:
            raise MissingFile(
                f"{path / MANIFEST}: files: {required} is not listed; write the bundle again", path=required
            )
    if len(names) > limits.max_files:
        raise TooLarge(
            f"{path / MANIFEST}: files: {len(names)} of them, the limit is {limits.max_files}; raise the limit"
        )
    for entry in manifest.files:
        if entry.size_bytes > limits.max_file_bytes:
            raise TooLarge(
                f"{path / MANIFEST}: {entry.path} has {entry.size_bytes} bytes, the limit is {limits.max_file_bytes}; raise the limit"
            )
    total = sum(entry.size_bytes for entry in manifest.files)
    if total > limits.max_bundle_bytes:
        raise TooLarge(
            f"{path / MANIFEST}: files: {total} bytes in all, the limit is {limits.max_bundle_bytes}; raise the limit"
        )


def _check_signature(declared: Signature, found: Signature, path: Path) -> None:
    """Names, datatypes and shapes must agree; where the graph leaves an axis open, the manifest may fix it."""
    for role, ours, theirs in (("inputs", declared.inputs, found.inputs), ("outputs", declared.outputs, found.outputs)):
        names = [spec.name for spec in ours]
        if names != [spec.name for spec in theirs]:
            raise SignatureMismatch(
                f"{path}: signature.{role} names {names}, the graph has {[spec.name for spec in theirs]}; write the bundle again"
            )
        for mine, graphs in zip(ours, theirs, strict=True):
            if mine.datatype != graphs.datatype or not _shape_fits(mine, graphs):
                raise SignatureMismatch(
                    f"{path}: signature.{role}: {mine.name!r} is {mine.datatype} {list(mine.shape)}, the graph has "
                    f"{graphs.datatype} {list(graphs.shape)}; write the bundle again"
                )


def _check_labels(signature: Signature, path: Path) -> None:
    """Class labels are distinct, one for each column of scores, and the same wherever an output has some.

    Which metric `targets` names is not looked at: a later version may know more of them, and whoever computes one says so.
    """
    first: TensorSpec | None = None
    for spec in (spec for spec in signature.outputs if spec.labels is not None):
        labels, where = spec.labels or (), f"{path / MANIFEST}: signature.outputs: {spec.name!r}"
        if not labels or len({str(label) for label in labels}) != len(labels):
            raise SignatureMismatch(
                f"{where} must have distinct labels, got {_short(labels)}; name every class once", output=spec.name
            )
        n_columns = spec.shape[1] if len(spec.shape) == 2 and spec.datatype in _FLOATS else len(labels)
        if isinstance(n_columns, int) and n_columns != len(labels):
            raise SignatureMismatch(
                f"{where} has {n_columns} columns of scores and {len(labels)} labels; give one label per column",
                output=spec.name,
            )
        if first is not None and labels != first.labels:
            raise SignatureMismatch(
                f"{where} has the labels {_short(labels)}, {first.name!r} has {_short(first.labels)}; give both the same labels in "
                "the same order",
                output=spec.name,
            )
        first = first or spec


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _shape_fits(mine: TensorSpec, graphs: TensorSpec) -> bool:
    return len(mine.shape) == len(graphs.shape) and all(
        isinstance(theirs, str) or ours == theirs for ours, theirs in zip(mine.shape, graphs.shape, strict=True)
    )


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes.

    In large pieces, so that a thread which hashes beside a server asks for the interpreter lock a few times, not thousands.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE_BYTES, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as stream:
        while n_bytes := stream.readinto(piece):
            digest.update(piece[:n_bytes])
    return digest.hexdigest()


def _entry(root: Path, name: str) -> FileEntry:
    return FileEntry(path=name, size_bytes=(root / name).stat().st_size, sha256=sha256_of(root / name))


def differences(old: Manifest, new: Manifest) -> Mapping[str, tuple[Any, Any]]:
    """Return field → (old, new) for every leaf of the two manifests that differs; absent leaves are None."""
    before, after = _leaves(to_builtins(old)), _leaves(to_builtins(new))
    return {
        field: (before.get(field), after.get(field))
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
    }


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten to dotted fields; a list of named things is keyed by its names, others by position."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        items = {
            str(item.get("name") or item.get("path") or item.get("metric") or i): item for i, item in enumerate(value)
        }.items()
    else:
        return {prefix: value}
    return {
        name: leaf
        for key, item in items
        for name, leaf in _leaves(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
