"""What was found in the data, as values: a report for a person and for a machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from modelyard.errors import DataError

Severity = Literal["error", "warning", "info"]
LISTED = 10
"""Values named in one message; the others are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing found; the message ends with what to do where there is something to do."""

    severity: Severity
    code: str
    """E.g. "constant-column", "leak-suspect"."""
    column: str | None
    message: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The figures behind the message; strings, numbers, lists and dicts of them."""


@dataclass(frozen=True)
class ColumnSummary:
    """One column over all rows."""

    name: str
    datatype: str
    missing_share: float
    n_distinct: int
    """Of the values that are there."""
    minimum: float | None = None
    """Of a column of numbers."""
    maximum: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    """Of a column of text or booleans: the most frequent values with their shares of all rows."""
    shape: tuple[int, ...] = ()
    """Of one row, where it is more than one number."""


@dataclass(frozen=True)
class DataReport:
    """Everything found, for a person (`text`) and for a machine (`to_json`)."""

    source: str
    task: str
    label_name: str
    split: str
    n_samples: int
    part_sizes: Mapping[str, int]
    """Rows of train, validation and test."""
    columns: tuple[ColumnSummary, ...]
    class_counts: Mapping[str, Mapping[str, int]]
    """Class → part → rows; {} for regression."""
    label_means: Mapping[str, float]
    """Part → mean label; {} for classification."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of this severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def raise_for_errors(self) -> None:
        """Raise DataError listing every finding of severity "error"; return when there is none."""
        errors = self.of("error")
        if errors:
            lines = "\n".join(f"  {finding.message}" for finding in errors)
            raise DataError(f"{self.source}: {count(len(errors), 'error')} in the data:\n{lines}", findings=errors)

    def to_json(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers."""
        return asdict(self)

    def text(self) -> str:
        """Return the report for a terminal, without a final newline."""
        n_classes = f", {len(self.class_counts)} classes" if self.class_counts else ""
        parts = " · ".join(f"{part} {size:,}" for part, size in self.part_sizes.items())
        lines = [
            f"{self.source}: {self.n_samples:,} rows, {count(len(self.columns), 'column')}; {self.task} of "
            f"{self.label_name!r}{n_classes}",
            f"split {self.split}: {parts}",
            "",
        ]
        lines += _table(
            ["column", "type", "missing", "distinct", "values"],
            [[c.name, _type(c), f"{c.missing_share:.1%}", f"{c.n_distinct:,}", _values(c)] for c in self.columns],
        )
        if self.class_counts:
            shown = list(self.class_counts.items())[: 2 * LISTED]
            rows = [[name, *(f"{n:,}" for n in counts.values())] for name, counts in shown]
            lines += ["", *_table(["class", *self.part_sizes], rows)]
            lines += [f"and {len(self.class_counts) - len(shown)} more"] if len(shown) < len(self.class_counts) else []
        else:
            lines += ["", "mean label: " + " · ".join(f"{part} {mean:.6g}" for part, mean in self.label_means.items())]
        errors, warnings, notes = (len(self.of(severity)) for severity in ("error", "warning", "info"))
        lines += ["", f"found: {count(errors, 'error')}, {count(warnings, 'warning')}, {count(notes, 'note')}"]
        words = {"error": "error  ", "warning": "warning", "info": "note   "}
        lines += [f"  {words[f.severity]}  {f.code}: {f.message}" for f in self.findings]
        return "\n".join(lines)


def _type(column: ColumnSummary) -> str:
    return column.datatype + (f" {' × '.join(map(str, column.shape))}" if column.shape else "")


def _values(column: ColumnSummary) -> str:
    if column.top:
        return ", ".join(f"{short(value)} {share:.1%}" for value, share in column.top)
    if column.minimum is None or column.maximum is None:
        return ""
    return f"{column.minimum:.6g} to {column.maximum:.6g}"


def short(value: str) -> str:
    """Return a value cut to two dozen characters."""
    return value if len(value) <= 24 else value[:23] + "…"


def some(values: Sequence[str]) -> str:
    """Return the first few values, and how many more there are."""
    shown = ", ".join(short(value) for value in values[:LISTED])
    return shown if len(values) <= LISTED else f"{shown} and {len(values) - LISTED} more"


def count(n: int, noun: str) -> str:
    """Return a number with its noun, "1 row" or "2 rows"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
