"""Method and path lead to one function, or to the reason why there is none."""

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import MethodNotAllowed, UnknownPath
from modelyard.inference.serve.transport.messages import Head, Request, Response
from modelyard.inference.serve.transport.routes import Route, Router


def answer(request: Request, **placeholders: str) -> Response:
    return Response(200)


def other(request: Request, **placeholders: str) -> Response:
    return Response(200)


ROUTES = [
    Route("POST", "/v1/models/{model}:predict", answer, ignore_case=True),
    Route("POST", "/v1/models/{model}/versions/{version}:predict", answer, ignore_case=True),
    Route("GET", "/v1/models/{model}", other, ignore_case=True),
    Route("GET", "/v2/models/{model}/ready", other),
    Route("POST", "/v2/models/{model}/ready", answer),
]


def find(method: str, path: str) -> tuple[Any, dict[str, str]]:
    return Router(ROUTES).find(Head(method, path))


def test_placeholders_are_the_decoded_parts_of_the_path() -> None:
    assert find("POST", "/v1/models/a:predict") == (answer, {"model": "a"})
    assert find("POST", "/v1/models/a%20b/versions/7:predict") == (answer, {"model": "a b", "version": "7"})
    assert find("GET", "/v1/models/a") == (other, {"model": "a"})


@given(name=st.text(min_size=1, max_size=40))
def test_any_name_can_be_asked_for_percent_encoded(name: str) -> None:
    name = name.encode("utf-8", "replace").decode()  # no half characters, which no URL can hold
    assert find("GET", f"/v1/models/{quote(name, safe='')}") == (other, {"model": name})


def test_head_is_answered_as_get() -> None:
    assert find("HEAD", "/v1/models/a") == (other, {"model": "a"})


def test_where_said_case_does_not_matter_but_in_names() -> None:
    assert find("POST", "/V1/Models/Aa:Predict") == (answer, {"model": "Aa"})
    with pytest.raises(UnknownPath):
        find("GET", "/V2/models/a/ready")


def test_another_method_is_405_and_names_those_that_work() -> None:
    with pytest.raises(MethodNotAllowed) as caught:
        find("DELETE", "/v2/models/a/ready")
    assert caught.value.allow == "GET, HEAD, POST"
    assert "use GET, HEAD, POST" in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/v1/models/",
        "/v1/models/a/b",
        "/v1/models/a:b:predict",
        "/v1/models/a/",
        "x/v1/models/a",
    ],
)
def test_anything_else_is_404_and_says_what_there_is(path: str) -> None:
    with pytest.raises(UnknownPath, match="/v1/models"):
        find("GET", path)


@given(paths=st.lists(st.sampled_from(["/v1/models/a", "/v1/models/b", "/v2/models/a/ready", "/nowhere"]), max_size=8))
def test_a_path_found_before_is_found_again_and_the_same(paths: list[str]) -> None:
    router = Router(ROUTES)
    for path in paths * 2:
        for method in ("GET", "POST"):
            try:
                fresh: Any = find(method, path)
            except (UnknownPath, MethodNotAllowed) as exc:
                fresh = type(exc)
            try:
                known: Any = router.find(Head(method, path))
            except (UnknownPath, MethodNotAllowed) as exc:
                known = type(exc)
            assert known == fresh


def test_long_paths_are_not_remembered_and_short_ones_not_without_end() -> None:
    """Strangers choose the names in them."""
    router = Router(ROUTES)
    for number in range(5000):
        router.find(Head("GET", f"/v1/models/{number}"))
    for number in range(100):
        router.find(Head("GET", f"/v1/models/{'x' * 30_000}{number}"))
    assert len(router._known) <= 4096
    assert max(len(path) for _, path in router._known) < 1000
