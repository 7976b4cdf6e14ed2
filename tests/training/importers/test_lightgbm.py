"""LightGBM models are drawn with the branches that they take themselves, boosters as well as estimators."""

from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modelyard import import_model
from modelyard.bundle.format import Bundle
from modelyard.errors import DataError, ExportError
from modelyard.training.export import run_graph
from modelyard.training.importers.sklearn import convert_estimator

QUIET: dict[str, Any] = {"verbose": -1, "n_estimators": 30, "num_threads": 1}


def _x(n: int = 400) -> NDArray[np.float32]:
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    x[::7, 1] = np.nan
    return x


def _booster(objective: str, y: NDArray[Any], **more: Any) -> lightgbm.Booster:
    parameters = {"objective": objective, "verbose": -1, "num_threads": 1} | more
    return lightgbm.train(parameters, lightgbm.Dataset(_x(), y), 30)


def _import(obj: Any, samples: Any, folder: Path, **more: Any) -> Bundle:
    return import_model(obj, samples=samples, name="trees", target=folder / "bundle", **more)


def _answers(bundle: Bundle, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return dict(run_graph(bundle.model_path.read_bytes())({"features": x}))


@pytest.mark.parametrize("names", [["no", "yes"], ["a", "b", "c"], [0, 1, 2]])
def test_a_classifier_keeps_its_classes_and_missing_values(tmp_path: Path, names: list[Any]) -> None:
    x = _x()
    model = lightgbm.LGBMClassifier(**QUIET).fit(x, np.array(names)[np.arange(len(x)) % len(names)])
    bundle = _import(model, x, tmp_path)
    assert bundle.manifest.lineage.made_by == "import: lightgbm"
    assert bundle.signature.inputs[0].nullable
    answers = _answers(bundle, x)
    assert answers["label"].tolist() == np.asarray(model.predict(x)).tolist()
    np.testing.assert_allclose(answers["probabilities"], np.asarray(model.predict_proba(x)), rtol=1e-5, atol=1e-5)


def test_a_regressor_at_the_end_of_a_pipeline(tmp_path: Path) -> None:
    x = np.nan_to_num(_x())
    model = (
        make_pipeline(StandardScaler(), lightgbm.LGBMRegressor(**QUIET))
        .set_output(transform="default")
        .fit(x, 1000 * x[:, 0])
    )
    answers = _answers(_import(model, x, tmp_path), x)
    np.testing.assert_allclose(
        answers["prediction"], model[-1].booster_.predict(model[0].transform(x)), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("objective", "labels"), [("binary", None), ("binary", ("no", "yes")), ("multiclass", ("a", "b", "c"))]
)
def test_a_booster_has_classes_by_its_objective(tmp_path: Path, objective: str, labels: tuple[str, ...] | None) -> None:
    x = _x()
    n_classes = 2 if objective == "binary" else 3
    booster = _booster(objective, np.arange(len(x)) % n_classes, **({"num_class": 3} if n_classes == 3 else {}))
    bundle = _import(booster, x, tmp_path, labels=labels)
    assert bundle.signature.output("label").labels == (labels or (0, 1))
    raw = np.asarray(booster.predict(x))
    wanted = raw if raw.ndim == 2 else np.stack([1 - raw, raw], axis=1)
    np.testing.assert_allclose(_answers(bundle, x)["probabilities"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["regression", "poisson"])
def test_a_booster_of_quantities_answers_with_values(tmp_path: Path, objective: str) -> None:
    x = _x()
    booster = _booster(objective, np.abs(x[:, 0]))
    np.testing.assert_allclose(
        _answers(_import(booster, x, tmp_path), x)["prediction"], np.asarray(booster.predict(x)), rtol=1e-5, atol=1e-5
    )


def test_a_threshold_between_neighbouring_floats_sends_both_to_their_own_branch() -> None:
    """Rounded to the nearest float32 it would be one of the two, and "x <= threshold" true of both."""
    x = (2.0**24 + 2 * np.random.default_rng(0).integers(0, 50, size=(2000, 1))).astype(np.float32)
    y = (x[:, 0] // 2 % 2).astype(int)
    model = lightgbm.LGBMClassifier(**QUIET, min_child_samples=1).fit(x, y)
    answers = run_graph(convert_estimator(model, 1).SerializeToString())({"x": x})
    np.testing.assert_allclose(answers["probabilities"], np.asarray(model.predict_proba(x)), atol=1e-5)


def test_what_cannot_be_drawn_is_refused_with_the_reason(tmp_path: Path) -> None:
    x = _x()
    two = np.arange(len(x)) % 2
    with pytest.raises(ExportError, match=r"labels must name the 2 classes of this Booster, got \['a'\]"):
        _import(_booster("binary", two), x, tmp_path, labels=["a"])
    with pytest.raises(ExportError, match=r"a Booster of objective 'regression' has none; leave them out"):
        _import(_booster("regression", two), x, tmp_path, labels=["a", "b"])
    with pytest.raises(DataError, match=r"samples have 2 columns, BoosterClassifier was fitted on 3"):
        _import(_booster("binary", two), x[:, :2], tmp_path)
    with pytest.raises(ExportError, match="LGBMClassifier is not fitted"):
        _import(lightgbm.LGBMClassifier(), x, tmp_path)
    table = pd.DataFrame({"town": pd.Categorical(["Aix", "Bonn"] * 200), "x": x[:, 0]})
    model = lightgbm.LGBMClassifier(**QUIET).fit(table, two)
    with pytest.raises(ExportError, match=r"trained on pandas categories \['Aix', 'Bonn'\]"):
        _import(model, table, tmp_path)
