"""From labelled rows to a bundle, for each kind of model, on small data whose answer is known."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from msgspec import structs
from numpy.typing import NDArray

from modelyard.bundle.cases import check_cases
from modelyard.bundle.format import read_bundle
from modelyard.bundle.manifest import Targets
from modelyard.errors import ConfigError, ExportError
from modelyard.prices import load_prices
from modelyard.provenance import code_revision, environment
from modelyard.training.builders import fit_linear
from modelyard.training.data import DataConfig, Dataset, load_dataset
from modelyard.training.export import run_graph
from modelyard.training.fit_config import FitConfig
from modelyard.training.models import ModelConfig
from modelyard.training.preprocess import fit_preprocessor
from modelyard.training.split import SplitConfig
from modelyard.training.train import Trained, train
from modelyard.training.watch import Watch

N = 900
KINDS = ["network", "lightgbm", "linear"]
QUICK = FitConfig(epochs=12, batch_size=32, learning_rate=1e-2, n_threads=1)


def _table() -> pd.DataFrame:
    """A product of two columns decides, which no linear model sees; text, missing values and booleans stand beside."""
    generator = np.random.default_rng(0)
    x, z = generator.normal(size=N), generator.normal(size=N)
    town = generator.choice(["Aix", "Bonn", "Cork"], size=N)
    strength = x * z + (town == "Aix") * 0.5
    x[::20] = np.nan
    return pd.DataFrame(
        {
            "x": x,
            "z": z,
            "town": np.where(generator.random(N) < 0.1, "", town),
            "new": generator.random(N) < 0.5,
            "y": np.where(strength > 0.2, "late", "on time"),
            "minutes": 30 * strength,
        }
    )


def _dataset(folder: Path, label: str = "y") -> Dataset:
    path = folder / "rows.parquet"
    _table().drop(columns={"y": "minutes", "minutes": "y"}[label]).to_parquet(path)
    data = DataConfig(path=path.name, label=label)
    return load_dataset(data, SplitConfig(), root=folder, progress=lambda message: None)[0]


def _image_dataset(folder: Path) -> Dataset:
    generator = np.random.default_rng(0)
    label = np.arange(300) % 3
    image = generator.integers(0, 60, size=(300, 8, 8), dtype=np.uint8)
    for stripe in range(3):
        image[label == stripe, :, 2 * stripe : 2 * stripe + 2] += 150
    np.savez(folder / "rows.npz", image=image, label=label)
    data = DataConfig(path="rows.npz")
    return load_dataset(data, SplitConfig(), root=folder, progress=lambda message: None)[0]


def _train(folder: Path, dataset: Dataset, model: ModelConfig, fit: FitConfig = QUICK, **more: Any) -> Trained:
    return train(
        "delay",
        dataset,
        model,
        fit,
        more.pop("targets", Targets()),
        more.pop("target", folder / "bundle"),
        root=folder,
        checkpoint=folder / "run.safetensors",
        prices=load_prices(),
        **more,
    )


def _require(kind: str) -> None:
    if kind in ("network", "torch"):
        pytest.importorskip("torch")


def _served(trained: Trained, rows: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    return run_graph(trained.bundle.model_path.read_bytes())(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_a_bundle_that_verifies_and_knows_where_it_comes_from(tmp_path: Path, kind: Any) -> None:
    _require(kind)
    dataset = _dataset(tmp_path)
    steps: list[str] = []
    watch = Watch(step=steps.append)
    targets = Targets(positive="late", keep=0.98)
    trained = _train(tmp_path, dataset, ModelConfig(kind=kind), targets=targets, description="Late?", watch=watch)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.digest == trained.bundle.digest
    run = run_graph(bundle.model_path.read_bytes())
    check_cases(bundle.cases(), bundle.manifest.cases, bundle.signature, run, source="the golden cases")
    lineage = bundle.manifest.lineage
    assert lineage.made_by == f"train: {kind}"
    assert lineage.data == dataset.lineage
    assert lineage.seeds == {"fit": 0}
    assert {"python", "numpy", "onnx", "modelyard"} <= lineage.environment.keys()
    assert lineage.spent is not None
    assert lineage.spent.wall_s > 0
    assert lineage.spent.cost_usd > 0
    assert [score.metric for score in lineage.scores] == ["auc", "accuracy", "log_loss"]
    assert lineage.scores[0].n_samples == len(dataset.split.test)
    assert bundle.manifest.targets == Targets(metric="auc", positive="late", keep=0.98)
    assert bundle.manifest.cases.origin == "held-out"
    assert f"on {len(dataset.split.test)} held-out rows" in lineage.notes[0]
    assert len(lineage.notes) == 3
    assert steps[0] == "preprocess"
    assert steps[-1] == "write the bundle"


@pytest.mark.parametrize("kind", ["network", "lightgbm"])
def test_what_a_linear_model_cannot_see_beats_both_baselines(tmp_path: Path, kind: Any) -> None:
    _require(kind)
    trained = _train(tmp_path, _dataset(tmp_path), ModelConfig(kind=kind))
    assert [comparison.baseline_name for comparison in trained.comparisons] == [
        "the majority-class baseline",
        "the linear baseline",
    ]
    assert all(comparison.difference.low > 0 for comparison in trained.comparisons)
    assert trained.evaluation.scores[0].value > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_regression_answers_in_the_labels_unit(tmp_path: Path, kind: Any) -> None:
    _require(kind)
    dataset = _dataset(tmp_path, label="minutes")
    trained = _train(tmp_path, dataset, ModelConfig(kind=kind))
    assert [score.metric for score in trained.evaluation.scores] == ["rmse", "mae"]
    truth = dataset.label[dataset.split.test]
    prediction = _served(trained, dataset.take(dataset.split.test))["prediction"]
    rmse = float(np.sqrt(((prediction - truth) ** 2).mean()))
    assert rmse == pytest.approx(trained.evaluation.scores[0].value, rel=1e-4)
    assert rmse < (1.1 if kind == "linear" else 0.8) * float(truth.std())


def test_images_train_a_network_that_answers_pixels(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    dataset = _image_dataset(tmp_path)
    model = ModelConfig(kind="network", channels=(4, 8))
    trained = _train(tmp_path, dataset, model, FitConfig(epochs=8, batch_size=16, learning_rate=1e-2, shift_pixels=0))
    assert trained.evaluation.scores[0].value > 0.9
    assert [(spec.datatype, spec.shape) for spec in trained.bundle.signature.inputs] == [("UINT8", ("batch", 8, 8, 1))]
    assert trained.bundle.signature.output("label").labels == (0, 1, 2)
    answers = _served(trained, dataset.take(dataset.split.test))
    assert answers["label"].dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_model(tmp_path: Path, kind: Any) -> None:
    _require(kind)
    dataset = _dataset(tmp_path)
    first, second = (
        _train(tmp_path, dataset, ModelConfig(kind=kind), target=tmp_path / folder) for folder in ("one", "two")
    )
    assert first.bundle.model_path.read_bytes() == second.bundle.model_path.read_bytes()


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    steps: list[str] = []
    with pytest.raises(FileExistsError, match="a bundle is never overwritten: choose another path or remove it"):
        _train(tmp_path, _dataset(tmp_path), ModelConfig(kind="linear"), watch=Watch(step=steps.append))
    assert steps == []
    assert list((tmp_path / "bundle").iterdir()) == []


def test_moving_pixels_of_a_table_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match=r"fit.shift_pixels moves images, got 2 for 4 columns; remove it"):
        _train(tmp_path, _dataset(tmp_path), ModelConfig(), FitConfig(shift_pixels=2))


_MODELS = """
import torch
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.svm import LinearSVC

def forest():
    text = make_pipeline(SimpleImputer(missing_values="", strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    columns = ColumnTransformer([("numbers", SimpleImputer(), ["x", "z", "new"]), ("text", text, ["town"])])
    return make_pipeline(columns, RandomForestClassifier(30, random_state=0, n_jobs=1))

def without_scores():
    return make_pipeline(ColumnTransformer([("numbers", SimpleImputer(), ["z"])]), LinearSVC())

def network(row_shape, n_outputs):
    return torch.nn.Sequential(torch.nn.Linear(*row_shape, 24), torch.nn.Tanh(), torch.nn.Linear(24, n_outputs))

def nothing(*_):
    return "nothing"

def a_class():
    return RandomForestClassifier

def torch_class(row_shape, n_outputs):
    return torch.nn.Linear

def needs_more(row_shape):
    return None

def raises(*_):
    raise KeyError("no such column")

def takes_no_text():
    return LogisticRegression()

def too_wide(row_shape, n_outputs):
    return torch.nn.Linear(*row_shape, n_outputs + 1)

def wrong_input(row_shape, n_outputs):
    return torch.nn.Linear(row_shape[0] + 1, n_outputs)

class Strict(torch.nn.Linear):
    def forward(self, x):
        if self.training:
            raise ValueError("not in training")
        return super().forward(x)

def fails_in_training(row_shape, n_outputs):
    return Strict(*row_shape, n_outputs)

class Random(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(len(x), 1)[:, [0, 0]] * torch.tensor([0.0, 1.0])

def at_random(row_shape, n_outputs):
    return Random(*row_shape, n_outputs)
"""


@pytest.mark.parametrize(("kind", "function"), [("sklearn", "forest"), ("torch", "network")])
def test_a_model_of_the_users_own_is_trained_and_drawn(tmp_path: Path, kind: Any, function: str) -> None:
    pytest.importorskip("torch")
    (tmp_path / "own.py").write_text(_MODELS)
    dataset = _dataset(tmp_path)
    trained = _train(tmp_path, dataset, ModelConfig(kind=kind, callable=f"own:{function}"))
    accuracy = next(score.value for score in trained.evaluation.scores if score.metric == "accuracy")
    assert accuracy > 0.7
    assert trained.bundle.manifest.lineage.made_by == f"train: {kind}"
    answers = _served(trained, dataset.take(dataset.split.test))
    assert float((answers["label"] == dataset.label[dataset.split.test]).mean()) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        ("sklearn", "nothing", r"must return an estimator with fit\(\), got str"),
        ("sklearn", "a_class", r"got the class RandomForestClassifier; return an instance, RandomForestClassifier\("),
        ("torch", "torch_class", r"got the class Linear; return an instance"),
        ("torch", "needs_more", r"is called with 2 arguments, but its parameters are \(row_shape\)"),
        ("torch", "raises", r"the function raised KeyError: 'no such column' \(own.py, line \d+\); correct it"),
        ("sklearn", "takes_no_text", r"LogisticRegression.fit\(\) raised ValueError: could not convert.*text: 'town'"),
        ("torch", "too_wide", r"must return floats of shape \[2, 2\], got float32 of shape \[2, 3\]; correct its last"),
        ("torch", "wrong_input", r"given two rows, float32 of shape \[2, \d+\], raised RuntimeError: mat1 and mat2"),
        ("torch", "fails_in_training", r"training the module raised ValueError: not in training"),
        ("torch", "nothing", r"must return a torch module, got str"),
        ("sklearn", "without_scores", r"Pipeline has no predict_proba\(\), and classes need scores"),
    ],
)
def test_a_callable_that_gives_no_model_that_fits_is_named(
    tmp_path: Path, kind: Any, function: str, message: str
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "own.py").write_text(_MODELS)
    with pytest.raises(ConfigError, match=rf"\[model\] callable = 'own:{function}'.*{message}"):
        _train(tmp_path, _dataset(tmp_path), ModelConfig(kind=kind, callable=f"own:{function}"))


def test_a_module_that_answers_at_random_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "own.py").write_text(_MODELS)
    with pytest.raises(ExportError):
        _train(tmp_path, _dataset(tmp_path), ModelConfig(kind="torch", callable="own:at_random"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_leavez": 3}, r"LightGBM knows no 'num_leavez' \(did you mean 'num_leaves'\?\); correct the name"),
        ({"feature_fracton": 0.5}, r"knows no 'feature_fracton' \(did you mean 'feature_fraction'\?\)"),
        ({"num_leaves": "many"}, r"\{'num_leaves': 'many'\}: LightGBM raised LightGBMError: .*num_leaves.*; correct"),
        ({"bagging_fraction": 7}, r"LightGBM raised LightGBMError: Check failed: \(bagging_fraction\)"),
        ({"n_estimators": "3"}, r"LightGBM raised TypeError"),
        ({"metric": "nope"}, r"LightGBM raised ValueError"),
    ],
)
def test_parameters_that_lightgbm_does_not_take_are_named(
    tmp_path: Path, parameters: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=rf"\[model\] parameters.*{message}"):
        _train(tmp_path, _dataset(tmp_path), ModelConfig(kind="lightgbm", parameters=parameters))
    assert "Unknown parameter" not in "".join(capfd.readouterr())


def test_parameters_under_lightgbms_other_names_are_taken(tmp_path: Path) -> None:
    parameters = {"n_estimators": 5, "feature_fraction": 0.5, "l2_regularization": 1.0, "importance_type": "gain"}
    trained = _train(tmp_path, _dataset(tmp_path), ModelConfig(kind="lightgbm", parameters=parameters))
    assert trained.bundle.manifest.lineage.made_by == "train: lightgbm"


def test_a_graph_that_onnxruntime_cannot_load_or_run_is_an_export_error() -> None:
    with pytest.raises(ExportError, match="onnxruntime cannot load the graph"):
        run_graph(b"no graph")
    x = onnx.helper.make_tensor_value_info("x", 1, ["n", 3])
    shape = onnx.helper.make_tensor("shape", 7, [2], [7, 9])
    nodes = [onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [x], [onnx.helper.make_tensor_value_info("y", 1, None)], [shape])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ExportError, match="onnxruntime cannot run the graph"):
        run_graph(model.SerializeToString())({"x": np.zeros((2, 3), np.float32)})


def test_a_linear_fit_says_whether_it_converged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _dataset(tmp_path)
    preprocessor = fit_preprocessor(dataset.specs, dataset.take(dataset.split.train))
    assert fit_linear(dataset, preprocessor)[1]
    monkeypatch.setattr("modelyard.training.builders.LINEAR_ITERATIONS", 1)
    assert not fit_linear(dataset, preprocessor)[1]


def test_a_checkpoint_of_another_number_of_threads_is_not_taken_up(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    dataset = _dataset(tmp_path)
    often = structs.replace(QUICK, epochs=2, checkpoint_every_s=1e-9)
    for n_threads, resumed in [(1, False), (1, True), (2, False)]:
        fit = structs.replace(often, n_threads=n_threads)
        target = tmp_path / f"bundle-{n_threads}-{resumed}"
        trained = _train(tmp_path, dataset, ModelConfig(hidden=(4,)), fit, target=target)
        assert (trained.resumed_at is not None) == resumed


def test_a_checkpoint_of_another_number_of_cores_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    dataset = _dataset(tmp_path)
    every_core = structs.replace(QUICK, epochs=2, checkpoint_every_s=1e-9, n_threads=0)
    for n_cores, resumed in [(1, False), (1, True), (2, False)]:
        monkeypatch.setattr("os.cpu_count", lambda n_cores=n_cores: n_cores)
        target = tmp_path / f"bundle-{n_cores}-{resumed}"
        trained = _train(tmp_path, dataset, ModelConfig(hidden=(4,)), every_core, target=target)
        assert (trained.resumed_at is not None) == resumed


_WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=sys.argv[1])

sys.meta_path.insert(0, NotInstalled())
from tests_of_train import ModelConfig, _dataset, _train
from modelyard.errors import MissingExtra
folder = Path(sys.argv[3])
try:
    _train(folder, _dataset(folder), ModelConfig(kind=sys.argv[2]))
except MissingExtra as exc:
    print(exc)
"""


@pytest.mark.parametrize(
    ("package", "kind", "extra"),
    [("torch", "network", "torch"), ("safetensors", "network", "torch"), ("lightgbm", "lightgbm", "train")],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, package: str, kind: str, extra: str) -> None:
    (tmp_path / "tests_of_train.py").write_text(Path(__file__).read_text())
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, package, kind, str(tmp_path)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == (
        f"model.kind = \"{kind}\" needs {package}, which is not installed; run: pip install 'modelyard[{extra}]'\n"
    )


_YARD = """
name = "delay"

[data]
path = "rows.parquet"
label = "y"

[model]
kind = "network"
hidden = [16]
dropout = 0.2

[fit]
epochs = 150
patience = 150
batch_size = 32
n_threads = 1
checkpoint_every_s = 0.05
"""


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    """And ends with the model of one that was not killed, byte for byte."""
    pytest.importorskip("torch")
    _table().drop(columns="minutes").to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "yard.toml").write_text(_YARD)
    command = [sys.executable, "-m", "modelyard", "train", "yard.toml", "--output"]
    victim = subprocess.Popen([*command, "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        checkpoint = _await_checkpoint(tmp_path, victim)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert not (tmp_path / "killed").exists()
    assert checkpoint.exists()
    resumed = subprocess.run([*command, "resumed"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "went on from the checkpoint at epoch" in resumed.stderr
    subprocess.run([*command, "whole", "--fresh"], cwd=tmp_path, check=True, capture_output=True)
    graphs = [(tmp_path / folder / "model.onnx").read_bytes() for folder in ("resumed", "whole")]
    assert graphs[0] == graphs[1]
    spent = read_bundle(tmp_path / "resumed").manifest.lineage.spent
    assert spent is not None


def _await_checkpoint(folder: Path, victim: "subprocess.Popen[bytes]") -> Path:
    """Return the first checkpoint that appears."""
    while victim.poll() is None:
        found = list(folder.rglob("checkpoints/delay.safetensors"))
        if found:
            return found[0]
    raise AssertionError("the training ended before it wrote a checkpoint")


def test_the_environment_names_versions_and_the_revision_is_that_of_the_users_project(tmp_path: Path) -> None:
    assert environment()["numpy"] == np.__version__
    assert code_revision(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "project").mkdir()
    project = tmp_path / "project"
    (project / "own.py").write_text("x = 1\n")
    for arguments in (["init", "-q"], ["add", "own.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], cwd=project, check=True, capture_output=True)
    revision = code_revision(project)
    assert revision is not None
    assert len(revision) == 40
    (project / "own.py").write_text("x = 2\n")
    code_revision.cache_clear()
    assert code_revision(project) == f"{revision}-dirty"
