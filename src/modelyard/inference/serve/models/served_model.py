"""One model as the server knows it: what is wanted of it, which version each label means, how its requests are shared out.

keeper.py changes it, repository.py reads it for every request that is not answered from the table.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from modelyard.inference.serve.models.loading import Loaded
from modelyard.inference.serve.models.polling import Stamp
from modelyard.inference.serve.models.shadow import ShadowCounts
from modelyard.inference.serve.models.traffic import Split, Traffic
from modelyard.inference.serve.models.versions import Listing, VersionPolicy, Wanted

State = Literal["loading", "ready", "failed", "draining", "unloaded"]

DEFAULT = ""
"""The route of requests that name neither version nor label."""


@dataclass(frozen=True)
class Entry:
    """What is known of one version; `loaded` is there exactly when it is ready or draining."""

    name: str
    version: int
    state: State
    reason: str = ""
    loaded: Loaded | None = None
    on_demand: bool = False
    """Not in memory, and loaded by the first request for it."""

    @property
    def answers(self) -> bool:
        """Whether a request for it is answered, be it after a load."""
        return self.state == "ready" or self.on_demand


@dataclass(slots=True)
class Failure:
    """Why a version could not be loaded, and what has to change before it is tried again."""

    reason: str
    passing: bool
    """It may succeed by itself later, and is tried now and then."""
    fingerprint: Stamp
    """Of its files; when they are touched it is tried again."""
    n_tries: int = 1
    retry: asyncio.TimerHandle | None = None

    def forget(self) -> None:
        if self.retry is not None:
            self.retry.cancel()


@dataclass(slots=True)
class Fork:
    """Stands in the table of answers where a model's requests are split."""

    split: Split
    counts: dict[int, int]


@dataclass(slots=True)
class ServedModel:
    """Belongs to the event loop."""

    name: str
    wanted: Wanted = field(default_factory=lambda: Wanted((), {}))
    listing: Listing | None = None
    """What the store had when it was last looked at; None: it never was."""
    policy: VersionPolicy | None = None
    """Given by a call; None follows the library's."""
    is_off: bool = False
    """Unloaded by a call, until it is loaded by one."""
    routes: dict[str, int] = field(default_factory=dict)
    """Label, or DEFAULT → the version that answers now. It follows its target when the target is ready."""
    failures: dict[int, Failure] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    fork: Fork | None = None
    shadow_counts: ShadowCounts = field(default_factory=ShadowCounts)
    shadow_trouble: str = ""
    """Why nothing is repeated on the shadow."""

    @property
    def default(self) -> int | None:
        """The version that answers requests that name neither version nor label; None: there is none."""
        return self.routes.get(DEFAULT)

    def targets(self) -> dict[str, int]:
        """Return the routes as they should be."""
        if self.is_off or not self.wanted.versions:
            return {}
        return {DEFAULT: self.wanted.versions[0], **self.wanted.labels}

    def needed(self) -> tuple[int, ...]:
        """Return the versions to be served, the default one first: answering, wanted, or part of the traffic."""
        if self.is_off:
            return ()
        answering = [] if self.default is None else [self.default]
        return tuple(dict.fromkeys([*answering, *self.wanted.versions, *self.traffic.versions, *self.routes.values()]))

    def share(self, traffic: Traffic) -> None:
        """Share the requests out like this from now on, and count anew."""
        weights = traffic.weights
        self.traffic = traffic
        self.fork = Fork(Split(self.name, weights), dict.fromkeys(weights, 0)) if weights else None
        self.shadow_counts = ShadowCounts(self.shadow_counts.totals)

    def forget_failures(self, versions: Iterable[int]) -> None:
        for version in tuple(versions):
            failure = self.failures.pop(version, None)
            if failure is not None:
                failure.forget()
