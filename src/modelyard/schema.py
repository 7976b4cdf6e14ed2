"""Untyped mappings (JSON, TOML) become frozen structs here, and nowhere else.

msgspec checks types, ranges and unknown keys; this file turns its complaint into one that names the field, the value and
the remedy.
"""

import re
from typing import Any, TypeVar

import msgspec

from modelyard.errors import ModelyardError

T = TypeVar("T")


class Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every value that is read from a file."""


def convert(data: Any, into: type[T], *, source: str, error: type[ModelyardError]) -> T:
    """Return `data` as an `into`, or raise `error` naming `source`, the field and its value."""
    try:
        return msgspec.convert(data, into)
    except msgspec.ValidationError as exc:
        complaint, _, path = str(exc).partition(" - at `")
        field = path.rstrip("`").removeprefix("$").lstrip(".") or "the top level"
        found = _value_at(data, path.rstrip("`"))
        value = "" if found is _ABSENT else f", got {_short(found)}"
        complaint = complaint[:1].lower() + complaint[1:]
        raise error(f"{source}: {field}: {complaint}{value}; correct this field and try again", field=field) from exc


def to_builtins(value: Any) -> Any:
    """Return `value` as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value)


_ABSENT = object()


def _value_at(data: Any, path: str) -> Any:
    """Follow msgspec's `$.a.b[0]` into `data`; `_ABSENT` where it leads nowhere."""
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            data = data[name] if name else data[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return _ABSENT
    return _ABSENT if isinstance(data, dict) else data


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
