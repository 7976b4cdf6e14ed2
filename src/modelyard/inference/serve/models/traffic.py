"""How the requests of a model are shared between its versions: a weighted split, sticky by key, and a shadow. Pure.

POST /v2/repository/models/NAME/traffic → `Traffic` → `Split.choose`, for each request that names no version or label
                                                    → shadow.py, which repeats a share of them on another version
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, field

from modelyard.errors import ConfigError
from modelyard.schema import Frozen

_GOLDEN = (math.sqrt(5) - 1) / 2
_TO_UNIT = 2.0**-64


class Traffic(Frozen, frozen=True, omit_defaults=True):
    """How a model's requests are shared out. The default: one version answers all.

    Example:
        >>> Traffic(split={"1": 0.9, "2": 0.1}, shadow=3, shadow_share=0.05).versions
        (1, 2, 3)
    """

    split: dict[Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,8}(?!\n)$")], Annotated[float, Meta(ge=0)]] = field(
        default_factory=dict
    )
    """Version → weight; the weights need not add up to 1. Empty: no split."""
    shadow: Annotated[int, Meta(ge=1)] | None = None
    """The version that a share of the calls is repeated on; its answers are compared and thrown away."""
    shadow_share: Annotated[float, Meta(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        if self.split and not 0 < sum(self.split.values()) < math.inf:
            raise ConfigError(
                f"split must have a finite weight above 0, got {self.split}; leave it out to end the split"
            )
        if self.shadow is not None and list(self.weights) == [self.shadow]:
            raise ConfigError(f"shadow must be another version than the only one of the split, got {self.shadow}")

    @property
    def weights(self) -> dict[int, float]:
        """Version → share of the requests, adding up to 1; those with weight 0 left out."""
        total = sum(self.split.values())
        return {int(version): weight / total for version, weight in self.split.items() if weight > 0}

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that have to be served for it."""
        return tuple(dict.fromkeys([*self.weights, *([] if self.shadow is None else [self.shadow])]))


class Split:
    """Chooses a version per request. Belongs to the event loop.

    With a key, by weighted rendezvous hashing: the same key meets the same version in every process and after every restart,
    and a change of weights moves only the keys it has to. Without one, by a sequence that comes as close to the weights in
    every stretch of requests as in the long run.

    Sources: Schindelhauer and Schomaker, Weighted Distributed Hash Tables (SPAA 2005); the additive recurrence of the golden
    ratio, Knuth, The Art of Computer Programming 3, section 6.4.
    """

    def __init__(self, name: str, weights: Mapping[int, float]) -> None:
        """`name` is the model's: the same key may meet the new version of one model and the old one of another."""
        self._weights = dict(sorted(weights.items()))
        self._hashes = {
            version: hashlib.blake2b(f"{name}/{version}".encode(), digest_size=8) for version in self._weights
        }
        self._position = 0.0

    def choose(self, key: bytes = b"") -> int:
        """Return the version for the next request, or for that of a client who gave a key."""
        if key:
            return min(self._weights, key=lambda version: self._cost(version, key))
        self._position = position = (self._position + _GOLDEN) % 1.0
        for version, weight in self._weights.items():
            position -= weight
            if position < 0.0:
                return version
        return version  # the weights add up to a rounding error less than 1

    def _cost(self, version: int, key: bytes) -> float:
        """Return the arrival of an exponential clock that ticks at the version's weight; the first to tick has the key."""
        hashed = self._hashes[version].copy()
        hashed.update(key)
        uniform = (int.from_bytes(hashed.digest(), "big") + 0.5) * _TO_UNIT
        return -math.log(uniform) / self._weights[version]


class Sampler:
    """Says for each of a stream of calls whether it is among a share of them, spread as evenly as can be."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._position = 0.0

    def take(self) -> bool:
        self._position = position = (self._position + _GOLDEN) % 1.0
        return position < self._share
