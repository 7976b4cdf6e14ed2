"""Files of bundles from strangers, by atheris: `python fuzz/bundles.py KIND [libFuzzer options] [CORPUS]`.

KIND is graph (model.onnx), npz, manifest (bundle.json) or profile (profile.json). Whatever the bytes, the reader returns or
raises a BundleError. The corpus starts with the files of a small good bundle.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["modelyard"]):
    from modelyard.bundle.format import read_bundle
    from modelyard.bundle.graph import read_graph
    from modelyard.bundle.jsonfile import BLANK
    from modelyard.bundle.npz import read_npz
    from modelyard.bundle.profile import read_profiles
    from modelyard.errors import BundleError
    from modelyard.testing.bundles import late_bundle

_MEMORY = Path("/dev/shm")
folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None))
bundle = late_bundle(folder / "bundle").path


def signed(data: bytes) -> bytes:
    """Return a manifest whose digest is right, where it has one to fill in: else nothing behind the digest is ever reached."""
    blank = BLANK.encode()
    if blank not in data:
        return data
    return data.replace(blank, hashlib.sha256(data).hexdigest().encode(), 1)


def graph(data: bytes) -> None:
    path = folder / "model.onnx"
    path.write_bytes(data)
    read_graph(path)


def npz(data: bytes) -> None:
    path = folder / "arrays.npz"
    path.write_bytes(data)
    read_npz(path)


def manifest(data: bytes) -> None:
    (bundle / "bundle.json").write_bytes(signed(data))
    read = read_bundle(bundle)
    read.cases()
    read.reference()


def profile(data: bytes) -> None:
    path = folder / "profile.json"
    path.write_bytes(signed(data))
    read_profiles(path)


READERS: dict[str, tuple[Callable[[bytes], None], str]] = {
    "graph": (graph, "model.onnx"),
    "npz": (npz, "cases.npz"),
    "manifest": (manifest, "bundle.json"),
    "profile": (profile, "bundle.json"),
}


def seeds(name: str) -> list[bytes]:
    raw = (bundle / name).read_bytes()
    if name != "bundle.json":
        return [raw]
    # Its own digest is in the text: blank, it is filled in again for every mutant.
    start = raw.index(b'"', raw.index(b":", raw.index(b'"digest"'))) + 1
    return [raw, raw[:start] + BLANK.encode() + raw[start + len(BLANK) :]]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"give one of these kinds: {', '.join(READERS)}")
    read, seed = READERS[sys.argv.pop(1)]

    def fuzz_one_input(data: bytes) -> None:
        with suppress(BundleError):
            read(data)

    for corpus in map(Path, sys.argv[1:]):
        if corpus.is_dir():
            for number, raw in enumerate(seeds(seed)):
                (corpus / f"seed-{number}").write_bytes(raw)
    atheris.Setup(sys.argv, fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
