""".npz archives from strangers: plain arrays only, sizes checked before allocation, no pickle.

Written uncompressed with fixed dates, so that equal arrays give equal bytes.
"""

import ast
import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.errors import BundleError, TooLarge, UnsafeArchive

_EPOCH = (1980, 1, 1, 0, 0, 0)
_DTYPE = re.compile(r"[<>|][biufU][0-9]{1,9}")
_HEADER_LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
_MAX_HEADER_BYTES = 10_000
_MAX_RANK = 32
_ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
"""What a zip begins with: its first member, or its end where it is empty."""


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
        if path.stat().st_size > limits.max_archive_bytes:
            raise TooLarge(
                f"{path}: {path.stat().st_size} bytes, the limit is {limits.max_archive_bytes}; raise the limit"
            )
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            _require_pure(stream, members, path)
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
    except BundleError:
        raise
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError, OverflowError
    ) as exc:  # fmt: skip
        raise UnsafeArchive(f"{path}: not a readable .npz archive ({exc}); fetch the bundle again") from exc


def _require_pure(stream: IO[bytes], members: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """A zip is found from its end, so that a file of another kind may stand before it and be read as that kind elsewhere."""
    stream.seek(0)
    signature = stream.read(4)
    if signature not in _ZIP_SIGNATURES or min((member.header_offset for member in members), default=0) != 0:
        raise UnsafeArchive(f"{path}: holds other data before the archive; write the archive again")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    where = f"{path}: {member.filename}"
    if not member.filename.endswith(".npy") or "/" in member.filename or "\\" in member.filename:
        raise UnsafeArchive(f"{where}: not an array of this format; write the archive again")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnsafeArchive(f"{where}: compression {member.compress_type} is not read; store or deflate it")
    with archive.open(member) as stream:
        dtype, fortran_order, shape = _read_header(stream, where)
        declared = math.prod(shape) * dtype.itemsize
        if max(declared, dtype.itemsize) > member.file_size:
            raise TooLarge(
                f"{where}: declares {declared} bytes as {dtype} of shape {shape}, the member holds {member.file_size}; "
                "write the archive again"
            )
        data = stream.read(declared + 1)
    if len(data) != declared:
        raise UnsafeArchive(
            f"{where}: holds {len(data)} bytes of data where the header says {declared}; write the archive again"
        )
    flat = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "U":
        codes = np.frombuffer(data, dtype=np.dtype("u4").newbyteorder(dtype.byteorder))
        if codes.size and (codes.max() > 0x10FFFF or np.any((codes >= 0xD800) & (codes <= 0xDFFF))):
            raise UnsafeArchive(f"{where}: text that is no Unicode; write the archive again")
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()


def _read_header(stream: IO[bytes], where: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """Read the header of an .npy, versions 1.0 and 2.0, literally as NumPy writes it: nothing is guessed or evaluated.

    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    n_length_bytes = _HEADER_LENGTH_BYTES.get(stream.read(8))
    if n_length_bytes is None:
        raise UnsafeArchive(f"{where}: not an .npy array of version 1.0 or 2.0; write the archive again")
    n_header_bytes = int.from_bytes(stream.read(n_length_bytes), "little")
    if n_header_bytes > _MAX_HEADER_BYTES:
        raise UnsafeArchive(f"{where}: a header of {n_header_bytes} bytes is no array's; write the archive again")
    try:
        header = ast.literal_eval(stream.read(n_header_bytes).decode("ascii").strip())
        descr, fortran_order, shape = header["descr"], header["fortran_order"], header["shape"]
        if not isinstance(descr, str) or not _DTYPE.fullmatch(descr):
            raise UnsafeArchive(
                f"{where}: has dtype {descr!r}; only booleans, numbers and text are read, never pickles; write the archive again"
            )
        if not isinstance(fortran_order, bool) or not isinstance(shape, tuple):
            raise TypeError("fortran_order and shape must be a boolean and a tuple")
        if len(header) != 3 or len(shape) > _MAX_RANK or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError("shape must be a short tuple of sizes, and nothing may follow it")
        return np.dtype(descr), fortran_order, shape
    except UnsafeArchive:
        raise
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError) as exc:
        raise UnsafeArchive(f"{where}: not a plain .npy header ({exc}); write the archive again") from exc
