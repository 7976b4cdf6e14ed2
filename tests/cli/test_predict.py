"""`modelyard predict`: files of every kind in, the same answers out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import BundleContent, write_bundle
from modelyard.bundle.manifest import Lineage, Signature, TensorSpec
from modelyard.bundle.reference import summarise
from modelyard.testing.bundles import late_bundle, late_cases

CSV = """delay,origin,dest,label
0,EWR,LAX,late
30,JFK,SFO,late
-12,LGA,,on_time
,JFK,"a, b",on_time
5,,LAX,late
0,ORD,LAX,on_time
"""
LABELS = late_cases().outputs["label"].tolist()
ROWS: list[dict[str, Any]] = [
    {"delay": 0, "origin": "EWR"},
    {"delay": 30.0, "origin": "JFK"},
    {"delay": -12, "origin": "LGA"},
    {"delay": None, "origin": "JFK"},
    {"delay": 5},
    {"delay": 0, "origin": "ORD"},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return late_bundle(tmp_path_factory.mktemp("bundle") / "late").path


def predict(*arguments: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "modelyard", "predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def labels(done: "subprocess.CompletedProcess[str]") -> list[str]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["label"] for line in done.stdout.splitlines()]


def test_csv_in_csv_out_with_extra_columns_left_out_and_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(CSV)
    done = predict(bundle, tmp_path / "rows.csv")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header == "probability,label"
    assert [line.split(",")[1] for line in lines] == LABELS
    assert "left out what the model does not take: dest, label" in done.stderr


@pytest.mark.parametrize("kind", ["list.json", "instances.json", "rows.jsonl", "arrays.npz", "table.parquet"])
def test_every_kind_of_file_gives_the_same_answers(bundle: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "list.json":
        path.write_text(json.dumps(ROWS))
    elif kind == "instances.json":
        path.write_text(json.dumps({"instances": ROWS}))
    elif kind == "rows.jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif kind == "arrays.npz":
        inputs = late_cases().inputs
        np.savez(path, delay=inputs["delay"].astype(np.float64), origin=inputs["origin"].astype(np.str_))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({name: [row.get(name) for row in ROWS] for name in ("delay", "origin")})
        parquet.write_table(table, path)
    assert labels(predict(bundle, path)) == LABELS


def test_limit_reads_only_the_first_rows(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(CSV + "not a number,EWR,,\n")
    assert labels(predict(bundle, tmp_path / "rows.csv", "--limit", 2, "--format", "jsonl")) == LABELS[:2]


def test_a_long_file_is_answered_in_batches(bundle: Path, tmp_path: Path) -> None:
    header, *lines = CSV.splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text(header + "".join(lines) * 700)
    assert labels(predict(bundle, tmp_path / "rows.csv", "--format", "jsonl")) == LABELS * 700


def test_output_is_whole_or_not_there(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(CSV)
    output = tmp_path / "answers.jsonl"
    done = predict(bundle, tmp_path / "rows.csv", "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in output.read_text().splitlines()] == LABELS
    summary = json.loads(done.stdout)
    assert (summary["n_samples"], summary["output"]) == (6, str(output))

    (tmp_path / "bad.csv").write_text(CSV + "x,EWR,,\n")
    before = output.read_bytes()
    assert predict(bundle, tmp_path / "bad.csv", "--output", output).returncode == 2
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "bad.csv", "rows.csv"]


def test_json_prints_one_document(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    document = json.loads(predict(bundle, tmp_path / "rows.json", "--json").stdout)
    assert [row["label"] for row in document["predictions"]] == LABELS
    assert document["n_samples"] == 6


def test_a_reader_that_has_had_enough_is_no_error(bundle: Path, tmp_path: Path) -> None:
    header, *lines = CSV.splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text(header + "".join(lines) * 5000)
    read, write = os.pipe()
    command = [sys.executable, "-m", "modelyard", "predict", str(bundle), str(tmp_path / "rows.csv")]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, stderr = process.communicate()
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.csv", CSV + "ten,EWR,,\n", ["line 8", "'delay'", "'ten'", "FP32"]),
        ("rows.csv", CSV + "1_000,EWR,,\n", ["line 8", "'1_000'"]),
        ("rows.csv", CSV + "inf,EWR,,\n", ["line 8", "inf"]),
        ("rows.csv", CSV + "1,EWR\n", ["line 8", "2 cells", "4"]),
        ("rows.csv", "", ["is empty"]),
        ("rows.csv", "delay,origin\n", ["no rows"]),
        ("rows.csv", "delay,delay\n1,2\n", ["'delay' stands twice"]),
        ("rows.json", "{}", ["list of rows"]),
        ("rows.json", "[{]", ["not valid JSON"]),
        ("rows.json", '[{"delay": "ten"}]', ["row 0", "'delay'", "'ten'"]),
        ("rows.jsonl", '{"delay": 1}\n{"delay": true}\n', ["line 2", "'delay'", "True"]),
        ("rows.jsonl", '{"delay": 1}\n{"delay"\n', ["line 2", "not valid JSON"]),
        ("rows.npy", "text", ["not an array file"]),
        ("rows.txt", "text", ["'.txt'", ".csv"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    bundle: Path, tmp_path: Path, name: str, text: str, words: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    done = predict(bundle, tmp_path / name)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert all(word in error for word in [name, *words]), error
    assert "Traceback" not in done.stderr


def test_a_pickle_in_an_array_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done = predict(bundle, tmp_path / "rows.npy")
    assert done.returncode == 2
    assert "without pickles" in done.stderr


def test_a_missing_bundle_or_file_is_named(bundle: Path, tmp_path: Path) -> None:
    for arguments in ([tmp_path / "no-bundle", tmp_path], [bundle, tmp_path / "no-rows.csv"]):
        done = predict(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "no-" in done.stderr


def doubling(path: Path, datatype: Any, *row_shape: int) -> Path:
    """A bundle whose model doubles its one input "X"."""
    names = {"FP32": 1, "UINT8": 2}
    specs = [TensorSpec(name=name, datatype=datatype, shape=("batch", *row_shape)) for name in ("X", "Y")]
    infos = [helper.make_tensor_value_info(spec.name, names[datatype], ["batch", *row_shape]) for spec in specs]
    graph = helper.make_graph([helper.make_node("Add", ["X", "X"], ["Y"])], "doubling", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = np.ones((2, *row_shape), dtype=specs[0].numpy_dtype)
    signature, cases = Signature(inputs=(specs[0],), outputs=(specs[1],)), CaseSet({"X": x}, {"Y": x + x})
    content = BundleContent(
        name="doubling",
        task="other",
        signature=signature,
        model=model.SerializeToString(),
        cases=cases,
        reference=summarise(cases.inputs, cases.outputs, signature),
        cases_origin="samples",
        lineage=Lineage(created_at="2026-11-24T00:00:00+00:00", made_by="import"),
    )
    return write_bundle(path, content).path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_columns_are_the_rows_of_a_model_that_takes_one_matrix(tmp_path: Path, kind: str) -> None:
    """In the file's order, with a note."""
    rows = [{"b": 1.0, "a": 2.0, "c": 3.0}, {"b": 4.0, "a": 5.5, "c": 6.0}]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text("b,a,c\n1,2,3\n4,5.5,6\n")
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    done = predict(doubling(tmp_path / "bundle", "FP32", 3), path, "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["Y"] for line in done.stdout.splitlines()] == [[2, 4, 6], [8, 11, 12]]
    assert "note: 'X' is made of the columns in their order: b, a, c" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "rows.csv",
            "a,b,c,left\n1,2,3,no\n",
            "this model takes one matrix of 3 numbers per row ('X'); the file has 4 columns: a, b, c, left; give 3 numeric "
            "columns or a .npy of shape (rows, 3)",
        ),
        ("rows.csv", "a\n1\n", "the file has 1 column: a; give 3"),
        ("rows.csv", "a,b,c\n1,two,3\n", "line 2, column 'X'[1] must be a finite number (FP32), got 'two'"),
        (
            "rows.json",
            '[{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "d": 3}]',
            "row 1: has the columns a, b, d, the first row",
        ),
    ],
)
def test_columns_that_are_no_row_of_the_matrix_are_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    done = predict(doubling(tmp_path / "bundle", "FP32", 3), tmp_path / name)
    assert done.returncode == 2
    assert says in done.stderr


def test_images_may_lack_their_channel_axis(tmp_path: Path) -> None:
    images = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    np.save(tmp_path / "images.npy", images)
    done = predict(doubling(tmp_path / "bundle", "UINT8", 4, 3, 1), tmp_path / "images.npy")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line)["Y"] for line in done.stdout.splitlines()]
    assert answers == (images * 2).reshape(2, 4, 3, 1).tolist()


@pytest.mark.parametrize("kind", ["folder", "image.png"])
def test_images_are_told_how_they_become_rows(tmp_path: Path, kind: str) -> None:
    """And what is told works."""
    pillow = pytest.importorskip("PIL.Image")
    bundle = doubling(tmp_path / "bundle", "UINT8", 4, 3, 1)
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    else:
        pillow.fromarray(np.full((8, 6, 3), 7, dtype=np.uint8)).save(path)
    done = predict(bundle, path)
    assert done.returncode == 2
    said, _, code = done.stderr.strip().partition(" is made of images by: ")
    assert f"{kind}: is a{' folder' if kind == 'folder' else 'n image'}; give one file of rows" in said
    assert said.endswith("An .npy of shape (rows, 4, 3, 1)")
    if kind == "image.png":
        script = f"paths = ['image.png']; {code}"
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
        done = predict(bundle, tmp_path / "images.npy")
        assert json.loads(done.stdout)["Y"] == np.full((4, 3, 1), 14).tolist()


def test_a_missing_value_where_training_had_none_is_told_so(tmp_path: Path) -> None:
    bundle = doubling(tmp_path / "bundle", "FP32", 1)
    (tmp_path / "rows.csv").write_text('X\n1\n""\n')
    done = predict(bundle, tmp_path / "rows.csv")
    assert done.returncode == 2
    assert "column 'X' is missing and may not be, since the model never saw missing values there" in done.stderr


def test_parquet_without_pyarrow_asks_for_pyarrow_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    script = (
        "import sys; sys.modules['pyarrow'] = None; from modelyard.cli.main import main; "
        f"sys.argv = ['modelyard', 'predict', {str(doubling(tmp_path / 'bundle', 'FP32', 3))!r}, "
        f"{str(tmp_path / 'rows.parquet')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install pyarrow")
