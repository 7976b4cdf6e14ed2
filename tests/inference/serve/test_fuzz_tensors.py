"""Laws of reading tensors, for any body: it is read or refused with a reason, JSON and binary say the same, and a header seen
before changes nothing."""

import json
from typing import Any

import numpy as np
import orjson
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Datatype, Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols.open_inference import Codec, Infer, InferHeader
from modelyard.inference.serve.protocols.tensors import raw_from_array
from modelyard.inference.serve.transport.messages import Head, Request
from modelyard.inference.values import bfloat16_bits

NUMBERS: tuple[Datatype, ...] = (
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "BF16", "FP32", "FP64"
)  # fmt: skip
ALL: tuple[Datatype, ...] = (*NUMBERS, "BYTES")
NAMES = ("a", "b", "é ✈")
LENGTH = b"inference-header-content-length"


class Served:
    """As much of a loaded version as reading takes."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._codec = Codec(signature)

    def codec(self, kind: Any) -> Any:
        return self._codec


def read(body: bytes, length: bytes | None, served: Served) -> Call | str:
    """Return the call, or the reason why there is none."""
    headers = {} if length is None else {LENGTH: length}
    loaded: Any = served
    try:
        return Infer().read(Request(Head("POST", "/", headers=headers), body, 0.0), loaded)
    except RequestError as exc:
        reason = str(exc)
    except RecursionError:
        reason = "nested too deeply"  # the front says so
    assert 0 < len(reason) < 2000
    return reason


def in_hand(call: Call) -> tuple[Any, ...]:
    form: InferHeader = call.form
    parts = [part if isinstance(part, list) else bytes(part) for part in call.inputs]
    return parts, call.n_rows, call.bucket, call.timeout_s, call.priority, form.outputs, form.id


@st.composite
def specs(draw: st.DrawFn, name: str) -> TensorSpec:
    rows: list[tuple[int | str, ...]] = [(), (), (3,), (1,), (2, 2), ("n",), ("n", 2), (0,)]
    row = draw(st.sampled_from(rows))
    shape = (BATCH, *row) if draw(st.integers(0, 9)) else row
    return TensorSpec(name=name, datatype=draw(st.sampled_from(ALL)), shape=shape, nullable=draw(st.booleans()))


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    outputs = (
        TensorSpec(name="y", datatype="FP32", shape=(BATCH, 2), labels=("u", "v")),
        TensorSpec(name="z", datatype="BYTES", shape=(BATCH,)),
    )
    return Signature(inputs=tuple(draw(specs(name)) for name in names), outputs=outputs)


@st.composite
def arrays(draw: st.DrawFn, spec: TensorSpec, n_rows: int, free: int) -> NDArray[Any]:
    """Return values that fit, BF16 as its bits."""
    shape = tuple(n_rows if axis == BATCH else free if isinstance(axis, str) else axis for axis in spec.shape)
    n = int(np.prod(shape, dtype=np.int64))
    if spec.datatype == "BYTES":
        texts = draw(st.lists(st.sampled_from(["", "UA", "é", "\x00", '"', "a" * 70]), min_size=n, max_size=n))
        array = np.empty(n, dtype=object)
        array[:] = texts
        return array.reshape(shape)
    values: list[Any]
    if spec.datatype in ("FP16", "FP32", "FP64", "BF16"):
        floats = st.floats(-60000, 60000, width=16 if spec.datatype in ("FP16", "BF16") else 32)
        values = draw(st.lists(floats, min_size=n, max_size=n))
        if spec.datatype == "BF16":
            return bfloat16_bits(np.array(values, dtype=np.float32)).reshape(shape)
    elif spec.datatype == "BOOL":
        values = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    else:
        info = np.iinfo(spec.numpy_dtype)
        values = draw(st.lists(st.integers(int(info.min), int(info.max)), min_size=n, max_size=n))
    return np.array(values, dtype=spec.numpy_dtype).reshape(shape)


def as_json(array: NDArray[Any], spec: TensorSpec, *, nested: bool) -> Any:
    values: NDArray[Any] = (array.astype(np.uint32) << 16).view(np.float32) if spec.datatype == "BF16" else array
    return values.tolist() if nested and values.ndim else values.reshape(-1).tolist()


@st.composite
def requests(draw: st.DrawFn) -> tuple[Signature, bytes, bytes, bytes | None]:
    """Return a signature and the same request twice: all JSON; and in binary, in parts, with the header it needs."""
    signature = draw(signatures())
    n_rows, free = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    common: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"id": "7"},
                {"parameters": {"timeout": 5000}},
                {"parameters": {"priority": 2}},
                {"outputs": [{"name": "z"}]},
            ]
        )
    )
    plain, mixed, raws = [], [], b""
    for spec in draw(st.permutations(signature.inputs)):
        array = draw(arrays(spec, n_rows, free))
        head = {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape)}
        plain.append(head | {"data": as_json(array, spec, nested=draw(st.booleans()))})
        if draw(st.integers(0, 3)):
            raw = raw_from_array(array)
            mixed.append(head | {"parameters": {"binary_data_size": len(raw)}})
            raws += raw
        else:
            mixed.append(plain[-1])
    text = json.dumps(common | {"inputs": mixed}).encode()
    length = b"%d" % len(text) if raws or draw(st.booleans()) else None
    return signature, json.dumps(common | {"inputs": plain}).encode(), text + raws, length


@given(request=requests())
def test_json_and_binary_are_read_alike(request: tuple[Signature, bytes, bytes, bytes | None]) -> None:
    signature, plain, mixed, length = request
    served = Served(signature)
    first, second, again = read(plain, None, served), read(mixed, length, served), read(mixed, length, served)
    assert isinstance(first, Call), first
    assert isinstance(second, Call), second
    assert isinstance(again, Call), again
    assert in_hand(first) == in_hand(second) == in_hand(again)
    packer = Packer(signature)
    for call in (first, second):
        joined = packer.join([call], call.n_rows)
        assert {name: array.dtype for name, array in joined.items()} == {
            s.name: s.numpy_dtype for s in signature.inputs
        }
        packer.check(call)


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, -1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 1.5, 1e308, "", "a", "BYTES", "FP32", "fp32", [], {}, [[]], [None], [-1], [2, 2],
        [2**62, 2], [True], ["1"], {"b64": ""}, [{"name": "y"}, {"name": "y"}], [{}], {"binary_data_size": -1}, {"binary_data_size": 2**70},
        {"binary_data_size": "8"}, {"binary_data_size": True}, {"shared_memory_region": "r"}, {"timeout": -1}, {"timeout": 1e300},
        {"priority": "high"}, {"priority": 2**32}, {"classification": -1}, {"classification": 2**62}, {"binary_data_output": 1},
    ]
)  # fmt: skip


@st.composite
def hostile(draw: st.DrawFn) -> tuple[Signature, bytes, bytes | None]:
    """Return a request with something wrong in it, as a rule."""
    signature, plain, mixed, length = draw(requests())
    if draw(st.booleans()):
        body = orjson.loads(plain)
        target: dict[str, Any] = draw(st.sampled_from([body, *body["inputs"]]))
        key = draw(st.sampled_from([*target, "parameters", "outputs", "id", "data", "other"]))
        if draw(st.integers(0, 4)):
            target[key] = draw(ODD)
        else:
            target.pop(key, None)
        mixed = json.dumps(body).encode()
        length = draw(st.none() | st.just(b"%d" % len(mixed)))
    elif draw(st.booleans()):
        length = draw(
            st.sampled_from([b"0", b"1", b"-1", b"", b"x", b"9" * 20, b"9" * 19, b"\xb2", b"%d" % len(mixed), b" 1"])
        )
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(mixed)))
        mixed = mixed[:place] + draw(st.binary(max_size=3)) + mixed[place + draw(st.integers(0, 3)) :]
    return signature, mixed, length


def one(datatype: Datatype, *shape: int | str) -> Signature:
    spec = TensorSpec(name="a", datatype=datatype, shape=shape)
    return Signature(inputs=(spec,), outputs=(spec,))


@given(request=hostile())
@example((one("FP32", BATCH, 1), b"[" * 1000 + b"]" * 1000, None))
@example(
    (
        one("FP32", BATCH),
        b'{"inputs":[{"name":"a","datatype":"FP32","shape":[1],"data":' + b"[" * 1000 + b"]" * 1000 + b"}]}",
        None,
    )
)
def test_whatever_is_sent_is_read_or_refused_with_a_reason(request: tuple[Signature, bytes, bytes | None]) -> None:
    signature, body, length = request
    served = Served(signature)
    call = read(body, length, served)
    if isinstance(call, Call):
        packer = Packer(signature)
        joined = packer.join([call], call.n_rows)
        for spec in signature.inputs:
            assert joined[spec.name].dtype == spec.numpy_dtype
            if spec.batched:
                assert len(joined[spec.name]) == call.n_rows


@given(first=hostile(), bodies=st.lists(hostile(), max_size=3))
def test_a_header_seen_before_changes_no_reading(
    first: tuple[Signature, bytes, bytes | None], bodies: list[tuple[Signature, bytes, bytes | None]]
) -> None:
    signature = first[0]
    known = Served(signature)
    sent = [first, *bodies]
    for _, body, length in sent:
        read(body, length, known)
        read(body + b"\x00", length, known)
    for _, body, length in sent:
        for each in (body, body + b"\x00", body[:-1]):
            fresh = read(each, length, Served(signature))
            again = read(each, length, known)
            if isinstance(fresh, Call) and isinstance(again, Call):
                assert in_hand(fresh) == in_hand(again)
            else:
                assert fresh == again


@given(data=st.binary(max_size=60), length=st.sampled_from([None, b"0", b"1", b"7"]), signature=signatures())
def test_any_bytes_are_read_or_refused(data: bytes, length: bytes | None, signature: Signature) -> None:
    read(data, length, Served(signature))
