"""Compressed bodies: gzip, and "deflate", which in HTTP means the zlib format. Unpacking is bounded before it begins."""

import gzip
import zlib

from modelyard.errors import BodyTooLarge, RequestError, UnsupportedEncoding

_AUTO_DETECT = 32 + zlib.MAX_WBITS  # gzip or zlib, by the header of the data
_RAW = -zlib.MAX_WBITS
_LEVEL = 1  # answers are compressed on the event loop; the first level gains most of what there is to gain


def decompressed(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """Return `body` unpacked, for one Content-Encoding.

    Raises:
        UnsupportedEncoding: not gzip, deflate or identity.
        BodyTooLarge: it unpacks to more than `max_bytes`.
        RequestError: it is not what it says, or ends early.
    """
    name = encoding.strip().lower()
    if name in (b"identity", b""):
        return body
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        raise UnsupportedEncoding(
            f"Content-Encoding {encoding.decode('latin-1')!r:.60} is not taken; use gzip, deflate or identity"
        )
    # Some clients send deflate without the zlib header, which the first byte tells: 8 in its low half means there is one.
    raw = name == b"deflate" and body[:1] and body[0] & 0x0F != 8
    unpack = zlib.decompressobj(_RAW if raw else _AUTO_DETECT)
    try:
        plain = unpack.decompress(body, max_bytes + 1)
    except zlib.error as exc:
        raise RequestError(
            f"the body is not {name.decode()}, as its Content-Encoding says: {exc}; compress it whole, or send it as it is"
        ) from exc
    if len(plain) > max_bytes:
        raise BodyTooLarge(
            f"the body unpacks to more than {max_bytes} bytes; split the request, or start with a larger --max-body-bytes"
        )
    if not unpack.eof:
        raise RequestError(f"the {name.decode()} body ends early; send all of it")
    if unpack.unused_data:
        raise RequestError(
            f"{len(unpack.unused_data)} bytes follow the {name.decode()} body; send one compressed stream"
        )
    return plain


def accepted_coding(accept: bytes) -> bytes:
    """Return the coding of those in an Accept-Encoding header that is used here, b"" for none."""
    wanted = {}
    for part in accept.lower().split(b","):
        name, _, parameters = part.partition(b";")
        quality = parameters.strip().removeprefix(b"q=").strip()
        wanted[name.strip()] = quality not in (b"0", b"0.0", b"0.00", b"0.000")
    for coding in (b"gzip", b"deflate"):
        if wanted.get(coding, False):
            return coding
    return b""


def compressed(body: bytes, coding: bytes) -> bytes:
    """Return `body` in `coding`, gzip or deflate."""
    return gzip.compress(body, _LEVEL, mtime=0) if coding == b"gzip" else zlib.compress(body, _LEVEL)
