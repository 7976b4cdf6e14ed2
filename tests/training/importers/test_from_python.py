"""A fitted model from Python becomes a bundle that answers as it does, or is refused with the reason."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

import modelyard
from modelyard.bundle.cases import check_cases
from modelyard.bundle.format import Bundle
from modelyard.bundle.manifest import Targets
from modelyard.bundle.store import LocalStore
from modelyard.errors import ConfigError, DataError, ExportError, SkewDetected
from modelyard.training.export import run_graph

N = 300


def _matrix(seed: int = 0, n: int = N) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(n, 4))


def _classes(x: NDArray[np.float64], names: list[Any]) -> NDArray[Any]:
    return np.array(names)[np.digitize(x[:, 0] + x[:, 1], np.linspace(-1, 1, len(names) + 1)[1:-1])]


def _table(n: int = N) -> pd.DataFrame:
    """Text, whole numbers, floats and booleans; missing text, missing floats; a column that is called like an output."""
    generator = np.random.default_rng(0)
    amount = generator.normal(size=n)
    amount[::9] = np.nan
    return pd.DataFrame(
        {
            "town": generator.choice(["Aix", "Bonn", "Cork", ""], size=n),
            "rooms": generator.integers(1, 9, size=n),
            "amount": amount,
            "label": generator.normal(size=n).astype(np.float32),
            "new": generator.random(n) < 0.5,
        }
    )


def _steps() -> ColumnTransformer:
    return ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["rooms", "amount", "label", "new"]),
            (
                "text",
                make_pipeline(
                    SimpleImputer(missing_values="", strategy="constant", fill_value="?"),
                    OneHotEncoder(handle_unknown="ignore"),
                ),
                ["town"],
            ),
            ("codes", OneHotEncoder(handle_unknown="ignore"), ["rooms"]),
        ]
    )


def _import(obj: Any, samples: Any, folder: Path, **more: Any) -> Bundle:
    return modelyard.import_model(obj, samples=samples, name="borrowed", target=folder / "bundle", **more)


def _answers(bundle: Bundle, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    run = run_graph(bundle.model_path.read_bytes())
    check_cases(bundle.cases(), bundle.manifest.cases, bundle.signature, run, source="the golden cases")
    return dict(run(inputs))


def test_a_pipeline_over_a_table_keeps_its_columns_and_classes(tmp_path: Path) -> None:
    table = _table()
    y = np.where(table["rooms"] > 4, "large", "small")
    pipeline = make_pipeline(_steps(), LogisticRegression(max_iter=500)).fit(table, y)
    bundle = _import(pipeline, table, tmp_path)
    kinds = [(spec.name, spec.datatype, spec.nullable) for spec in bundle.signature.inputs]
    assert kinds == [
        ("town", "BYTES", True),
        ("rooms", "INT64", False),
        ("amount", "FP32", True),
        ("label", "FP32", False),
        ("new", "BOOL", False),
    ]
    label, scores = bundle.signature.outputs
    assert (label.name, label.labels, scores.labels) == ("label_", ("large", "small"), ("large", "small"))
    answers = _answers(
        bundle,
        town=table["town"].to_numpy(dtype=object),
        rooms=table["rooms"].to_numpy(),
        amount=table["amount"].to_numpy(dtype=np.float32),
        label=table["label"].to_numpy(),
        new=table["new"].to_numpy(),
    )
    assert answers["label_"].tolist() == pipeline.predict(table).tolist()
    np.testing.assert_allclose(answers["probabilities"], pipeline.predict_proba(table), rtol=1e-5, atol=1e-5)
    assert bundle.manifest.cases.origin == "samples"
    assert bundle.manifest.lineage.made_by == "import: sklearn"
    assert "graph and original agree on 300 samples" in bundle.manifest.lineage.notes[0]
    assert "input:amount" in bundle.reference()


def test_columns_that_the_model_was_not_fitted_on_are_left_out(tmp_path: Path) -> None:
    table = _table()[["amount", "rooms"]].fillna(0)
    model = LinearRegression().fit(table, table["rooms"] * 2.0)
    bundle = _import(model, table.assign(comment="x")[["comment", "rooms", "amount"]], tmp_path)
    assert [spec.name for spec in bundle.signature.inputs] == ["amount", "rooms"]


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"], [0, 1], [3, 5, 9], [0.0, 1.0], [False, True]])
@pytest.mark.parametrize("kind", [LogisticRegression, GaussianNB])
def test_classes_are_decoded_in_the_graph(tmp_path: Path, kind: Any, names: list[Any]) -> None:
    x = _matrix()
    model = kind().fit(x, _classes(x, names))
    bundle = _import(model, x, tmp_path)
    wanted = names if isinstance(names[0], str) else [int(name) for name in names]
    assert bundle.signature.output("label").labels == tuple(wanted)
    answers = _answers(bundle, features=x.astype(np.float32))
    said = model.predict(x.astype(np.float32)).tolist()
    assert answers["label"].tolist() == [wanted[names.index(name)] for name in said]


@pytest.mark.parametrize(
    "kind", [LinearRegression(), RandomForestRegressor(20, random_state=0), GradientBoostingRegressor()]
)
def test_regressors_answer_with_their_values(tmp_path: Path, kind: Any) -> None:
    x = _matrix().astype(np.float32)
    model = kind.fit(x, 100 * x[:, 0] + x[:, 1])
    bundle = _import(model, x, tmp_path)
    assert bundle.manifest.task == "regression"
    np.testing.assert_allclose(_answers(bundle, features=x)["prediction"], model.predict(x), rtol=1e-5, atol=1e-5)


def test_float64_samples_are_rounded_and_the_original_still_agrees(tmp_path: Path) -> None:
    x = _matrix()
    model = RandomForestClassifier(20, random_state=0).fit(x, _classes(x, ["a", "b"]))
    bundle = _import(model, x, tmp_path)
    assert bundle.signature.inputs[0].datatype == "FP32"


def _between_float32(n: int, n_ties: int) -> tuple[Any, NDArray[np.float64]]:
    """A linear model and samples, some of which lie so far from float32 that rounding moves the value by more than 1e-5."""
    x = np.random.default_rng(0).normal(size=(n, 1)).astype(np.float32).astype(np.float64)
    model = LinearRegression().fit(x, x[:, 0])
    x[:n_ties] = 16384 * (1 + 3e-8)
    model.coef_[:], model.intercept_ = 16384.0, -(16384.0 * 16384.0)
    return model, x


def test_one_row_that_rounding_alone_explains_is_excused_and_two_are_not(tmp_path: Path) -> None:
    model, x = _between_float32(500, 1)
    bundle = _import(model, x, tmp_path)
    assert "1 threshold ties excused" in bundle.manifest.lineage.notes[0]
    model, x = _between_float32(500, 2)
    with pytest.raises(
        SkewDetected, match=r"2 of 500 rows differ at threshold ties \(the first is row 0 of the samples\)"
    ):
        _import(model, x, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_graph_that_differs_names_the_sample(tmp_path: Path) -> None:
    """Samples whose text is missing in another way than the graph is told: "" is not NaN to the encoder."""
    table = pd.DataFrame({"town": np.array(["Aix", np.nan, "Bonn", "Aix"] * 5, dtype=object)})
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(table, [0, 1, 1, 0] * 5)
    with pytest.raises(
        SkewDetected, match=r"row 1 of the samples: output 'probabilities' is .* by the original, .* by the graph"
    ):
        _import(model, table, tmp_path)


def test_a_model_is_published_where_a_store_is_given(tmp_path: Path) -> None:
    x = _matrix()
    model = LogisticRegression().fit(x, _classes(x, ["a", "b"]))
    first = modelyard.import_model(
        model, samples=x, name="borrowed", store=tmp_path / "store", targets=Targets(keep=0.95)
    )
    second = modelyard.import_model(
        model, samples=x, name="borrowed", store=str(tmp_path / "store"), target=tmp_path / "own", description="Mine."
    )
    assert LocalStore(tmp_path / "store").versions("borrowed") == (1, 2)
    assert first.path == tmp_path / "store" / "borrowed" / "1"
    assert first.manifest.targets.keep == 0.95
    assert second.path == tmp_path / "own"
    assert second.manifest.description == "Mine."


@pytest.mark.parametrize(
    ("obj", "error", "message"),
    [
        (LogisticRegression(), ExportError, r"LogisticRegression is not fitted; call fit\(\) before importing it"),
        (Pipeline([("model", LogisticRegression())]), ExportError, r"Pipeline is not fitted"),
        (
            {"weights": [1]},
            ExportError,
            r"import_model takes scikit-learn and LightGBM models and nn.Modules, got builtins.dict",
        ),
        (KMeans(2, n_init=1).fit(_matrix()), ExportError, r"KMeans is neither a classifier nor a regressor"),
        (LinearSVC().fit(_matrix(), _matrix()[:, 0] > 0), ExportError, r"LinearSVC has no predict_proba\(\)"),
        (
            make_pipeline(FunctionTransformer(np.sin), LinearRegression()).fit(_matrix(), _matrix()[:, 0]),
            ExportError,
            r"skl2onnx cannot convert Pipeline: .*; replace the step it names by one it knows",
        ),
        (
            LogisticRegression().fit(_matrix(), np.where(_matrix()[:, 0] > 0, 0.5, 1.5) * 2 + 0),
            None,
            "",
        ),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(
    tmp_path: Path, obj: Any, error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert _import(obj, _matrix(), tmp_path).signature.outputs[0].labels == (1, 3)
        return
    with pytest.raises(error, match=message):
        _import(obj, _matrix(), tmp_path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (_matrix()[:, :3], r"samples have 3 columns, LinearRegression was fitted on 4; give those"),
        (_matrix()[:0], r"samples has no rows"),
        (_matrix()[:, 0], r"samples must be a DataFrame, or a matrix of numbers .* shape \(300,\)"),
        (np.array([["a", "b", "c", "d"]]), r"samples must be a DataFrame, or a matrix of numbers"),
        (np.full((3, 4), 1e300), r"samples: 1e\+300 in row 0, column 0 is not finite in 32 bits"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, samples: Any, message: str) -> None:
    model = LinearRegression().fit(_matrix(), _matrix()[:, 0])
    with pytest.raises(DataError, match=message):
        _import(model, samples, tmp_path)


def test_a_table_without_a_column_of_the_model_is_refused_by_its_name(tmp_path: Path) -> None:
    table = _table()
    model = make_pipeline(_steps(), LogisticRegression(max_iter=500)).fit(table, table["new"])
    with pytest.raises(DataError, match=r"samples: no column 'town', which Pipeline was fitted on"):
        _import(model, table.drop(columns="town"), tmp_path)
    with pytest.raises(DataError, match=r"samples must be a DataFrame with the columns \['town'"):
        _import(model, table.to_numpy(), tmp_path)


def test_arguments_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    x = _matrix()
    model = LogisticRegression().fit(x, _classes(x, ["a", "b"]))
    with pytest.raises(ConfigError, match="needs store or target, got neither"):
        modelyard.import_model(model, samples=x, name="borrowed")
    with pytest.raises(ConfigError, match=r"task must be 'classification' for LogisticRegression, got 'regression'"):
        _import(model, x, tmp_path, task="regression")
    with pytest.raises(ConfigError, match=r"LogisticRegression knows its own: leave them out"):
        _import(model, x, tmp_path, labels=["a", "b"])
    (tmp_path / "bundle").mkdir()
    with pytest.raises(FileExistsError, match="never overwritten"):
        _import(object(), None, tmp_path)


def test_importing_modelyard_imports_no_training_library() -> None:
    script = "import sys, modelyard; assert 'modelyard.training' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'import_models'"):
        modelyard.import_models  # noqa: B018  # type: ignore[attr-defined]
