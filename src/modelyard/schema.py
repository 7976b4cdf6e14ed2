"""Untyped mappings (JSON, TOML) become frozen structs here, and nowhere else.

msgspec checks types, ranges and unknown keys; this file turns its complaint into one that names the field, the value, what
is wanted and the remedy.
"""

import difflib
import functools
import json
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
        complaint, path, is_key = _parts(str(exc))
        steps = _steps(data, into, str(exc), path)
        if is_key:  # the last step is the key that is wrong, in the table before it
            *steps, key = steps
            said = f"the key {_plainly(complaint, key, [])}"
        else:
            said = _plainly(complaint, _value_at(data, steps), list(_types_at(into, steps)))
        field = _shown(steps)
        raise error(f"{source}: {field}: {said}; correct this field and try again", field=field) from exc


def to_builtins(value: Any) -> Any:
    """Return `value` as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value)


_ABSENT = object()
_PLACED = re.compile(r"(?s)(.*) - at (`key` in )?`([^`]*)`")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
"""A step of msgspec's `$.a.b[0]`; [...] is any key of a mapping."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+|\.\.\.")
Step = str | int
"""A key, or an index."""
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


def _parts(message: str) -> tuple[str, str, bool]:
    """Return what msgspec complains of, the path it names, and whether it means the key at its end, not the value."""
    match = _PLACED.fullmatch(message)
    if match is None:
        return message, "$", False
    complaint, in_key, path = match.groups()
    return complaint, f"{path}[...]" if in_key else path, bool(in_key)


def _steps(data: Any, into: Any, message: str, path: str) -> list[Step]:
    """Return the steps of `path`, with the key that is meant in the place of each [...]."""
    steps: list[Step] = []
    for name, index in _STEP.findall(path):
        if index == "...":
            steps.append(_guilty_key(data, into, message, steps))
        else:
            steps.append(name or int(index))
    return steps


def _guilty_key(data: Any, into: Any, message: str, steps: list[Step]) -> str:
    """Return the key of the table at `steps` without which msgspec would not say `message`.

    By halving: the wrong entry is in the half that alone brings the same complaint. A table of a hostile client may be long.
    """
    try:
        table = functools.reduce(lambda outer, step: outer[step], steps, data)
        keys = list(table)
        while len(keys) > 1:
            half = keys[: len(keys) // 2]
            tried = _replaced(data, steps, {key: table[key] for key in half})
            keys = half if _complaint(tried, into) == message else keys[len(half) :]
        return str(keys[0])
    except (KeyError, IndexError, TypeError):
        return "..."


def _replaced(data: Any, steps: list[Step], value: Any) -> Any:
    """Return a copy of `data` with `value` at `steps`."""
    if not steps:
        return value
    first, *rest = steps
    if isinstance(data, dict):
        return data | {first: _replaced(data[first], rest, value)}
    items = list(data)
    items[int(first)] = _replaced(items[int(first)], rest, value)
    return items


def _complaint(data: Any, into: Any) -> str:
    try:
        msgspec.convert(data, into)
    except msgspec.ValidationError as exc:
        return str(exc)
    return ""


def _shown(steps: list[Step]) -> str:
    """["models", "a.b", "sizes", 0] → models."a.b".sizes[0], as TOML would write it."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step if _BARE_KEY.fullmatch(step) else json.dumps(_cut(step), ensure_ascii=False)}"
    return text.removeprefix(".") or "the top level"


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


def _types_at(into: Any, steps: list[Step]) -> Iterator[inspect.Type]:
    """Yield the types that may stand at `steps` within an `into`; nothing where they lead out of what is known."""
    types = list(_flat(inspect.type_info(into)))
    for step in steps:
        types = [inner for kind in types for below in _below(kind, step) for inner in _flat(below)]
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


def _below(kind: inspect.Type, step: Step) -> Iterator[inspect.Type]:
    """Yield the type of what stands one step further in."""
    if isinstance(kind, inspect.StructType):
        yield from (field.type for field in kind.fields if field.encode_name == step)
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType) and isinstance(step, int):
        yield kind.item_type
    elif isinstance(kind, inspect.DictType) and isinstance(step, str):
        yield kind.value_type


def _value_at(data: Any, steps: list[Step]) -> Any:
    """Follow `steps` into `data`; `_ABSENT` where they lead nowhere, or to a table."""
    for step in steps:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return _ABSENT
    return _ABSENT if isinstance(data, dict) else data


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
