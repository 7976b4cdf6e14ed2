"""Laws of the HTTP edge, for any bytes: nothing raises, and neither the cutting into pieces nor what was seen before matters."""

import asyncio
import base64
import re
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from wire import Later, at_once, connections, converse, cut, statuses

from modelyard.inference.serve.transport.http import HttpLimits

SMALL = 16_000
"""Below the limit of a head, which is counted a little differently for one that arrives in pieces."""

methods = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT", b"get", b"PRI", b"M-SEARCH", b""])
targets = st.sampled_from(
    [b"/", b"/v2/health/live", b"/v1/models/m:predict?x=1&y", b"http://host:80/a?b", b"*", b"host:443", b"/a b", b"/\xff", b"//", b""]
)  # fmt: skip
versions = st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"", b"HTTP/1."])
headers = st.sampled_from(
    [
        b"Host: x", b"Host:", b"Host: a\r\nHost: b", b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade, close",
        b"Upgrade: h2c\r\nConnection: Upgrade", b"Upgrade: websocket", b"Expect: 100-continue", b"X-Request-Id: mine", b"X-Empty:",
        b"X-Empty:   ", b"X-Folded: a\r\n b", b"Content-Encoding: gzip", b"Content-Encoding: identity", b"Accept-Encoding: gzip",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Content-Length: 0",
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", b"Content-Encoding: gzip\r\nContent-Encoding: gzip",
        b"Content-Length: 5", b"Content-Length: 18446744073709551616", b"Content-Length: 99999999", b"Content-Length: +1", b"bad header",
        b": no name", b"traceparent: 00-0", b"A: b", b"B\x00: c", b"C: \x80\xff", b"D : e",
    ]
)  # fmt: skip
ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Return a request, more or less."""
    end = draw(ends)
    body = draw(st.binary(max_size=24))
    framing = draw(st.sampled_from(["none", "length", "length", "length", "chunks", "lie"]))
    lines = [b" ".join((draw(methods), draw(targets), draw(versions))), *draw(st.lists(headers, max_size=4))]
    if draw(st.integers(0, 7)):
        lines.insert(1, b"Host: x")
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
    elif framing == "lie":
        lines.append(b"Content-Length: %d" % draw(st.integers(0, 40)))
    elif framing == "chunks":
        lines.append(b"Transfer-Encoding: chunked")
        parts = cut(body, draw(st.lists(st.integers(0, 24), max_size=3)))
        body = b"".join(b"%x%b\r\n%b\r\n" % (len(part), draw(extensions), part) for part in parts if part)
        body += draw(last_chunks)
    return end.join(lines) + end * 2 + body


extensions = st.sampled_from([b"", b"", b"", b";a=b", b";", b" "])
last_chunks = st.sampled_from(
    [b"0\r\n\r\n"] * 5 + [b"0\r\nTrailer: t\r\n\r\n", b"0\r\nContent-Length: 9\r\n\r\n", b"-1\r\n", b"0\r\n"]
)
plain = st.sampled_from(
    [
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n\r\n\r",
        b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Return what a client, a broken one or an attacker may send on one connection."""
    data = b"".join(draw(st.lists(messages() | plain, min_size=1, max_size=4)))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        place = draw(st.integers(0, len(data)))
        width = draw(st.integers(0, 3))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + width :]
    return data


places = st.lists(st.integers(0, 2000), max_size=8)


def talk(pieces: list[bytes], **options: Any) -> tuple[bytes, bool]:
    """Return what `pieces` are answered by a server that knows nothing yet."""

    async def main() -> tuple[bytes, bool]:
        return converse(connections(at_once, **options), pieces)

    return asyncio.run(main())


@given(data=st.binary(max_size=200) | streams())
@example(b"GET / HTTP/1.1\r\nHost:\r\nX: y\r\n\r\n")
def test_any_bytes_are_answered_without_a_fault_of_ours(data: bytes) -> None:
    answers, _ = talk([data])
    assert set(statuses(answers)) <= {100, 200, 400, 405, 413, 415, 431}


@given(requests=st.lists(plain, min_size=1, max_size=4), at=places, n_missing=st.integers(1, 20))
def test_a_stream_cut_off_anywhere_ends_with_an_answer_that_says_so(
    requests: list[bytes], at: list[int], n_missing: int
) -> None:
    last = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    answers, closed = talk(cut(b"".join(requests) + last[:-n_missing], at))
    assert statuses(answers) == [200] * len(requests) + [400]
    assert b"the HTTP request ended " in answers
    assert closed


@given(data=streams(), at=places)
@example(b"GET / HTTP/1.1\r\nHost:\r\nX: y\r\n\r\n", [21, 22])
def test_the_answers_do_not_depend_on_how_the_bytes_are_cut(data: bytes, at: list[int]) -> None:
    whole = talk([data], remembers=False)
    assert talk(cut(data, at), remembers=False) == whole
    assert talk(cut(data, range(len(data))), remembers=False) == whole


@given(data=streams(), at=places, max_body_bytes=st.integers(1, 30))
def test_a_body_over_the_limit_is_refused_however_it_comes(data: bytes, at: list[int], max_body_bytes: int) -> None:
    limits = HttpLimits(max_body_bytes=max_body_bytes)
    whole = talk([data], limits=limits)
    assert talk(cut(data, at), limits=limits) == whole
    for body in re.findall(rb'"body":"([^"]*)"', whole[0]):
        assert len(base64.b85decode(body)) <= max_body_bytes


@given(data=streams(), before=st.lists(streams(), max_size=2), at=places)
def test_a_head_seen_before_changes_no_answer(data: bytes, before: list[bytes], at: list[int]) -> None:
    """Heads are looked up only where a piece is one whole request, so the requests are sent like that too."""
    pieces = [part + b"\r\n\r\n" for part in data.split(b"\r\n\r\n")]
    pieces[-1] = pieces[-1][:-4]

    async def warm() -> list[tuple[bytes, bool]]:
        shared = connections()
        for stream in (*before, data):
            converse(shared, [stream])
        return [converse(shared, sent) for sent in (pieces, [data], cut(data, at), pieces)]

    for sent, answers in zip((pieces, [data], cut(data, at), pieces), asyncio.run(warm()), strict=True):
        assert answers == talk(sent, remembers=False)


@given(requests=st.lists(plain, max_size=6))
def test_whole_requests_sent_one_by_one_are_looked_up_and_answered_alike(requests: list[bytes]) -> None:
    requests.append(b"GET /last HTTP/1.1\r\nHost: x\r\n\r\n")

    async def warm() -> tuple[bytes, bool]:
        shared = connections()
        converse(shared, requests)
        assert requests[-1] in shared.heads
        return converse(shared, requests)

    assert asyncio.run(warm()) == talk(requests, remembers=False)


@given(data=streams(), ranks=st.lists(st.integers(0, 9), min_size=1, max_size=8), at=places)
def test_answers_leave_in_the_order_of_the_requests_whenever_they_become_ready(
    data: bytes, ranks: list[int], at: list[int]
) -> None:
    async def later() -> tuple[bytes, bool]:
        handler = Later(ranks)
        return converse(connections(handler), cut(data, at), stalled=handler.answer_all)

    assert asyncio.run(later()) == talk([data], remembers=False)


@given(n_requests=st.integers(60, 300), at=places)
def test_a_client_that_pipelines_without_end_is_read_no_further_than_it_is_answered(
    n_requests: int, at: list[int]
) -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    async def main() -> tuple[bytes, bool]:
        handler = Later([0])
        return converse(connections(handler), [request] * n_requests, stalled=handler.answer_all)

    answers, _ = asyncio.run(main())
    assert statuses(answers) == [200] * n_requests
