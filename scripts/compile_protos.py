"""Compile the .proto files of the gRPC front end into the one file that the server reads.

    pip install grpcio-tools        # at development time only
    python scripts/compile_protos.py [--check]

Writes src/modelyard/inference/serve/protocols/protos/descriptors.binpb, a serialized google.protobuf.FileDescriptorSet; with --check it
only says whether that file is up to date.
"""

import argparse
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent.parent / "src/modelyard/inference/serve/protocols/protos"
COMPILED = PROTOS / "descriptors.binpb"


def compiled() -> bytes:
    """Return the descriptors of all .proto files below PROTOS, each behind those it imports."""
    from grpc_tools import protoc

    sources = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.binpb"
        code = protoc.main(
            ["protoc", f"--proto_path={PROTOS}", f"--descriptor_set_out={out}", "--include_imports", *sources]
        )
        if code != 0:
            raise SystemExit(code)
        return out.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the file is out of date")
    options = parser.parse_args()
    descriptors = compiled()
    if options.check:
        current = COMPILED.exists() and COMPILED.read_bytes() == descriptors
        print(f"{COMPILED.name} is {'up to date' if current else 'out of date; run python scripts/compile_protos.py'}")
        return 0 if current else 1
    COMPILED.write_bytes(descriptors)
    print(f"{COMPILED.name}: {len(descriptors)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
