"""A bar: what was promised, what was measured, and whether the one reaches the other. And how numbers are written."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Bar:
    """One line of the table.

    Attributes:
        what: the promise, without its number.
        values: what was measured, one a turn; the median is judged. Empty where nothing could be measured, which is a miss.
        limit: that the median must reach, or not pass.
        unit: of the values and the limit; a ratio by default.
        ours: our figure as people read it, with its unit.
        against: what it was compared with, likewise.
        noisy: some value was disturbed by something else on the machine, every time it was tried.
    """

    what: str
    values: tuple[float, ...]
    side: Literal["at least", "at most"]
    limit: float
    unit: str = "×"
    ours: str = ""
    against: str = ""
    noisy: bool = False

    @property
    def value(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.side == "at least" else self.value <= self.limit


@dataclass(frozen=True)
class Table:
    """Figures beside the bars, for people."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What one section found."""

    bars: tuple[Bar, ...]
    tables: tuple[Table, ...] = ()


def number(value: float) -> str:
    """Return a number with three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Iterable[float]) -> str:
    """Return "median (least–most)", or the single value; "-" for none."""
    if not (values := sorted(values)):
        return "-"
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(values[0])}–{number(values[-1])})"


def per_s(values: Iterable[float]) -> str:
    return f"{text}/s" if (text := spread(values)) != "-" else text


def ms(values_s: Iterable[float]) -> str:
    return f"{text} ms" if (text := spread(value * 1000 for value in values_s)) != "-" else text


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, ...]:
    """Return ours over theirs for each turn that both have; where they share none, ours over the median of theirs."""
    if shared := [turn for turn in ours if theirs.get(turn)]:
        return tuple(ours[turn] / theirs[turn] for turn in shared)
    middle = statistics.median(theirs.values()) if theirs else 0
    return tuple(value / middle for value in ours.values()) if middle else ()
