"""How the command line ends when the system says no: one line on stderr, a code, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.testing.bundles import late_bundle

V1 = Path(__file__).parents[1] / "fixtures" / "bundle-v1"
COMMAND = [sys.executable, "-m", "modelyard"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "bundle", "show", str(V1)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device; make room or choose another place\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, "bundle", "show", str(V1)], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    bundle = late_bundle(tmp_path / "b").path
    done = subprocess.run(
        [*COMMAND, "store", "publish", str(tmp_path / "store"), str(bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'store'}")
    assert len(done.stderr.splitlines()) == 1
