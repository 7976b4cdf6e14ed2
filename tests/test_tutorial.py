"""docs/tutorial.md, followed literally: its shell blocks are run in order, in one shell, as a new user would."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_every_command_of_the_tutorial_works(tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE)
    # The PATH is this test's own, and the port is free here where 8123 may not be.
    steps = [block for block in blocks if "export PATH" not in block]
    script = "set -eum\n" + "\n".join(steps).replace("8123", str(free_port()))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(steps) == len(blocks) - 1
    assert "mean_radius" in done.stdout  # the data report
    assert "accuracy on test rows, 95 % interval" in done.stdout  # the closing table
    assert '"name":"cells"' in done.stdout.replace(" ", "")  # the server's metadata
    assert "malignant" in done.stdout.splitlines()[-1] or "benign" in done.stdout.splitlines()[-1]  # a prediction
