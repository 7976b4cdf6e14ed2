"""The result of a run: the table of bars for the terminal, and the same with all figures as Markdown and as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .bars import Bar, Findings, number
from .contenders import CONTENDERS


def lines(bars: Sequence[Bar]) -> list[str]:
    """Return the table of bars as aligned lines."""
    rows = [("", "bar", "measured", "promised", "ours", "against"), *(_cells(bar) for bar in bars)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def markdown(heading: str, findings: Sequence[Findings], names: Iterable[str]) -> str:
    """Return everything for people: bars, tables, and how each server of `names` was started."""
    bars = [bar for each in findings for bar in each.bars]
    parts = [
        "# The server beside its peers",
        "Written by `make bench-serve`; how it measures is in [bench/serve](../bench/serve/README.md). Every figure is the median of "
        "the turns, with the least and the most. Client and server shared the machine's cores. Why bars are missed, where they are: "
        "[notes](../bench/serve/notes.md#what-is-missed-and-why).",
        f"```\n{heading}\n```",
    ]
    parts += [_table(("", "bar", "measured", "promised", "ours", "against"), [_cells(bar) for bar in bars])]
    for table in (table for each in findings for table in each.tables):
        parts += [f"## {table.title}", table.note, _table(table.head, table.rows)]
    servers = [CONTENDERS[name] for name in names if name in CONTENDERS]
    parts += [
        "## How the peers are started",
        _table(
            ("server", "command", "settings", "note"),
            [(each.name, f"`{each.command}`", _settings(each.settings), each.note) for each in servers],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_json(heading: str, findings: Sequence[Findings], entries: Sequence[Mapping[str, Any]]) -> str:
    bars = [{**asdict(bar), "value": bar.value, "met": bar.met} for each in findings for bar in each.bars]
    return json.dumps({"heading": heading.splitlines(), "bars": bars, "measured": entries}, indent=1) + "\n"


def _cells(bar: Bar) -> tuple[str, ...]:
    value = "not measured" if bar.value is None else _with_spread(bar)
    promised = f"{'≥' if bar.side == 'at least' else '≤'} {bar.limit:g} {bar.unit}"
    return ("met" if bar.met else "MISSED", bar.what, value, promised, bar.ours or "-", bar.against or "-")


def _with_spread(bar: Bar) -> str:
    assert bar.value is not None
    text = f"{number(bar.value)} {bar.unit}"
    if len(bar.values) > 1:
        text += f" ({number(min(bar.values))}–{number(max(bar.values))})"
    return text + (" disturbed" if bar.noisy else "")


def _settings(settings: Mapping[str, Mapping[str, str | int]]) -> str:
    return "; ".join(
        f"{'all' if model == '*' else model}: " + " ".join(f"{name}={value}" for name, value in values.items())
        for model, values in settings.items()
        if values
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in every)
