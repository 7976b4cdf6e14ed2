"""`modelyard import`: an ONNX file → a bundle that verifies, by the real command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from modelyard.bundle.format import read_bundle
from modelyard.inference.runtime._base import open_engine


def modelyard(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelyard", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def save(path: Path, model: ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def linear(*, batch: str | int = "n", n_classes: int = 2, operator: str = "Gemm", domain: str = "") -> ModelProto:
    weights = np.random.default_rng(0).normal(size=(3, n_classes)).astype(np.float32)
    nodes = [
        helper.make_node(operator, ["x", "w"], ["logits"], domain=domain),
        helper.make_node("Softmax", ["logits"], ["p"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", 1, [batch, 3])],
        [helper.make_tensor_value_info("p", 1, [batch, n_classes])],
        [numpy_helper.from_array(weights, "w")],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def test_without_samples_the_golden_cases_are_generated_and_say_so(tmp_path: Path) -> None:
    done = modelyard(
        "import", save(tmp_path / "m.onnx", linear()), "--name", "linear", "--store", tmp_path / "store", "--json"
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    bundle = read_bundle(tmp_path / "store" / "linear" / "1")
    assert bundle.manifest.cases.origin == "generated"
    assert bundle.signature.inputs[0].shape == ("batch", 3)
    open_engine(bundle)  # its golden cases pass


def test_samples_become_golden_cases_and_reference_statistics(tmp_path: Path) -> None:
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.save(tmp_path / "rows.npy", rows)

    done = modelyard(
        "import", save(tmp_path / "m.onnx", linear()), "--name", "linear", "--output", tmp_path / "bundle",
        "--samples", tmp_path / "rows.npy", "--labels", "no,yes",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.manifest.cases.origin == "samples"
    assert bundle.manifest.task == "classification"
    assert bundle.signature.outputs[0].labels == ("no", "yes")
    assert {tuple(row) for row in bundle.cases().inputs["x"]} <= {tuple(row) for row in rows}
    assert bundle.reference()["input:x:0"].n_samples == 10


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    done = modelyard(
        "import", save(tmp_path / "m.onnx", linear(batch=1)), "--name", "one", "--output", tmp_path / "bundle"
    )

    assert done.returncode == 0, done.stderr
    assert read_bundle(tmp_path / "bundle").signature.inputs[0].shape == (1, 3)


def test_a_graph_that_looks_over_the_batch_is_marked(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ReduceMax", ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])],
        "batchwise",
        [helper.make_tensor_value_info("x", 1, ["n", 3])],
        [helper.make_tensor_value_info("y", 1, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    done = modelyard("import", save(tmp_path / "m.onnx", model), "--name", "b", "--output", tmp_path / "bundle")

    assert "one row at a time" in done.stdout
    bundle = read_bundle(tmp_path / "bundle")
    assert not bundle.manifest.rows_independent
    open_engine(bundle)


def test_external_data_comes_along(tmp_path: Path) -> None:
    import onnx

    (tmp_path / "m").mkdir()
    onnx.save_model(
        linear(), tmp_path / "m" / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )

    done = modelyard("import", tmp_path / "m" / "m.onnx", "--name", "linear", "--output", tmp_path / "bundle")

    assert done.returncode == 0, done.stderr
    assert "weights.bin" in [entry.path for entry in read_bundle(tmp_path / "bundle").manifest.files]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "m"], "--store"),
        (["--name", "a/b", "--output", "OUT"], "name"),
        (["--name", "m", "--output", "OUT", "--labels", "a,b,c"], "--labels names 3 classes"),
        (["--name", "m", "--output", "OUT", "--samples", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path: Path, arguments: list[str], says: str) -> None:
    model = save(tmp_path / "m.onnx", linear())

    done = modelyard("import", model, *(str(tmp_path / "out") if word == "OUT" else word for word in arguments))

    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_foreign_operator_needs_consent(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", linear(operator="Secret", domain="org.example"))

    done = modelyard("import", model, "--name", "m", "--output", tmp_path / "out")

    assert done.returncode == 2
    assert "--allow-domain org.example" in done.stderr


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("not a model")

    done = modelyard("import", tmp_path / "m.onnx", "--name", "m", "--output", tmp_path / "out")

    assert done.returncode == 2
    assert "not an ONNX model" in done.stderr
