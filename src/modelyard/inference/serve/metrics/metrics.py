"""Counters, gauges and histograms in shared memory: written by each worker's event loop, read by whoever answers /metrics.

Every worker owns one slab, a piece of anonymous shared memory made before the fork. What a worker counted outlives it: its
replacement gets the same slab and goes on counting there. A reader merges all slabs by name and labels.

    slab = header (64 bytes) | directory, growing up →   …free…   ← values (float64), growing down

The directory is JSON lines, one per series: [name, index of its first value, label values…]. A line is written first and the
directory's length after it, so a reader sees whole lines only. No lock is needed: one writer per slab, and a float64 that is
aligned is read and written in one piece.

What is counted, and under which names, is said in observe.py; how it is written out, in exposition.py.
"""

import mmap
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from modelyard.errors import ConfigError

SLAB_BYTES = 4 * 1024 * 1024
"""Room for about 1,500 versions of models; pages that are never touched cost nothing."""

_HEADER_BYTES = 64
_MAGIC = int.from_bytes(b"myslab01", "little")
_NAN = float("nan")

Merge = Literal["sum", "max", "min", "worker"]
Labels = tuple[str, ...]


@dataclass(frozen=True)
class CounterFamily:
    """Something that only grows. By convention `name` ends in _total."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    width = 1


@dataclass(frozen=True)
class GaugeFamily:
    """Something that goes up and down; `merge` says how the workers' values become one. "worker" keeps them apart by a label."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    merge: Merge = "sum"
    width = 1


@dataclass(frozen=True)
class HistogramFamily:
    """How values are distributed. `bounds` are the inclusive upper ends of the buckets; one without an end follows."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        return len(self.bounds) + 2  # the sum, a count per bound, and the count beyond the last


Family = CounterFamily | GaugeFamily | HistogramFamily

SERIES_DROPPED = CounterFamily(
    "modelyard_metric_series_dropped_total", "Series not counted because the worker's slab of shared memory was full."
)


@dataclass(frozen=True, slots=True)
class HistogramValue:
    """A merged histogram; `counts` are per bucket, not cumulative, the last one beyond the last bound."""

    counts: tuple[float, ...]
    sum: float

    @property
    def count(self) -> float:
        return sum(self.counts)


Value = float | HistogramValue
Snapshot = Mapping[Family, Mapping[Labels, Value]]
"""Everything at one moment: family → label values → value."""


class Counter:
    """One series of a counter."""

    __slots__ = ("_cells", "index")

    def __init__(self, cells: "memoryview[float]", index: int) -> None:
        self._cells = cells
        self.index = index

    def add(self, amount: float = 1.0) -> None:
        self._cells[self.index] += amount

    @property
    def value(self) -> float:
        return self._cells[self.index]


class Gauge:
    """One series of a gauge; it does not appear before it is set, nor after it is cleared."""

    __slots__ = ("_cells", "index")

    def __init__(self, cells: "memoryview[float]", index: int) -> None:
        self._cells = cells
        self.index = index

    def set(self, value: float) -> None:
        self._cells[self.index] = value

    def clear(self) -> None:
        self._cells[self.index] = _NAN


class Histogram:
    """One series of a histogram. Values must not be NaN: the sum would stay so."""

    __slots__ = ("_bounds", "_cells", "index")

    def __init__(self, cells: "memoryview[float]", index: int, bounds: tuple[float, ...]) -> None:
        self._cells = cells
        self.index = index
        self._bounds = bounds

    def observe(self, value: float) -> None:
        cells, index = self._cells, self.index
        cells[index] += value
        cells[index + 1 + bisect_left(self._bounds, value)] += 1.0

    def observe_many(self, values: Iterable[float]) -> None:
        """The same for each of `values`, at about half the price."""
        cells, bounds, first = self._cells, self._bounds, self.index + 1
        total = 0.0
        for value in values:
            total += value
            cells[first + bisect_left(bounds, value)] += 1.0
        cells[first - 1] += total


class Registry:
    """What one worker counts. Belongs to the worker's event loop; not thread-safe.

    Children are looked up once and held by the caller: looking one up costs a dictionary, counting in it does not. A slab that
    is full drops new series and counts that it did; nothing here raises because of it.
    """

    def __init__(self, families: Iterable[Family], slabs: Sequence[memoryview], worker: int = 0) -> None:
        """Take over slab number `worker`: what counts in it goes on, what its gauges said is forgotten.

        Args:
            families: every family that may be counted, and that may stand in the slab.
            slabs: all workers' slabs; the others are read only.

        Raises:
            ConfigError: the slab is too small, or holds something else.
        """
        self._families = {family.name: family for family in (*families, SERIES_DROPPED)}
        self._slab = slabs[worker]
        if len(self._slab) < 4096 or len(self._slab) % 8:
            raise ConfigError(
                f"slab_bytes must be a multiple of 8 from 4096 on, got {len(self._slab)}; the default is {SLAB_BYTES}"
            )
        self.cells = self._slab.cast("d")
        """All values, for who inlines what a child does."""
        self._header = self._slab[:_HEADER_BYTES].cast("Q")
        self._children: dict[tuple[str, Labels], Counter | Gauge | Histogram] = {}
        # What is counted in a series that found no room goes into the last values, which no line of the directory names.
        self._nowhere = self._values_start = len(self.cells) - max(family.width for family in self._families.values())
        if self._header[0] not in (0, _MAGIC):
            raise ConfigError("the slab for metrics holds something else; give each worker zeroed shared memory")
        self._header[0] = _MAGIC
        for line in _read_lines(self._slab, 0)[0]:
            self._resume(line)
        self._dropped = self.counter(SERIES_DROPPED)

    def counter(self, family: CounterFamily, *labels: str) -> Counter:
        child = self._children.get((family.name, labels)) or self._new(family, labels)
        assert isinstance(child, Counter)
        return child

    def gauge(self, family: GaugeFamily, *labels: str) -> Gauge:
        child = self._children.get((family.name, labels)) or self._new(family, labels)
        assert isinstance(child, Gauge)
        return child

    def histogram(self, family: HistogramFamily, *labels: str) -> Histogram:
        child = self._children.get((family.name, labels)) or self._new(family, labels)
        assert isinstance(child, Histogram)
        return child

    def announce(self, line: list[str]) -> bool:
        """Write a line that is no series into the directory, for `BoundedLabel`; False where there is no room."""
        return self._append(line, 0)

    def _new(self, family: Family, labels: Labels) -> Counter | Gauge | Histogram:
        if len(labels) != len(family.labels):
            raise TypeError(f"{family.name} has the labels {family.labels}, got {labels}")
        index = self._values_start - family.width
        first = _NAN if isinstance(family, GaugeFamily) else 0.0
        if not self._append([family.name, index, *labels], family.width, first):
            self._dropped.add()
            return self._remember(family, labels, self._nowhere)
        self._values_start = index
        return self._remember(family, labels, index)

    def _append(self, line: list[Any], width: int, first: float = 0.0) -> bool:
        """Write a line of the directory; False where it and `width` values, the first of them `first`, find no room."""
        text = orjson.dumps(line) + b"\n"
        start, index = _HEADER_BYTES + self._header[1], self._values_start - width
        if start + len(text) > 8 * index:
            return False
        if width:
            self.cells[index] = first
        self._slab[start : start + len(text)] = text
        self._header[1] += len(text)  # from here on readers see it
        return True

    def _resume(self, line: list[Any]) -> None:
        """Take over a series that an earlier owner of the slab began."""
        name, index, *labels = line
        family = self._families.get(name)
        if family is None:
            return  # an announcement
        self._values_start = min(self._values_start, index)
        if isinstance(family, GaugeFamily):
            self.cells[index] = _NAN
        self._remember(family, tuple(labels), index)

    def _remember(self, family: Family, labels: Labels, index: int) -> Counter | Gauge | Histogram:
        child: Counter | Gauge | Histogram
        if isinstance(family, CounterFamily):
            child = Counter(self.cells, index)
        elif isinstance(family, GaugeFamily):
            child = Gauge(self.cells, index)
        else:
            child = Histogram(self.cells, index, family.bounds)
        self._children[family.name, labels] = child
        return child


class BoundedLabel:
    """The values of a label that strangers choose: at most `limit` distinct ones over all workers, the others are OTHER.

    Belongs to the worker's event loop, as its registry does.
    """

    OTHER = "other"

    def __init__(self, name: str, limit: int, registry: Registry, slabs: Sequence[memoryview]) -> None:
        self._limit = limit
        self._registry = registry
        self._slabs = slabs
        self._come, self._go = f"+{name}", f"-{name}"
        self._read_bytes = [0] * len(slabs)
        self._announced: list[set[str]] = [set() for _ in slabs]
        self._admitted: set[str] = set()
        self._settled: set[str] | None = None
        """All that stand, once there are as many as there may be."""

    def value(self, wanted: str) -> str:
        """Return `wanted`, or OTHER where there are too many already."""
        if wanted in self._admitted:
            return wanted
        if self._settled is not None and wanted not in self._settled:
            return self.OTHER
        return self._admit(wanted)

    def _admit(self, wanted: str) -> str:
        """Announce `wanted`, and only then read what the others have announced: of two workers that each add one too many, one at
        least sees the other's and withdraws."""
        standing = self._standing()
        if (wanted in standing or len(standing) < self._limit) and self._registry.announce([self._come, wanted]):
            if len(self._standing()) <= self._limit:
                self._admitted.add(wanted)
            else:
                self._registry.announce([self._go, wanted])
        standing = self._standing()
        if len(standing) >= self._limit:
            self._settled = standing
        return wanted if wanted in self._admitted else self.OTHER

    def _standing(self) -> set[str]:
        for worker, slab in enumerate(self._slabs):
            lines, self._read_bytes[worker] = _read_lines(slab, self._read_bytes[worker])
            for kind, value, *_ in lines:
                if kind == self._come:
                    self._announced[worker].add(value)
                elif kind == self._go:
                    self._announced[worker].discard(value)
        return set().union(*self._announced)


class Reader:
    """Merges the slabs of all workers. May be used on any thread, by one caller at a time."""

    def __init__(self, families: Iterable[Family], slabs: Sequence[memoryview]) -> None:
        self._families = {family.name: family for family in (*families, SERIES_DROPPED)}
        self._slabs = slabs
        self._cells = [slab.cast("d") for slab in slabs]
        self._read_bytes = [0] * len(slabs)
        self._places: dict[Family, dict[Labels, list[tuple[int, int]]]] = {}

    def snapshot(self) -> Snapshot:
        """Return every series, in the order of the families; a family without series is left out."""
        for worker, slab in enumerate(self._slabs):
            lines, self._read_bytes[worker] = _read_lines(slab, self._read_bytes[worker])
            for name, index, *values in lines:
                family = self._families.get(name)
                if family is not None:
                    self._place(family, tuple(values), worker, index)
        found: dict[Family, dict[Labels, Value]] = {}
        for family in self._families.values():
            series: dict[Labels, Value] = {}
            for labels, places in self._places.get(family, {}).items():
                value = self._merged(family, places)
                if value is not None:
                    series[labels] = value
            if series:
                found[family] = series
        return found

    def _place(self, family: Family, labels: Labels, worker: int, index: int) -> None:
        if isinstance(family, GaugeFamily) and family.merge == "worker":
            labels = (*labels, str(worker))
        self._places.setdefault(family, {}).setdefault(labels, []).append((worker, index))

    def _merged(self, family: Family, places: list[tuple[int, int]]) -> Value | None:
        cells = self._cells
        if isinstance(family, CounterFamily):
            return float(sum(cells[worker][index] for worker, index in places))
        if isinstance(family, HistogramFamily):
            width = family.width
            values = [cells[worker][index : index + width].tolist() for worker, index in places]
            total, *counts = values[0] if len(values) == 1 else map(sum, zip(*values, strict=True))
            return HistogramValue(tuple(counts), total)
        shown = [value for worker, index in places if (value := cells[worker][index]) == value]  # not NaN
        if not shown:
            return None
        return max(shown) if family.merge == "max" else min(shown) if family.merge == "min" else sum(shown)


def label_names(family: Family) -> tuple[str, ...]:
    """Return the names of a family's labels as they are read: with "worker" where the workers are kept apart."""
    apart = isinstance(family, GaugeFamily) and family.merge == "worker"
    return (*family.labels, "worker") if apart else family.labels


def new_slabs(n_workers: int = 1, slab_bytes: int = SLAB_BYTES) -> list[memoryview]:
    """Return shared memory for `n_workers`, to be made before they are forked."""
    shared = memoryview(mmap.mmap(-1, n_workers * slab_bytes))
    return [shared[start : start + slab_bytes] for start in range(0, n_workers * slab_bytes, slab_bytes)]


def _read_lines(slab: memoryview, start_bytes: int) -> tuple[list[list[Any]], int]:
    """Return the directory's lines from a place on, and the place to go on from.

    On machines that reorder writes a line may lag behind the length that announces it; it is then read the next time.
    """
    end_bytes = slab[8:16].cast("Q")[0]
    text = bytes(slab[_HEADER_BYTES + start_bytes : _HEADER_BYTES + end_bytes])
    lines: list[list[Any]] = []
    for line in text.splitlines(keepends=True):
        try:
            lines.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            break
        start_bytes += len(line)
    return lines, start_bytes
