"""Modules are drawn with a free batch axis, answer as they did, and are left as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402  # after torch, which is optional

from modelyard import import_model  # noqa: E402
from modelyard.bundle.format import Bundle  # noqa: E402
from modelyard.errors import ConfigError, DataError, ExportError  # noqa: E402
from modelyard.training.export import run_graph  # noqa: E402
from modelyard.training.importers.torch import export_module  # noqa: E402
from modelyard.training.networks import ImageNetwork, TableNetwork  # noqa: E402

X = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)


def _network(n_outputs: int, *more: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(TableNetwork(5, (8,), n_outputs, dropout=0.5), *more)


def _import(module: nn.Module, samples: Any, folder: Path, **more: Any) -> Bundle:
    return import_model(module, samples=samples, name="network", target=folder / "bundle", **more)


def _raw(module: nn.Module, x: Any) -> Any:
    with torch.no_grad():
        return module.eval()(torch.as_tensor(x)).numpy()


def _answers(bundle: Bundle, x: Any) -> Any:
    return run_graph(bundle.model_path.read_bytes())({"input": x})


@pytest.mark.parametrize("n", [1, 2, 7])
def test_an_exported_module_takes_any_number_of_rows(n: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, size=(7, 8, 8, 3), dtype=np.uint8)
    module = ImageNetwork(torch.full((3,), 0.5), torch.full((3,), 0.2), (4, 8), 3, dropout=0.1)
    model = export_module(module, pixels[:2])
    (out,) = run_graph(model.SerializeToString())({"x": pixels[:n]}).values()
    np.testing.assert_allclose(out, _raw(module, pixels[:n]), rtol=1e-4, atol=1e-5)
    assert not model.functions
    assert b"test_torch.py" not in model.SerializeToString()


def test_without_labels_the_output_is_served_as_it_is(tmp_path: Path) -> None:
    module = _network(3)
    module.train()
    bundle = _import(module, X, tmp_path)
    assert module.training
    assert module[0].layers[2].training  # type: ignore[index]  # its dropout
    assert bundle.manifest.task == "other"
    assert [(spec.name, spec.shape) for spec in bundle.signature.outputs] == [("output", ("batch", 3))]
    np.testing.assert_allclose(_answers(bundle, X)["output"], _raw(module, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "samples", [X, X.astype(np.float64), torch.from_numpy(X)], ids=["float32", "float64", "tensor"]
)
def test_logits_with_labels_get_a_softmax_and_a_label(tmp_path: Path, samples: Any) -> None:
    module = _network(3)
    bundle = _import(module, samples, tmp_path, labels=["a", "b", "c"])
    answers = _answers(bundle, X)
    logits = torch.from_numpy(_raw(module, X))
    np.testing.assert_allclose(answers["probabilities"], logits.softmax(1).numpy(), rtol=1e-5, atol=1e-5)
    assert answers["label"].tolist() == [("a", "b", "c")[i] for i in logits.argmax(1)]
    assert "taken for logits" in bundle.manifest.lineage.notes[1]


def test_probabilities_with_labels_stay_as_they_are(tmp_path: Path) -> None:
    module = _network(2, nn.Softmax(1))
    bundle = _import(module, X, tmp_path, labels=[0, 1])
    np.testing.assert_allclose(_answers(bundle, X)["probabilities"], _raw(module, X), rtol=1e-5, atol=1e-5)
    assert len(bundle.manifest.lineage.notes) == 1


def test_one_float_a_row_is_a_regression(tmp_path: Path) -> None:
    module = _network(1)
    bundle = _import(module, X[:1], tmp_path)
    assert bundle.manifest.task == "regression"
    np.testing.assert_allclose(_answers(bundle, X)["prediction"], _raw(module, X)[:, 0], rtol=1e-5, atol=1e-5)


def test_a_module_in_float64_takes_float64(tmp_path: Path) -> None:
    bundle = _import(_network(2).double(), X, tmp_path, labels=["a", "b"])
    assert bundle.signature.inputs[0].datatype == "FP64"
    assert bundle.signature.output("probabilities").datatype == "FP32"


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    tokens = np.random.default_rng(0).integers(0, 10, size=(20, 3))
    bundle = _import(module, tokens, tmp_path)
    assert (bundle.signature.inputs[0].datatype, bundle.signature.inputs[0].shape) == ("INT64", ("batch", 3))


class _Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        if self.kind == "two":
            return x, x
        if self.kind == "whole":
            return x.mean()
        if self.kind == "branch":
            return x if float(x.sum()) > 0 else -x
        return x - x.mean(dim=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two", r"_Odd answers 40 rows with tuple; it must return one tensor"),
        ("whole", r"_Odd answers 40 rows with \[\]; it must return one tensor"),
        ("branch", r"torch cannot export _Odd: "),
        ("mates", r"_Odd answers a row differently beside other rows"),
    ],
)
def test_a_module_that_no_server_could_run_is_refused_with_the_reason(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        _import(_Odd(kind), X, tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_samples_and_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"Sequential cannot answer samples of float32 \[40, 3\]: .*; give rows as the module"
    ):
        _import(_network(2), X[:, :3], tmp_path)
    with pytest.raises(DataError, match=r"samples must be an array of numbers .* got dtype <U1"):
        _import(_network(2), np.array(["a", "b"]), tmp_path)
    with pytest.raises(DataError, match="samples has no rows"):
        _import(_network(2), X[:0], tmp_path)
    with pytest.raises(ConfigError, match=r"labels must name each column .* got \['a', 'b'\] for float32 \['n', 3\]"):
        _import(_network(3), X, tmp_path, labels=["a", "b"])
    with pytest.raises(ConfigError, match=r'task = "regression" needs one float per row'):
        _import(_network(3), X, tmp_path, task="regression")


class Noisy(nn.Module):
    """Adds noise to every answer."""

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = torch.randn_like(x)
        return x + noise


def test_a_module_that_answers_otherwise_each_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Noisy answers sample 0 differently each time"):
        _import(Noisy(), X, tmp_path)
    assert not list(tmp_path.iterdir())
