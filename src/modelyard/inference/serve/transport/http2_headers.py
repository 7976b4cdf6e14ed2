"""Header blocks of HTTP/2: what a request's block leads to, remembered by its bytes, and the fields of answers.

A client sends the same block again and again, mostly references into a table that both sides keep. A block that leaves the
table as it was has the same meaning until the table changes, so it is looked up instead of decoded. Blocks that differ, by a
trace's id, say, are decoded here with the tables of `hpack`, in a seventh of the time that its own decoder takes.

https://www.rfc-editor.org/rfc/rfc7541
"""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from modelyard.errors import MissingExtra
from modelyard.inference.serve.transport.http2_frames import ConnectionFault, ErrorCode, StreamFault
from modelyard.inference.serve.transport.messages import Head

try:
    from hpack.exceptions import HPACKDecodingError
    from hpack.huffman_table import decode_huffman
    from hpack.table import HeaderTable
except ImportError as exc:
    raise MissingExtra("hpack", "grpc", "serving gRPC") from exc

T = TypeVar("T")

_MAX_KNOWN, _MAX_KNOWN_BYTES = 128, 2048
_FIELD_BYTES = 32  # what HTTP/2 counts for each field beside its name and value
_STATIC = HeaderTable.STATIC_TABLE
_N_STATIC = len(_STATIC)
Field = tuple[bytes, bytes]
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


class HeaderReader(Generic[T]):
    """Reads the header blocks of one connection, which have to come in order."""

    def __init__(self, prepare: Callable[[Head], T], max_header_bytes: int) -> None:
        """`prepare` is called once for each distinct block and must not raise."""
        self._prepare = prepare
        self._max_header_bytes = max_header_bytes
        self._max_decoded_bytes = 2 * max_header_bytes
        self._table = HeaderTable()
        self._changed = False
        self._known: dict[bytes, tuple[T, int]] = {}

    def request(self, block: bytes) -> tuple[T, int]:
        """Return what `prepare` makes of a request's headers, and their content-length, -1 where they have none.

        Raises:
            StreamFault: the request is malformed, or has more headers than it may.
            ConnectionFault: as in `fields`.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        fields = self.fields(block)
        if sum(len(name) + len(value) + _FIELD_BYTES for name, value in fields) > self._max_header_bytes:
            raise StreamFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {self._max_header_bytes} bytes of headers")
        head = request_head(fields)
        length = head.headers.get(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 18):
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, f"content-length {length[:40]!r}")
        made = self._prepare(head), -1 if length is None else int(length)
        if not self._changed and len(block) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[block] = made
        return made

    def fields(self, block: bytes) -> list[Field]:
        """Return the headers or trailers in a block.

        Raises:
            ConnectionFault: they cannot be decoded, which leaves a table that nobody knows, or are far too many.
        """
        self._changed = False
        try:
            fields = self._decoded(block)
        except (IndexError, HPACKDecodingError) as exc:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"a header block that cannot be decoded: {exc}") from exc
        if self._changed:
            self._known.clear()
        return fields

    def _decoded(self, block: bytes) -> list[Field]:
        """Return the fields of a block and keep the table; raises IndexError where it ends early or refers to nothing."""
        table = self._table
        entries = table.dynamic_entries
        fields: list[Field] = []
        left = self._max_decoded_bytes
        at, end = 0, len(block)
        while at < end:
            first = block[at]
            if first & 0x80:  # an entry of the table
                index, at = _integer(block, at, 0x7F)
                field = _STATIC[index - 1] if 0 < index <= _N_STATIC else entries[_dynamic(index)]
            elif first & 0x60 == 0x20:  # a new size of the table
                size, at = _integer(block, at, 0x1F)
                if fields or size > HeaderTable.DEFAULT_SIZE:
                    raise IndexError("a size of the table that it may not have, or behind a field")
                table.maxsize = size
                self._changed = True
                continue
            else:  # a value, and a name or an entry that has it
                kept = first & 0x40
                index, at = _integer(block, at, 0x3F if kept else 0x0F)
                if index == 0:
                    name, at = _text(block, at)
                else:
                    name = (_STATIC[index - 1] if index <= _N_STATIC else entries[_dynamic(index)])[0]
                value, at = _text(block, at)
                field = (name, value)
                if kept:
                    table.add(name, value)
                    self._changed = True
            left -= len(field[0]) + len(field[1]) + _FIELD_BYTES
            if left < 0:
                raise ConnectionFault(
                    ErrorCode.ENHANCE_YOUR_CALM, f"more than {self._max_decoded_bytes} bytes of headers"
                )
            fields.append(field)
        return fields


def _dynamic(index: int) -> int:
    """Return where in the dynamic table an entry is; raises IndexError for 0, which is none."""
    if index == 0:
        raise IndexError("entry 0 of the table")
    return index - _N_STATIC - 1


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Return the number in the lower bits of a byte, or behind it where they are all set, and where it ends (section 5.1)."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 28:
            raise IndexError("a number without end")


def _text(block: bytes, at: int) -> tuple[bytes, int]:
    """Return the string at a place, and where it ends (section 5.2)."""
    huffman = block[at] & 0x80
    size, at = _integer(block, at, 0x7F)
    end = at + size
    if end > len(block):
        raise IndexError("a string longer than the block")
    text = block[at:end]
    return (decode_huffman(text) if huffman else text), end


def request_head(fields: Iterable[Field]) -> Head:
    """Return a request's headers, checked (RFC 9113, section 8); repeated ones are joined with commas.

    Raises:
        StreamFault: they are malformed.
    """
    pseudo: dict[bytes, bytes] = {}
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name.startswith(b":"):
            if headers or name in pseudo or name not in _PSEUDO:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, f"pseudo-header {name[:40]!r}")
            pseudo[name] = value
        elif not name or name in _OF_CONNECTIONS or name != name.lower() or (name == b"te" and value != b"trailers"):
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, f"header {name[:40]!r}")
        elif name in headers:
            headers[name] += b"," + value
        else:
            headers[name] = value
    if not pseudo.get(b":method") or not pseudo.get(b":path") or not pseudo.get(b":scheme"):
        raise StreamFault(ErrorCode.PROTOCOL_ERROR, ":method, :scheme and :path are required")
    if b":authority" in pseudo:
        headers.setdefault(b"host", pseudo[b":authority"])
    path, _, query = pseudo[b":path"].decode("latin-1").partition("?")
    return Head(pseudo[b":method"].decode("latin-1"), path, query, headers)


def are_trailers(fields: Iterable[Field]) -> bool:
    """Whether fields may stand behind a body."""
    return not any(name.startswith(b":") or name != name.lower() for name, _ in fields)


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header field for an answer, as HPACK writes one that leaves the client's table alone."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    """Return a string as HPACK writes it without Huffman coding (section 5)."""
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    size -= 127
    head = bytearray((127,))
    while size >= 128:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + text
