"""Where a model comes from, for its lineage: the versions at work and the commit of the user's project."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

_RECORDED_PACKAGES = (
    "modelyard",
    "numpy",
    "onnx",
    "onnxruntime",
    "scikit-learn",
    "lightgbm",
    "torch",
    "skl2onnx",
    "pandas",
)


def environment() -> dict[str, str]:
    """Return the versions that a result depends on, as far as they are installed."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_revision(root: Path) -> str | None:
    """Return the git commit of `root`, "-dirty" behind it where files differ from it; None outside of git."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
