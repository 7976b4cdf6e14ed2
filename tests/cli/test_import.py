"""`modelyard import`: an ONNX file → a bundle that verifies, by the real command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from modelyard.bundle.format import read_bundle
from modelyard.inference.runtime import open_engine


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


def test_samples_in_columns_become_the_one_matrix_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,c\n" + "".join(f"{i},{i + 1},{i + 2}\n" for i in range(10)))

    done = modelyard(
        "import", save(tmp_path / "m.onnx", linear()), "--name", "linear", "--output", tmp_path / "bundle",
        "--samples", tmp_path / "rows.csv",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "note: 'x' is made of the columns in their order: a, b, c" in done.stderr
    wanted = {(float(i), float(i + 1), float(i + 2)) for i in range(10)}
    assert {tuple(row) for row in read_bundle(tmp_path / "bundle").cases().inputs["x"].tolist()} <= wanted


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


def graph(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> ModelProto:
    """Return a model of these nodes; inputs and outputs are (name, element type, shape)."""
    takes, gives = ([helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs))
    made = helper.make_graph(nodes, "graph", takes, gives)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


NODE = helper.make_node
REFUSED = {
    "random": (
        graph([NODE("RandomNormalLike", ["x"], ["y"])], [("x", 1, ["n", 3])], [("y", 1, ["n", 3])]),
        "answers the same rows differently each time",
    ),
    "total": (
        graph([NODE("ReduceSum", ["x"], ["y"], keepdims=0)], [("x", 1, ["n", 3])], [("y", 1, [])]),
        "output 'y' is one number for all rows",
    ),
    "negative-axis": (graph([NODE("Abs", ["x"], ["y"])], [("x", 1, ["n", -1])], [("y", 1, ["n", 3])]), "axis 1 of input 'x' is -1"),
    "empty-axis": (graph([NODE("Abs", ["x"], ["y"])], [("x", 1, ["n", 0])], [("y", 1, ["n", 0])]), "holds no values"),
    "gigabytes": (
        graph([NODE("Abs", ["x"], ["y"])], [("x", 1, ["n", 2**28])], [("y", 1, ["n", 2**28])]),
        "would take 17179869184 bytes",
    ),
    "terabytes": (
        graph([NODE("Abs", ["x"], ["y"])], [("x", 1, ["n", 2**40])], [("y", 1, ["n", 2**40])]),
        "axis 1 of input 'x' is 1099511627776",
    ),
    "other-columns": (
        graph([NODE("Concat", ["x", "x"], ["y"], axis=1)], [("x", 1, ["n", "k"])], [("y", 1, ["n", 5])]),
        "is declared as FP32 ['batch', 5], and the model answers float32 of shape [16, 16]",
    ),
    "other-rank": (
        graph(
            [NODE("Shape", ["x"], ["s"]), NODE("Reshape", ["x", "s"], ["y"])], [("x", 1, ["n", 3])], [("y", 1, ["n"])]
        ),
        "output 'y' is declared as FP32 ['batch']",
    ),
    "other-rows": (
        graph([NODE("Concat", ["x", "x"], ["y"], axis=0)], [("x", 1, ["n", 3])], [("y", 1, ["m", 3])]),
        "has 32 rows for 16 rows of input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_could_not_be_served_is_refused_and_leaves_nothing_behind(tmp_path: Path, case: str) -> None:
    model, says = REFUSED[case]

    done = modelyard("import", save(tmp_path / "m.onnx", model), "--name", "m", "--output", tmp_path / "out")

    assert done.returncode == (1 if case == "random" else 2), done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    "model",
    [
        graph([NODE("Abs", ["x"], ["y"])], [("x", 1, [])], [("y", 1, [])]),
        graph([NODE("Identity", ["x"], ["y"])], [("x", 8, [])], [("y", 8, [])]),
        graph([NODE("Mul", ["x", "t"], ["y"])], [("x", 1, ["n", 3]), ("t", 1, [])], [("y", 1, ["n", 3])]),
        graph([NODE("ReduceSum", ["x"], ["y"], keepdims=0)], [("x", 1, [4, 3])], [("y", 1, [])]),
        graph(
            [NODE("MatMul", ["x", "w"], ["y"])], [("x", 1, ["N", 2]), ("w", 1, ["M", 2, 2])], [("y", 1, ["M", "N", 2])]
        ),
    ],
    ids=["scalar", "one-text", "rows-and-scalar", "total-of-one-call", "two-first-axes"],
)
def test_a_model_without_a_batch_is_run_as_one_call(tmp_path: Path, model: ModelProto) -> None:
    done = modelyard("import", save(tmp_path / "m.onnx", model), "--name", "m", "--output", tmp_path / "out")

    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "out")
    open_engine(bundle).close()
    assert len(bundle.reference()) >= 2


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    done = modelyard(
        "import", save(tmp_path / "m.onnx", linear()), "--name", "m", "--output", tmp_path / "file" / "out"
    )

    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"error: {tmp_path / 'file'}" in done.stderr
