"""Bad requests to a real server with two workers: each gets the right status and a message that helps, and none leaves
anything behind."""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from driver import PATIENCE_S, Client, post, resident_bytes

pytestmark = pytest.mark.slow

MAX_BODY = 200_000
"""Of the server that many tests share."""
FLIGHT = {"dep_hour": 7, "distance": 1.5, "carrier": "UA"}
FLIGHTS, TABULAR, IMAGES = "/v1/models/flights:predict", "/v1/models/tabular:predict", "/v1/models/images:predict"
INFER = "/v2/models/tabular/infer"
NOT_A_NUMBER = b"\x00\x00\xc0\x7f"


def rows(*rows: Any) -> bytes:
    return json.dumps({"instances": rows}).encode()


def infer(body: Any, raw: bytes = b"", length: bytes | None = None, *, path: str = INFER) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    if length is None:
        length = b"%d" % len(text)
    return post(
        path,
        text + raw,
        *([b"Inference-Header-Content-Length: " + length] if raw or length != b"%d" % len(text) else []),
    )


def tensor(**changes: Any) -> dict[str, Any]:
    whole = {"name": "features", "datatype": "FP32", "shape": [1, 30], "data": [0.5] * 30} | changes
    return {"inputs": [{key: value for key, value in whole.items() if value is not None}]}


def binary(size: Any, **changes: Any) -> dict[str, Any]:
    return tensor(data=None, parameters={"binary_data_size": size}, **changes)


def chunked(*chunks: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % FLIGHTS.encode() + b"".join(chunks)


def packed(body: bytes, coding: bytes, data: bytes | None = None) -> bytes:
    pack = gzip.compress if coding == b"gzip" else zlib.compress
    return post(FLIGHTS, pack(body) if data is None else data, b"Content-Encoding: " + coding)


BOMB = gzip.compress(b"[" * 300_000_000, 9)
assert len(BOMB) > MAX_BODY
SMALL_BOMB = gzip.compress(b'{"instances":' + b" " * 50_000_000, 9)

CASES: dict[str, tuple[bytes, int, str]] = {
    # Malformed JSON.
    "no JSON": (post(FLIGHTS, b"{nonsense"), 400, "not valid JSON"),
    "empty body": (post(FLIGHTS, b""), 400, "not valid JSON"),
    "binary": (post(FLIGHTS, bytes(range(256))), 400, "not valid JSON"),
    "not UTF-8": (post(FLIGHTS, b'{"instances": [{"carrier": "\xff"}]}'), 400, "not valid JSON"),
    "half a character": (post(FLIGHTS, b'{"instances": [{"dep_hour": NaN, "carrier": "\\ud800"}]}'), 400, "not valid JSON"),
    "a list": (post(FLIGHTS, b"[1]"), 400, "instances"),
    "a number": (post(FLIGHTS, b"7"), 400, "instances"),
    "null": (post(FLIGHTS, b"null"), 400, "instances"),
    "no instances": (post(FLIGHTS, b"{}"), 400, "instances"),
    "rows and columns": (post(FLIGHTS, b'{"instances": [], "inputs": {}}'), 400, "not both"),
    "no rows": (post(FLIGHTS, rows()), 400, "no rows"),
    "deep lists": (post(TABULAR, b'{"instances": ' + b"[" * 900 + b"]" * 900 + b"}"), 400, ""),
    "deeper lists": (post(TABULAR, b'{"instances": ' + b"[" * 9000 + b"]" * 9000 + b"}"), 400, "not valid JSON"),
    "deep objects": (post(TABULAR, b'{"instances": [' + b'{"features":' * 900 + b"1" + b"}" * 900 + b"]}"), 400, ""),
    "deep NaN": (post(TABULAR, b'{"instances": ' + b"[" * 9000 + b"NaN" + b"]" * 9000 + b"}"), 400, "not valid JSON"),
    "wrong signature": (post(FLIGHTS, b'{"instances": [], "signature_name": "train"}'), 400, "signature_name"),
    # Shapes, datatypes, values.
    "29 of 30": (post(TABULAR, rows([0.5] * 29)), 400, "axis 0 takes 30 values, got 29"),
    "31 of 30": (post(TABULAR, rows([0.5] * 31)), 400, "axis 0 takes 30 values, got 31"),
    "text for numbers": (post(TABULAR, rows(["a"] * 30)), 400, "must be a finite number (FP32), got 'a'"),
    "a flat image": (post(IMAGES, rows([0] * 784)), 400, "must be lists of shape [28, 28, 1]"),
    "pixel 256": (post(IMAGES, rows([[256] * 28] * 28)), 400, "a whole number from 0 to 255 (UINT8), got 256"),
    "pixel 0.5": (post(IMAGES, rows([[0.5] * 28] * 28)), 400, "a whole number from 0 to 255 (UINT8), got 0.5"),
    "hour 1.5": (post(FLIGHTS, rows(FLIGHT | {"dep_hour": 1.5})), 400, "'dep_hour' must be a whole number"),
    "hour true": (post(FLIGHTS, rows(FLIGHT | {"dep_hour": True})), 400, "'dep_hour' must be a whole number"),
    "hour too large": (post(FLIGHTS, rows(FLIGHT | {"dep_hour": 2**63})), 400, "'dep_hour' must be a whole number"),
    "hour left out": (post(FLIGHTS, rows({"carrier": "UA"})), 400, "'dep_hour' is missing and may not be"),
    "carrier 7": (post(FLIGHTS, rows(FLIGHT | {"carrier": 7})), 400, "'carrier' must be text"),
    "unknown column": (post(FLIGHTS, rows(FLIGHT | {"arr_hour": 8})), 400, "unknown column 'arr_hour'"),
    "the second row": (post(FLIGHTS, rows(FLIGHT, FLIGHT | {"dep_hour": "x"})), 400, "row 1"),
    "distance infinite": (post(FLIGHTS, b'{"instances": [{"dep_hour": 7, "distance": 1e999}]}'), 400, "not valid JSON"),
    "b64 of nothing": (post(FLIGHTS, rows(FLIGHT | {"carrier": {"b64": "\u00e9"}})), 400, "b64"),
    # NaN where the signature forbids it.
    "NaN in rows": (post(TABULAR, b'{"instances": [[' + b"NaN," * 29 + b"1]]}"), 400, "is missing and may not be"),
    "Infinity in rows": (post(TABULAR, b'{"instances": [[' + b"Infinity," * 29 + b"1]]}"), 400, "must be a finite number"),
    "NaN in a column": (post(TABULAR, b'{"inputs": [' + b"NaN," * 29 + b"1]}"), 400, "is missing and may not be"),
    "null in rows": (post(TABULAR, rows([None] * 30)), 400, "is missing and may not be"),
    "NaN in tensors": (infer(tensor(data=[None] * 30)), 400, "is missing and may not be"),
    "NaN as a token": (post(INFER, json.dumps(tensor(data=[float("nan")] * 30)).encode()), 400, "not valid JSON"),
    "NaN in binary": (infer(binary(120), NOT_A_NUMBER + bytes(116)), 400, "'features' holds NaN"),
    # The Open Inference Protocol.
    "no inputs": (infer({}), 400, "inputs must be a list"),
    "inputs of numbers": (infer({"inputs": [1]}), 400, "inputs must be a list"),
    "unknown input": (infer(tensor(name="other")), 400, "unknown input 'other'"),
    "input twice": (infer({"inputs": tensor()["inputs"] * 2}), 400, "given twice"),
    "wrong datatype": (infer(tensor(datatype="FP64")), 400, "must have the datatype FP32, got 'FP64'"),
    "wrong shape": (infer(tensor(shape=[1, 31])), 400, "must have the shape [-1, 30]"),
    "no batch axis": (infer(tensor(shape=[30])), 400, "must have the shape [-1, 30]"),
    "negative shape": (infer(tensor(shape=[-1, 30])), 400, "must have the shape [-1, 30]"),
    "no rows in shape": (infer(tensor(shape=[0, 30], data=[])), 400, "has no rows"),
    "huge shape": (infer(tensor(shape=[2**62, 30])), 400, "data has 30 elements"),
    "shape of floats": (infer(tensor(shape=[1.0, 30])), 400, "must have the shape [-1, 30]"),
    "too few data": (infer(tensor(data=[0.5] * 29)), 400, "data has 29 elements, the shape [1, 30] takes 30"),
    "neither data nor size": (infer(tensor(data=None)), 400, "either data or the parameter binary_data_size"),
    "both": (infer(tensor(parameters={"binary_data_size": 120})), 400, "either data or the parameter binary_data_size"),
    "unknown output": (infer(tensor() | {"outputs": [{"name": "x"}]}), 400, "unknown output 'x'"),
    "output twice": (infer(tensor() | {"outputs": [{"name": "scores"}] * 2}), 400, "asked for twice"),
    "shared memory": (infer(tensor(parameters={"shared_memory_region": "r"})), 400, "shared memory is not offered"),
    "id 7": (infer(tensor() | {"id": 7}), 400, "id must be a string"),
    # Lying lengths.
    "header longer than the body": (infer(binary(120), bytes(120), b"99999"), 400, "Inference-Header-Content-Length must be from 0"),
    "header negative": (infer(binary(120), bytes(120), b"-1"), 400, "Inference-Header-Content-Length must be from 0"),
    "header no number": (infer(binary(120), bytes(120), b"many"), 400, "Inference-Header-Content-Length must be from 0"),
    "header too short": (infer(binary(120), bytes(120), b"20"), 400, "not valid JSON"),
    "header 0": (infer(binary(120), bytes(120), b"0"), 400, "takes 120 bytes"),
    "size too large": (infer(binary(2**40), bytes(120)), 400, "binary_data_size is 1099511627776, 120 bytes are left"),
    "size too small": (infer(binary(116), bytes(120)), 400, "takes 120 bytes"),
    "size negative": (infer(binary(-1), bytes(120)), 400, "binary_data_size must be a number of bytes"),
    "size no number": (infer(binary("120"), bytes(120)), 400, "binary_data_size must be a number of bytes"),
    "bytes left over": (infer(binary(120), bytes(121)), 400, "1 bytes are left in the body"),
    "no binary at all": (post(INFER, json.dumps(binary(120)).encode()), 400, "0 bytes are left"),
    "chunks that lie": (chunked(b"5\r\nabc\r\n0\r\n\r\n"), 400, "malformed HTTP"),
    "chunks without a size": (chunked(b"xyz\r\n"), 400, "malformed HTTP"),
    "a chunk of 2**64": (chunked(b"1" + b"0" * 16 + b"\r\n"), 400, "malformed HTTP"),
    "chunks and a length": (chunked(b"0\r\n\r\n").replace(b"Host: x", b"Host: x\r\nContent-Length: 3"), 400, "malformed HTTP"),
    # Sizes.
    "a large body": (post(FLIGHTS, b"x" * (MAX_BODY + 1)), 413, "200000 bytes"),
    "a large chunked body": (chunked(*[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 4), 413, "200000 bytes"),
    "large headers": (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431, "32768 bytes"),
    # Compression.
    "a bomb": (packed(b"", b"gzip", SMALL_BOMB), 413, "unpacks to more than 200000 bytes"),
    "a bomb that is too large": (packed(b"", b"gzip", BOMB), 413, "200000 bytes"),
    "not gzip": (packed(b"", b"gzip", rows(FLIGHT)), 400, "not gzip"),
    "gzip cut off": (packed(b"", b"gzip", gzip.compress(rows(FLIGHT))[:-9]), 400, "ends early"),
    "more than gzip": (packed(b"", b"gzip", gzip.compress(rows(FLIGHT)) + b"more"), 400, "follow"),
    "gzip twice": (packed(b"", b"gzip, gzip", gzip.compress(gzip.compress(rows(FLIGHT)))), 415, "Content-Encoding"),
    "not deflate": (packed(b"", b"deflate", b"x" * 20), 400, "not deflate"),
    "brotli": (packed(b"", b"br", b"x"), 415, "use gzip, deflate or identity"),
    # What is not there.
    "unknown model": (post("/v1/models/nobody:predict", rows(FLIGHT)), 404, "nobody"),
    "unknown version": (post("/v2/models/tabular/versions/9/infer", b"{}"), 404, "9"),
    "version no number": (post("/v2/models/tabular/versions/x/infer", b"{}"), 404, "x"),
    "unknown label": (post("/v1/models/tabular/labels/canary:predict", rows(FLIGHT)), 404, "canary"),
    "a model of slashes": (post("/v1/models/..%2F..%2Fetc:predict", rows(FLIGHT)), 404, "etc"),
    "a model of bytes": (post("/v1/models/%ff%00:predict", rows(FLIGHT)), 404, "model"),
    "unknown path": (post("/v3/models", b""), 404, "/v1/models"),
    "wrong verb": (b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % INFER.encode(), 405, "use POST"),
    # Headers.
    "timeout no number": (post(FLIGHTS, rows(FLIGHT), b"Modelyard-Timeout-Ms: soon"), 400, "Modelyard-Timeout-Ms must be a number"),
    "timeout NaN": (post(FLIGHTS, rows(FLIGHT), b"Modelyard-Timeout-Ms: nan"), 400, "Modelyard-Timeout-Ms must be a number"),
    "timeout 0": (post(FLIGHTS, rows(FLIGHT), b"Modelyard-Timeout-Ms: 0"), 400, "Modelyard-Timeout-Ms must be a number"),
    "priority -1": (post(FLIGHTS, rows(FLIGHT), b"Modelyard-Priority: -1"), 400, "Modelyard-Priority must be a number"),
    "explain perhaps": (post(FLIGHTS, rows(FLIGHT), b"Modelyard-Explain: perhaps"), 400, "Modelyard-Explain must be true or false"),
    # HTTP.
    "no HTTP": (b"nonsense\r\n\r\n", 400, "malformed HTTP"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed HTTP"),
    "no Host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400, "no Host header"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "HTTP"),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, "malformed HTTP"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_gets_its_status_and_a_clear_message(server: Any, name: str) -> None:
    """And the connection, or the next one, goes on as if nothing had been."""
    request, status, message = CASES[name]
    with Client(server.address) as client:
        for _ in range(2):
            got, headers, body = client.ask(request)
            error = json.loads(body)["error"]
            assert (got, message in error) == (status, True), (got, error)
            assert len(error) < 1000
            assert headers[b"x-request-id"]
            assert client.ask(post(FLIGHTS, rows(FLIGHT)))[0] == 200


def various(number: int) -> list[bytes]:
    """Return bad requests that no server has seen before: what could pile up in some table."""
    odd = b"%d-%d" % (number, number * 7919)
    text = odd.decode()
    return [
        post(f"/v1/models/{text * 40}:predict", rows(FLIGHT)),
        post(f"/v2/models/tabular/versions/{number}/infer", b"{}"),
        post(f"/v1/models/tabular/labels/{text * 40}:predict", b"{}"),
        post(f"/{text * 40}", b""),
        post(f"{FLIGHTS}?{text * 40}", rows(FLIGHT | {text * 40: 1})),
        post(FLIGHTS, rows(FLIGHT), b"Modelyard-Tenant: " + odd * 20, b"Modelyard-Key: " + odd * 20),
        post(FLIGHTS, rows(FLIGHT), b"X-%b: " % odd + b"a" * 3000),
        post(FLIGHTS, rows(FLIGHT), b"X-Request-Id: " + odd, b"Modelyard-Timeout-Ms: 1e-%d" % (number % 300)),
        infer(binary(120) | {"parameters": {"odd": text * 100}}, bytes(119)),
        infer(binary(120) | {"parameters": {"odd": text * 100}}, bytes(120)),
        infer(tensor() | {"id": text, "parameters": {text: text}}),
        infer(tensor() | {"outputs": [{"name": text * 40}]}),
        post(f"/v2/models/{text}/trace/setting", json.dumps({text: text}).encode()),
        post("/v2/logging", json.dumps({text: text}).encode()),
        post(f"/v2/repository/models/{text * 40}/load", b"{}"),
        post("/v2/repository/models/tabular/load", json.dumps({"parameters": {text: text}}).encode()),
    ]


def test_thousands_of_bad_requests_leave_nothing_in_memory(store: Path, serve: Any) -> None:
    numbers = itertools.count(1)
    small = [request for request, _, _ in CASES.values() if len(request) < 50_000]
    all_of_them = [request for request, _, _ in CASES.values()]
    options = ("--workers", "2", "--max-body-bytes", str(MAX_BODY))
    with serve(store, *options) as server, ExitStack() as stack:
        turn = itertools.cycle([stack.enter_context(Client(server.address)) for _ in range(8)])

        def send(n_rounds: int, each: Callable[[int], list[bytes]]) -> None:
            for _ in range(n_rounds):
                for request in each(next(numbers)):
                    assert next(turn).ask(request)[0] not in (500, 502), request[:200]

        send(4, lambda _: all_of_them)
        send(400, various)  # tables that are bounded are full by now
        before = resident_bytes(server)
        send(30, lambda _: small)
        send(10, lambda _: all_of_them)
        send(400, various)
        after = resident_bytes(server)
        assert "Traceback" not in server.log.read_text()
    grown = [late - early for early, late in zip(before, after, strict=True)]
    assert max(grown) < 6 * 2**20, (before, after)


def filled(start: bytes, item: bytes, end: bytes) -> bytes:
    """Return a body of 20 MB, most of it `item` again and again."""
    return start + b",".join([item] * (20_000_000 // (len(item) + 1))) + end


DATA = b'{"inputs":[{"name":"features","datatype":"FP32","shape":[1,30],"data":['
LARGE = {
    "empty lists": (TABULAR, filled(b'{"instances":[', b"[]", b"]}"), 413, "at most 100000 rows"),
    "empty objects": (FLIGHTS, filled(b'{"instances":[', b"{}", b"]}"), 413, "at most 100000 rows"),
    "good rows": (FLIGHTS, filled(b'{"instances":[', b'{"dep_hour":7}', b"]}"), 413, "at most 100000 rows"),
    "a long column": (FLIGHTS, filled(b'{"inputs":{"dep_hour":[', b"7", b"]}}"), 413, "at most 100000 rows"),
    "a long row": (TABULAR, filled(b'{"instances":[[', b"1", b"]]}"), 400, "takes 30 values"),
    "an object": (TABULAR, filled(b'{"instances":{"a":[', b"1", b"]}}"), 400, "must be a list of rows"),
    "no end": (TABULAR, filled(b'{"instances":[[', b"1", b"]"), 400, "not valid JSON"),
    "a long tensor": (INFER, filled(DATA, b"1", b"]}]}"), 400, "the shape"),
    "long outputs": (INFER, filled(b'{"inputs":[],"outputs":[', b'{"name":"scores"}', b"]}"), 400, "missing"),
    "lists for data": (INFER, filled(DATA, b"[]", b"]}]}"), 400, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_bad_body_is_refused_and_forgotten(store: Path, serve: Any, name: str) -> None:
    """What it takes to read JSON of this size is given back with the answer, and not by a collection much later."""
    path, body, status, message = LARGE[name]
    patient = b"Modelyard-Timeout-Ms: 60000"
    with serve(store, "--workers", "1") as server, Client(server.address) as client:
        assert client.ask(post(FLIGHTS, rows(FLIGHT), patient))[0] == 200
        (before,) = resident_bytes(server)
        for _ in range(2):
            got, _, answer = client.ask(post(path, body, patient))
            assert (got, message in json.loads(answer)["error"]) == (status, True), answer
        until_s = monotonic() + PATIENCE_S
        while resident_bytes(server)[0] > before + 100 * 2**20:
            assert monotonic() < until_s, resident_bytes(server)
            assert client.ask(post(FLIGHTS, rows(FLIGHT), patient))[0] == 200
