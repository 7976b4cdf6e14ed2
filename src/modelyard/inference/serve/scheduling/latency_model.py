"""l(b): how long a batch of b rows takes, as the policy of scheduling.py believes it. No clock inside.

A centre per size and one spread for all sizes, l(b) = centre(b) * spread:

- The centre is learned at about four sizes per doubling ("knots") as a smoothed time, in which one run counts for at most
  twice what was expected: a hiccup moves it by a tenth. While a knot is young, a time shorter than expected is believed at
  once, since noise only ever adds to an execution time.
- The spread is the sixth largest ratio of time to centre among the last 64 runs, the 91st percentile. Five hiccups in 64
  runs leave it as it is; a machine that has become slower raises it within six runs, one that has become faster lowers
  it after 64.
- A curve that never falls is drawn through the centres: the one seen last is believed, and earlier ones give way where both
  cannot be true. It is straight between knots, and beyond the largest size seen half of it grows in proportion to the
  rows: hopeful enough that larger batches get tried, after which they are known.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from math import inf

from modelyard.bundle.profile import Latency
from modelyard.errors import ConfigError

_N_RUNS = 64
_RANK = 6
"""The spread is this many-th largest ratio of the last `_N_RUNS`."""
_UNMEASURED_SPREAD = 1.2
_MOST_PROFILED_SPREAD = 2.0
"""A profile's p99 of a few hundred runs may be a single hiccup."""
_NEWEST = 0.1
"""Weight of the newest run in a centre that has seen many."""
_YOUNG = 4.0
"""Runs after which a centre is trusted; a profiled size counts as having had so many."""
_FORGET_RUNS = 256
"""A knot that was not seen for so many runs is young again."""
_REDRAW_RUNS = 64
"""The curve is drawn anew after so many runs; a surprise counts for several, a young size for all of them."""
_SURPRISE = 12
_RELAX = 0.8
_SHORTEST_S = 1e-9


class LatencyModel:
    """The learned latency of one model version for one shape of rows. One owner mutates; not thread-safe.

    Reading is cheap; what was learned since the last reading is drawn into the curve first, which takes some 20 microseconds
    and happens every 64 runs, or after a few where they were surprising.

    Example:
        >>> model = LatencyModel(max_batch_size=8)
        >>> for _ in range(64):
        ...     model.observe(1, 0.005)
        ...     model.observe(8, 0.007)
        >>> [round(model.high_s(n_rows) * 1e3, 1) for n_rows in (1, 4, 8)]
        [5.0, 5.9, 7.0]
    """

    __slots__ = (
        "_centres",
        "_curve",
        "_knot_of",
        "_known",
        "_least_s",
        "_n_runs",
        "_n_undrawn",
        "_runs",
        "_seen_at",
        "_sizes",
        "_spread",
        "_weights",
        "max_batch_size",
        "revision",
    )

    def __init__(self, max_batch_size: int, profile: Iterable[Latency] = (), guess_row_s: float = 1e-3) -> None:
        """
        Args:
            max_batch_size: the largest batch that is ever run.
            profile: latencies measured on this hardware with the number of threads that an instance has.
            guess_row_s: what a row alone is taken to need before anything is known.

        Raises:
            ConfigError: a size or a guess that is not positive.
        """
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size must be at least 1, got {max_batch_size}; 1 means no batching")
        if guess_row_s <= 0.0:
            raise ConfigError(f"guess_row_s must be above 0, got {guess_row_s}; give the seconds one row may need")
        self.max_batch_size = max_batch_size
        self.revision = 0
        """Grows whenever l(b) is drawn anew; what was read at one revision holds until the next."""
        self._sizes = _knot_sizes(max_batch_size)
        self._knot_of = _nearest(self._sizes, max_batch_size)
        measured = {each.batch_size: each for each in profile if each.batch_size <= max_batch_size and each.p50_s > 0.0}
        self._known = bool(measured)
        points = [(size, each.p50_s) for size, each in sorted(measured.items())]
        self._curve = _draw(points or [(1, guess_row_s)], max_batch_size)
        self._centres = [self._curve[size] for size in self._sizes]
        self._weights = [0.0] * len(self._sizes)  # runs behind each centre; 0: nothing but the curve around it
        for size in measured:
            self._weights[self._knot_of[size]] = _YOUNG
        self._least_s = [inf] * len(self._sizes)  # the shortest run ever seen of each size, or measured before
        for size, each in measured.items():
            self._least_s[self._knot_of[size]] = each.p50_s
        if not measured:
            self._least_s[0] = guess_row_s
        self._n_runs = 0
        self._seen_at = [0] * len(self._sizes)  # the value of `_n_runs` then
        spreads = sorted(max(1.0, each.p99_s / each.p50_s) for each in measured.values()) or [_UNMEASURED_SPREAD]
        self._spread = min(spreads[len(spreads) // 2], _MOST_PROFILED_SPREAD)
        # The last runs as (knot, seconds at the knot's size); a ratio to today's centre is taken when drawing, so that a
        # machine that changed is not counted twice, in the centre and in the spread.
        self._runs: deque[tuple[int, float]] = deque(maxlen=_N_RUNS)
        smallest = self._knot_of[min(measured, default=1)]
        for rank in range(_N_RUNS):
            spread = self._spread if rank >= _N_RUNS - _RANK else 1.0
            self._runs.append((smallest, self._centres[smallest] * spread))
        self._n_undrawn = 0

    def fresh(self) -> "LatencyModel":
        """Return a model that starts from what this one believes and learns on its own, for rows of another shape."""
        other = LatencyModel(self.max_batch_size)
        other._curve, other._spread, other._known = self._curve, self._spread, self._known
        other._centres, other._runs = self._centres.copy(), self._runs.copy()
        other._weights, other._least_s = self._weights.copy(), self._least_s.copy()
        other._n_runs = _FORGET_RUNS + 1  # all of it is hearsay: the first runs may overrule it
        return other

    @property
    def spread(self) -> float:
        """How many times longer than usual the slow runs take; 1 where all are alike."""
        return self._spread

    def high_s(self, n_rows: int) -> float:
        """Return l(n_rows), the high quantile by which deadlines are judged; `n_rows` in [1, max_batch_size]."""
        self.redraw()
        return self._curve[n_rows] * self._spread

    def mean_s(self, n_rows: int) -> float:
        """Return what a batch of `n_rows` usually takes: a mean in which hiccups count for little."""
        self.redraw()
        return self._curve[n_rows]

    def high_table_s(self) -> list[float]:
        """Return l(0) = 0, l(1), ... l(max_batch_size)."""
        self.redraw()
        spread = self._spread
        return [centre_s * spread for centre_s in self._curve]

    def seen(self, n_rows: int) -> bool:
        """Return whether l(n_rows) rests on runs or a profile of about this size, rather than on extrapolation."""
        return self._weights[self._knot_of[n_rows]] > 0.0

    def least_s(self, n_rows: int) -> float:
        """Return the shortest time that `n_rows` or more have ever taken, as far as was seen; infinity where none were."""
        return min(self._least_s[self._knot_of[n_rows] :])

    def well_known(self, limit: int) -> tuple[int, int]:
        """Return the smallest and the largest size up to `limit` that some runs or a profile tell of; (0, 0) where none do."""
        known = [
            size for size, weight in zip(self._sizes, self._weights, strict=True) if weight >= _YOUNG and size <= limit
        ]
        return (known[0], known[-1]) if known else (0, 0)

    def observe(self, n_rows: int, service_s: float) -> None:
        """Learn that a batch of `n_rows` in [1, max_batch_size] took `service_s`."""
        knot = self._knot_of[n_rows]
        drawn_s = self._curve[self._sizes[knot]]
        seen_s = drawn_s * service_s / self._curve[n_rows]  # had it been a batch of the knot's size
        weight = self._weights[knot]
        n_runs = self._n_runs = self._n_runs + 1
        if weight >= _YOUNG and n_runs - self._seen_at[knot] > _FORGET_RUNS:
            weight = _YOUNG - 1.0
        self._seen_at[knot] = n_runs
        if seen_s < self._least_s[knot]:
            self._least_s[knot] = seen_s
        centre_s = self._centres[knot] if weight else drawn_s
        if weight < _YOUNG:
            self._n_undrawn += _REDRAW_RUNS
        else:
            self._n_undrawn += _SURPRISE if seen_s > drawn_s * self._spread else 1
        if not self._known or (seen_s < centre_s and weight < _YOUNG):
            centre_s = seen_s
            self._known = True
        else:
            step = 1.0 / (weight + 2.0)
            step = step if step > _NEWEST else _NEWEST
            centre_s += step * ((seen_s if seen_s < 2.0 * centre_s else 2.0 * centre_s) - centre_s)
        self._centres[knot] = centre_s if centre_s > _SHORTEST_S else _SHORTEST_S
        self._weights[knot] = weight + 1.0 if weight < 10.0 else weight
        if weight >= _YOUNG - 1.0:  # earlier the ratio would tell more about the guess than about the noise
            self._runs.append((knot, seen_s))

    def relax(self) -> None:
        """Believe in a faster machine: forget the slowest runs, or where all were alike, take a fifth off everything.

        For an owner that would refuse all work because of what it has learned, and so would never learn better.
        """
        slow = [i for i, (knot, seen_s) in enumerate(self._runs) if seen_s > 1.05 * self._centres[knot]]
        if len(slow) >= _RANK:
            for i in slow:
                knot, _ = self._runs[i]
                self._runs[i] = (knot, self._centres[knot])
        else:
            self._centres = [_RELAX * centre_s for centre_s in self._centres]
            self._runs = deque(((knot, _RELAX * seen_s) for knot, seen_s in self._runs), maxlen=_N_RUNS)
        self._n_undrawn += _REDRAW_RUNS

    def redraw(self) -> None:
        """Draw what was learned into the curve, if there is enough of it to matter."""
        if self._n_undrawn < _REDRAW_RUNS:
            return
        centres = self._centres
        seen = [knot for knot, weight in enumerate(self._weights) if weight] or [0]  # or a guess, relaxed
        seen.sort(key=self._seen_at.__getitem__, reverse=True)
        self._curve = _draw([(self._sizes[knot], centres[knot]) for knot in seen], self.max_batch_size)
        self._spread = max(1.0, sorted([seen_s / centres[knot] for knot, seen_s in self._runs])[-_RANK])
        self._n_undrawn = 0
        self.revision += 1


def _knot_sizes(max_batch_size: int) -> list[int]:
    """Return sizes a fourth of a doubling apart, each once, up to and with `max_batch_size`."""
    sizes, quarter = [1], 0
    while sizes[-1] < max_batch_size:
        quarter += 1
        size = round(2.0 ** (quarter / 4))
        if size > sizes[-1]:
            sizes.append(min(size, max_batch_size))
    return sizes


def _nearest(sizes: Sequence[int], max_batch_size: int) -> list[int]:
    """Return for every number of rows the index of the knot it teaches, the nearest by ratio."""
    nearest = [0]
    for n_rows in range(1, max_batch_size + 1):
        above = bisect_left(sizes, n_rows)
        below = max(0, above - 1)
        nearest.append(above if sizes[above] * sizes[below] <= n_rows * n_rows else below)
    return nearest


def _draw(points: Iterable[tuple[int, float]], max_batch_size: int) -> list[float]:
    """Return the seconds of 0, 1, ... `max_batch_size` rows through (size, seconds) points, those to be believed first.

    Never falling: a point that contradicts an earlier one is moved as far as it must. Level below the smallest size,
    straight between sizes, half in proportion to the rows beyond the largest.
    """
    sizes: list[int] = []
    levels_s: list[float] = []
    for size, level_s in points:
        place = bisect_left(sizes, size)
        if place < len(sizes):
            level_s = min(level_s, levels_s[place])
        if place:
            level_s = max(level_s, levels_s[place - 1])
        sizes.insert(place, size)
        levels_s.insert(place, level_s)
    before, level_s = sizes[0], levels_s[0]
    curve = [0.0] + [level_s] * before
    for size, next_s in zip(sizes[1:], levels_s[1:], strict=True):
        slope_s = (next_s - level_s) / (size - before)
        curve += [level_s + slope_s * step for step in range(1, size - before)]
        curve.append(next_s)
        before, level_s = size, next_s
    curve += [level_s * 0.5 * (1.0 + size / before) for size in range(before + 1, max_batch_size + 1)]
    return curve
