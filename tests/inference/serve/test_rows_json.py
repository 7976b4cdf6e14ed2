"""Rows as JSON, quickly: what clients usually send is read the quick way, and what is written is what rows.py would write."""

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Datatype, Signature, TensorSpec
from modelyard.inference.rows import predictions
from modelyard.inference.serve.calls import Call, Run
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols.rows_json import QuickReader, RowWriter, tensor_rows
from modelyard.inference.values import to_values

MANY = 1000
FLIGHTS = (
    TensorSpec(name="dep_hour", datatype="INT64", shape=(BATCH,)),
    TensorSpec(name="distance", datatype="FP32", shape=(BATCH,), nullable=True),
    TensorSpec(name="carrier", datatype="BYTES", shape=(BATCH,), nullable=True, categories=("UA",)),
    TensorSpec(name="holiday", datatype="BOOL", shape=(BATCH,)),
)


def signature(inputs: Any = FLIGHTS, outputs: Any = FLIGHTS) -> Signature:
    return Signature(inputs=tuple(inputs), outputs=tuple(outputs))


def tensor(name: str, datatype: Datatype, *row: int | str, **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(BATCH, *row), **more)


def joined(call: Call | None, of: Signature) -> dict[str, NDArray[Any]]:
    assert call is not None
    return Packer(of).join([call], call.n_rows)


class TestReading:
    def test_objects_of_columns_are_read_the_quick_way(self) -> None:
        body = b"""{"instances": [{"dep_hour": 7, "distance": 1.5, "carrier": "UA", "holiday": true},
            {"holiday": false, "carrier": null, "dep_hour": 23},
            {"dep_hour": 7, "distance": null, "carrier": "Zephyr \\u2708", "holiday": true}
        ]}"""
        arrays = joined(QuickReader(signature()).instances(body, MANY), signature())
        assert arrays["dep_hour"].tolist() == [7, 23, 7]
        assert_array_equal(arrays["distance"], np.array([1.5, np.nan, np.nan], dtype=np.float32))
        assert arrays["carrier"].tolist() == ["UA", "", "Zephyr ✈"]
        assert arrays["holiday"].tolist() == [True, False, True]

    def test_a_tensor_per_row_is_read_the_quick_way(self) -> None:
        one = signature([tensor("x", "FP32", 3)])
        reader = QuickReader(one)
        assert joined(reader.instances(b'{"instances":[[1,2,3],[4,5.5,6]]}', MANY), one)["x"].tolist() == [
            [1, 2, 3],
            [4, 5.5, 6],
        ]
        assert joined(reader.columnar_row(b' {"inputs" : [1, 2, 3] }'), one)["x"].tolist() == [[1, 2, 3]]

    @pytest.mark.parametrize("datatype", ["INT8", "INT64", "UINT8", "UINT64", "FP16", "FP32", "FP64", "BOOL"])
    def test_every_datatype_of_numbers_is(self, datatype: Datatype) -> None:
        of = signature([tensor("x", datatype, 1)])
        body = b'{"inputs":[%b]}' % (b"true" if datatype == "BOOL" else b"1")
        assert joined(QuickReader(of).columnar_row(body), of)["x"].tolist() == [[1]]

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{}", b"[]", b'{"instances":[]}', b'{"instances":[{}]}', b'{"instances":{}}', b'{"instances":[1]}',
            b'{"instances":[{"dep_hour":7,"holiday":true,"other":1}]}', b'{"instances":[{"dep_hour":7.5,"holiday":true}]}',
            b'{"instances":[{"dep_hour":9223372036854775808,"holiday":true}]}', b'{"instances":[{"dep_hour":7,"holiday":1}]}',
            b'{"instances":[{"dep_hour":7,"holiday":true,"distance":1e39}]}',
            b'{"instances":[{"dep_hour":7,"holiday":true,"distance":NaN}]}',
            b'{"instances":[{"dep_hour":7,"holiday":true,"carrier":7}]}', b'{"instances":[{"dep_hour":7,"holiday":true,"carrier":"\xff"}]}',
            b'{"instances":[{"dep_hour":7,"holiday":true}],"signature_name":""}', b'{"instances":[{"dep_hour":7,"holiday":true}]',
        ],
    )  # fmt: skip
    def test_anything_else_is_left_to_the_long_way(self, body: bytes) -> None:
        reader = QuickReader(signature())
        assert reader.instances(body, MANY) is None
        assert reader.columnar_row(body) is None

    def test_more_rows_than_a_request_may_have_are_left_to_the_long_way_which_refuses_them(self) -> None:
        reader = QuickReader(signature([tensor("x", "FP32", 1)]))
        assert reader.instances(b'{"instances":[[1],[2]]}', 2) is not None
        assert reader.instances(b'{"instances":[[1],[2],[3]]}', 2) is None
        columns = QuickReader(signature([tensor("x", "FP32")]))
        assert columns.instances(b'{"instances":[{"x":1},{"x":2},{"x":3}]}', 2) is None

    @pytest.mark.parametrize("name", ['say "x"', "back\\slash", "new\nline", "b64"])
    def test_a_column_may_have_any_name(self, name: str) -> None:
        """The decoder does not take all of them; the long way does."""
        of = signature([tensor(name, "FP32")])
        body = json.dumps({"instances": [{name: 1}]}).encode()
        assert QuickReader(of).instances(body, MANY) is None


def answered(arrays: dict[str, NDArray[Any]], n_rows: int) -> Call:
    call = Call((), n_rows)
    call.run = Run(arrays, n_rows, 1, "instance free", 0.0, 0.0)
    return call


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Signature, dict[str, NDArray[Any]], int]:
    n_rows = draw(st.integers(1, 4))
    specs: list[TensorSpec] = []
    arrays: dict[str, NDArray[Any]] = {}
    for name in draw(st.lists(st.sampled_from(["y", "100%s", 'say "y"', "é"]), min_size=1, max_size=3, unique=True)):
        kind = draw(st.sampled_from(["scores", "label", "texts", "tensor", "number", "one", "whole"]))
        floats = st.floats(width=32)
        if kind == "scores":
            labels = draw(st.sampled_from([("no", "yes"), (0, 1), ("50%", 'a"b')]))
            specs.append(tensor(name, "FP32", 2, labels=labels))
            values = draw(st.lists(floats, min_size=2 * n_rows, max_size=2 * n_rows))
            arrays[name] = np.array(values, dtype=np.float32).reshape(n_rows, 2)
        elif kind in ("label", "texts"):
            shape: tuple[int, ...] = (n_rows,) if kind == "label" else (n_rows, 2)
            specs.append(tensor(name, "BYTES", *shape[1:], nullable=draw(st.booleans())))
            array = np.empty(shape, dtype=object)
            array[...] = np.array(
                draw(st.lists(st.text(max_size=3), min_size=array.size, max_size=array.size)), dtype=object
            ).reshape(shape)
            arrays[name] = array
        elif kind == "tensor":
            specs.append(tensor(name, "FP64", 2, 2))
            arrays[name] = np.array(draw(st.lists(st.floats(), min_size=4 * n_rows, max_size=4 * n_rows))).reshape(
                n_rows, 2, 2
            )
        elif kind == "whole":
            specs.append(TensorSpec(name=name, datatype="FP32", shape=(2, 2)))
            arrays[name] = np.array(draw(st.lists(floats, min_size=4, max_size=4)), dtype=np.float32).reshape(2, 2)
        else:
            shape = (n_rows,) if kind == "number" else (n_rows, 1)
            specs.append(tensor(name, "INT64", *shape[1:]))
            arrays[name] = np.array(
                draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n_rows, max_size=n_rows))
            ).reshape(shape)
    if not any(spec.batched for spec in specs):
        n_rows = 1
    return Signature(inputs=FLIGHTS, outputs=tuple(specs)), arrays, n_rows


class TestWriting:
    @given(outputs())
    def test_rows_are_written_as_rows_py_would(self, case: tuple[Signature, dict[str, NDArray[Any]], int]) -> None:
        of, arrays, n_rows = case
        texts = RowWriter(of).predictions(answered(arrays, n_rows))
        expected = predictions(arrays, of)
        assert [orjson.loads(text) for text in texts] == orjson.loads(orjson.dumps(expected))

    @given(outputs())
    def test_tensors_are_written_as_lists_of_rows(self, case: tuple[Signature, dict[str, NDArray[Any]], int]) -> None:
        of, arrays, n_rows = case
        for one in (False, True):
            if one and n_rows > 1:
                continue
            written = RowWriter(of).tensors(answered(arrays, n_rows), one=one)
            for spec, text in zip(of.outputs, written, strict=True):
                plain = to_values(arrays[spec.name])
                assert orjson.loads(text) == (plain[0] if one and spec.batched else plain)

    def test_calls_of_one_run_share_what_was_written(self) -> None:
        of = signature(outputs=[tensor("y", "FP32", 2, labels=("no", "yes"))])
        run = Run(
            {"y": np.array([[0.25, 0.75], [1, 0], [0.5, 0.5]], dtype=np.float32)}, 3, 2, "instance free", 0.0, 0.0
        )
        writer = RowWriter(of)
        calls = [Call((), 1), Call((), 2)]
        calls[0].run = calls[1].run = run
        calls[1].first_row = 1
        assert [list(writer.predictions(call)) for call in calls] == [
            [b'{"no":0.25,"yes":0.75}'],
            [b'{"no":1.0,"yes":0.0}', b'{"no":0.5,"yes":0.5}'],
        ]
        assert len(run.scratch) == 1

    def test_no_number_is_null(self) -> None:
        array = np.array([[np.nan, np.inf, -np.inf, 0.1]], dtype=np.float32)
        assert tensor_rows(array, tensor("y", "FP32", 4)) == [b"[null,null,null,0.1]"]
        assert tensor_rows(array[0], tensor("y", "FP32")) == [b"null", b"null", b"null", b"0.1"]

    def test_bf16_is_written_as_the_numbers_behind_its_bits(self) -> None:
        assert tensor_rows(np.array([0x3F80, 0x4049], dtype=np.uint16), tensor("y", "BF16")) == [b"1.0", b"3.140625"]
