"""Rows with named columns ↔ named arrays."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import RequestError
from modelyard.inference.rows import arrays_to_rows, example_row, rows_to_arrays
from modelyard.inference.values import bfloat16_bits, bfloat16_values, short


def column(name: str, datatype: Any, *row_shape: int | str, **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(BATCH, *row_shape), **more)


def taking(*inputs: TensorSpec) -> Signature:
    return Signature(inputs=inputs, outputs=inputs)


MIXED = taking(
    column("hour", "INT8"),
    column("distance", "FP32", nullable=True),
    column("carrier", "BYTES", nullable=True, categories=("UA",)),
    column("holiday", "BOOL"),
    column("pixels", "UINT8", 2, 3, 1),
)
GOOD = {"hour": 7, "distance": 1.5, "carrier": "UA", "holiday": True, "pixels": [[0, 1, 2], [3, 4, 255]]}


def test_each_column_gets_its_datatype_and_shape() -> None:
    arrays = rows_to_arrays([GOOD, GOOD], MIXED)
    assert {name: (str(array.dtype), array.shape) for name, array in arrays.items()} == {
        "hour": ("int8", (2,)),
        "distance": ("float32", (2,)),
        "carrier": ("object", (2,)),
        "holiday": ("bool", (2,)),
        "pixels": ("uint8", (2, 2, 3, 1)),
    }
    assert arrays["pixels"][1, 1, 2, 0] == 255


def test_null_and_left_out_are_missing_where_the_column_is_nullable() -> None:
    for row in ({**GOOD, "distance": None, "carrier": None}, {"hour": 7, "holiday": False, "pixels": GOOD["pixels"]}):
        arrays = rows_to_arrays([row], MIXED)
        assert math.isnan(arrays["distance"][0])
        assert arrays["carrier"][0] == ""


def test_a_value_in_a_message_is_short_however_large_or_deep_it_is() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, [1] * 10**6, {"a": [None] * 10**6}, "x" * 10**6, {"k" * 10**6: 1}):
        assert len(short(value)) == 60
    for small in ([1, "a", None, {"b": [0.5]}], {"a": 1, "b": []}, "text", 7, None):
        assert short(small) == repr(small)


@pytest.mark.parametrize(
    ("datatype", "largest", "beyond"),
    [("FP16", 65519.99, 65520.0), ("FP32", 3.4028235e38, 3.4028236e38), ("BF16", 3.3895313892515355e38, 3.4e38)],
)
def test_a_number_fits_that_rounds_to_a_finite_one(datatype: Any, largest: float, beyond: float) -> None:
    """JSON has the shortest decimals that round to a float, and those of the largest may lie above it."""
    for row in ({"x": largest}, {"x": -largest}):
        assert np.isfinite(rows_to_arrays([row], taking(column("x", datatype)))["x"]).all()
    for rows in ([{"x": beyond}], [{"x": beyond}, {"x": None}]):
        with pytest.raises(RequestError, match="a finite number"):
            rows_to_arrays(rows, taking(column("x", datatype, nullable=True)))


def test_an_unknown_category_is_left_to_the_graph() -> None:
    assert rows_to_arrays([GOOD | {"carrier": "Zephyr"}], MIXED)["carrier"][0] == "Zephyr"


def test_a_whole_float_is_an_integer_since_json_does_not_tell_them_apart() -> None:
    assert rows_to_arrays([GOOD | {"hour": 7.0}], MIXED)["hour"][0] == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hour": None}, ["'hour'", "missing", "-128 to 127"]),
        ({"hour": 128}, ["'hour'", "128", "-128 to 127"]),
        ({"hour": -129}, ["'hour'", "-129"]),
        ({"hour": 10**30}, ["'hour'"]),
        ({"hour": 1e300}, ["'hour'"]),
        ({"hour": 7.5}, ["'hour'", "7.5", "whole number"]),
        ({"hour": True}, ["'hour'", "True"]),
        ({"hour": "7"}, ["'hour'", "'7'"]),
        ({"distance": "NaN"}, ["'distance'", "'NaN'", "finite number"]),
        ({"distance": math.inf}, ["'distance'", "inf"]),
        ({"distance": 1e39}, ["'distance'", "1e+39"]),
        ({"distance": 10**400}, ["'distance'"]),
        ({"distance": False}, ["'distance'", "False"]),
        ({"distance": [1.5]}, ["'distance'", "[1.5]"]),
        ({"carrier": 5}, ["'carrier'", "5", "text"]),
        ({"carrier": ["UA"]}, ["'carrier'", "text"]),
        ({"holiday": 1}, ["'holiday'", "true or false"]),
        ({"pixels": [[0, 1, 2]]}, ["'pixels'", "[2, 3, 1]", "axis 0 takes 2 values, got 1"]),
        ({"pixels": [[0, 1], [2, 3, 4]]}, ["'pixels'", "axis 1 takes 3 values, got 2"]),
        ({"pixels": [[0, 1, 2], [3, 4, 256]]}, ["'pixels'[1][2][0]", "256", "0 to 255"]),
        ({"pixels": [[0, 1, 2], [3, 4, None]]}, ["'pixels'[1][2][0]", "missing"]),
        ({"pixels": [[0, 1, 2], [3, 4, [5, 6]]]}, ["'pixels'[1][2][0]", "[5, 6]"]),
        ({"pixels": "AAAA"}, ["'pixels'", "'AAAA'"]),
        ({"colour": "red"}, ["unknown column 'colour'", "hour, distance, carrier, holiday, pixels"]),
    ],
)
def test_a_value_that_does_not_fit_names_row_column_value_and_what_fits(change: Any, words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        rows_to_arrays([GOOD, GOOD | change], MIXED)
    assert refused.value.status == 400
    assert all(word in str(refused.value) for word in ["row 1", *words]), str(refused.value)


@pytest.mark.parametrize("rows", [None, 5, "text", {}, [], [5], [None], [GOOD, []]])
def test_what_is_not_a_list_of_rows_is_refused(rows: Any) -> None:
    with pytest.raises(RequestError):
        rows_to_arrays(rows, MIXED)


def test_a_model_with_one_input_takes_the_bare_value() -> None:
    scalar, vector = taking(column("x", "FP32")), taking(column("x", "FP32", 3))
    assert_array_equal(rows_to_arrays([1, 2.5], scalar)["x"], [1, 2.5])
    assert_array_equal(rows_to_arrays([[1, 2, 3], {"x": [4, 5, 6]}], vector)["x"], [[1, 2, 3], [4, 5, 6]])


def test_a_column_of_one_is_a_number_in_both_directions() -> None:
    signature = taking(column("x", "FP32", 1), column("y", "BYTES", 1))
    rows = [{"x": 1.5, "y": "a"}]
    arrays = rows_to_arrays(rows, signature)
    assert arrays["x"].shape == arrays["y"].shape == (1, 1)
    assert arrays_to_rows(arrays, signature) == rows
    assert_array_equal(rows_to_arrays([{"x": [1.5], "y": ["a"]}], signature)["x"], [[1.5]])


def test_rows_of_one_request_need_not_agree_on_what_they_leave_out() -> None:
    full = [[[0], [1], [2]], [[3], [4], [255]]]
    arrays = rows_to_arrays([GOOD, GOOD | {"pixels": full}], MIXED)
    assert_array_equal(arrays["pixels"][0], arrays["pixels"][1])


def test_an_axis_of_any_size_takes_rows_of_equal_length() -> None:
    signature = taking(column("tokens", "INT64", "length"))
    assert rows_to_arrays([[1, 2, 3], [4, 5, 6]], signature)["tokens"].shape == (2, 3)
    with pytest.raises(RequestError, match="equally many values, got 1"):
        rows_to_arrays([[1, 2, 3], [4]], signature)


def test_a_model_without_a_batch_axis_takes_one_row() -> None:
    spec = TensorSpec(name="x", datatype="FP32", shape=(2,))
    signature = taking(spec)
    arrays = rows_to_arrays([[1, 2]], signature)
    assert arrays["x"].shape == (2,)
    assert arrays_to_rows(arrays, signature) == [{"x": [1, 2]}]
    with pytest.raises(RequestError, match="one row at a time"):
        rows_to_arrays([[1, 2], [3, 4]], signature)


def test_scores_come_back_by_label_and_labels_as_they_are() -> None:
    signature = Signature(
        inputs=(column("x", "FP32"),),
        outputs=(
            column("label", "BYTES", labels=("late", "on_time")),
            column("probabilities", "FP32", 2, labels=("late", "on_time")),
            column("digits", "FP32", 2, labels=(3, 8)),
        ),
    )
    outputs = {
        "label": np.array(["late"], dtype=object),
        "probabilities": np.array([[0.8, 0.2]], dtype=np.float32),
        "digits": np.array([[np.nan, np.inf]], dtype=np.float32),
    }
    assert arrays_to_rows(outputs, signature) == [
        {"label": "late", "probabilities": {"late": 0.8, "on_time": 0.2}, "digits": {"3": None, "8": None}}
    ]


def test_an_example_is_a_row_that_is_accepted() -> None:
    arrays = rows_to_arrays([GOOD, GOOD | {"hour": 8}], MIXED)
    row = example_row(arrays, MIXED)
    again = rows_to_arrays([row], MIXED)
    assert all(np.array_equal(again[name], arrays[name][:1]) for name in arrays)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "other"]), inner, max_size=5),
    max_leaves=20,
)


@settings(deadline=None)
@given(json_values | st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, json_values)), max_size=3))
def test_arbitrary_json_never_raises_anything_but_request_error(rows: Any) -> None:
    try:
        arrays = rows_to_arrays(rows, MIXED)
    except RequestError:
        return
    assert len(arrays["hour"]) == len(rows)


SCALARS = {
    "BOOL": st.booleans(),
    "INT8": st.integers(-128, 127),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT16": st.integers(0, 2**16 - 1),
    "UINT64": st.integers(0, 2**64 - 1),
    "FP16": st.floats(width=16, allow_nan=False, allow_infinity=False) | st.none(),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False) | st.none(),
    "FP64": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
    "BYTES": st.text(min_size=1, max_size=5) | st.none(),
}


@st.composite
def signatures_and_rows(draw: st.DrawFn) -> tuple[Signature, list[dict[str, Any]]]:
    specs: list[TensorSpec] = []
    values: dict[str, st.SearchStrategy[Any]] = {}
    for i in range(draw(st.integers(1, 4))):
        datatype: Any = draw(st.sampled_from(sorted(SCALARS)))
        nullable = datatype in ("FP16", "FP32", "FP64", "BYTES")
        size = draw(st.sampled_from([None, 2, 3]))
        specs.append(column(f"c{i}", datatype, *([] if size is None else [size]), nullable=nullable))
        scalar = SCALARS[datatype] if size is None else SCALARS[datatype].filter(lambda value: value is not None)
        values[f"c{i}"] = scalar if size is None else st.lists(scalar, min_size=size, max_size=size)
    return taking(*specs), draw(st.lists(st.fixed_dictionaries(values), min_size=1, max_size=4))


@settings(deadline=None)
@given(signatures_and_rows())
def test_rows_survive_the_way_to_arrays_and_back(case: tuple[Signature, list[dict[str, Any]]]) -> None:
    """Floats come back as the shortest decimals of their datatype, so the arrays are what must be equal."""
    signature, rows = case
    arrays = rows_to_arrays(rows, signature)
    back = arrays_to_rows(arrays, signature)
    again = rows_to_arrays(back, signature)
    for spec in signature.inputs:
        assert_array_equal(again[spec.name], arrays[spec.name])
        if spec.datatype not in ("FP16", "FP32"):
            assert [row[spec.name] for row in back] == [row[spec.name] for row in rows]


@settings(deadline=None)
@given(st.floats(width=32, allow_infinity=False))
def test_bfloat16_bits_are_the_nearest(value: float) -> None:
    """Beside the bits chosen lie no others that are nearer."""
    bits = bfloat16_bits(np.array([value], dtype=np.float32))
    near = bfloat16_values(bits).astype(np.float64)[0]
    if math.isnan(value):
        assert math.isnan(near)
        return
    for other in (bits - np.uint16(1), bits + np.uint16(1)):
        candidate = float(bfloat16_values(other)[0])
        if math.isfinite(candidate) and math.isfinite(near):
            assert abs(near - value) <= abs(candidate - value)
