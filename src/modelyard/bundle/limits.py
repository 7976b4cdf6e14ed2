"""How large the parts of a bundle may be; checked before anything is allocated."""

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """Upper bounds for a bundle from a stranger; raise them for models that are meant to be larger."""

    max_manifest_bytes: int = 4 * MIB
    max_file_bytes: int = 2 * GIB
    """For any one file; ONNX itself holds no more than 2 GiB without external data."""
    max_bundle_bytes: int = 16 * GIB
    max_tensor_bytes: int = 2 * GIB
    max_archive_bytes: int = 256 * MIB
    """Of an .npz once unpacked."""
    max_files: int = 1000
    max_graph_fields: int = 4_000_000
    """Protobuf fields of a model.onnx: an empty node takes 2 bytes in the file and a hundred in memory."""


DEFAULT_LIMITS = Limits()
