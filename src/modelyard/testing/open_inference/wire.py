"""HTTP/1.1 over a bare socket, so that requests no HTTP library would send can be sent, and every byte is known.

The parser of answers is strict: what a client could misread is a failure of the server.
"""

import json
import socket
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from modelyard.errors import ConfigError
from modelyard.testing.open_inference.check import Exchange, Failed, shown, shown_bytes

Headers = tuple[tuple[str, str], ...]
_MAX_ANSWER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Address:
    """Where a server listens. `prefix` comes before every path, without a slash at its end."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(url: str) -> Address:
    """Return the address in `url`, http:// when it names no scheme; raises ConfigError."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"the URL {url!r} cannot be read ({exc}); give one like http://localhost:8000") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the URL must be http:// or https:// and name a host, got {url!r}")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v2")
    return Address(parts.hostname, port or (443 if tls else 80), prefix, tls)


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    version: str
    status: int
    headers: Headers
    body: bytes
    interim: tuple[int, ...] = ()
    """Statuses from 100 to 199 that came before."""

    def header(self, name: str) -> str | None:
        """Return the last header of that name."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        return values[-1] if values else None

    def json(self) -> Any:
        """Return the body as JSON; raises Failed. NaN and Infinity, which JSON has not, are read as numbers."""
        try:
            return json.loads(self.body)
        except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError are both
            raise Failed(f"the body is not JSON ({exc}), its first bytes are {self.body[:60]!r}") from exc

    def expect(self, status: int) -> "Reply":
        """Return the reply itself when it has that status."""
        if self.status != status:
            raise Failed(
                f"the status is {self.status}, expected {status}; the body is {shown_bytes(self.body[:200])!r}"
            )
        return self

    def expect_refusal(self) -> str:
        """Return the text of {"error": text}; raises Failed unless the status is an error's and the body such an object."""
        if self.status < 400:
            raise Failed(f"the status is {self.status}, expected an error's")
        value = self.json()
        if not isinstance(value, dict) or not isinstance(value.get("error"), str) or not value["error"]:
            raise Failed(f'the body of an error must be {{"error": text}}, got {shown(value)}')
        text: str = value["error"]
        return text


@dataclass
class Connection:
    """One connection to the server. What goes and comes is noted in `log` for the report."""

    address: Address
    timeout_s: float
    log: list[Exchange] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            plain = socket.create_connection((self.address.host, self.address.port), self.timeout_s)
        except OSError as exc:
            raise Failed(f"no connection to {self.address.authority}: {exc}") from exc
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket: socket.socket = plain
        if self.address.tls:
            self._socket = ssl.create_default_context().wrap_socket(plain, server_hostname=self.address.host)
        self._sent = b""
        self._buffer = b""
        self._answer = b""

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are. A server may answer and close before it has read them all: that is no fault."""
        self._sent += data
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return
        except TimeoutError as exc:
            raise Failed(f"the server did not read the request within {self.timeout_s:g} s") from exc

    def end_of_requests(self) -> None:
        """Close the sending half."""
        self._socket.shutdown(socket.SHUT_WR)

    def reply(self, method: str = "GET") -> Reply:
        """Read the next answer; raises Failed when none comes, or one that cannot be read."""
        self._answer = b""
        sent, self._sent = self._sent, b""
        try:
            return self._read_reply(method)
        except Failed as exc:
            if not self._answer:
                self._answer = str(exc).encode()
            raise
        finally:
            self.log.append(Exchange(shown_bytes(sent), shown_bytes(self._answer)))

    def is_closed(self) -> bool:
        """Wait for the server to close its half, or to send more, or for the time to run out: True when it closed."""
        if self._buffer:
            return False
        try:
            self._buffer = self._receive()
        except TimeoutError:
            return False
        return not self._buffer

    def has_answer(self) -> bool:
        """Wait for an answer to begin, without reading it: True when one has."""
        if not self._buffer:
            try:
                self._buffer = self._receive()
            except TimeoutError:
                return False
        return bool(self._buffer)

    def _read_reply(self, method: str) -> Reply:
        interim: list[int] = []
        while True:
            version, status, headers = self._read_head()
            if status >= 200 or status == 101:
                break
            interim.append(status)
        body = self._read_body(method, version, status, headers)
        return Reply(version, status, headers, body, tuple(interim))

    def _read_head(self) -> tuple[str, int, Headers]:
        head = self._until(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        parts = first.split(" ", 2)
        if (
            len(parts) < 2
            or parts[0] not in ("HTTP/1.0", "HTTP/1.1")
            or not (parts[1].isdigit() and len(parts[1]) == 3)
        ):
            raise Failed(f"the status line is {first!r}, expected HTTP/1.1, a code and a reason")
        headers = []
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise Failed(f"a header line is {line!r}, expected a name, a colon and a value")
            headers.append((name, value.strip()))
        return parts[0], int(parts[1]), tuple(headers)

    def _read_body(self, method: str, version: str, status: int, headers: Headers) -> bytes:
        if method == "HEAD" or status in (204, 304) or status < 200:
            return b""
        lengths = {value for name, value in headers if name.lower() == "content-length"}
        codings = [value.lower() for name, value in headers if name.lower() == "transfer-encoding"]
        if codings:
            if lengths or codings != ["chunked"]:
                raise Failed(f"the answer has Transfer-Encoding {codings} and Content-Length {sorted(lengths)}")
            if version == "HTTP/1.0":
                raise Failed("an answer in HTTP/1.0 must not be chunked")
            return self._read_chunks()
        if not lengths:
            return self._until_closed()
        if len(lengths) > 1 or not next(iter(lengths)).isdigit():
            raise Failed(f"Content-Length must be one number, got {sorted(lengths)}")
        return self._exactly(int(next(iter(lengths))))

    def _read_chunks(self) -> bytes:
        body = b""
        while True:
            line = self._until(b"\r\n")[:-2].split(b";")[0]
            try:
                size = int(line, 16)
            except ValueError:
                raise Failed(f"the size of a chunk is {line[:40]!r}, expected hexadecimal digits") from None
            if size == 0:
                while self._until(b"\r\n") != b"\r\n":  # trailers
                    pass
                return body
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise Failed("a chunk does not end where its size says")

    def _until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            self._more()
        return self._take(end + len(mark))

    def _exactly(self, n_bytes: int) -> bytes:
        while len(self._buffer) < n_bytes:
            self._more()
        return self._take(n_bytes)

    def _until_closed(self) -> bytes:
        body = self._take(len(self._buffer))
        try:
            while received := self._receive():
                self._answer += received
                body += received
        except TimeoutError:
            raise Failed(
                "the answer has no Content-Length, and the connection stays open: where does it end?"
            ) from None
        return body

    def _take(self, n_bytes: int) -> bytes:
        taken, self._buffer = self._buffer[:n_bytes], self._buffer[n_bytes:]
        self._answer += taken
        return taken

    def _more(self) -> None:
        try:
            received = self._receive()
        except TimeoutError:
            raise Failed(f"the server went silent for {self.timeout_s:g} s {self._so_far()}") from None
        if not received:
            raise Failed(f"the server closed the connection {self._so_far()}")
        self._buffer += received
        if len(self._buffer) > _MAX_ANSWER_BYTES:
            raise Failed(f"the answer is over {_MAX_ANSWER_BYTES} bytes")

    def _receive(self) -> bytes:
        """Return what has come, nothing when the server closed; raises TimeoutError."""
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:
            return b""

    def _so_far(self) -> str:
        self._take(len(self._buffer))
        return f"after {len(self._answer)} bytes of an answer" if self._answer else "without an answer"
