"""The most important law of the row protocols: the quick way of reading a body and the long way never disagree.

Quick is what decodes straight into the signature's types; long is rows.py, which takes every form and explains refusals. For
any body the quick way says the same as the long way, or leaves it to it.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from modelyard.bundle.manifest import BATCH, Datatype, Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.protocols.tensorflow import Codec, Predict

NUMBERS = (
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64"
)  # fmt: skip
ALL: tuple[Datatype, ...] = (*NUMBERS, "BF16", "BYTES")  # type: ignore[assignment]  # they are datatypes

EDGES = [
    -0.0, 0.5, 65504, 65519.999, 65520, 3.4028235e38, 3.4028234663852886e38, 3.4028235677973366e38,
    1.7976931348623157e308, 5e-324, 1e-46, 0.1, 1 / 3, 2**24 + 1, 2**53 + 1,
]  # fmt: skip
ODD = [
    "-0", "1.0", "7.0", "1e2", "1E+2", "100e-2", "1e400", "-1e400", "1e-400", "1" * 25, "1" * 400, "0.1" + "0" * 400 + "1", "01", "+1",
    ".5", "5.", "1_0", "NaN", "-Infinity", "nan", "9007199254740993.0", "1e19", "18446744073709551616", "-9223372036854775809",
    "2147483648.0", "255.5", "true", "false", "null", '""', '"1"', '"NaN"', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"\x00"',
    '"Zephyr ✈"', '{"b64":"YWJj"}', '{"b64":"é"}', '{"b64":1}', "[]", "{}", "[1]", "[[1]]", "[null]", "[1,2]",
]  # fmt: skip


def number_texts() -> st.SearchStrategy[str]:
    limits = [sign * (2**bits + d) for bits in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, 0, 1) for sign in (1, -1)]
    whole = st.integers(-(2**70), 2**70) | st.sampled_from(limits)
    small = st.integers(-130, 300)
    floats = st.floats(allow_nan=False, allow_infinity=False) | st.floats(
        width=16, allow_nan=False, allow_infinity=False
    )
    return st.one_of(
        small.map(str), small.map(str), whole.map(str), floats.map(repr), st.sampled_from(EDGES).map(repr),
        st.sampled_from(EDGES).map(lambda value: repr(-value)), floats.map("{:.30g}".format),
    )  # fmt: skip


VALUES = st.one_of(number_texts(), number_texts(), st.sampled_from(ODD))
GAPS = st.sampled_from(["", "", "", " ", "\n\t "])
MAX_ROWS = 3
NAMES = ("a", "b", "émile", 'say "x"', "100%s", "b64", "instances", "c0")


@st.composite
def column_specs(draw: st.DrawFn, name: str) -> TensorSpec:
    datatype: Datatype = draw(st.sampled_from(ALL))
    return TensorSpec(name=name, datatype=datatype, shape=(BATCH,), nullable=draw(st.booleans()))


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    """Return what most models take: columns, or one tensor per row; and now and then something else."""
    if draw(st.integers(0, 2)):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        inputs = tuple(draw(column_specs(name)) for name in names)
    else:
        row: tuple[int | str, ...] = draw(st.sampled_from([(3,), (1,), (0,), ("n",), (2, 1), (2, 2), ()]))
        datatype: Datatype = draw(st.sampled_from(ALL))
        inputs = (TensorSpec(name="x", datatype=datatype, shape=(BATCH, *row), nullable=draw(st.booleans())),)
    return Signature(inputs=inputs, outputs=(TensorSpec(name="y", datatype="FP32", shape=(BATCH,)),))


@st.composite
def lists(draw: st.DrawFn, items: st.SearchStrategy[str], n_items: int) -> str:
    gap = draw(GAPS)
    n_items += draw(st.sampled_from([0] * 12 + [1, -1]))
    return "[" + gap + ("," + gap).join(draw(items) for _ in range(n_items)) + gap + "]"


def tensors(shape: tuple[int | str, ...], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    if not shape:
        return values
    size = shape[0] if isinstance(shape[0], int) else 2
    return lists(tensors(shape[1:], values), size)


@st.composite
def fitting(draw: st.DrawFn, spec: TensorSpec) -> str:
    """Return a value that most probably fits the column."""
    if spec.nullable and not draw(st.integers(0, 4)):
        return "null"
    if spec.datatype == "BYTES":
        return draw(st.sampled_from(['"UA"', '""', '"\\u00e9 \\"x\\""', '"✈"']))
    if spec.datatype == "BOOL":
        return draw(st.sampled_from(["true", "false"]))
    return draw(st.one_of(st.integers(0, 127).map(str), number_texts() if spec.datatype[0] in "FB" else st.just("7.0")))


@st.composite
def row_objects(draw: st.DrawFn, signature: Signature) -> str:
    gap = draw(GAPS)
    keys = []
    for spec in draw(st.permutations(signature.inputs)):
        if draw(st.integers(0, 15)):
            keys.append(spec)
        if not draw(st.integers(0, 15)):
            keys.append(spec)  # given twice
    pairs = []
    for spec in keys:
        value = draw(fitting(spec)) if draw(st.integers(0, 7)) else draw(VALUES)
        name = draw(st.sampled_from([spec.name] * 15 + ["other"]))
        text = "".join(f"\\u{ord(c):04x}" for c in name) if not draw(st.integers(0, 9)) else name.replace('"', '\\"')
        pairs.append(f'"{text}"{gap}:{gap}{value}')
    return "{" + gap + ",".join(pairs) + gap + "}"


@st.composite
def bodies(draw: st.DrawFn, signature: Signature) -> bytes:
    gap = draw(GAPS)
    n_rows = draw(st.integers(0, 4))
    spec = signature.inputs[0]
    usual = draw(st.integers(0, 5))
    value = fitting(spec) if usual else VALUES
    bare = len(signature.inputs) == 1 and draw(st.booleans())
    row = tensors(spec.row_shape, value) if bare else row_objects(signature)
    if draw(st.booleans()):
        key, content = "instances", draw(lists(row, n_rows))
    else:
        key, content = "inputs", draw(row)
    more = draw(
        st.sampled_from(
            [""] * 8 + [',"signature_name":"serving_default"', ',"other":1', f',"{key}":[]', "]", "}", "\x00"]
        )
    )
    text = f'{gap}{{{gap}"{key}"{gap}:{gap}{content}{gap}{more}}}{gap}'
    data = text.encode("utf-8", "surrogatepass")
    if not draw(st.integers(0, 9)):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=2)) + data[place + draw(st.integers(0, 2)) :]
    return data


@st.composite
def cases(draw: st.DrawFn) -> tuple[Signature, bytes]:
    signature = draw(signatures())
    return signature, draw(bodies(signature))


class Served:
    """As much of a loaded version as reading takes."""

    name = "m"
    max_rows = MAX_ROWS

    def __init__(self, codec: Codec) -> None:
        self.signature = codec.signature
        self._codec = codec

    def codec(self, kind: Any) -> Codec:
        return self._codec


def loaded_of(codec: Codec) -> Any:
    return Served(codec)


def quick(body: bytes, codec: Codec) -> Call | None:
    """Return what the quick way makes of a body, as `Predict.read` has it."""
    start = body.find(b'"', 0, 64)
    if body.startswith(b'"inputs"', start):
        return codec.quick.columnar_row(body)
    return codec.quick.instances(body, MAX_ROWS) if body.startswith(b'"instances"', start) else None


def in_hand(call: Call) -> list[Any]:
    return [part if isinstance(part, list) else bytes(part) for part in call.inputs]


def one(datatype: Datatype, *row: int | str, nullable: bool = False) -> Signature:
    spec = TensorSpec(name="x", datatype=datatype, shape=(BATCH, *row), nullable=nullable)
    return Signature(inputs=(spec,), outputs=(spec,))


@given(case=cases())
@example((one("FP32", 2), b'{"inputs": [1, 2], "inputs": [3, 4]}'))
@example((one("INT8", 1), b'{"inputs": [1.0]}'))
@example((one("FP64"), b'{"instances": [{"x": 9007199254740993}]}'))
@example((one("BYTES", nullable=True), b'{"instances": [{"x": null}, {}]}'))
@example((one("BYTES"), b'{"instances": [{"x": "\xff"}]}'))
def test_quick_and_long_never_disagree(case: tuple[Signature, bytes]) -> None:
    signature, body = case
    codec = Codec(signature)
    call = quick(body, codec)
    if call is None:
        event("left to the long way")
        return
    event("quick")
    try:
        slow = Predict()._read_any(body, loaded_of(codec))
    except RequestError as exc:
        pytest.fail(f"quick takes what long refuses: {exc}")
    assert in_hand(call) == in_hand(slow)
    assert (call.n_rows, call.bucket) == (slow.n_rows, slow.bucket)
    assert slow.form == (
        "one row" if body.find(b'"inputs"') in range(64) and b'"instances"' not in body[:64] else "rows"
    )


@given(case=cases())
@example((one("BYTES"), '{"instances": [{"b64": "é"}]}'.encode()))
@example((one("FP32", 1), b'{"instances": ' + b"[" * 900 + b"]" * 900 + b"}"))
@example((one("FP32", 1), b'{"instances": [' + b'{"x":' * 900 + b"1" + b"}" * 900 + b"]}"))
def test_whatever_is_sent_is_read_or_refused_with_a_reason(case: tuple[Signature, bytes]) -> None:
    signature, body = case
    codec = Codec(signature)
    try:
        call = Predict()._read_any(body, loaded_of(codec))
    except RecursionError:
        return  # nested too deeply; the front makes that a refusal
    except RequestError as exc:
        reason = str(exc)
    else:
        check(call, codec)
        return
    assert 0 < len(reason) < 2000


def check(call: Call, codec: Codec) -> None:
    """What was read fits the signature."""
    signature = codec.signature
    joined = codec.packer.join([call], call.n_rows)
    for spec in signature.inputs:
        array = joined[spec.name]
        assert array.dtype == spec.numpy_dtype
        assert len(array) == call.n_rows
        if not spec.nullable and spec.datatype in ("FP16", "FP32", "FP64"):
            assert np.isfinite(array).all()
        if spec.datatype in ("FP16", "FP32", "FP64"):
            assert not np.isinf(array).any()


@pytest.mark.parametrize(("datatype", "text"), [("FP32", b"3.4028235e38"), ("FP16", b"65519.99")])
def test_the_largest_float_as_it_is_usually_written_is_read_either_way(datatype: Datatype, text: bytes) -> None:
    """JSON has the shortest decimals that round to a float, and those of the largest lie above it."""
    for signature, body in (
        (one(datatype, 1), b'{"inputs": [%b]}' % text),
        (one(datatype), b'{"instances": [{"x": %b}]}' % text),
    ):
        codec = Codec(signature)
        call = quick(body, codec)
        assert call is not None
        assert in_hand(call) == in_hand(Predict()._read_any(body, loaded_of(codec)))
