"""Which versions of a model are to be served, and which of them answers whom. Pure: what a store lists in, what to serve out.

store (polling.py) → `Listing` → `wanted` → repository.py, which loads what is missing and switches when it is ready
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelyard.bundle.store import CHAMPION
from modelyard.errors import ConfigError

Ref = int | str
"""A version, or a tag that points at one; "" is the champion, else the latest."""


@dataclass(frozen=True)
class Listing:
    """What a store has of one model."""

    versions: tuple[int, ...]
    """Complete ones, ascending."""
    tags: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionPolicy:
    """Which versions of a model to serve; the default is the champion, else the latest."""

    latest: int = 0
    """That many of the highest versions; 0: none for being high."""
    refs: tuple[Ref, ...] = ()
    """These; the first of them answers requests that name no version."""
    all: bool = False

    @property
    def is_default(self) -> bool:
        return not (self.latest or self.refs or self.all)


@dataclass(frozen=True)
class Wanted:
    """What is to be served of one model."""

    versions: tuple[int, ...]
    """The one that answers requests that name no version first. Empty: nothing can be."""
    labels: Mapping[str, int]
    """The store's tags on those versions: what …/labels/LABEL means."""
    missing: tuple[Ref, ...] = ()
    """Asked for by the policy and not in the store."""


def wanted(policy: VersionPolicy, listing: Listing) -> Wanted:
    """Return what `policy` asks of `listing`."""
    versions, tags = listing.versions, {tag: v for tag, v in listing.tags.items() if v in listing.versions}
    if not versions:
        return Wanted((), {}, policy.refs)
    favourite = tags.get(CHAMPION, versions[-1])
    chosen: list[int] = []
    missing: list[Ref] = []
    for ref in policy.refs:
        version = ref if isinstance(ref, int) else tags.get(ref) if ref else favourite
        if version in versions:
            chosen.append(version)
        else:
            missing.append(ref)
    if policy.all:
        chosen += versions[::-1]
    elif policy.latest:
        chosen += versions[: -policy.latest - 1 : -1]
    elif policy.is_default:
        chosen.append(favourite)
    if not policy.refs and favourite in chosen:
        chosen.insert(0, favourite)
    served = tuple(dict.fromkeys(chosen))
    return Wanted(served, {tag: version for tag, version in tags.items() if version in served}, tuple(missing))


def read_policy(value: str | Mapping[str, int] | tuple[Ref, ...], source: str) -> VersionPolicy:
    """Return the policy that serve.toml writes as "champion", "all", { latest = N } or [1, 3, "challenger"].

    Raises:
        ConfigError: it says something else.
    """
    if value == "champion":
        return VersionPolicy()
    if value == "all":
        return VersionPolicy(all=True)
    if isinstance(value, Mapping) and set(value) == {"latest"} and value["latest"] >= 1:
        return VersionPolicy(latest=value["latest"])
    if isinstance(value, tuple) and value:
        return VersionPolicy(refs=value)
    shown = dict(value) if isinstance(value, Mapping) else value
    raise ConfigError(
        f'{source} must be "champion", "all", {{ latest = N }} with N of at least 1, or a list of versions and tags, got {shown!r}'
    )
