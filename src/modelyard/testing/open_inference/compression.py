"""Checks of compressed bodies (RFC 9110, 8.4 and 12.5.3): optional, but what is compressed has to be right.

With binary tensors, Inference-Header-Content-Length counts bytes of JSON before compression, as Triton and its client do.
"""

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import replace

from modelyard.testing.open_inference.check import Check, Failed, Run, Skipped, check, expect, shown
from modelyard.testing.open_inference.inference import Call, read_answer
from modelyard.testing.open_inference.server import Server
from modelyard.testing.open_inference.wire import Reply

CONTENT = "RFC 9110, 8.4"
ACCEPT = "RFC 9110, 12.5.3"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


def request_in(coding: str, *, binary: bool) -> Run:
    def run(server: Server) -> None:
        expected = server.steady
        if binary:
            _ = server.binary_base
        reply = _post(server, server.call(), coding)
        if reply.status != 200:
            raise Skipped(f"{coding} is not taken: {reply.status}, {shown(reply.expect_refusal())}")
        if binary:
            reply = _post(server, server.call(binary=True), coding)
        expected.expect_same(read_answer(reply), f"the answer to a request in {coding}")

    return run


def _post(server: Server, call: Call, coding: str) -> Reply:
    body, headers = call.encoded()
    return server.post_body(COMPRESS[coding](body), (*headers, ("Content-Encoding", coding)))


def answer_in(coding: str, *, binary: bool) -> Run:
    def run(server: Server) -> str:
        _ = server.steady
        expected = server.binary_base if binary else server.base
        call = server.call(binary_output=binary)
        reply = server.post_call(call, (("Accept-Encoding", coding),)).expect(200)
        if reply.header("Content-Encoding") is None:
            expected.expect_same(read_answer(reply), f"the answer to a client that takes {coding}")
            if server.model.batched:  # a server may leave short answers as they are
                reply = server.post_call(
                    server.call(server.arrays(500), binary_output=binary), (("Accept-Encoding", coding),)
                )
            if reply.status != 200 or reply.header("Content-Encoding") is None:
                raise Skipped(f"answers are not compressed with {coding}")
            read_answer(_decoded(reply, coding))
            return "long answers are compressed"
        expected.expect_same(read_answer(_decoded(reply, coding)), f"the answer in {coding}")
        return "answers are compressed"

    return run


def _decoded(reply: Reply, coding: str) -> Reply:
    got = reply.header("Content-Encoding")
    expect(got == coding, f"Content-Encoding is {got!r}, only {coding} was offered")
    try:
        return replace(reply, body=DECOMPRESS[coding](reply.body))
    except (OSError, zlib.error, EOFError) as exc:
        raise Failed(f"the body is not {coding}: {exc}") from exc


CODINGS = tuple(
    each
    for coding in ("gzip", "deflate")
    for each in (
        Check(
            f"compression.request-{coding}",
            "MAY",
            f"a request in {coding}, where it is taken, is answered like any other",
            CONTENT,
            request_in(coding, binary=False),
        ),
        Check(
            f"compression.request-{coding}-binary",
            "MAY",
            f"so is one with binary tensors in {coding}",
            CONTENT,
            request_in(coding, binary=True),
            "binary_tensor_data",
        ),
        Check(
            f"compression.answer-{coding}",
            "MAY",
            f"an answer in {coding}, where it is asked for, says so and can be read",
            ACCEPT,
            answer_in(coding, binary=False),
        ),
        Check(
            f"compression.answer-{coding}-binary",
            "MAY",
            f"so does one with binary tensors in {coding}",
            ACCEPT,
            answer_in(coding, binary=True),
            "binary_tensor_data",
        ),
    )
)


@check("compression.unasked", "SHOULD", "nothing is compressed that nobody asked for", ACCEPT)
def unasked(server: Server) -> None:
    _ = server.base
    for headers in ((), (("Accept-Encoding", "identity"),), (("Accept-Encoding", "gzip;q=0, deflate;q=0"),)):
        reply = server.post_call(server.call(), headers)
        got = reply.header("Content-Encoding")
        expect(got is None, f"Content-Encoding is {got!r} for {headers or 'no Accept-Encoding'}")


@check(
    "compression.broken", "SHOULD", "a body that is not what Content-Encoding says is the client's fault: 4xx", CONTENT
)
def broken(server: Server) -> None:
    _ = server.base
    body, headers = server.call().encoded()
    for coding, sent in (("gzip", body), ("deflate", body), ("gzip", gzip.compress(body)[:-12])):
        reply = server.post_body(sent, (*headers, ("Content-Encoding", coding)))
        expect(400 <= reply.status < 500, f"the status is {reply.status} for {shown(coding)} that is not, expected 4xx")


@check(
    "compression.unknown", "SHOULD", "a Content-Encoding that the server does not know is refused: 415, or 400", CONTENT
)
def unknown(server: Server) -> None:
    _ = server.base
    body, headers = server.call().encoded()
    reply = server.post_body(body, (*headers, ("Content-Encoding", "x-unknown")))
    expect(reply.status in (400, 415), f"the status is {reply.status}, expected 415 or 400")


@check("compression.refusal", "SHOULD", "an error reads the same when the client offers to take it compressed", ACCEPT)
def refusal(server: Server) -> None:
    reply = server.ask("POST", server.infer_path, b"no JSON", (("Accept-Encoding", "gzip, deflate"),))
    coding = reply.header("Content-Encoding")
    if coding is not None:
        expect(coding in DECOMPRESS, f"Content-Encoding is {coding!r}")
        reply = _decoded(reply, coding)
    try:
        json.loads(reply.body)
    except ValueError as exc:
        raise Failed(f"the body is no JSON: {exc}") from exc
