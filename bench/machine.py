"""What every benchmark prints first: where, with what, at which commit; and how it prints a bar that was met or missed."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from modelyard.bundle.profile import fingerprint

ROOT = Path(__file__).resolve().parent.parent


def heading(title: str, *packages: str) -> None:
    """Print the title, the machine, the versions of `packages` and the commit."""
    hardware = fingerprint("")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("modelyard", *packages))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"\n{title}")
    print(f"  {hardware.processor}, {os.cpu_count()} cores, {' '.join(hardware.features)}")
    print(f"  Python {platform.python_version()}, {versions}")
    print(f"  commit {commit.stdout.strip() or 'unknown'}{' with changes' if changed.stdout.strip() else ''}")


def bar(text: str, met: bool) -> bool:
    """Print one bar with its figure; return whether it was met."""
    print(f"  {'met   ' if met else 'MISSED'}  {text}")
    return met
