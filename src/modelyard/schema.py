"""Untyped mappings (JSON, TOML) become frozen structs here, and nowhere else.

msgspec checks types, ranges and unknown keys; this file turns its complaint into one that names the field, the value, what
is wanted and the remedy.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

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
        path = path.rstrip("`")
        field = path.removeprefix("$").lstrip(".") or "the top level"
        said = _plainly(complaint, _value_at(data, path), list(_types_at(into, path)))
        raise error(f"{source}: {field}: {said}; correct this field and try again", field=field) from exc


def to_builtins(value: Any) -> Any:
    """Return `value` as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value)


_ABSENT = object()
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
"""A step of msgspec's `$.a.b[0]`; [...] is any key of a mapping."""
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table of keys and values",
    "null": "null",
}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


def _plainly(complaint: str, value: Any, types: list[inspect.Type]) -> str:
    """Say in plain words what msgspec complains of: what is wanted and what was got."""
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", complaint):
        return _unknown(match[1], [name for kind in types for name in _keys(kind)])
    if match := re.fullmatch(r"Object missing required field `(.*)`", complaint):
        return f"the key {match[1]!r} is missing and has no default"
    got = "" if value is _ABSENT else f", got {_short(value)}"
    if complaint.startswith("Invalid enum value"):
        allowed = [str(value) for kind in types if isinstance(kind, inspect.LiteralType) for value in kind.values]
        return f"must be one of {', '.join(allowed)}{got}"
    if match := re.fullmatch(r"Expected `([^`]+)`(?:, got `([^`]+)`)?", complaint):
        return f"must be {_kinds(match[1])}{got or (f', got {_kinds(match[2])}' if match[2] else '')}"
    if match := re.fullmatch(r"Expected `(\w+)` (>=|<=|>|<) (.+)", complaint):
        return f"must be {_kinds(match[1])} of {_BOUNDS[match[2]]} {match[3]}{got}"
    if match := re.fullmatch(r"Expected `(\w+)` of length (>=|<=) (\d+)", complaint):
        return f"must be {_kinds(match[1])} of length {_BOUNDS[match[2]]} {match[3]}{got}"
    if match := re.fullmatch(r"Expected `str` matching regex (.+)", complaint):
        return f"must be text that matches the pattern {match[1]}{got}"
    return complaint[:1].lower() + complaint[1:] + got


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    guess = f", did you mean {close[0]!r}?" if close else ";"
    return f"unknown key {name!r}{guess} the keys here are {', '.join(known)}"


def _kinds(names: str) -> str:
    """ "int | null" → "a whole number or null"."""
    return " or ".join(_KINDS.get(name, name) for name in names.split(" | "))


def _keys(kind: inspect.Type) -> list[str]:
    return [field.encode_name for field in kind.fields] if isinstance(kind, inspect.StructType) else []


def _types_at(into: Any, path: str) -> Iterator[inspect.Type]:
    """Yield the types that may stand at `path` within an `into`; nothing where it leads out of what is known."""
    types = list(_flat(inspect.type_info(into)))
    for name, _ in _STEP.findall(path):
        types = [inner for kind in types for step in _below(kind, name) for inner in _flat(step)]
    yield from types


def _flat(kind: inspect.Type) -> Iterator[inspect.Type]:
    """Yield the members of a union, without the annotations around them."""
    if isinstance(kind, inspect.Metadata):
        yield from _flat(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for member in kind.types:
            yield from _flat(member)
    else:
        yield kind


def _below(kind: inspect.Type, name: str) -> Iterator[inspect.Type]:
    """Yield the type of the key `name`, or of the items where `name` is empty."""
    if isinstance(kind, inspect.StructType):
        yield from (field.type for field in kind.fields if field.encode_name == name)
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType) and not name:
        yield kind.item_type
    elif isinstance(kind, inspect.DictType) and not name:
        yield kind.value_type


def _value_at(data: Any, path: str) -> Any:
    """Follow msgspec's `$.a.b[0]` into `data`; `_ABSENT` where it leads nowhere."""
    for name, index in _STEP.findall(path):
        try:
            data = data[name] if name else data[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return _ABSENT
    return _ABSENT if isinstance(data, dict) else data


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
