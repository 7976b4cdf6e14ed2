"""A value from a file that breaks the schema is told by its field, its value and the remedy."""

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
            r"the top level: unknown key 'nmae', did you mean 'name'\? the keys here are name, parts, weights, after;",
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
        ({"name": "a", "weights": {"x": "heavy"}}, "weights[...]", r"weights\[\.\.\.\]: must be a number, got text;"),
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


@given(st.builds(Outer, name=st.text(min_size=1), parts=st.lists(st.builds(Inner, size=st.integers(1, 99))).map(tuple)))
def test_what_was_written_reads_back(value: Outer) -> None:
    assert convert(to_builtins(value), Outer, source="memory", error=ConfigError) == value


def test_values_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Inner().size = 2  # type: ignore[misc]  # that it is frozen is what is tested
