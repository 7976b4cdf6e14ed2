"""Estimators over the columns of a table are converted as scikit-learn computes them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from modelyard.bundle.manifest import BATCH, TensorSpec
from modelyard.training.export import run_graph, to_onnx
from modelyard.training.models import FramePipeline, class_array

N = 200
SPECS = (
    TensorSpec(name="amount", datatype="FP32", shape=(BATCH,)),
    TensorSpec(name="rooms", datatype="INT64", shape=(BATCH,)),
    TensorSpec(name="new", datatype="BOOL", shape=(BATCH,)),
)
TEXT = (
    TensorSpec(name="town", datatype="BYTES", shape=(BATCH,)),
    TensorSpec(name="way", datatype="BYTES", shape=(BATCH,)),
)


def _numbers() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "amount": generator.normal(size=N).astype(np.float32),
        "rooms": generator.integers(1, 9, size=N),
        "new": generator.random(N) < 0.5,
    }


def _texts() -> dict[str, Any]:
    generator = np.random.default_rng(1)
    return {
        "town": generator.choice(np.array(["Aix", "Bonn", ""], dtype=object), size=N),
        "way": generator.choice(np.array(["by sea", "by land"], dtype=object), size=N),
    }


def _check(estimator: Any, specs: tuple[TensorSpec, ...], inputs: dict[str, Any]) -> None:
    y = np.arange(N) % 3
    pipeline = FramePipeline(estimator.fit(pd.DataFrame(inputs), y), specs, "classification", ("a", "b", "c"))
    model, _ = to_onnx(pipeline, specs)
    answers = run_graph(model)(inputs)
    wanted = pipeline.predict(inputs)
    assert wanted.scores is not None
    np.testing.assert_allclose(answers["probabilities"], wanted.scores, rtol=1e-5, atol=1e-5)
    assert answers["label"].tolist() == class_array(("a", "b", "c"))[wanted.scores.argmax(axis=1)].tolist()


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=500),
        RandomForestClassifier(10, random_state=0),
        make_pipeline(RandomForestClassifier(10, random_state=0)),
        make_pipeline(StandardScaler(), LogisticRegression()),
        make_pipeline(make_pipeline(SimpleImputer(), StandardScaler()), LogisticRegression()),
    ],
    ids=["bare", "bare forest", "pipeline of one", "pipeline", "nested pipeline"],
)
def test_an_estimator_of_one_matrix_is_given_all_columns_in_their_order(estimator: Any) -> None:
    """Whole numbers and floats stacked by the converter as they are would be cut to whole numbers."""
    _check(estimator, SPECS, _numbers())


@pytest.mark.parametrize("encoder", [OneHotEncoder(), OrdinalEncoder()])
def test_columns_of_text_alone_are_stacked_as_text(encoder: Any) -> None:
    _check(make_pipeline(encoder, LogisticRegression()), TEXT, _texts())


@pytest.mark.parametrize("rest", ["passthrough", "drop"])
def test_a_column_transformer_picks_columns_of_every_datatype(rest: str) -> None:
    columns = ColumnTransformer(
        [
            ("scaled", StandardScaler(), ["amount"]),
            ("codes", OneHotEncoder(handle_unknown="ignore"), ["rooms", "town"]),
            (
                "text",
                make_pipeline(SimpleImputer(missing_values="", strategy="most_frequent"), OneHotEncoder()),
                ["way"],
            ),
        ],
        remainder=rest,
    )
    _check(make_pipeline(columns, LogisticRegression(max_iter=500)), SPECS + TEXT, _numbers() | _texts())
