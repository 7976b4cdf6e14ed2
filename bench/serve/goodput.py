"""Goodput: the highest rate of Poisson arrivals at which 99 % of all requests sent are answered within the target."""

import time
from dataclasses import dataclass

from .generators import Cores, OpenLoop, Patience, open_loop
from .processes import Server

SHARE = 0.99
_NEAR = 0.97


class Search:
    """Which rate to try next: up or down by a quarter until the border lies between two rates, then halving between them.

    Pure: `rate_per_s` says what to try, `tell` what came out.
    """

    def __init__(self, first_per_s: float, n_probes: int) -> None:
        self.rate_per_s: float | None = first_per_s
        self.sustained_per_s = 0.0
        self._too_much_per_s: float | None = None
        self._n_left = n_probes

    def tell(self, sustained: bool) -> None:
        """Say whether `rate_per_s` was sustained; the next one replaces it, or None when the search is over."""
        assert self.rate_per_s is not None
        if sustained:
            self.sustained_per_s = self.rate_per_s
        else:
            self._too_much_per_s = self.rate_per_s
        self._n_left -= 1
        low, high = self.sustained_per_s, self._too_much_per_s
        if high is None:
            self.rate_per_s = low * 1.25
        elif not low:
            self.rate_per_s = high * 0.75
        else:
            self.rate_per_s = (low + high) / 2
        if not self._n_left or (high is not None and high < low * 1.02):
            self.rate_per_s = None


@dataclass(frozen=True)
class Goodput:
    """What a search found, and every probe of it."""

    rate_per_s: float
    at: OpenLoop | None
    probes: tuple[OpenLoop, ...]

    @property
    def cores(self) -> Cores:
        return max((probe.cores for probe in self.probes), key=lambda cores: cores.foreign)


def goodput(
    server: Server,
    first_per_s: float,
    seconds: float,
    patience: Patience,
    *,
    n_probes: int = 7,
    seed: int = 0,
    most_connections: int | None = None,
) -> Goodput:
    """Search the goodput of `server`, from `first_per_s` on.

    A near miss is tried once more with other arrivals, since short windows are noisy. The same seed gives the same arrivals.
    """
    search = Search(first_per_s, n_probes)
    probes: list[OpenLoop] = []
    at: OpenLoop | None = None
    while (rate_per_s := search.rate_per_s) is not None:
        for attempt in range(2):
            probe = open_loop(
                server,
                rate_per_s,
                seconds,
                seed + len(probes) * 10 + attempt,
                patience,
                most_connections=most_connections,
            )
            time.sleep(0.3)  # lets an overloaded server drain
            if not _NEAR <= probe.share_in_time < SHARE:
                break
        probes.append(probe)
        sustained = probe.share_in_time >= SHARE
        at = probe if sustained else at
        search.tell(sustained)
    return Goodput(search.sustained_per_s, at, tuple(probes))
