"""Compressed bodies are unpacked whole and within bounds, or refused with the reason."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import BodyTooLarge, RequestError, UnsupportedEncoding
from modelyard.inference.serve.transport.compression import accepted_coding, compressed, decompressed

CODINGS = [b"gzip", b"deflate"]
LIMIT = 1000


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@given(data=st.binary(max_size=LIMIT), coding=st.sampled_from(CODINGS))
def test_what_was_compressed_comes_back(data: bytes, coding: bytes) -> None:
    assert decompressed(compressed(data, coding), coding, LIMIT) == data


@given(data=st.binary(max_size=LIMIT))
def test_deflate_may_come_with_and_without_its_header_and_gzip_under_its_old_name(data: bytes) -> None:
    assert decompressed(zlib.compress(data), b"deflate", LIMIT) == data
    assert decompressed(raw_deflate(data), b" Deflate ", LIMIT) == data
    assert decompressed(gzip.compress(data), b"x-gzip", LIMIT) == data
    assert decompressed(data, b"identity", LIMIT) == data


@given(
    data=st.binary(max_size=200),
    coding=st.sampled_from([*CODINGS, b"br", b"gzip, gzip", b"\xff"]),
    n_cut=st.integers(0, 20),
)
def test_any_bytes_are_unpacked_or_refused(data: bytes, coding: bytes, n_cut: int) -> None:
    for sent in (data, gzip.compress(data)[: max(0, 30 - n_cut)], zlib.compress(data) + data[:n_cut]):
        try:
            plain = decompressed(sent, coding, LIMIT)
        except RequestError:
            continue
        assert len(plain) <= LIMIT


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_refused_before_it_has_gone_off(coding: bytes) -> None:
    assert decompressed(compressed(bytes(LIMIT), coding), coding, LIMIT) == bytes(LIMIT)
    for n_bytes in (LIMIT + 1, 50_000_000):
        with pytest.raises(BodyTooLarge, match="unpacks to more than 1000 bytes"):
            decompressed(compressed(bytes(n_bytes), coding), coding, LIMIT)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_body_cut_off_followed_by_something_or_damaged_is_refused(coding: bytes) -> None:
    packed = compressed(b"some text" * 20, coding)
    for sent, message in (
        (packed[:-1], "ends early"),
        (b"", "ends early"),
        (packed + b"more", "4 bytes follow"),
        (b"\x78\x9c\xff\xff\xff", "is not"),
    ):
        with pytest.raises(RequestError, match=message):
            decompressed(sent, coding, LIMIT)


def test_an_unknown_coding_is_415_and_says_which_are_taken() -> None:
    with pytest.raises(UnsupportedEncoding, match="use gzip, deflate or identity") as caught:
        decompressed(b"x", b"br", LIMIT)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (b"gzip", b"gzip"), (b"deflate", b"deflate"), (b"deflate, GZIP", b"gzip"), (b"br, deflate;q=0.5", b"deflate"), (b"br", b""),
        (b"gzip;q=0, deflate", b"deflate"), (b"gzip; q=0.0", b""), (b"", b""), (b"identity", b""), (b",;,q=", b""), (b"\xff", b""),
    ],
)  # fmt: skip
def test_the_answer_is_coded_as_the_client_accepts_it(accept: bytes, coding: bytes) -> None:
    assert accepted_coding(accept) == coding
