"""Public clients, unmodified, against a real server: those whose dependencies are kept out of the test environment.

A virtual environment is built for them once, in the ignored folder .venv-clients.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROBABILITIES = [0.83548355, 0.34864515]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client_python() -> Path:
    python = ROOT / ".venv-clients" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    requirements = HERE / "requirements.txt"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
    return python


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("clients") / "store"
    shutil.copytree(ROOT / "tests" / "fixtures" / "bundle-v1", store / "late" / "1")
    command = [sys.executable, "-m", "modelyard", "serve", str(store), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.wait(timeout=30)


def ask(python: Path, script: str, *arguments: str) -> Any:
    done = subprocess.run([str(python), str(HERE / script), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kserves_inference_client_is_answered_over_v2_and_v1(client_python: Path, server: str) -> None:
    told = ask(client_python, "ask_with_kserve.py", server)
    assert told["live"]
    assert told["ready"]
    assert told["model_ready"]
    assert told["v2"] == {"probability": pytest.approx(PROBABILITIES), "label": ["late", "on_time"]}
    assert told["id"] == "a1"
    assert [row["probability"] for row in told["v1"]] == pytest.approx(PROBABILITIES)


def test_a_client_of_tensorflow_serving_is_answered(client_python: Path, server: str) -> None:
    told = ask(client_python, "ask_with_ovmsclient.py", server.removeprefix("http://"))
    assert told["status"] == {"1": "AVAILABLE"}
    signature = told["metadata"]["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["delay"]["dtype"] == "DT_FLOAT"
    assert told["answer"]["probability"] == pytest.approx(PROBABILITIES)
    assert told["answer"]["label"] == ["late", "on_time"]
