"""An ONNX file read as data: its signature, operators, weights and external files. Nothing is run.

The file is parsed with protobuf, which onnxruntime brings, so that the bare install needs no `onnx` package. The handful of
message fields below are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); everything else in a
file is carried over unread.
"""

import functools
import math
import struct
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import structs

from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.bundle.manifest import ALLOWED_DOMAINS, BATCH, NUMPY_DTYPES, Signature, TensorSpec
from modelyard.bundle.paths import safe_relative
from modelyard.errors import (
    ForbiddenOperator,
    MalformedGraph,
    MissingExtra,
    MissingFile,
    SignatureMismatch,
    TooLarge,
    UnsafePath,
)

DEFAULT_DOMAIN = "ai.onnx"
EXTERNAL = 1
"""TensorProto.DataLocation of a tensor whose bytes lie in another file."""
INT64 = 7
"""TensorProto.DataType of shapes."""
MAX_RANK = 64
MAX_AXIS = 2**31 - 1
"""The longest axis that a manifest can hold."""
_SMALL_BYTES = 2**22  # cannot unpack to much, whatever is in it
_KEPT_BYTES = 8 * MAX_RANK  # of raw_data: what a constant shape takes
_WINDOW_BYTES = 2**16
_MAX_FIELD_HEADER_BYTES = 20  # two varints
_RAW_BYTES = 2**29 - 1  # the number of a field of our own, the highest there is

# TensorProto.DataType: number → (our datatype or None where a signature cannot carry it, bits per element).
_ELEMENT_TYPES: dict[int, tuple[str | None, int]] = {
    1: ("FP32", 32), 2: ("UINT8", 8), 3: ("INT8", 8), 4: ("UINT16", 16), 5: ("INT16", 16), 6: ("INT32", 32),
    7: ("INT64", 64), 8: ("BYTES", 8), 9: ("BOOL", 8), 10: ("FP16", 16), 11: ("FP64", 64), 12: ("UINT32", 32),
    13: ("UINT64", 64), 14: (None, 64), 15: (None, 128), 16: ("BF16", 16), 17: (None, 8), 18: (None, 8), 19: (None, 8),
    20: (None, 8), 21: (None, 4), 22: (None, 4), 23: (None, 4), 24: (None, 8), 25: (None, 2), 26: (None, 2),
}  # fmt: skip

# message → {field: (number, kind)}; kind is a scalar type or a message name, "*" behind it marks a repeated field. Text is
# read as bytes and decoded here, so that bad UTF-8 is our error and not the library's.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {
        "ir_version": (1, "int64"), "producer_name": (2, "bytes"), "producer_version": (3, "bytes"),
        "graph": (7, "Graph"), "opset_import": (8, "OperatorSet*"), "training_info": (20, "bytes*"),
        "functions": (25, "Function*"),
    },
    "OperatorSet": {"domain": (1, "bytes"), "version": (2, "int64")},
    "Graph": {
        "node": (1, "Node*"), "initializer": (5, "Tensor*"), "input": (11, "ValueInfo*"), "output": (12, "ValueInfo*"),
        "sparse_initializer": (15, "SparseTensor*"),
    },
    "Node": {
        "input": (1, "bytes*"), "output": (2, "bytes*"), "op_type": (4, "bytes"), "attribute": (5, "Attribute*"),
        "domain": (7, "bytes"),
    },
    "Attribute": {
        "name": (1, "bytes"), "ints": (8, "int64*"), "t": (5, "Tensor"), "g": (6, "Graph"),
        "tensors": (10, "Tensor*"), "graphs": (11, "Graph*"),
        "sparse_tensor": (22, "SparseTensor"), "sparse_tensors": (23, "SparseTensor*"),
    },
    "Tensor": {
        "dims": (1, "int64*"), "data_type": (2, "int32"), "float_data": (4, "float*"), "int32_data": (5, "int32*"),
        "string_data": (6, "bytes*"), "int64_data": (7, "int64*"), "name": (8, "bytes"), "raw_data": (9, "bytes"),
        "double_data": (10, "double*"), "uint64_data": (11, "uint64*"), "external_data": (13, "Entry*"),
        "data_location": (14, "int32"),
    },
    "SparseTensor": {"values": (1, "Tensor"), "indices": (2, "Tensor"), "dims": (3, "int64*")},
    "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
    "ValueInfo": {"name": (1, "bytes"), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "TensorType")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "Dimension*")},
    "Dimension": {"dim_value": (1, "int64"), "dim_param": (2, "bytes")},
    "Function": {"name": (1, "bytes"), "node": (7, "Node*"), "domain": (10, "bytes")},
}  # fmt: skip

Constants = ChainMap[bytes, tuple[int, ...] | None]
"""Tensor name → its values where it is a constant that can be a shape; inner graphs see those of outer ones."""


@dataclass(frozen=True)
class Graph:
    """What an ONNX file contains, as far as a bundle cares."""

    signature: Signature
    operators: Mapping[str, int]
    """Operator as "domain:Type" → how often, subgraphs and functions included."""
    opsets: Mapping[str, int]
    weight_bytes: int
    """Bytes of all constant tensors: initializers and those in attributes, external ones included."""
    external_files: tuple[str, ...] = ()
    producer: str = ""

    @property
    def domains(self) -> frozenset[str]:
        return frozenset(operator.rpartition(":")[0] for operator in self.operators)


def read_graph(
    path: Path,
    *,
    listed: Iterable[str] | None = None,
    extra_domains: Iterable[str] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> Graph:
    """Return what the ONNX file at `path` contains, after checking that it is safe to load.

    Args:
        path: the file; external data is looked for beside it.
        listed: names of files that external data may lie in; None allows any regular file beside the model.
        extra_domains: operator domains the caller consents to beyond ai.onnx, ai.onnx.ml and com.microsoft.

    Raises:
        MalformedGraph, ForbiddenOperator, UnsafePath, MissingFile, TooLarge, SignatureMismatch.
    """
    size_bytes = path.stat().st_size
    if size_bytes > limits.max_file_bytes:
        raise TooLarge(
            f"{path}: {size_bytes} bytes, the limit is {limits.max_file_bytes}; keep large weights as external data or raise the limit"
        )
    weights_cut = size_bytes > _SMALL_BYTES
    raw = _without_weights(path, limits.max_graph_fields) if weights_cut else path.read_bytes()
    message = _messages(weights_cut=weights_cut)["Model"]()
    try:
        message.ParseFromString(raw)
    except Exception as exc:  # google.protobuf.message.DecodeError; the name is not importable without protobuf
        raise MalformedGraph(f"{path}: not an ONNX model ({exc}); export it again") from exc
    if not message.HasField("graph") or not message.opset_import:
        raise MalformedGraph(f"{path}: no graph or no operator set in it; export it again as an ONNX model")
    return _Reader(path, listed, frozenset((*ALLOWED_DOMAINS, *extra_domains)), limits).read(message)


@dataclass
class _Reader:
    path: Path
    listed: Iterable[str] | None
    allowed: frozenset[str]
    limits: Limits
    operators: Counter[str] = field(default_factory=Counter)
    external: dict[str, None] = field(default_factory=dict)
    weight_bytes: int = 0
    functions: frozenset[tuple[str, str]] = frozenset()

    def read(self, model: Any) -> Graph:
        if model.training_info:
            raise ForbiddenOperator(f"{self.path}: contains training steps; export the inference graph only")
        self.functions = frozenset((_domain(f.domain), self.text(f.name)) for f in model.functions)
        self.walk_graph(model.graph, ChainMap())
        for function in model.functions:
            self.walk_nodes(function.node, ChainMap())
        initialized = {bytes(tensor.name) for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if bytes(value.name) not in initialized]
        if not inputs or not model.graph.output:
            raise SignatureMismatch(
                f"{self.path}: the graph has no inputs or no outputs; nothing can be served from it"
            )
        return Graph(
            signature=self.signature(inputs, list(model.graph.output)),
            operators=dict(sorted(self.operators.items())),
            opsets={_domain(opset.domain): opset.version for opset in model.opset_import},
            weight_bytes=self.weight_bytes,
            external_files=tuple(self.external),
            producer=f"{self.text(model.producer_name)} {self.text(model.producer_version)}".strip(),
        )

    def walk_graph(self, graph: Any, outer: Constants) -> None:
        """Check a graph whose nodes may also use the constants of the graphs around it."""
        constants = outer.new_child()
        for tensor in graph.initializer:
            self.check_tensor(tensor)
            constants[bytes(tensor.name)] = self.as_shape(tensor)
        for sparse in graph.sparse_initializer:
            self.check_sparse(sparse)
        self.walk_nodes(graph.node, constants)

    def walk_nodes(self, nodes: Iterable[Any], constants: Constants) -> None:
        for node in nodes:
            domain, op_type = _domain(node.domain), self.text(node.op_type)
            if domain not in self.allowed and (domain, op_type) not in self.functions:
                raise ForbiddenOperator(
                    f"{self.path}: operator {op_type!r} of domain {domain!r} is not allowed "
                    f"(allowed: {', '.join(sorted(self.allowed))}); consent with --allow-domain {domain} if you trust it",
                    domain=domain,
                    operator=op_type,
                )
            if op_type == "EPContext":
                raise ForbiddenOperator(
                    f"{self.path}: operator 'EPContext' runs a compiled blob that nobody can check; export the plain graph",
                    domain=domain,
                    operator=op_type,
                )
            self.operators[f"{domain}:{op_type}"] += 1
            for attribute in node.attribute:
                for tensor in (*_present(attribute, "t"), *attribute.tensors):
                    self.check_tensor(tensor)
                    if op_type == "Constant":
                        constants.update({bytes(output): self.as_shape(tensor) for output in node.output})
                if op_type == "Constant" and attribute.ints:
                    constants.update({bytes(output): tuple(attribute.ints[: MAX_RANK + 1]) for output in node.output})
                for sparse in (*_present(attribute, "sparse_tensor"), *attribute.sparse_tensors):
                    self.check_sparse(sparse)
                for subgraph in (*_present(attribute, "g"), *attribute.graphs):
                    self.walk_graph(subgraph, constants)
            self.check_expansion(op_type, node, constants)

    def check_tensor(self, tensor: Any) -> None:
        """A constant must fit the bytes that are there for it, and the limit."""
        name = self.text(tensor.name) or "a constant"
        if tensor.data_type not in _ELEMENT_TYPES:
            raise MalformedGraph(
                f"{self.path}: tensor {name!r} has unknown data type {tensor.data_type}; export it again"
            )
        datatype, bits = _ELEMENT_TYPES[tensor.data_type]
        n_elements = self.n_elements(tensor.dims, name)
        n_bytes = math.ceil(n_elements * bits / 8)
        if n_bytes > self.limits.max_tensor_bytes:
            raise TooLarge(
                f"{self.path}: tensor {name!r} declares {n_bytes} bytes, the limit is {self.limits.max_tensor_bytes}; "
                "raise the limit if the model is meant to be that large"
            )
        if tensor.data_location == EXTERNAL:
            self.check_external(tensor, name, n_bytes)
        elif datatype == "BYTES":
            self.require_elements(name, n_elements, len(tensor.string_data))
        elif tensor.HasField("raw_data"):
            self.require_elements(name, n_bytes, getattr(tensor, "raw_bytes", len(tensor.raw_data)))
        else:
            stored = max(
                len(values)
                for values in (
                    tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data
                )
            )  # fmt: skip
            self.require_elements(name, n_elements, stored * max(1, 8 // bits))
        self.weight_bytes += sum(map(len, tensor.string_data)) if datatype == "BYTES" else n_bytes

    def require_elements(self, name: str, declared: int, stored: int) -> None:
        if declared > stored:
            raise TooLarge(
                f"{self.path}: tensor {name!r} declares {declared} elements or bytes, its file holds {stored}; export the model again",
                declared=declared,
                stored=stored,
            )

    def check_sparse(self, sparse: Any) -> None:
        self.check_tensor(sparse.values)
        self.check_tensor(sparse.indices)
        self.require_dense(sparse.dims, self.text(sparse.values.name) or "a sparse constant")

    def check_external(self, tensor: Any, name: str, n_bytes: int) -> None:
        relative, offset, length = self.external_span(tensor, name, n_bytes)
        if self.listed is not None and relative not in set(self.listed):
            raise UnsafePath(
                f"{self.path}: external data {relative!r} of tensor {name!r} is not a file listed in the manifest; list it"
            )
        file = self.path.parent / relative
        if file.is_symlink() or not file.resolve().is_relative_to(self.path.parent.resolve()):
            raise UnsafePath(f"{file}: external data of tensor {name!r} is a link; replace it by the file itself")
        if not file.is_file():
            raise MissingFile(f"{file}: external data of tensor {name!r} is missing; copy it beside the model")
        available = file.stat().st_size
        if length < n_bytes or offset + length > available:
            raise TooLarge(
                f"{self.path}: tensor {name!r} declares {n_bytes} bytes at {offset} (+{length}) of {relative}, which has {available}; "
                "export the model again",
                declared=n_bytes,
                stored=available,
            )
        self.external[relative] = None

    def external_span(self, tensor: Any, name: str, n_bytes: int) -> tuple[str, int, int]:
        """Return (relative path, offset, length) of a tensor's external data, as the file states them."""
        source = f"{self.path}: external data of tensor {name!r}"
        entries = {self.text(entry.key): self.text(entry.value) for entry in tensor.external_data}
        if len(entries) != len(tensor.external_data):
            raise MalformedGraph(f"{source}: a key stands twice; export the model again")
        numbers = []
        for key, default in (("offset", 0), ("length", n_bytes)):
            text = entries.get(key, str(default))
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise MalformedGraph(f"{source}: {key} must be an integer, got {text[:40]!r}; export the model again")
            numbers.append(int(text))
        return safe_relative(entries.get("location", ""), source), numbers[0], numbers[1]

    def as_shape(self, tensor: Any) -> tuple[int, ...] | None:
        """Return the values of a checked INT64 constant if it can be a shape, wherever they are stored."""
        n_elements = math.prod(tensor.dims)
        if tensor.data_type != INT64 or n_elements > MAX_RANK:
            return None
        if tensor.data_location == EXTERNAL:
            relative, offset, _ = self.external_span(tensor, self.text(tensor.name), 8 * n_elements)
            with (self.path.parent / relative).open("rb") as stream:
                stream.seek(offset)
                raw = stream.read(8 * n_elements)
        elif tensor.HasField("raw_data"):
            raw = bytes(tensor.raw_data)
        else:
            return tuple(tensor.int64_data)
        return struct.unpack(f"<{n_elements}q", raw[: 8 * n_elements])

    def check_expansion(self, op_type: str, node: Any, constants: Constants) -> None:
        """A few bytes can ask for terabytes: a constant size given to an operator that fills memory stays under the limit.

        What a graph computes from its inputs cannot be known without running it.
        """
        position = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}.get(op_type)
        sizes: Iterable[int] | None = None
        if position is not None and len(node.input) > position:
            sizes = constants.get(bytes(node.input[position]))
        elif op_type in ("RandomNormal", "RandomUniform"):
            sizes = next((attribute.ints for attribute in node.attribute if attribute.name == b"shape"), None)
        if sizes is not None:
            # Expand takes -1 for "as it is"; a negative size anywhere is the runtime's to refuse and allocates nothing.
            self.require_dense((max(1, size) if size < 0 else size for size in sizes), f"the result of {op_type}")

    def require_dense(self, dims: Iterable[int], name: str) -> None:
        n_bytes = 4 * self.n_elements(dims, name)
        if n_bytes > self.limits.max_tensor_bytes:
            raise TooLarge(
                f"{self.path}: {name} would take {n_bytes} bytes at four an element, the limit is {self.limits.max_tensor_bytes}; "
                "this looks like an attack on memory; raise the limit if it is not"
            )

    def n_elements(self, dims: Iterable[int], name: str) -> int:
        sizes = list(dims)
        if len(sizes) > MAX_RANK or any(size < 0 for size in sizes):
            raise MalformedGraph(f"{self.path}: {name} has impossible dimensions {sizes[:9]}; export it again")
        return math.prod(sizes)

    def signature(self, inputs: Iterable[Any], outputs: Iterable[Any]) -> Signature:
        """The open first axis is the batch, unless the inputs call theirs by different names: then rows belong to no batch.

        What outputs call theirs counts for nothing: converters name those as they please.
        """
        takes = [self.tensor_spec(value, "input") for value in inputs]
        answers = [self.tensor_spec(value, "output") for value in outputs]
        names = {spec.shape[0] for spec in takes if spec.shape and isinstance(spec.shape[0], str)} - {_unnamed(0)}
        rename = _first_axis_is_batch if len(names) <= 1 else _first_axis_is_no_batch
        return Signature(inputs=tuple(map(rename, takes)), outputs=tuple(map(rename, answers)))

    def tensor_spec(self, value: Any, role: str) -> TensorSpec:
        name = self.text(value.name)
        if not value.HasField("type") or not value.type.HasField("tensor_type"):
            raise SignatureMismatch(
                f"{self.path}: {role} {name!r} is not a tensor (a sequence or map, as scikit-learn converters write with "
                "zipmap on); convert with zipmap=False"
            )
        tensor = value.type.tensor_type
        datatype = _ELEMENT_TYPES.get(tensor.elem_type, (None, 0))[0]
        if datatype is None:
            raise SignatureMismatch(
                f"{self.path}: {role} {name!r} has element type {tensor.elem_type}, which no protocol can carry; "
                f"cast it to one of {', '.join(NUMPY_DTYPES)}"
            )
        if not tensor.HasField("shape"):
            raise SignatureMismatch(
                f"{self.path}: {role} {name!r} has no shape; export it with a shape (axes may be dynamic)"
            )
        return TensorSpec(name=name, datatype=datatype, shape=self.axes(tensor.shape.dim, role, name))  # type: ignore[arg-type]  # from the table of datatypes

    def axes(self, dims: Iterable[Any], role: str, name: str) -> tuple[int | str, ...]:
        axes: list[int | str] = []
        for position, dim in enumerate(dims):
            if not dim.HasField("dim_value"):
                axes.append(self.text(dim.dim_param) or _unnamed(position))
            elif 0 <= dim.dim_value <= MAX_AXIS:
                axes.append(dim.dim_value)
            else:
                raise SignatureMismatch(
                    f"{self.path}: axis {position} of {role} {name!r} is {dim.dim_value}, and must be from 0 to {MAX_AXIS}; export the "
                    "model again, with a name for an axis that varies"
                )
        return tuple(axes)

    def text(self, raw: bytes) -> str:
        try:
            return bytes(raw).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise MalformedGraph(f"{self.path}: a name is not UTF-8 ({raw[:40]!r}); export it again") from exc


def _unnamed(position: int) -> str:
    """Return the name of an open axis that the graph gives none."""
    return f"axis_{position}"


def _first_axis_is_batch(spec: TensorSpec) -> TensorSpec:
    is_open = bool(spec.shape) and isinstance(spec.shape[0], str)
    return structs.replace(spec, shape=(BATCH, *spec.shape[1:])) if is_open else spec


def _first_axis_is_no_batch(spec: TensorSpec) -> TensorSpec:
    return structs.replace(spec, shape=(_unnamed(0), *spec.shape[1:])) if spec.batched else spec


def _present(message: Any, name: str) -> Iterator[Any]:
    if message.HasField(name):
        yield getattr(message, name)


def _without_weights(path: Path, max_fields: int) -> bytes:
    """Return the file with at most `_KEPT_BYTES` of each tensor's raw_data, and beside it how many there are as raw_bytes.

    Only headers and names are read, so that a model of gigabytes takes no more time and memory than one of the same layers.
    Protobuf, which holds the interpreter lock while it parses, gets little to do; and no weights are freed under that lock.

    Raises:
        TooLarge: the file has more than `max_fields` fields.
        MalformedGraph: it is not made of fields.

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    kinds = {name: {number: kind.rstrip("*") for number, kind in fields.values()} for name, fields in _MESSAGES.items()}
    raw_data = _MESSAGES["Tensor"]["raw_data"][0]
    n_fields = 0
    window, window_at = b"", 0

    with path.open("rb", buffering=0) as stream:

        def read(at: int, n_bytes: int) -> bytes:
            """Return what stands at a place in the file."""
            if window_at <= at and at + n_bytes <= window_at + len(window):
                return window[at - window_at : at - window_at + n_bytes]
            stream.seek(at)
            found = stream.read(n_bytes)
            if len(found) < n_bytes:
                raise IndexError
            return found

        def copied(message: str, at: int, end: int) -> bytes:
            nonlocal n_fields, window, window_at
            parts: list[bytes] = []
            while at < end:
                n_fields += 1
                if n_fields > max_fields:
                    raise TooLarge(
                        f"{path}: more than {max_fields} protobuf fields, which is the limit; this looks like an attack on "
                        "memory; raise the limit if it is not"
                    )
                if not window_at <= at <= window_at + len(window) - _MAX_FIELD_HEADER_BYTES:
                    stream.seek(at)
                    window, window_at = stream.read(_WINDOW_BYTES), at
                start = at
                key, at = _varint(window, start - window_at)
                number, wire_type = key >> 3, key & 7
                if message == "Tensor" and number == _RAW_BYTES:
                    raise KeyError  # ours; no ONNX file has it
                if wire_type == 0:
                    _, at = _varint(window, at)
                    at += window_at
                elif wire_type == 2:
                    n_bytes, value_at = _varint(window, at)
                    value_at += window_at
                    at = value_at + n_bytes
                    if at > end:
                        raise IndexError
                    kind = kinds[message].get(number)
                    if kind in _MESSAGES:
                        inner = copied(kind, value_at, at)
                        parts += (_as_varint(key), _as_varint(len(inner)), inner)
                        continue
                    if message == "Tensor" and number == raw_data:
                        kept = read(value_at, min(n_bytes, _KEPT_BYTES))
                        parts += (_as_varint(key), _as_varint(len(kept)), kept)
                        parts += (_as_varint(_RAW_BYTES << 3), _as_varint(n_bytes))
                        continue
                else:
                    at += window_at + {1: 8, 5: 4}[wire_type]
                parts.append(read(start, at - start))
            return b"".join(parts)

        try:
            return copied("Model", 0, path.stat().st_size)
        except (IndexError, KeyError, RecursionError) as exc:  # a number without end, a wire type ONNX has not
            raise MalformedGraph(f"{path}: not an ONNX model; export it again") from exc


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError


def _domain(raw: bytes) -> str:
    return bytes(raw).decode("utf-8", errors="replace") or DEFAULT_DOMAIN


@functools.cache
def _messages(*, weights_cut: bool = False) -> dict[str, Any]:
    """Build protobuf classes from `_MESSAGES`, in a pool of their own so that they never meet the `onnx` package's.

    Args:
        weights_cut: for what `_without_weights` returns.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as exc:
        raise MissingExtra("protobuf", "train", "reading an ONNX graph") from exc

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="modelyard_onnx.proto", package="modelyard", syntax="proto2")
    cut = {"Tensor": {"raw_bytes": (_RAW_BYTES, "int64")}} if weights_cut else {}
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, kind) in (fields | cut.get(message_name, {})).items():
            scalar = kind.rstrip("*")
            entry = message.field.add(name=field_name, number=number)
            entry.label = field_type.LABEL_REPEATED if kind.endswith("*") else field_type.LABEL_OPTIONAL
            if scalar in _MESSAGES:
                entry.type, entry.type_name = field_type.TYPE_MESSAGE, f".modelyard.{scalar}"
            else:
                entry.type = getattr(field_type, f"TYPE_{scalar.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"modelyard.{name}")) for name in _MESSAGES
    }
