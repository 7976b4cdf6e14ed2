"""Which models stay in memory under a budget: the least recently used leaves first. Pure decisions.

repository.py asks before a load, with what the version is expected to need, and after it, with what it was measured to take.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Key = tuple[str, int]
"""Name and version."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A version in memory."""

    key: Key
    memory_bytes: int
    used_s: float
    """When it was last asked, on any one clock."""
    pinned: bool = False
    """Never leaves for another."""
    busy: bool = False
    """Has calls in flight; does not leave now."""


def evictions(residents: Iterable[Resident], needed_bytes: int, budget_bytes: int) -> tuple[Key, ...] | None:
    """Return who has to leave so that `needed_bytes` more fit into the budget, least recently used first.

    None when they do not fit at present, whoever of those that may leave does. Equal times leave in order of their keys, so
    that every worker decides alike.
    """
    residents = tuple(residents)
    excess = sum(one.memory_bytes for one in residents) + needed_bytes - budget_bytes
    leaving: list[Key] = []
    for one in sorted(residents, key=lambda one: (one.used_s, one.key)):
        if excess <= 0:
            break
        if not one.pinned and not one.busy:
            leaving.append(one.key)
            excess -= one.memory_bytes
    return tuple(leaving) if excess <= 0 else None


def can_ever_fit(residents: Iterable[Resident], needed_bytes: int, budget_bytes: int) -> bool:
    """Whether `needed_bytes` fit beside those that never leave."""
    return sum(one.memory_bytes for one in residents if one.pinned) + needed_bytes <= budget_bytes
