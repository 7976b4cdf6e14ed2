"""Which rows train, which stop the training, which judge it. Pure: arrays and a seed in, row indices out.

Between the checked columns (data.py) and everything that learns. A row is in exactly one part; the same data and seed give
the same parts on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from modelyard.errors import ConfigError, DataError
from modelyard.schema import Frozen

PARTS = ("train", "validation", "test")
MIN_CLASS_ROWS = 3
"""A class needs a row in each part."""
_LISTED = 10
_STREAM = int.from_bytes(b"split", "big")


class SplitConfig(Frozen, frozen=True):
    """The [split] table of yard.toml."""

    method: Literal["random", "group", "time"] = "random"
    """random: stratified by class, plain for regression. group: no group in two parts. time: train earliest, test latest."""
    by: str | None = None
    """The column that holds the group or the time."""
    validation: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    """Share of the rows that decides when to stop and which settings are best."""
    test: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """Share of the rows that nothing is chosen by."""
    seed: Annotated[int, Meta(ge=0)] = 0
    keep: bool = False
    """Whether `by` also stays a feature."""

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ConfigError(
                f"[split] validation + test must be below 1, got {self.validation} + {self.test}; leave rows to train on"
            )
        if self.method != "random" and self.by is None:
            raise ConfigError(f'[split] method = "{self.method}" needs by = "COLUMN"; name the column to split by')
        if self.method == "random" and self.by is not None:
            raise ConfigError(
                f'[split] by = "{self.by}" has no meaning for method = "random"; set method to "group" or "time", or leave by out'
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of train, validation and test."""
        return (1.0 - self.validation - self.test, self.validation, self.test)


@dataclass(frozen=True)
class Split:
    """Row indices of each part, sorted, dtype int64; every row is in one part."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    digest: str
    """SHA-256 over the parts in this order: row count, then indices, all as little-endian int64."""

    @property
    def parts(self) -> dict[str, NDArray[np.int64]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def split_rows(config: SplitConfig, label: NDArray[Any], *, stratify: bool, by: NDArray[Any] | None = None) -> Split:
    """Return the parts of the rows behind `label`.

    Args:
        label: shape (n,); classes where `stratify`.
        stratify: True for classification: classes are balanced over a random split, and none may be absent from train.
        by: shape (n,); the group of each row (text, numbers) or its time (numbers, datetime64), where `config` needs one.

    Raises:
        DataError: classes, groups or distinct times are too few; a group or time is missing; a class is absent from train.
    """
    classes, codes = _encode(label) if stratify else ((), np.zeros(len(label), dtype=np.int64))
    if stratify:
        _require_rows(classes, codes)
    if config.method == "random":
        assigned = _random(config, codes)
    else:
        if by is None or len(by) != len(label):
            raise DataError(
                f"[split] by = {config.by!r}: needs one value a row, {len(label)} of them; check the column"
            )
        _require_present(by, config)
        assigned = _by_group(config, by) if config.method == "group" else _by_time(config, by)
    if stratify:
        _require_in_train(classes, codes, assigned, config)
    train, validation, test = (np.flatnonzero(assigned == part).astype(np.int64) for part in range(3))
    return Split(train, validation, test, split_digest(train, validation, test))


def split_digest(*parts: NDArray[np.int64]) -> str:
    """Return SHA-256 over the parts: row count, then indices, all as little-endian int64."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8, "little"))
        digest.update(rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _random(config: SplitConfig, codes: NDArray[np.int64]) -> NDArray[np.int8]:
    n_rows = len(codes)
    if n_rows < MIN_CLASS_ROWS:
        raise DataError(
            f"{n_rows} rows cannot be split into train, validation and test; bring at least {MIN_CLASS_ROWS}"
        )
    assigned = np.zeros(n_rows, dtype=np.int8)
    # Rows of one class lie together, in random order within it.
    order = np.lexsort((_keys(config.seed, n_rows), codes))
    start = 0
    for size in np.bincount(codes):
        _, n_validation, n_test = _whole(int(size), config.shares)
        rows = order[start : start + size]
        assigned[rows[:n_validation]] = 1
        assigned[rows[n_validation : n_validation + n_test]] = 2
        start += int(size)
    return assigned


def _whole(size: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers that sum to `size`, by largest remainder; none is 0 when `size` is at least 3."""
    wanted = [round(size * share, 9) for share in shares]
    counts = [int(want) for want in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda part: counts[part] - wanted[part])
    for part in by_remainder[: size - sum(counts)]:
        counts[part] += 1
    while size >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _by_group(config: SplitConfig, by: NDArray[Any]) -> NDArray[np.int8]:
    """Largest group first, each into the part that lacks the most rows; groups of one size in random order."""
    groups, codes = _encode(by)
    if len(groups) < len(PARTS):
        raise DataError(
            f"[split] by = {config.by!r}: {len(groups)} distinct groups cannot fill train, validation and test; bring at "
            'least 3 groups or set method = "random"'
        )
    sizes = np.bincount(codes)
    order = np.lexsort((_keys(config.seed, len(groups)), -sizes))
    lacking = [len(by) * share for share in config.shares]
    empty = set(range(len(PARTS)))
    part_of_group = np.zeros(len(groups), dtype=np.int8)
    for done, group in enumerate(order.tolist()):
        # Towards the end a part that is still empty goes first.
        open_parts = empty if empty and len(order) - done <= len(empty) else range(len(PARTS))
        part = max(open_parts, key=lacking.__getitem__)
        part_of_group[group] = part
        lacking[part] -= int(sizes[group])
        empty.discard(part)
    return part_of_group[codes]


def _by_time(config: SplitConfig, by: NDArray[Any]) -> NDArray[np.int8]:
    """Cut between two distinct times, as near to the wanted shares as they permit."""
    times, codes = np.unique(by, return_inverse=True)
    if len(times) < len(PARTS):
        raise DataError(
            f"[split] by = {config.by!r}: {len(times)} distinct times cannot be cut into train, validation and test; bring "
            'rows of at least 3 times or set method = "random"'
        )
    rows_until = np.cumsum(np.bincount(codes))  # (times,) rows up to and with each time
    share_train, share_validation, _ = config.shares
    n_rows = len(by)
    last_train = int(np.argmin(np.abs(rows_until[:-2] - n_rows * share_train)))
    later = rows_until[last_train + 1 : -1]
    last_validation = last_train + 1 + int(np.argmin(np.abs(later - n_rows * (share_train + share_validation))))
    assigned: NDArray[np.int8] = ((codes > last_train).astype(np.int8) + (codes > last_validation)).astype(np.int8)
    return assigned


def _keys(seed: int, n: int) -> NDArray[np.float64]:
    # PCG64 by name and plain doubles: the stream that NumPy promises to keep. A stream of our own, since a column drawn from
    # default_rng(0) would otherwise decide, with the same seed, which rows are held out.
    entropy = np.random.SeedSequence([_STREAM, seed])
    return np.random.Generator(np.random.PCG64(entropy)).random(n)


def _encode(values: NDArray[Any]) -> tuple[tuple[Any, ...], NDArray[np.int64]]:
    """Return the sorted distinct values and each row's place among them."""
    if values.dtype == object:
        distinct = sorted(set(values.tolist()))
        place = {value: code for code, value in enumerate(distinct)}
        return tuple(distinct), np.fromiter((place[value] for value in values.tolist()), np.int64, len(values))
    uniques, codes = np.unique(values, return_inverse=True)
    return tuple(uniques.tolist()), codes.astype(np.int64)


def _require_rows(classes: Sequence[Any], codes: NDArray[np.int64]) -> None:
    counts = np.bincount(codes, minlength=len(classes)).tolist()
    small = {name: n for name, n in zip(classes, counts, strict=True) if n < MIN_CLASS_ROWS}
    if small:
        raise DataError(
            f"{len(small)} of {len(classes)} classes have fewer than {MIN_CLASS_ROWS} rows and cannot be split: "
            f"{_listed(small)}; bring more rows of them, merge them into other classes, or drop them",
            classes=small,
        )


def _require_present(by: NDArray[Any], config: SplitConfig) -> None:
    missing = (
        by == "" if by.dtype == object else np.isnat(by) if by.dtype.kind == "M" else by != by
    )  # NaN is not itself
    n_missing = int(np.count_nonzero(missing))
    if n_missing:
        raise DataError(
            f"[split] by = {config.by!r}: missing in {n_missing} of {len(by)} rows, first in row {int(np.argmax(missing))}; "
            "fill it in or leave those rows out",
            n_missing=n_missing,
        )


def _require_in_train(
    classes: Sequence[Any], codes: NDArray[np.int64], assigned: NDArray[np.int8], config: SplitConfig
) -> None:
    in_train = np.bincount(codes[assigned == 0], minlength=len(classes))
    totals = np.bincount(codes, minlength=len(classes))
    absent = {name: int(totals[code]) for code, name in enumerate(classes) if in_train[code] == 0}
    if absent:
        raise DataError(
            f"the {config.method} split by {config.by!r} leaves no training row of {_listed(absent)} (rows in all); choose "
            'another column to split by, merge or drop these classes, or set method = "random"',
            classes=absent,
        )


def _listed(counts: dict[Any, int]) -> str:
    first = ", ".join(f"{name!r}: {n}" for name, n in list(counts.items())[:_LISTED])
    return first if len(counts) <= _LISTED else f"{first} and {len(counts) - _LISTED} more"
