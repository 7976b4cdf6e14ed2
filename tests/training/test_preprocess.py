"""NumPy's features for training and the graph's for serving are the same numbers, whatever the table holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Datatype, TensorSpec
from modelyard.errors import ExportError
from modelyard.training.onnx_graph import GraphBuilder
from modelyard.training.preprocess import Preprocessor, fit_preprocessor

Table = dict[str, NDArray[Any]]

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(width=32, allow_infinity=False, allow_nan=True)
NAMES = st.one_of(st.sampled_from(["value_0", "value_1", "constant_0", "features", "part_0/x"]), TEXTS.filter(bool))


def _objects(values: list[str]) -> NDArray[Any]:
    return np.array(values, dtype=object)


def _graph_of(preprocessor: Preprocessor, specs: tuple[TensorSpec, ...], n_features: int) -> ort.InferenceSession:
    graph = GraphBuilder(reserved=[spec.name for spec in specs])
    output = TensorSpec(name=preprocessor.add_to(graph), datatype="FP32", shape=(BATCH, n_features))
    return ort.InferenceSession(graph.build(specs, [output]).SerializeToString(), providers=["CPUExecutionProvider"])


def _both(specs: tuple[TensorSpec, ...], train: Table, rows: Table) -> tuple[NDArray[Any], NDArray[Any]]:
    preprocessor = fit_preprocessor(specs, train)
    with np.errstate(over="ignore", invalid="ignore"):  # the largest floats overflow in both worlds alike
        by_numpy = preprocessor.apply(rows)
    (by_graph,) = _graph_of(preprocessor, specs, by_numpy.shape[1]).run(None, rows)
    return by_numpy, by_graph


@st.composite
def columns(draw: st.DrawFn, n_train: int, n_rows: int) -> tuple[Datatype, NDArray[Any], NDArray[Any]]:
    """Draw a datatype, training values, and values to answer: missing, unknown and constant ones among them."""
    datatype: Datatype = draw(st.sampled_from(["FP32", "INT64", "BOOL", "BYTES"]))
    value = {
        "FP32": FLOATS,
        "INT64": st.integers(-(2**63), 2**63 - 1),
        "BOOL": st.booleans(),
        "BYTES": TEXTS,
    }[datatype]
    trained: list[Any] = draw(
        st.one_of(st.lists(value, min_size=n_train, max_size=n_train), value.map(lambda constant: [constant] * n_train))
    )
    asked: list[Any] = draw(
        st.lists(st.one_of(value, st.sampled_from(trained)), min_size=n_rows, max_size=n_rows)  # known and unknown ones
    )
    if datatype == "BYTES":
        return datatype, _objects(trained), _objects(asked)
    dtype = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}[datatype]
    return datatype, np.array(trained, dtype=dtype), np.array(asked, dtype=dtype)


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[TensorSpec, ...], Table, Table]:
    n_train, n_rows = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    specs: list[TensorSpec] = []
    train: Table = {}
    rows: Table = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        datatype, train[name], rows[name] = draw(columns(n_train, n_rows))
        text = datatype == "BYTES"
        nullable = bool((train[name] == "").any() if text else datatype == "FP32" and np.isnan(train[name]).any())
        categories = tuple(sorted(set(train[name].tolist()) - {""})) if text else None
        specs.append(TensorSpec(name=name, datatype=datatype, shape=(BATCH,), nullable=nullable, categories=categories))
    return tuple(specs), train, rows


@given(tables())
@settings(max_examples=150, deadline=None)
def test_the_graph_computes_the_features_that_training_sees(
    table: tuple[tuple[TensorSpec, ...], Table, Table],
) -> None:
    by_numpy, by_graph = _both(*table)
    np.testing.assert_array_equal(by_numpy, by_graph)


@given(tables(), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_batching_changes_no_feature(table: tuple[tuple[TensorSpec, ...], Table, Table], size: int) -> None:
    specs, train, rows = table
    preprocessor = fit_preprocessor(specs, train)
    with np.errstate(over="ignore", invalid="ignore"):
        together = preprocessor.apply(rows)
    session = _graph_of(preprocessor, specs, together.shape[1])
    parts = [
        session.run(None, {name: column[start : start + size] for name, column in rows.items()})[0]
        for start in range(0, len(together), size)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), together)


def _spec(datatype: Datatype, *row_shape: int, **more: Any) -> tuple[TensorSpec]:
    return (TensorSpec(name="x", datatype=datatype, shape=(BATCH, *row_shape), **more),)


def test_a_missing_number_becomes_the_mean_and_is_indicated() -> None:
    x = np.array([1, 3, np.nan], dtype=np.float32)
    by_numpy, by_graph = _both(_spec("FP32", nullable=True), {"x": x}, {"x": x})
    np.testing.assert_array_equal(by_numpy, np.array([[-1, 0], [1, 0], [0, 1]], dtype=np.float32))
    np.testing.assert_array_equal(by_numpy, by_graph)


def test_a_number_missing_at_serving_time_alone_becomes_the_mean() -> None:
    train, rows = np.array([1, 3], dtype=np.float32), np.array([np.nan, 3], dtype=np.float32)
    by_numpy, by_graph = _both(_spec("FP32"), {"x": train}, {"x": rows})
    np.testing.assert_array_equal(by_numpy, np.array([[0], [1]], dtype=np.float32))
    np.testing.assert_array_equal(by_numpy, by_graph)


def test_an_unknown_category_sets_no_feature_and_a_missing_one_has_its_own() -> None:
    train, rows = _objects(["b", "a", ""]), _objects(["a", "", "zebra", "b"])
    specs = _spec("BYTES", nullable=True, categories=("a", "b"))
    by_numpy, by_graph = _both(specs, {"x": train}, {"x": rows})
    np.testing.assert_array_equal(by_numpy, [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(by_numpy, by_graph)


@pytest.mark.parametrize("value", [0.1, -3.3e38, 1e-45, 16777217.0])
def test_a_constant_column_becomes_zeros(value: float) -> None:
    x = np.full(1000, value, dtype=np.float32)
    by_numpy, by_graph = _both(_spec("FP32"), {"x": x}, {"x": x[:3]})
    np.testing.assert_array_equal(by_numpy, np.zeros((3, 1)))
    np.testing.assert_array_equal(by_numpy, by_graph)


def test_a_spread_that_float32_cannot_hold_is_not_divided_by() -> None:
    x = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1e-45], dtype=np.float32)
    by_numpy, by_graph = _both(_spec("FP32"), {"x": x}, {"x": x})
    assert np.isfinite(by_numpy).all()
    np.testing.assert_array_equal(by_numpy, by_graph)


def test_pixels_are_laid_out_between_0_and_1() -> None:
    image = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1) * 10
    by_numpy, by_graph = _both(_spec("UINT8", 3, 4, 1), {"x": image}, {"x": image})
    np.testing.assert_array_equal(by_numpy, image.reshape(2, 12).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(by_numpy, by_graph)


def test_a_matrix_is_standardised_per_element() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(5, 3, size=(50, 4)).astype(np.float32)
    x[3, 2] = np.nan
    by_numpy, by_graph = _both(_spec("FP32", 4), {"x": x}, {"x": x})
    np.testing.assert_allclose(np.delete(by_numpy, 3, axis=0).std(axis=0), 1, atol=0.1)
    assert by_numpy[3, 2] == 0
    np.testing.assert_array_equal(by_numpy, by_graph)


def test_no_rows_are_answered_with_no_features() -> None:
    x: Mapping[str, NDArray[Any]] = {"x": np.ones((5, 4), dtype=np.float32)}
    preprocessor = fit_preprocessor(_spec("FP32", 4), x)
    assert preprocessor.apply({"x": x["x"][:0]}).shape == (0, 4)


def test_a_datatype_without_a_transform_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"input 'x': INT64 \['batch', 2\] has no transform; drop the column"):
        fit_preprocessor(_spec("INT64", 2), {"x": np.zeros((3, 2), dtype=np.int64)})
