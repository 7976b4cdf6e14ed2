"""The command line of the serving benchmark, as far as it goes without measuring."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_section_that_is_not_there_is_refused_with_those_that_are() -> None:
    command = [sys.executable, "-m", "bench.serve", "--only", "tiny-json,tiny-jsno"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "tiny-jsno; there are tiny-json, tiny-binary, mid, overload, version-load, footprint, synthetic" in done.stderr
    )
