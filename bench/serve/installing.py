"""Brings what the benchmark needs and does not find: the peers' virtual environments, wrk, perf_analyzer, our own generator.

What is there is left as it is, so that a second run costs nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .places import HERE, OPEN_LOOP, PERF, VENVS
from .turns import say

# The current perf_analyzer wheel wants glibc 2.38; that of tritonclient 2.41.0 carries a binary which runs on glibc 2.36.
_PERF_WHEELS = ("tritonclient==2.41.0", "nvidia-cuda-runtime-cu12==12.9.79")


def install(venvs: Iterable[str], *, perf_analyzer: bool) -> None:
    """Install what is missing; `venvs` are names in requirements/, and empty for what needs none."""
    for name in sorted(set(venvs) - {""}):
        _venv(name)
    if not shutil.which("wrk"):
        _debian("wrk")
    source = HERE / "open_loop.c"
    if not OPEN_LOOP.exists() or OPEN_LOOP.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(OPEN_LOOP), str(source), "-lm"], check=True)
    if perf_analyzer and not any(PERF.rglob("perf_analyzer")):
        _perf_analyzer()


def version(venv: str) -> str:
    """Return the first requirement of a virtual environment, which is its server, as installed: "mosec 0.9.8"."""
    requirements = (HERE / "requirements" / f"{venv}.txt").read_text().splitlines()
    package = next(re.split(r"[\[=<>]", line)[0] for line in requirements if line and not line.startswith("#"))
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    done = subprocess.run([VENVS / venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {done.stdout.strip()}"


def _venv(name: str) -> None:
    folder, requirements = VENVS / name, HERE / "requirements" / f"{name}.txt"
    python = folder / "bin" / "python"
    if python.exists():
        return
    say(f"installing {name} into {folder}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    done = subprocess.run([str(python), "-m", "pip", "install", "-qq", "--requirement", str(requirements)], check=False)
    if done.returncode:
        shutil.rmtree(folder)
        raise SystemExit(f"{name} could not be installed from {requirements}; see above")


def _debian(*packages: str) -> None:
    say(f"installing {', '.join(packages)} with apt-get")
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"install {', '.join(packages)} first: the benchmark needs it and may not install it itself")
    subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["apt-get", "install", "-y", "-q", *packages], check=True, stdout=subprocess.DEVNULL)


def _perf_analyzer() -> None:
    say(f"installing perf_analyzer into {PERF}")
    _debian("libb64-0d")
    PERF.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", wheels]
        subprocess.run([*pip, *_PERF_WHEELS], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(PERF)
    for binary in PERF.rglob("perf_analyzer"):
        binary.chmod(0o755)
