"""A batch is its calls' rows, one behind the other; packing and joining lose nothing, whatever the datatype."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Datatype, Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.serve.packing import Packer, value_packer
from modelyard.inference.values import bfloat16_bits

NUMBERS: tuple[Datatype, ...] = (
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "BF16", "FP32", "FP64"
)  # fmt: skip


def taking(*inputs: TensorSpec) -> Packer:
    return Packer(Signature(inputs=inputs, outputs=inputs))


def column(name: str, datatype: Datatype, *row: int | str, nullable: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(BATCH, *row), nullable=nullable)


def texts(*values: str) -> NDArray[Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@st.composite
def rows_of(draw: st.DrawFn, spec: TensorSpec, n_rows: int) -> NDArray[Any]:
    shape = (n_rows, *[axis if isinstance(axis, int) else 2 for axis in spec.row_shape])
    if spec.datatype == "BYTES":
        values = draw(st.lists(st.text(max_size=3), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        return texts(*values).reshape(shape)
    raw = draw(st.binary(min_size=int(np.prod(shape)) * spec.numpy_dtype.itemsize, max_size=4096))
    array: NDArray[Any] = np.frombuffer(raw, dtype=spec.numpy_dtype, count=int(np.prod(shape))).reshape(shape)
    return array.astype(np.uint8).astype(np.bool_) if spec.datatype == "BOOL" else array


@given(data=st.data(), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), n_padding=st.integers(0, 3))
def test_joined_are_the_rows_of_all_calls_in_order_and_the_last_again_where_it_is_padded(
    data: st.DataObject, sizes: list[int], n_padding: int
) -> None:
    rows: list[tuple[int | str, ...]] = [(), (2,), (2, 1), ("n",)]
    specs = [
        column(f"c{i}", data.draw(st.sampled_from((*NUMBERS, "BYTES"))), *data.draw(st.sampled_from(rows)))
        for i in range(data.draw(st.integers(1, 3)))
    ]
    packer = taking(*specs)
    arrays = [{spec.name: data.draw(rows_of(spec, n_rows)) for spec in specs} for n_rows in sizes]
    calls = [packer.pack(of_one, n_rows) for of_one, n_rows in zip(arrays, sizes, strict=True)]
    assert len({call.bucket for call in calls}) == 1
    n_rows = sum(sizes)
    joined = packer.join(calls, n_rows, n_rows + n_padding)
    for spec in specs:
        array = joined[spec.name]
        assert array.dtype == spec.numpy_dtype
        assert len(array) == n_rows + n_padding
        whole = np.concatenate([of_one[spec.name] for of_one in arrays])
        padded = np.concatenate([whole, *[whole[-1:]] * n_padding])
        if spec.datatype == "BYTES":
            assert_array_equal(array, padded)
        else:
            assert array.tobytes() == padded.tobytes()  # to the bit, NaN too


@pytest.mark.parametrize("datatype", [datatype for datatype in NUMBERS if datatype not in ("BF16", "BOOL")])
def test_binary_tensors_go_in_as_they_are(datatype: Datatype) -> None:
    packer = taking(column("x", datatype, 2))
    assert packer.takes_raw
    first = np.arange(4, dtype=column("x", datatype).numpy_dtype).reshape(2, 2)
    body = memoryview(b"?" + first.tobytes())[1:]
    joined = packer.join([packer.call({"x": body}, 2), packer.pack({"x": first}, 2)], 4)
    assert_array_equal(joined["x"], np.concatenate([first, first]))


def test_texts_truth_values_and_shapes_that_vary_are_looked_at_before_they_are_packed() -> None:
    assert not taking(column("x", "BYTES")).takes_raw
    assert not taking(column("x", "BOOL")).takes_raw
    assert not taking(column("x", "FP32", "n")).takes_raw


def test_rows_of_different_shapes_are_in_different_buckets() -> None:
    packer = taking(column("x", "FP32", "n"), column("y", "FP32"))
    y = np.zeros(1, dtype=np.float32)

    def bucket(n: int) -> Any:
        return packer.pack({"x": np.zeros((1, n), dtype=np.float32), "y": y}, 1).bucket

    assert bucket(3) == bucket(3) != bucket(4)
    assert taking(column("y", "FP32")).pack({"y": y}, 1).bucket is None


def test_an_input_without_a_batch_axis_keeps_its_shape() -> None:
    packer = taking(TensorSpec(name="x", datatype="FP32", shape=(2, 3)))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_array_equal(packer.join([packer.pack({"x": x}, 1)], 1)["x"], x)


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_nan_is_found_where_it_is_forbidden_and_named(datatype: Datatype) -> None:
    values = np.array([1.0, np.nan], dtype=np.float32)
    array = bfloat16_bits(values) if datatype == "BF16" else values.astype(column("x", datatype).numpy_dtype)
    strict, lenient = taking(column("x", datatype)), taking(column("x", datatype, nullable=True))
    for packer, holds in ((strict, True), (lenient, False)):
        call = packer.pack({"x": array}, 2, unchecked=True)
        assert packer.holds_nan(packer.join([call], 2)) is holds
    with pytest.raises(RequestError, match="input 'x' holds NaN"):
        strict.check(strict.pack({"x": array}, 2))
    strict.check(strict.pack({"x": array[:1]}, 1))
    lenient.check(lenient.pack({"x": array}, 2))


def test_infinity_is_no_missing_value() -> None:
    packer = taking(column("x", "FP32"))
    packer.check(packer.pack({"x": np.array([np.inf], dtype=np.float32)}, 1))


@pytest.mark.parametrize(
    ("datatype", "fits", "does_not"),
    [
        ("INT8", -128, 128),
        ("UINT8", 255, -1),
        ("INT64", 2**63 - 1, 2**63),
        ("FP16", 65504.0, 65520.0),
        ("FP32", 1.5, 1e39),
    ],
)
def test_what_does_not_fit_a_datatype_is_no_value_of_it(datatype: Datatype, fits: Any, does_not: Any) -> None:
    packer = value_packer(column("x", datatype), 1)
    assert packer is not None
    assert np.frombuffer(packer.pack(fits), dtype=column("x", datatype).numpy_dtype)[0] == fits
    with pytest.raises((struct.error, OverflowError)):
        packer.pack(does_not)


def test_texts_and_bf16_have_no_packer() -> None:
    assert value_packer(column("x", "BYTES"), 1) is None
    assert value_packer(column("x", "BF16"), 1) is None
