"""The whole walk by the real commands, on small real data: train, run, compress."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes

from modelyard.bundle.format import read_bundle
from modelyard.bundle.store import LocalStore


def modelyard(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelyard", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    cells = load_breast_cancer(as_frame=True)
    table = cells.data.rename(columns=lambda name: name.replace(" ", "_"))
    table["diagnosis"] = cells.target.map({0: "malignant", 1: "benign"})
    table.to_csv(tmp_path / "cells.csv", index=False)
    configure(tmp_path, 'kind = "lightgbm"\nparameters = { n_estimators = 20 }')
    return tmp_path


def configure(folder: Path, model: str) -> None:
    (folder / "yard.toml").write_text(
        f'name = "cells"\n[data]\npath = "cells.csv"\nlabel = "diagnosis"\n[model]\n{model}\n[fit]\nepochs = 3\n'
        '[targets]\nmetric = "accuracy"\nkeep = 0.9\nlatency_p99_s = 1.0\n'
    )


def document(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_publishes_serves_and_asks_every_held_out_row(project: Path) -> None:
    result = document(modelyard("run", "--json", folder=project))

    assert result["served"]["n_rows"] == 113
    assert result["served"]["worst_difference"] <= 1e-5
    store = LocalStore(project / "store")
    assert store.versions("cells") == (1,)
    assert store.tags("cells") == {"champion": 1}
    assert json.loads((project / "work" / "reports" / "run.json").read_text()) == result
    # Trees have nothing that int8 could quantize; the walk says so and goes on with the parent.
    assert [candidate["verdict"] for candidate in result["compression"]["candidates"]] == [None, None]
    assert "no Conv" in result["compression"]["candidates"][0]["reason"]


def test_run_ends_in_a_table_and_where_everything_is(project: Path) -> None:
    done = modelyard("run", folder=project)

    assert done.returncode == 0, done.stderr
    for piece in (
        "accuracy on test rows, 95 % interval",
        "p99, one row, one thread",
        "rows/s, best batch, one thread",
        "compute of 1 million rows, one by one",
        "linear baseline",
    ):
        assert piece in done.stdout
    assert f"modelyard serve {project / 'store'}" in done.stdout
    assert "target of 1000 ms at p99: met by these 113 requests" in done.stdout


def test_a_worse_model_does_not_take_the_champions_place(project: Path) -> None:
    document(modelyard("run", "--json", folder=project))
    configure(project, 'kind = "lightgbm"\nparameters = { n_estimators = 1, num_leaves = 2, learning_rate = 0.01 }')

    result = document(modelyard("run", "--json", folder=project))

    assert result["champion"]["version"] == 1
    assert result["variants"][-1]["version"] == 2
    assert LocalStore(project / "store").tags("cells") == {"champion": 1}


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ('metric = "rmse"', r"\[targets\] metric = 'rmse'"),
        ('metric = "auc"\npositive = "sick"', r"\[targets\] positive = 'sick'.*benign"),
    ],
)
def test_targets_that_cannot_be_scored_are_found_before_the_fit(project: Path, targets: str, says: str) -> None:
    text = (project / "yard.toml").read_text()
    (project / "yard.toml").write_text(text.partition("[targets]")[0] + f"[targets]\n{targets}\n")

    done = modelyard("train", folder=project)

    assert done.returncode == 2
    assert re.search(says, done.stderr)
    assert "fit lightgbm" not in done.stderr


def test_run_takes_a_quantity_to_a_served_number(tmp_path: Path) -> None:
    patients = load_diabetes(as_frame=True)
    patients.data.assign(progression=patients.target).to_csv(tmp_path / "patients.csv", index=False)
    (tmp_path / "yard.toml").write_text(
        'name = "patients"\n[data]\npath = "patients.csv"\nlabel = "progression"\n[model]\nkind = "linear"\n'
    )

    result = document(modelyard("run", "--json", folder=tmp_path))

    assert result["variants"][0]["scores"][0]["metric"] == "rmse"
    assert result["served"]["n_rows"] == result["variants"][0]["scores"][0]["n_samples"]
    # Many times the rounding of float32 on labels of hundreds, and still far below any use of the number.
    assert result["served"]["worst_difference"] < 1e-3


def test_train_then_compress_a_network(project: Path) -> None:
    configure(project, 'kind = "network"\nhidden = [256, 256]')
    trained = document(modelyard("train", "--output", "bundle", "--json", folder=project))

    done = modelyard("compress", "bundle", "--output", "child", "--json", folder=project)

    result = json.loads(done.stdout)
    assert done.returncode == (0 if result["accepted"] else 1)
    assert (project / "child").exists() == bool(result["accepted"])
    static = next(c for c in result["candidates"] if c["technique"] == "static-int8")
    assert read_bundle(Path(project / static["bundle"])).manifest.lineage.parent == trained["digest"]


def test_compress_refuses_rows_the_bundle_may_have_been_trained_on(project: Path) -> None:
    document(modelyard("train", "--output", "bundle", "--json", folder=project))
    with (project / "yard.toml").open("a") as config:
        config.write("[split]\nseed = 1\n")

    done = modelyard("compress", "bundle", folder=project)

    assert done.returncode == 2
    assert "seed 0', here" in done.stderr  # the two splits, told apart
    assert "may be training rows" in done.stderr


def test_check_only_reports_and_trains_nothing(project: Path) -> None:
    done = modelyard("train", "--check-only", folder=project)

    assert done.returncode == 0, done.stderr
    assert "mean_radius" in done.stdout
    assert not (project / "work" / "bundles").exists()


def test_data_errors_stop_the_run_before_training(project: Path) -> None:
    rows = (project / "cells.csv").read_text().splitlines()
    rows[3] = rows[3].rpartition(",")[0] + ","  # a missing label
    (project / "cells.csv").write_text("\n".join(rows))

    done = modelyard("run", folder=project)

    assert done.returncode == 2
    assert "diagnosis" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "store" / "cells").exists()
