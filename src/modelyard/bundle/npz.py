""".npz archives from strangers: plain arrays only, sizes checked before allocation, no pickle.

Written uncompressed with fixed dates, so that equal arrays give equal bytes.
"""

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.errors import TooLarge, UnsafeArchive

_EPOCH = (1980, 1, 1, 0, 0, 0)
_PLAIN_KINDS = "biufU"


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` by name; strings must be of NumPy's fixed-width "U" type or objects that are all str."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            plain = np.asarray(array.astype(np.str_) if array.dtype == object else array)
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(plain).reshape(plain.shape), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH), buffer.getvalue())


def read_npz(path: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, NDArray[Any]]:
    """Return the arrays of `path` by name.

    Raises:
        UnsafeArchive: not a zip, a pickle inside, a duplicate or foreign member, damaged data.
        TooLarge: more bytes than allowed once unpacked, or an array declared larger than its member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > limits.max_archive_bytes:
                raise TooLarge(
                    f"{path}: unpacks to {total} bytes, the limit is {limits.max_archive_bytes}; "
                    "this looks like a decompression bomb; raise the limit if it is not",
                    size_bytes=total,
                )
            names = [member.filename for member in members]
            if len(set(names)) != len(names):
                raise UnsafeArchive(f"{path}: two members have the same name; write the archive again")
            return {member.filename.removesuffix(".npy"): _read_member(archive, member, path) for member in members}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as exc:
        raise UnsafeArchive(f"{path}: not a readable .npz archive ({exc}); fetch the bundle again") from exc


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    where = f"{path}: {member.filename}"
    if not member.filename.endswith(".npy") or "/" in member.filename or "\\" in member.filename:
        raise UnsafeArchive(f"{where}: not an array of this format; write the archive again")
    with archive.open(member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran_order, dtype = read_header(stream)
        except (KeyError, ValueError) as exc:
            raise UnsafeArchive(f"{where}: not a plain .npy array ({exc}); write the archive again") from exc
        if dtype.kind not in _PLAIN_KINDS:
            raise UnsafeArchive(f"{where}: has dtype {dtype}; only booleans, numbers and text are read, never pickles")
        declared = math.prod(shape) * dtype.itemsize
        if declared > member.file_size:
            raise TooLarge(
                f"{where}: declares {declared} bytes, the member holds {member.file_size}; write the archive again"
            )
        data = stream.read(declared + 1)
    if len(data) != declared:
        raise UnsafeArchive(
            f"{where}: holds {len(data)} bytes of data where the header says {declared}; write the archive again"
        )
    flat = np.frombuffer(data, dtype=dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()
