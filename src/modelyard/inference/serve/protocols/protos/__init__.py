"""The protocol buffers of the gRPC front end: the .proto files beside this one, compiled into descriptors.binpb.

Classes are made from the descriptors in a pool of our own, so that a process which also imports tritonclient or kserve, each
with its own idea of `inference.ModelInferRequest`, has no clash. `scripts/compile_protos.py` compiles.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.protobuf.descriptor_pool import DescriptorPool

COMPILED = Path(__file__).with_name("descriptors.binpb")


@functools.cache
def file_descriptors() -> "FileDescriptorSet":
    """Return the descriptors of all files, each behind those it imports."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    return FileDescriptorSet.FromString(COMPILED.read_bytes())


@functools.cache
def pool() -> "DescriptorPool":
    """Return the pool all classes are made in."""
    from google.protobuf.descriptor_pool import DescriptorPool

    made = DescriptorPool()
    for file in file_descriptors().file:
        made.AddSerializedFile(file.SerializeToString())
    return made


@functools.cache
def message(full_name: str) -> Any:
    """Return the class of a message, e.g. "inference.ModelInferRequest"."""
    from google.protobuf.message_factory import GetMessageClass

    return GetMessageClass(pool().FindMessageTypeByName(full_name))
