"""`modelyard bundle` on real bundles."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import Bundle, write_bundle
from modelyard.bundle.jsonfile import write_digested
from modelyard.bundle.store import LocalStore
from modelyard.cli.main import cli
from modelyard.errors import GoldenCaseFailed, TruncatedFile
from modelyard.testing.bundles import late_bundle, late_cases, late_content

V1 = Path(__file__).parents[1] / "fixtures" / "bundle-v1"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["bundle", *map(str, args)])


def process(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelyard", "bundle", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lying_bundle(path: Path) -> Bundle:
    """Write a bundle whose golden cases no machine can confirm."""
    cases = late_cases()
    outputs = {**cases.outputs, "probability": np.zeros(6, np.float32)}
    return write_bundle(path, replace(late_content(), cases=CaseSet(inputs=cases.inputs, outputs=outputs)))


def test_show_prints_a_readable_page() -> None:
    result = run("show", V1)
    assert result.exit_code == 0
    for part in (
        "late: classification",
        "c9ba842365114304df088a905a03e451a04fae286a9eb3a53c13bdb88ea73398",
        "input   delay        FP32      [batch]  nullable; min",
        "output  label        BYTES     [batch]  labels late, on_time",
        "ai.onnx.ml:LabelEncoder × 1",
        "accuracy 0.7500 [0.5000, 0.9000]",
        "golden cases  6, held-out",
        "an example, 2 cores",
    ):
        assert part in result.stdout


def test_show_prints_one_document_for_machines() -> None:
    document = json.loads(run("show", V1, "--json").stdout)
    assert document["manifest"]["name"] == "late"
    assert document["digest"] == document["manifest"]["digest"]
    assert document["graph"]["operators"]["ai.onnx:Sigmoid"] == 1
    assert document["size_bytes"] == sum(entry["size_bytes"] for entry in document["manifest"]["files"])


def test_verify_prints_a_line_per_check_and_runs_the_golden_cases() -> None:
    result = run("verify", V1)
    assert result.exit_code == 0
    lines = [line.split()[:2] for line in result.stdout.splitlines()[1:]]
    assert all(word == "ok" for word, _ in lines)
    assert [check for _, check in lines][:4] == ["bundle.json", "model.onnx", "cases.npz", "reference.npz"]
    assert "answers  agree on onnxruntime" in result.stdout
    assert "answers" not in run("verify", V1, "--no-run").stdout


def test_verify_takes_versions_of_a_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    bundle = late_bundle(tmp_path / "b")
    store.publish(bundle.path)
    store.publish(bundle.path)
    ran = process("verify", "--json", tmp_path / "store" / "late" / "1", tmp_path / "store" / "late" / "2")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert [(found["ok"], Path(found["path"]).name) for found in document["bundles"]] == [(True, "1"), (True, "2")]


def test_a_damaged_bundle_ends_in_2(tmp_path: Path) -> None:
    bundle = late_bundle(tmp_path / "b")
    (bundle.path / "model.onnx").write_bytes(b"")
    ran = process("verify", bundle.path)
    assert ran.returncode == 2
    assert "error: " in ran.stderr
    assert "model.onnx" in ran.stderr
    assert isinstance(run("verify", bundle.path).exception, TruncatedFile)


def test_other_answers_end_in_1_and_are_told_to_machines_too(tmp_path: Path) -> None:
    bundle = lying_bundle(tmp_path / "b")
    ran = process("verify", bundle.path, "--json")
    assert ran.returncode == 1
    document = json.loads(ran.stdout)["bundles"][0]
    assert (document["ok"], document["error"]["kind"]) == (False, "GoldenCaseFailed")
    assert run("verify", bundle.path, "--no-run").exit_code == 0
    assert isinstance(run("verify", bundle.path).exception, GoldenCaseFailed)


def with_contributed_operator(path: Path) -> Bundle:
    from onnx import helper, load_from_string

    content = late_content()
    assert isinstance(content.model, bytes)
    model = load_from_string(content.model)
    model.graph.node.append(helper.make_node("Run", ["delay"], ["ran"], domain="their.ops"))
    model.opset_import.append(helper.make_opsetid("their.ops", 1))
    return write_bundle(path, replace(content, model=model.SerializeToString(), extra_domains=("their.ops",)))


@pytest.mark.parametrize("command", ["show", "verify"])
def test_consent_to_a_domain_is_asked_for_and_taken(tmp_path: Path, command: str) -> None:
    bundle = with_contributed_operator(tmp_path / "b")
    options = ["--no-run"] if command == "verify" else []
    ran = process(command, bundle.path, *options)
    assert (ran.returncode, "--allow-domain their.ops" in ran.stderr) == (2, True)
    assert run(command, bundle.path, *options, "--allow-domain", "their.ops").exit_code == 0


def test_diff_of_equal_bundles_is_silent_and_ends_in_0(tmp_path: Path) -> None:
    late_bundle(tmp_path / "b")
    ran = process("diff", V1, tmp_path / "b")
    assert (ran.returncode, ran.stdout) == (0, "")
    assert json.loads(run("diff", V1, V1, "--json").stdout)["equal"] is True


def test_diff_names_fields_and_files_and_ends_in_1(tmp_path: Path) -> None:
    late_bundle(tmp_path / "b", name="later", weight=0.5)
    ran = process("diff", V1, tmp_path / "b")
    assert ran.returncode == 1
    assert "name" in ran.stdout
    assert "later" in ran.stdout
    result = run("diff", V1, tmp_path / "b", "--json")
    assert result.exit_code == 1
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["fields"] == {"name": {"a": "late", "b": "later"}}
    assert set(document["files"]) == {"model.onnx", "cases.npz", "reference.npz"}
    assert document["files"]["model.onnx"]["a"] != document["files"]["model.onnx"]["b"]


@pytest.mark.parametrize("command", [(), ("show",), ("verify",), ("diff",)])
def test_help_has_a_description(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert not command or "Examples:" in result.stdout


FORGED = "fine\n  ok  answers\x1b[2K\x9b1A\u202e"


def test_text_of_a_bundle_moves_no_cursor_and_forges_no_lines(tmp_path: Path) -> None:
    from msgspec import structs

    content = late_content()
    lineage = structs.replace(content.lineage, notes=(FORGED,), made_by=FORGED, environment={FORGED: FORGED})
    inputs = (
        structs.replace(content.signature.inputs[0], unit=FORGED, description=FORGED),
        content.signature.inputs[1],
    )
    signature = structs.replace(content.signature, inputs=inputs)
    bundle = write_bundle(tmp_path / "b", replace(content, description=FORGED, lineage=lineage, signature=signature))
    for ran in (process("show", bundle.path), process("show", bundle.path, "--json"), process("diff", V1, bundle.path)):
        assert "ok  answers" in ran.stdout
        assert not {"\x1b", "\x9b", "\u202e"} & set(ran.stdout)
        assert not any(line.startswith("  ok  answers") for line in ran.stdout.splitlines())


def test_an_error_that_quotes_a_bundle_stays_on_its_line(tmp_path: Path) -> None:
    bundle = late_bundle(tmp_path / "b")
    data = json.loads((bundle.path / "bundle.json").read_text())
    write_digested(bundle.path / "bundle.json", data | {FORGED: 1})
    ran = process("show", bundle.path)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert not {"\x1b", "\x9b", "\u202e"} & set(ran.stderr)
