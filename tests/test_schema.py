"""A value from a file that breaks the schema is told by its field, its value and the remedy."""

import time
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, field

from modelyard.errors import ConfigError
from modelyard.schema import Frozen, convert, to_builtins


class Inner(Frozen, frozen=True):
    size: Annotated[int, Meta(ge=1)] = 1
    kind: Literal["small", "large"] = "small"


class Outer(Frozen, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    parts: tuple[Inner, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    after: Inner | None = None
    shelves: dict[str, Inner] = field(default_factory=dict)
    rooms: tuple[dict[str, dict[Annotated[str, Meta(pattern="^[0-9]$")], int]], ...] = ()


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        ({"name": 5}, "name", r"yard\.toml: name: must be text, got 5; correct this field and try again"),
        (
            {"name": "a", "parts": [{}, {"size": 0}]},
            "parts[1].size",
            r"parts\[1\]\.size: must be a whole number of at least 1, got 0;",
        ),
        ({"name": "a", "parts": [{"size": "1"}]}, "parts[0].size", r"size: must be a whole number, got '1';"),
        (
            {"name": "a", "parts": [{"kind": "huge"}]},
            "parts[0].kind",
            r"parts\[0\]\.kind: must be one of large, small, got 'huge';",
        ),
        (
            {"name": "a", "nmae": "b"},
            "the top level",
            r"the top level: unknown key 'nmae', did you mean 'name'\? the keys here are name, parts, weights, after, shelves, rooms;",
        ),
        ({"name": "a", "xyzzy": 1}, "the top level", r"unknown key 'xyzzy'; the keys here are name, parts"),
        ({"name": "a", "parts": [{"sizes": 1}]}, "parts[0]", r"parts\[0\]: unknown key 'sizes', did you mean 'size'\?"),
        (
            {"name": "a", "after": {"kind": "huge"}},
            "after.kind",
            r"after\.kind: must be one of large, small, got 'huge'",
        ),
        ({"name": "a", "after": 3}, "after", r"after: must be a table of keys and values or null, got 3;"),
        ({"name": "", "parts": []}, "name", r"name: must be text of length at least 1, got '';"),
        ({"name": {"a": 1}}, "name", r"name: must be text, got a table of keys and values;"),
        ({}, "the top level", r"the top level: the key 'name' is missing and has no default"),
        ({"name": "a", "weights": {"x": "heavy"}}, "weights.x", r"weights\.x: must be a number, got 'heavy';"),
        (
            {"name": "a", "weights": {"x": 1, "y": 2, "z.1": "heavy", "w": 4}},
            'weights."z.1"',
            r'weights\."z\.1": must be a number, got \'heavy\';',
        ),
        ({"name": "a", "shelves": {"left": {}, "right": {"size": 0}}}, "shelves.right.size", r"of at least 1, got 0;"),
        (
            {"name": "a", "shelves": {"left": {}, "right": {"sise": 2}}},
            "shelves.right",
            r"shelves\.right: unknown key 'sise', did you mean 'size'\?",
        ),
        (
            {"name": "a", "rooms": [{}, {"1": {"2": 1}, "3": {"4": 1, "five": 1, "6": 1}}]},
            "rooms[1].3",
            r"rooms\[1\]\.3: the key must be text that matches the pattern '\^\[0-9\]\$', got 'five';",
        ),
        ([], "the top level", r"the top level: must be a table of keys and values, got \[\]"),
    ],
)
def test_the_error_names_field_value_and_remedy(data: Any, place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        convert(data, Outer, source="yard.toml", error=ConfigError)
    assert caught.value.field == place


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"got \['x', .*\.\.\.; correct") as caught:
        convert({"name": ["x"] * 1000}, Outer, source="yard.toml", error=ConfigError)
    assert len(str(caught.value)) < 200


def test_the_wrong_entry_of_a_long_table_is_found_at_once() -> None:
    """A client may send such a table; trying its entries one by one would take minutes."""
    weights = {str(n): 1.0 for n in range(100_000)} | {"last": "heavy"}
    started_s = time.perf_counter()
    with pytest.raises(ConfigError, match=r"weights\.last: must be a number, got 'heavy'"):
        convert({"name": "a", "weights": weights}, Outer, source="yard.toml", error=ConfigError)
    assert time.perf_counter() - started_s < 10


@given(st.builds(Outer, name=st.text(min_size=1), parts=st.lists(st.builds(Inner, size=st.integers(1, 99))).map(tuple)))
def test_what_was_written_reads_back(value: Outer) -> None:
    assert convert(to_builtins(value), Outer, source="memory", error=ConfigError) == value


def test_values_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Inner().size = 2  # type: ignore[misc]  # that it is frozen is what is tested
