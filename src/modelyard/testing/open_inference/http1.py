"""Checks of HTTP/1.1 below the protocol: what proxies, probes and clients of any make rely on (RFC 9110 and RFC 9112)."""

import json
import time

from modelyard.testing.open_inference.check import Failed, Skipped, check, expect
from modelyard.testing.open_inference.inference import read_answer
from modelyard.testing.open_inference.server import Server
from modelyard.testing.open_inference.wire import Connection, Reply

SOON_S = 3.0
"""How long a connection that has to be closed may stay open."""
PAUSE_S = 0.03
"""Between the pieces of a message, so that the server reads one by one: nothing tells a client when it has."""


@check(
    "http.keep-alive",
    "SHOULD",
    "a connection serves one request after another",
    "RFC 9112, 9.3: “SHOULD support persistent connections”",
)
def keep_alive(server: Server) -> None:
    with server.connect() as connection:
        for i in range(3):
            connection.send(server.message("GET", server.probe))
            reply = connection.reply().expect(200)
            expect(not _says_close(reply), f"answer {i + 1} says Connection: close, although nobody asked for that")


@check(
    "http.keep-alive-after-error",
    "SHOULD",
    "a request that is refused does not end the connection, unless the answer says so",
    "RFC 9112, 9.6",
)
def keep_alive_after_error(server: Server) -> None:
    with server.connect() as connection:
        connection.send(server.message("POST", server.infer_path, b"no JSON"))
        reply = connection.reply()
        if _says_close(reply):
            raise Skipped("the answer says Connection: close")
        connection.send(server.message("GET", server.probe))
        connection.reply().expect(200)


@check("http.close", "MUST", "Connection: close is followed", "RFC 9112, 9.6")
def close(server: Server) -> None:
    with server.connect(SOON_S) as connection:
        connection.send(server.message("GET", server.probe, b"", (("Connection", "close"),)))
        connection.reply().expect(200)
        expect(connection.is_closed(), "the connection is still open")


@check("http.pipelining", "MUST", "requests sent at once are answered in their order", "RFC 9112, 9.3.2")
def pipelining(server: Server) -> None:
    """An inference takes longer than metadata: the order is lost where each answer leaves as soon as it is ready."""
    _ = server.base
    server.need_keep_alive()
    body, headers = server.call().encoded()
    infer = server.message("POST", server.infer_path, body, headers)
    messages = (infer, server.message("GET", "/v2"), infer, server.message("GET", server.model_path()))
    with server.connect() as connection:
        connection.send(b"".join(messages))
        for i, expected in enumerate(("outputs", "extensions", "outputs", "inputs")):
            try:
                body = connection.reply().expect(200).body
            except Failed as exc:
                raise Failed(f"answer {i + 1} of 4: {exc}") from exc
            # Model metadata has inputs and outputs, an answer to an inference outputs, server metadata extensions.
            got = next((key for key in ("extensions", "inputs", "outputs") if f'"{key}"'.encode() in body), "none")
            expect(got == expected, f"answer {i + 1} of 4 has {got}, expected {expected}: it is {body[:100]!r}")


@check(
    "http.1.0", "MUST", "HTTP/1.0 is answered, not chunked, and the connection closed", "RFC 9112, 6.1, 9.3 and C.2.2"
)
def http_1_0(server: Server) -> None:
    with server.connect(SOON_S) as connection:
        connection.send(server.head("GET", server.probe, version="HTTP/1.0"))
        connection.reply().expect(200)
        expect(connection.is_closed(), "the connection is still open, although HTTP/1.0 did not ask to keep it")


@check("http.head", "MUST", "HEAD is answered as GET, without the body", "RFC 9110, 9.1 and 9.3.2")
def head(server: Server) -> None:
    server.need_keep_alive()
    for path in ("/v2", server.probe, server.model_path()):
        length = server.get(path).expect(200).header("Content-Length")
        with server.connect() as connection:
            connection.send(server.message("HEAD", path))
            reply = connection.reply("HEAD")
            expect(reply.status == 200, f"the status of HEAD {path} is {reply.status}, that of GET 200")
            own = reply.header("Content-Length")
            expect(own in (None, length), f"HEAD {path} has Content-Length {own}, GET {length}")
            connection.send(server.message("GET", server.probe))
            connection.reply().expect(200)  # cannot be read when a body came behind the HEAD


@check("http.wrong-method", "MUST", "a method that a path does not take is refused", "RFC 9110, 15.5.6")
def wrong_method(server: Server) -> None:
    for method, path in _wrong_methods(server):
        reply = server.ask(method, path)
        expect(reply.status >= 400, f"the status of {method} {path} is {reply.status}")


@check("http.wrong-method.status", "SHOULD", "a method that a path does not take is 405", "RFC 9110, 15.5.6")
def wrong_method_status(server: Server) -> None:
    for method, path in _wrong_methods(server):
        reply = server.ask(method, path)
        if reply.status < 400:
            raise Skipped(f"the status of {method} {path} is {reply.status}; see http.wrong-method")
        expect(reply.status == 405, f"the status of {method} {path} is {reply.status}, expected 405")


@check("http.allow", "MUST", "405 says in Allow which methods there are", "RFC 9110, 15.5.6: “MUST generate an Allow”")
def allow(server: Server) -> None:
    for method, path in _wrong_methods(server):
        reply = server.ask(method, path)
        if reply.status != 405:
            raise Skipped(f"the status of {method} {path} is {reply.status}; see http.wrong-method.status")
        allowed = reply.header("Allow")
        expected = "POST" if method == "GET" else "GET"
        methods = [each.strip() for each in (allowed or "").split(",")]
        expect(expected in methods, f"Allow of {method} {path} is {allowed!r}, expected {expected} in it")


@check("http.unknown-path", "SHOULD", "a path that is not there is 404", "RFC 9110, 15.5.5")
def unknown_path(server: Server) -> None:
    for path in ("/v2/no-such-thing", f"{server.model_path()}/no-such-thing"):
        reply = server.get(path)
        expect(reply.status == 404, f"the status of {path} is {reply.status}, expected 404")


@check("http.chunked", "MUST", "a body in chunks is taken", "RFC 9112, 7.1: “MUST be able to parse”")
def chunked(server: Server) -> None:
    _ = server.base
    body, headers = server.call().encoded()
    message = server.head("POST", server.infer_path, (*headers, ("Transfer-Encoding", "chunked")))
    third = max(1, len(body) // 3)
    for start in range(0, len(body), third):
        part = body[start : start + third]
        message += b"%x;note=1\r\n%b\r\n" % (len(part), part)
    with server.connect() as connection:
        connection.send(message + b"0\r\n\r\n")
        read_answer(connection.reply("POST"))


@check(
    "http.pieces-of-head", "MUST", "request line and headers are taken in whatever pieces they come", "RFC 9112, 2.2"
)
def pieces_of_head(server: Server) -> None:
    """TCP cuts where it likes: in a method, in a path, in a name, between the two bytes that end a line."""
    message = server.message("GET", server.model_path())
    cuts = (2, message.index(b"/v2/mo") + 6, message.index(b"Host") + 2, message.index(b"\r\n\r\n") + 3, len(message))
    with server.connect() as connection:
        start = 0
        for end in cuts:
            connection.send(message[start:end])
            time.sleep(PAUSE_S)
            start = end
        connection.reply().expect(200)


@check("http.pieces-of-body", "MUST", "a body is taken in whatever pieces it comes", "RFC 9112, 6.3")
def pieces_of_body(server: Server) -> None:
    _ = server.base
    body, headers = server.call().encoded()
    message = server.message("POST", server.infer_path, body, headers)
    head_bytes = len(message) - len(body)
    with server.connect() as connection:
        start = 0
        for end in (head_bytes, head_bytes + 1, head_bytes + len(body) // 2, len(message)):
            connection.send(message[start:end])
            time.sleep(PAUSE_S)
            start = end
        read_answer(connection.reply("POST"))


@check(
    "http.expect-continue",
    "MUST",
    "Expect: 100-continue gets 100 or a final status before the body is sent",
    "RFC 9110, 10.1.1",
)
def expect_continue(server: Server) -> None:
    _ = server.base
    body, headers = server.call().encoded()
    with server.connect(SOON_S) as connection:
        lines = (*headers, ("Content-Length", str(len(body))), ("Expect", "100-continue"))
        connection.send(server.head("POST", server.infer_path, lines))
        expect(connection.has_answer(), "neither 100 nor a final status came while the body was held back")
        connection.send(body)
        read_answer(connection.reply("POST"))


@check("http.no-host", "MUST", "a request of HTTP/1.1 without Host is 400", "RFC 9112, 3.2: “MUST respond with a 400”")
def no_host(server: Server) -> None:
    with server.connect() as connection:
        connection.send(f"GET {server.address.prefix}{server.probe} HTTP/1.1\r\n\r\n".encode())
        reply = connection.reply()
        expect(reply.status == 400, f"the status is {reply.status}, expected 400")


@check(
    "http.absolute-form", "MUST", "GET http://host/path is taken", "RFC 9112, 3.2.2: “MUST accept the absolute-form”"
)
def absolute_form(server: Server) -> None:
    authority = server.address.authority
    with server.connect() as connection:
        target = f"http://{authority}{server.address.prefix}{server.probe}"
        connection.send(f"GET {target} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
        connection.reply().expect(200)


@check("http.header-case", "MUST", "names of headers are told without regard to case", "RFC 9110, 5.1")
def header_case(server: Server) -> None:
    _ = server.base
    body, headers = server.call(binary=True if server.binary else ()).encoded()
    for change in (str.lower, str.upper):
        changed = tuple((change(name), value) for name, value in (*headers, ("Content-Length", str(len(body)))))
        with server.connect() as connection:
            connection.send(server.head("POST", server.infer_path, changed) + body)
            read_answer(connection.reply("POST"))


@check("http.percent-encoding", "MUST", "%6D in a path is m", "RFC 3986, 2.3: “they identify the same resource”")
def percent_encoding(server: Server) -> None:
    letter = next((c for c in server.name if c.isascii() and c.isalnum()), None)
    if letter is None:
        raise Skipped("the model's name has no letter or digit")
    path = server.model_path()
    at = path.index(letter, len("/v2/models/"))
    server.get(f"{path[:at]}%{ord(letter):02X}{path[at + 1 :]}").expect(200)


@check("http.query", "SHOULD", "a query behind the path does no harm", "RFC 3986, 3.4")
def query(server: Server) -> None:
    server.get(f"{server.probe}?probe=1").expect(200)


@check("http.half-close", "SHOULD", "a client that has said all and closes its half gets its answer", "RFC 9112, 9.6")
def half_close(server: Server) -> None:
    with server.connect() as connection:
        connection.send(server.message("GET", server.probe))
        connection.end_of_requests()
        connection.reply().expect(200)


@check("http.two-lengths", "MUST", "two lengths that differ are 400", "RFC 9112, 6.3: “MUST respond with a 400”")
def two_lengths(server: Server) -> None:
    body = b"{}"
    headers = (("Content-Length", str(len(body))), ("Content-Length", str(len(body) + 1)))
    with server.connect() as connection:
        connection.send(server.head("POST", server.infer_path, headers) + body)
        reply = connection.reply("POST")
        expect(reply.status == 400, f"the status is {reply.status}, expected 400")


@check(
    "http.length-and-chunks",
    "MUST",
    "a request with both Content-Length and chunks is refused, or read by its chunks and the connection closed",
    "RFC 9112, 6.1: “MUST close the connection”",
)
def length_and_chunks(server: Server) -> None:
    """A proxy that read the length would pass on what stands behind it as a request of somebody else's."""
    headers = (("Content-Length", "5"), ("Transfer-Encoding", "chunked"))
    with server.connect(SOON_S) as connection:
        smuggled = server.message("GET", server.probe)
        connection.send(server.head("GET", server.probe, headers) + b"0\r\n\r\n" + smuggled)
        connection.reply()
        expect(connection.is_closed(), "the connection goes on, and with it what a proxy would take for a body")


@check(
    "http.no-http",
    "SHOULD",
    "what is no HTTP is answered with 400, or with nothing, and the connection closed",
    "RFC 9112, 3: “SHOULD respond with … a 400”",
)
def no_http(server: Server) -> None:
    with server.connect(SOON_S) as connection:
        connection.send(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        _expect_refused_or_closed(connection)
    server.get(server.probe).expect(200)


@check("http.bad-length", "MUST", "a Content-Length that is no number is refused", "RFC 9112, 6.3")
def bad_length(server: Server) -> None:
    for length in ("-1", "many", "1e3"):
        with server.connect(SOON_S) as connection:
            connection.send(server.head("GET", server.probe, (("Content-Length", length),)))
            _expect_refused_or_closed(connection)


@check(
    "http.long-header",
    "SHOULD",
    "a header of 100,000 bytes is taken, or refused as the client's fault",
    "RFC 9110, 5.4",
)
def long_header(server: Server) -> None:
    with server.connect() as connection:
        connection.send(server.message("GET", server.probe, b"", (("X-Padding", "x" * 100_000),)))
        reply = connection.reply()
        expect(reply.status == 200 or 400 <= reply.status < 500, f"the status is {reply.status}")


@check("http.error-type", "SHOULD", 'an error\'s {"error": text} says Content-Type application/json', "RFC 9110, 8.3")
def error_type(server: Server) -> None:
    reply = server.post_body(b"no JSON")
    try:
        json.loads(reply.body)
    except ValueError as exc:
        raise Skipped(f"the error is no JSON; see faults.malformed-json ({exc})") from exc
    got = (reply.header("Content-Type") or "").partition(";")[0].strip().lower()
    expect(got == "application/json", f"Content-Type is {got!r}")


def _wrong_methods(server: Server) -> tuple[tuple[str, str], ...]:
    return (
        ("GET", server.infer_path),
        ("POST", server.probe),
        ("DELETE", "/v2/health/ready"),
        ("PUT", server.model_path()),
    )


def _expect_refused_or_closed(connection: Connection) -> None:
    try:
        reply = connection.reply()
    except Failed as exc:
        if "closed" in str(exc):
            return
        raise
    expect(400 <= reply.status <= 501, f"the status is {reply.status}")


def _says_close(reply: Reply) -> bool:
    tokens = [token.strip().lower() for token in (reply.header("Connection") or "").split(",")]
    return "close" in tokens
