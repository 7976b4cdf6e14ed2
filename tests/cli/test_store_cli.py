"""`modelyard store` on a real folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelyard.cli.main import cli
from modelyard.errors import NotInStore
from modelyard.testing.bundles import late_bundle


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["store", *map(str, args)])


def test_from_publishing_to_a_tag_and_its_history(tmp_path: Path) -> None:
    store, bundle = tmp_path / "store", late_bundle(tmp_path / "b").path
    assert run("publish", store, bundle).stdout == "late version 1\n"
    assert json.loads(run("publish", store, bundle, "--json").stdout)["version"] == 2
    assert run("publish", store, bundle, "--name", "other").stdout == "other version 1\n"
    assert run("tag", store, "late", "challenger", 2).stdout == "late challenger is version 2\n"
    assert run("tag", store, "late", "champion", 1, "--reason", "the first").exit_code == 0
    assert json.loads(run("tag", store, "late", "champion", "challenger", "--json").stdout)["version"] == 2
    assert run("list", store).stdout == "late  versions 1, 2  (challenger 2, champion 2)\nother  versions 1\n"
    models = json.loads(run("list", store, "--json").stdout)["models"]
    assert models[0] == {"name": "late", "versions": [1, 2], "tags": {"challenger": 2, "champion": 2}}
    lines = run("history", store, "late", "champion").stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("the first")
    records = json.loads(run("history", store, "late", "champion", "--json").stdout)["records"]
    assert [record["version"] for record in records] == [1, 2]


def test_an_empty_store_is_said_to_be_empty_and_a_missing_one_to_be_missing(tmp_path: Path) -> None:
    result = run("list", tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no models yet" in result.stderr
    assert isinstance(run("list", tmp_path / "typo").exception, NotInStore)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tag", "STORE", "late", "champion", "9"), "no version 9; there are versions 1"),
        (("tag", "STORE", "early", "champion", "1"), "no model 'early'; there are late"),
        (("history", "STORE", "late", "champion"), "no tag 'champion'"),
        (("publish", "STORE", "STORE"), "bundle.json"),
        (("publish", "STORE", "BUNDLE", "--name", "../up"), "choose such a name"),
    ],
)
def test_mistakes_end_in_2_with_one_line(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    places = {"STORE": tmp_path / "store", "BUNDLE": late_bundle(tmp_path / "b").path}
    run("publish", places["STORE"], places["BUNDLE"])
    command = [sys.executable, "-m", "modelyard", "store", *(str(places.get(arg, arg)) for arg in args)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert len(ran.stderr.splitlines()) == 1
    assert message in ran.stderr


@pytest.mark.parametrize("command", [(), ("list",), ("publish",), ("tag",), ("history",)])
def test_help_has_a_description(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert not command or "Examples:" in result.stdout
