"""Paths inside a bundle: relative, "/" between parts, never out of the folder, never through a link."""

import os
import stat
from pathlib import Path, PurePosixPath

from modelyard.errors import MissingFile, UnsafePath

# No operating system's separators, drives or wildcards. onnxruntime reads the location "*/_ORT_MEM_ADDR_/*" as an address
# in memory, so "*" is more than a matter of taste.
_NOT_PLAIN = frozenset('\\:*?"<>|')


def safe_relative(text: str, source: str) -> str:
    """Return `text` normalised, or raise UnsafePath when it is absolute, climbs with `..`, or is not a plain path."""
    path = PurePosixPath(text)
    if not text.isprintable() or _NOT_PLAIN & set(text) or path.is_absolute() or ".." in path.parts or not path.parts:
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
        except OSError as exc:
            raise MissingFile(
                f"{root / relative}: needed but cannot be found ({exc.strerror}); fetch the bundle again", path=relative
            ) from exc
        if stat.S_ISLNK(status.st_mode):
            raise UnsafePath(f"{current}: is a link; replace it by the file itself", path=relative)
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePath(f"{root / relative}: is not a regular file; replace it by one", path=relative)
    return status
