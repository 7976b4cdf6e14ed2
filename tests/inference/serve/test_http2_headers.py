"""Header blocks: decoded as the public decoder of `hpack` does, and remembered without changing what they mean."""

from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.inference.serve.transport.http2_frames import ConnectionFault, ErrorCode, StreamFault
from modelyard.inference.serve.transport.http2_headers import HeaderReader, literal
from modelyard.inference.serve.transport.messages import Head

names = st.sampled_from([b":path", b"content-type", b"x", b"x-trace", b"grpc-timeout"]) | st.binary(
    min_size=1, max_size=30
)
values = st.sampled_from([b"", b"/", b"application/grpc", b"5S"]) | st.binary(max_size=200)
fields = st.lists(st.tuples(names, values), max_size=12)


def reader(max_header_bytes: int = 2**15) -> HeaderReader[Head]:
    return HeaderReader(lambda head: head, max_header_bytes)


@given(st.lists(st.tuples(fields, st.booleans(), st.none() | st.integers(0, 4096)), max_size=6))
def test_law_blocks_are_decoded_as_they_were_encoded(
    blocks: list[tuple[list[tuple[bytes, bytes]], bool, int | None]],
) -> None:
    """With entries of the table that come, are used and go, whatever the encoder chooses."""
    encoder, decoder = hpack.Encoder(), reader()
    for sent, huffman, table_size in blocks:
        if table_size is not None:
            encoder.header_table_size = table_size
        assert decoder.fields(encoder.encode(sent, huffman=huffman)) == sent


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_law_any_bytes_are_decoded_as_hpack_does(blocks: list[bytes]) -> None:
    ours, theirs = reader(), hpack.Decoder()
    for block in blocks:
        try:
            expected: Any = [tuple(pair) for pair in theirs.decode(block, raw=True)]
        except hpack.HPACKError:
            expected = None
        try:
            got: Any = ours.fields(block)
        except ConnectionFault:
            got = None
        assert got == expected
        if expected is None:
            return


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_law_a_remembered_block_means_what_it_means_now(before: list[int], after: list[int]) -> None:
    """Blocks are the same bytes; what they refer to changes with the table."""
    encoder, decoder = hpack.Encoder(), reader()
    for i in (*before, *after):
        sent = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b"x-%d" % i, b"v" * (i * 500))]
        for _ in range(2):
            head, _ = decoder.request(encoder.encode(sent))
            assert head.headers == {sent[3][0]: sent[3][1]}


def test_a_block_that_changes_nothing_is_decoded_once() -> None:
    encoder, decoder = hpack.Encoder(), reader()
    sent = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b"content-length", b"7")]
    first, second, third = (decoder.request(encoder.encode(sent)) for _ in range(3))
    assert first[0] is not second[0]
    assert second is third
    assert third[1] == 7


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # entry 0
        b"\xbe",  # an entry that is not there
        b"\x7f\xff\xff\xff\xff\xff\x7f",  # a number without end
        b"\x00\x05ab",  # a string longer than the block
        b"\x00\x81\x00\x00",  # Huffman code that stops within a letter
        b"\x82\x20",  # a new size of the table behind a field
        b"\x3f\xe2\x1f",  # a table of 4097 bytes
    ],
)
def test_what_cannot_be_decoded(block: bytes) -> None:
    with pytest.raises(ConnectionFault) as caught:
        reader().fields(block)
    assert caught.value.code == ErrorCode.COMPRESSION_ERROR


def test_headers_are_bounded_after_decoding() -> None:
    encoder = hpack.Encoder()
    decoder = reader(1000)
    sent = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b"x", b"a" * 900)]
    with pytest.raises(StreamFault):  # this request alone: the table is known
        decoder.request(encoder.encode(sent))
    with pytest.raises(ConnectionFault) as caught:  # too much to decode for a request that will be refused
        decoder.request(encoder.encode([*sent, (b"y", b"b" * 900), (b"z", b"c" * 900)]))
    assert caught.value.code == ErrorCode.ENHANCE_YOUR_CALM


@given(st.binary(min_size=1, max_size=20), st.binary(max_size=400))
def test_law_a_literal_field_is_read_as_it_was_written(name: bytes, value: bytes) -> None:
    assert hpack.Decoder().decode(literal(name, value), raw=True) == [(name, value)]
