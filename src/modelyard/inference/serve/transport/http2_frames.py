"""HTTP/2 as it is written: frame types, flags, settings, error codes, and the frames that are always built the same way.

https://www.rfc-editor.org/rfc/rfc9113
"""

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(1, 7)

FRAME = struct.Struct(">BHBBI")
"""The head of a frame: upper and lower part of the length, type, flags, stream."""
FRAME_HEAD_BYTES = FRAME.size
SETTING = struct.Struct(">HI")
MAX_FRAME_BYTES = 16_384
"""What every endpoint takes."""
DEFAULT_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1


class ErrorCode(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionFault(Exception):
    """The client broke the protocol in a way that leaves nothing to go on with."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class StreamFault(Exception):
    """The client broke the protocol on one stream; the others go on."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def settings(*values: tuple[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    payload = b"".join([SETTING.pack(*pair) for pair in values])
    return FRAME.pack(0, len(payload), SETTINGS, 0, 0) + payload


def ping(payload: bytes, *, ack: bool = False) -> bytes:
    """Return a PING frame; the payload has 8 bytes."""
    return FRAME.pack(0, 8, PING, ACK if ack else 0, 0) + payload


def window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame; stream 0 is the connection."""
    return FRAME.pack(0, 4, WINDOW_UPDATE, 0, stream_id) + increment.to_bytes(4, "big")


def rst_stream(stream_id: int, code: ErrorCode) -> bytes:
    """Return a RST_STREAM frame."""
    return FRAME.pack(0, 4, RST_STREAM, 0, stream_id) + code.to_bytes(4, "big")


def goaway(last_id: int, code: ErrorCode, reason: str) -> bytes:
    """Return a GOAWAY frame: streams up to `last_id` are or have been answered."""
    text = reason.encode("utf-8", "replace")[:200]
    return FRAME.pack(0, 8 + len(text), GOAWAY, 0, 0) + struct.pack(">II", last_id, code) + text


def without_padding(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Return where the content of a padded frame begins and ends in `data`; raises ConnectionFault."""
    if start == end:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "padding is announced and not there")
    start, end = start + 1, end - data[start]
    if start > end:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
    return start, end
