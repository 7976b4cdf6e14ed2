"""profile.json: measured latency by batch size, per kind of hardware. Added and replaced; no part of a bundle's identity."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from modelyard.bundle.jsonfile import read_digested, write_digested
from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.bundle.paths import regular_file
from modelyard.errors import MalformedManifest
from modelyard.schema import Frozen, convert, to_builtins

PROFILE_VERSION = 1
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")

Seconds = Annotated[float, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class Fingerprint(Frozen, frozen=True):
    """The hardware and runtime that a latency belongs to."""

    processor: str
    features: tuple[str, ...]
    """Instruction sets that decide how fast, and how exactly, integer models run."""
    n_cores: Positive
    engine: str
    """Engine and version, e.g. "onnxruntime 1.32.0"."""


class Latency(Frozen, frozen=True):
    """Execution time at one batch size."""

    batch_size: Positive
    n_threads: Positive
    n_runs: Positive
    p50_s: Seconds
    p99_s: Seconds
    mean_s: Seconds

    @property
    def rows_per_s(self) -> float:
        return self.batch_size / self.mean_s


class Profile(Frozen, frozen=True):
    """What was measured on one kind of hardware."""

    hardware: Fingerprint
    measured_at: str
    latencies: Annotated[tuple[Latency, ...], Meta(min_length=1)]


class _ProfileFile(Frozen, frozen=True):
    digest: str
    profile_version: int
    profiles: tuple[Profile, ...]


def read_profiles(path: Path, limits: Limits = DEFAULT_LIMITS) -> tuple[Profile, ...]:
    """Return the profiles in the file, none when there is no file.

    Raises:
        DigestMismatch, MalformedManifest, TooLarge, UnsafePath.
    """
    if not os.path.lexists(path):
        return ()
    regular_file(path.parent, path.name)
    data = read_digested(path, limits.max_manifest_bytes)
    if data.get("profile_version") != PROFILE_VERSION:
        raise MalformedManifest(
            f"{path}: profile_version must be {PROFILE_VERSION}, got {data.get('profile_version')!r}; measure again"
        )
    return convert(data, _ProfileFile, source=str(path), error=MalformedManifest).profiles


def add_profile(path: Path, profile: Profile) -> None:
    """Add `profile`, in the place of an earlier one of the same hardware."""
    others: Iterable[Profile] = (kept for kept in read_profiles(path) if kept.hardware != profile.hardware)
    write_digested(path, {"profile_version": PROFILE_VERSION, "profiles": to_builtins([*others, profile])})


def fingerprint(engine: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> Fingerprint:
    """Return this machine's fingerprint for an engine given as "name version"."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return Fingerprint(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        features=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        n_cores=os.cpu_count() or 1,
        engine=engine,
    )
