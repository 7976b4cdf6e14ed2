"""The edge, over raw sockets to a real server: what a parser alone does not promise."""

import gzip
import http.client
import json
import re
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROW = json.dumps({"instances": [{"dep_hour": 7, "distance": 1.5, "carrier": "UA"}]}).encode()
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes = ROW, *headers: bytes) -> bytes:
    lines = [b"POST /v1/models/flights:predict HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def patient(n_steps: int) -> bytes:
    body = json.dumps({"inputs": [{"name": "n_steps", "shape": [1], "datatype": "INT64", "data": [n_steps]}]}).encode()
    return (
        b"POST /v2/models/patient/infer HTTP/1.1\r\nHost: x\r\nModelyard-Timeout-Ms: 60000\r\nContent-Length: %d\r\n\r\n%b"
        % (
            len(body),
            body,
        )
    )


def counted(server: Any) -> dict[tuple[str, str, str], float]:
    """Return how many requests ended how: (protocol, outcome, cause) → number."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {
        (found["protocol"], found["outcome"], found.get("cause", "")): float(value)
        for labels, value in re.findall(r"^modelyard_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
        if float(value) and (found := dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    }


def await_counted(server: Any, wanted: dict[tuple[str, str, str], float]) -> None:
    until_s = time.monotonic() + 20
    while counted(server) != wanted and time.monotonic() < until_s:
        time.sleep(0.02)
    assert counted(server) == wanted


class Connection:
    """A client that sees bytes."""

    def __init__(self, server: Any) -> None:
        self.socket = socket.create_connection(server.address, timeout=20)
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Read one answer: status, headers in lower case, body."""
        line = self.stream.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers: dict[str, str] = {}
        while (header := self.stream.readline()) != b"\r\n":
            name, _, value = header.decode().partition(": ")
            headers[name.lower()] = value.strip()
        body = b"" if head else self.stream.read(int(headers.get("content-length", 0)))
        return int(line.split()[1]), headers, body

    def at_end(self) -> bool:
        """Whether the server has closed its side and sent nothing more."""
        return self.stream.read(1) == b""


@pytest.fixture
def connection(server: Any) -> Any:
    with Connection(server) as connection:
        yield connection


def test_a_connection_is_kept_alive(connection: Connection) -> None:
    for _ in range(3):
        connection.send(post())
        status, headers, body = connection.answer()
        assert status == 200
        assert "connection" not in headers
        assert "predictions" in json.loads(body)


def test_pipelined_requests_are_answered_in_order(connection: Connection) -> None:
    """Also when the first is slower than the second: 2,000 steps run on the model's thread."""
    slow = json.dumps({"inputs": [{"name": "n_steps", "shape": [1], "datatype": "INT64", "data": [2000]}]}).encode()
    first = (
        b"POST /v2/models/patient/infer HTTP/1.1\r\nHost: x\r\nX-Request-Id: first\r\nContent-Length: %d\r\n\r\n"
        % len(slow)
    )
    connection.send(
        first + slow + post(ROW, b"X-Request-Id: second") + LIVE.replace(b"Host", b"X-Request-Id: third\r\nHost")
    )
    assert [connection.answer()[1]["x-request-id"] for _ in range(3)] == ["first", "second", "third"]


def test_hundreds_of_pipelined_requests_are_all_answered(connection: Connection) -> None:
    connection.send(LIVE * 500)
    assert [connection.answer()[0] for _ in range(500)] == [200] * 500


def test_a_request_may_arrive_byte_by_byte(connection: Connection) -> None:
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in post():
        connection.send(bytes([byte]))
    assert connection.answer()[0] == 200


def test_a_chunked_body_is_put_together(connection: Connection) -> None:
    half = len(ROW) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (ROW[:half], ROW[half:]))
    connection.send(
        b"POST /v1/models/flights:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunks
        + b"0\r\n\r\n"
    )
    assert connection.answer()[0] == 200
    connection.send(LIVE)
    assert connection.answer()[0] == 200


def test_head_gives_the_headers_of_get_and_no_body(connection: Connection) -> None:
    connection.send(b"HEAD /v2/models/flights HTTP/1.1\r\nHost: x\r\n\r\n" + LIVE)
    status, headers, _ = connection.answer(head=True)
    assert status == 200
    assert int(headers["content-length"]) > 0
    assert connection.answer()[2] == b'{"live":true}'


def test_expect_100_continue_is_answered_before_the_body_is_sent(connection: Connection) -> None:
    head, _, body = post(ROW, b"Expect: 100-continue").partition(b"\r\n\r\n")
    connection.send(head + b"\r\n\r\n")
    assert connection.stream.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert connection.stream.readline() == b"\r\n"
    connection.send(body)
    assert connection.answer()[0] == 200


def test_expect_with_too_large_a_body_is_refused_at_once(connection: Connection) -> None:
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 200001\r\n\r\n")
    assert connection.answer()[0] == 413
    assert connection.at_end()


def test_http_1_0_is_answered_and_closed(connection: Connection) -> None:
    connection.send(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    status, headers, body = connection.answer()
    assert (status, headers["connection"], body) == (200, "close", b'{"live":true}')
    assert connection.at_end()


def test_http_1_0_may_ask_to_be_kept_alive(connection: Connection) -> None:
    for _ in range(2):
        connection.send(b"GET /v2/health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        status, headers, _ = connection.answer()
        assert (status, headers["connection"]) == (200, "keep-alive")


def test_connection_close_is_honoured(connection: Connection) -> None:
    connection.send(LIVE.replace(b"Host", b"Connection: close\r\nHost"))
    assert connection.answer()[1]["connection"] == "close"
    assert connection.at_end()


def test_an_offer_to_upgrade_is_ignored(connection: Connection) -> None:
    """curl --http2 makes one with its first request."""
    offer = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ"]
    connection.send(post(ROW, *offer) + LIVE)
    assert connection.answer()[0] == 200
    assert connection.answer()[2] == b'{"live":true}'


def test_connect_is_refused(connection: Connection) -> None:
    connection.send(b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n\x16\x03")
    assert connection.answer()[0] == 405
    assert connection.at_end()


def test_a_client_that_closes_its_side_gets_its_answers(connection: Connection) -> None:
    connection.send(post() + post())
    connection.socket.shutdown(socket.SHUT_WR)
    assert [connection.answer()[0] for _ in range(2)] == [200, 200]
    assert connection.at_end()


def test_a_client_that_closes_its_side_and_waits_long_is_asked_whether_it_is_still_there(
    connection: Connection,
) -> None:
    connection.send(patient(500) + patient(1))
    connection.socket.shutdown(socket.SHUT_WR)
    assert [connection.answer()[0] for _ in range(3)] == [100, 200, 200]
    assert connection.at_end()


def test_a_client_of_the_standard_library_that_closes_its_side_gets_its_late_answer(server: Any) -> None:
    host, port = server.address
    client = http.client.HTTPConnection(host, port, timeout=20)
    client.request("POST", "/v2/models/patient/infer", patient(500).partition(b"\r\n\r\n")[2])
    client.sock.shutdown(socket.SHUT_WR)
    with client.getresponse() as answer:
        assert answer.status == 200
        assert b"outputs" in answer.read()
    client.close()


def test_a_client_of_http_1_0_that_closes_its_side_gets_its_late_answer_and_nothing_else(
    connection: Connection,
) -> None:
    connection.send(patient(500).replace(b"HTTP/1.1", b"HTTP/1.0"))
    connection.socket.shutdown(socket.SHUT_WR)
    assert connection.answer()[0] == 200
    assert connection.at_end()


def test_what_clients_that_closed_still_waited_for_is_not_computed(store: Path, serve: Any) -> None:
    """No reset, just close(), as curl does when its time is up."""
    with serve(store, "--workers", "1", "--model", "patient", "--target", "60") as server:
        with Connection(server) as first:
            first.send(patient(2000))
            for _ in range(5):
                with Connection(server) as hurried:
                    hurried.send(patient(2000))
            assert first.answer()[0] == 200
        await_counted(server, {("rest-v2", "ok", ""): 1, ("rest-v2", "cancelled", ""): 5})


@pytest.mark.parametrize(
    ("unfinished", "why"),
    [
        (post()[:-5], f"after {len(ROW) - 5} of {len(ROW)} body bytes"),
        (post()[: -len(ROW)], f"after 0 of {len(ROW)} body bytes"),
        (LIVE[:-2], "before its headers did"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n", "before its last chunk"),
    ],
)
def test_a_request_cut_off_in_the_middle_is_400_and_says_where(
    connection: Connection, unfinished: bytes, why: str
) -> None:
    connection.send(LIVE + unfinished)
    connection.socket.shutdown(socket.SHUT_WR)
    assert connection.answer()[0] == 200
    status, _, body = connection.answer()
    assert status == 400
    assert why in json.loads(body)["error"]
    assert connection.at_end()


def test_a_client_that_closes_its_side_between_requests_is_told_nothing(connection: Connection) -> None:
    connection.send(LIVE)
    assert connection.answer()[0] == 200
    connection.socket.shutdown(socket.SHUT_WR)
    assert connection.at_end()


@pytest.mark.parametrize(
    "lines", [b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked"]
)
def test_a_transfer_coding_besides_chunked_is_refused_by_name(connection: Connection, lines: bytes) -> None:
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n\r\n0\r\n\r\n")
    status, _, body = connection.answer()
    assert status == 400
    assert "'gzip, chunked'" in json.loads(body)["error"]
    assert connection.at_end()


def test_a_content_encoding_given_twice_is_not_taken_for_one(connection: Connection) -> None:
    twice = gzip.compress(gzip.compress(ROW))
    connection.send(post(twice, b"Content-Encoding: gzip", b"Content-Encoding: gzip"))
    status, _, body = connection.answer()
    assert status == 415
    assert "'gzip, gzip'" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_not_http_is_400_and_closed(connection: Connection, request_bytes: bytes) -> None:
    connection.send(request_bytes)
    status, headers, body = connection.answer()
    assert status == 400
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    assert "HTTP" in json.loads(body)["error"]
    assert connection.at_end()


def test_answers_owed_come_before_a_refusal(connection: Connection) -> None:
    connection.send(LIVE + b"nonsense\r\n\r\n")
    assert [connection.answer()[0] for _ in range(2)] == [200, 400]
    assert connection.at_end()


def test_headers_over_the_limit_are_431(connection: Connection) -> None:
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000 + b"\r\n\r\n")
    assert connection.answer()[0] == 431
    assert connection.at_end()


def test_many_headers_over_the_limit_are_431(connection: Connection) -> None:
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000 + b"\r\n")
    assert connection.answer()[0] == 431
    assert connection.at_end()


def test_a_header_that_never_ends_is_431(connection: Connection) -> None:
    """The server must not keep collecting it; it may stop reading at any point."""
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ")
    try:
        for _ in range(1000):
            connection.send(b"a" * 10_000)
    except (BrokenPipeError, ConnectionResetError):
        return  # refused, and the answer lost because we went on sending
    assert connection.answer()[0] == 431


def test_a_body_over_the_limit_is_413(connection: Connection) -> None:
    connection.send(post(b"x" * 200_001))
    status, _, body = connection.answer()
    assert status == 413
    assert "200000 bytes" in json.loads(body)["error"]
    assert connection.at_end()


def test_a_chunked_body_over_the_limit_is_413(connection: Connection) -> None:
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.send((b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 4)
    assert connection.answer()[0] == 413
    assert connection.at_end()


def test_a_client_too_slow_with_its_headers_or_body_is_408(store: Path, serve: Any) -> None:
    with serve(store, "--model", "tabular", "--read-timeout", "0.2") as server:
        for unfinished in (LIVE[:-2], post()[:-1]):
            with Connection(server) as connection:
                connection.send(LIVE + unfinished)
                assert connection.answer()[0] == 200
                status, _, body = connection.answer()
                assert status == 408
                assert "within 0.2 s" in json.loads(body)["error"]
                assert connection.at_end()


def test_a_client_that_does_not_read_its_answers_is_cut_off(store: Path, serve: Any) -> None:
    """Its answers pile up only to a limit, and only for the read timeout."""
    wanted = b'{"inputs":[{"name":"n_steps","shape":[1],"datatype":"INT64","data":[1]}]}'
    head = b"POST /v2/models/patient/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(wanted)
    with serve(store, "--model", "patient", "--read-timeout", "0.2") as server, Connection(server) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.send((head + wanted) * 300_000)


def test_a_sane_request_id_comes_back_and_any_other_is_replaced(connection: Connection) -> None:
    for sent, kept in [(b"my-id 7", True), (b"x" * 128, True), (b"x" * 129, False), (b"caf\xc3\xa9", False)]:
        connection.send(LIVE.replace(b"Host", b"X-Request-Id: " + sent + b"\r\nHost"))
        got = connection.answer()[1]["x-request-id"]
        assert (got == sent.decode()) is kept
        assert re.fullmatch(r"[ -~]{1,128}", got)


def test_errors_carry_a_request_id_too(connection: Connection) -> None:
    connection.send(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n")
    status, headers, body = connection.answer()
    assert (status, headers["x-request-id"]) == (404, "mine")
    assert "/v1/models" in json.loads(body)["error"]


def test_every_refusal_is_counted_by_its_cause_and_logged_with_it(store: Path, serve: Any) -> None:
    refused = [
        (404, "unknown_path", LIVE.replace(b"live", b"nowhere")),
        (405, "method", LIVE.replace(b"GET", b"PUT")),
        (400, "bad_request", post(ROW, b"Modelyard-Priority: high")),
        (415, "unsupported_encoding", post(ROW, b"Content-Encoding: br")),
        (400, "bad_request", post(ROW, b"Content-Encoding: gzip")),
        (413, "body_too_large", post(b"x" * 1001)),
        (431, "headers_too_large", LIVE.replace(b"Host", b"X: " + b"a" * 40_000 + b"\r\nHost")),
        (400, "bad_request", b"nonsense\r\n\r\n"),
        (408, "client_too_slow", LIVE[:-2]),
    ]
    options = ("--max-body-bytes", "1000", "--read-timeout", "0.2", "--access-log")
    with serve(store, "--workers", "1", "--model", "tabular", *options) as server:
        wanted: dict[tuple[str, str, str], float] = {}
        for status, cause, sent in refused:
            with Connection(server) as connection:
                connection.send(sent)
                assert connection.answer()[0] == status
            wanted["http", "client_error", cause] = wanted.get(("http", "client_error", cause), 0) + 1
        assert counted(server) == wanted
        server.terminate()
        assert server.process.wait(timeout=60) == 0
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    told = [(line["status"], line["cause"]) for line in lines if line["path"] != "/metrics"]
    assert told == [(status, cause) for status, cause, _ in refused]
