"""Paths inside a bundle: relative, "/" between parts, never out of the folder, never through a link."""

import os
import stat
from pathlib import Path, PurePosixPath

from modelyard.errors import MissingFile, UnsafePath


def safe_relative(text: str, source: str) -> str:
    """Return `text` normalised, or raise UnsafePath when it is absolute, climbs with `..`, or is not a plain path."""
    path = PurePosixPath(text)
    if (
        not text
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in text
        or ":" in text
        or "\0" in text
        or str(path) == "."
    ):
        raise UnsafePath(
            f"{source}: path {text!r} leaves the bundle or is not plain; use a relative path without '..'", path=text
        )
    return str(path)


def regular_file(root: Path, relative: str) -> os.stat_result:
    """Return the status of `root/relative`, or raise when it is missing, not a regular file, or reached through a link."""
    current = root
    parts = PurePosixPath(relative).parts
    for part in parts:
        current = current / part
        try:
            status = current.lstat()
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise MissingFile(
                f"{root / relative}: listed in the manifest but missing; fetch the bundle again", path=relative
            ) from exc
        if stat.S_ISLNK(status.st_mode):
            raise UnsafePath(f"{current}: is a link; replace it by the file itself", path=relative)
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePath(f"{root / relative}: is not a regular file; replace it by one", path=relative)
    return status
