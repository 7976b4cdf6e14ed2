"""Complaints about the names of columns: unknown ones with the close ones beside them, and names given twice."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelyard.errors import ConfigError, DataError


def pick(columns: Mapping[str, Any], name: str, source: str) -> Any:
    if name not in columns:
        raise DataError(f"{source}: no column {name!r}{_close(name, columns)}; it has {sorted(columns)[:30]}; add it")
    return columns[name]


def require_known(wanted: Iterable[str], names: Iterable[str], where: str) -> None:
    names = list(names)
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"{where}: no column {name!r}{_close(name, names)}; the columns are {', '.join(names[:30])}"
                f"{' …' if len(names) > 30 else ''}; correct the name",
                column=name,
            )


def require_distinct(names: Sequence[str], source: object) -> None:
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice:
        raise DataError(
            f"{source}: several columns are named {twice[0]!r}; give every column a name of its own", columns=twice
        )


def _close(name: str, names: Iterable[str]) -> str:
    lowered = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=3)
    return f" (did you mean {' or '.join(repr(lowered[other]) for other in close)}?)" if close else ""
