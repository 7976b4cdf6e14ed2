"""Checks of each datatype: its limits go in and come back unchanged, in JSON and in binary.

Needs a model that gives an input of the datatype back; one with an input and an output of every datatype tries them all.
"""

import math
from collections.abc import Iterator, Sequence

from modelyard.testing.open_inference.check import Check, Run, Skipped, expect, shown
from modelyard.testing.open_inference.inference import read_answer
from modelyard.testing.open_inference.server import Server
from modelyard.testing.open_inference.tensors import NUMPY_DTYPES, SIXTEEN_BIT_FLOATS, Array, extremes, filled, same

TABLE = "inference_rest.md, Tensor Data Types"
SIXTEEN_BITS = "inference_rest.md, Tensor Data: “fp16 and bf16 are problematic”"
BINARY = "extension_binary_data.md, Binary Tensor Request: “All tensor data types … in the native size”"


def in_json(datatype: str) -> Run:
    def run(server: Server) -> None:
        spec, output = server.echo_of(datatype)
        for array in tensors_of_extremes(datatype, spec.sized()):
            call = server.call({**server.arrays(), spec.name: array})
            call.body["outputs"] = [{"name": output}]
            _expect_equal(array, server.infer(call)[output].array, datatype)

    return run


def sixteen_bits_in_json(datatype: str) -> Run:
    def run(server: Server) -> None:
        spec, output = server.echo_of(datatype)
        for array in tensors_of_extremes(datatype, spec.sized()):
            call = server.call({**server.arrays(), spec.name: array}, in_json=spec.name)
            call.body["outputs"] = [{"name": output}]
            reply = server.post_call(call)
            if reply.status != 200:
                raise Skipped(f"refused with {reply.status}: {shown(reply.expect_refusal())}")
            _expect_equal(array, read_answer(reply)[output].array, datatype)

    return run


def in_binary(datatype: str) -> Run:
    def run(server: Server) -> None:
        spec, output = server.echo_of(datatype)
        _ = server.binary_base
        for array in tensors_of_extremes(datatype, spec.sized()):
            call = server.call({**server.arrays(), spec.name: array}, binary=True)
            call.body["outputs"] = [{"name": output, "parameters": {"binary_data": True}}]
            _expect_equal(array, server.infer(call)[output].array, datatype)

    return run


def tensors_of_extremes(datatype: str, shape: Sequence[int]) -> Iterator[Array]:
    """Yield tensors of `shape` until each of the datatype's extremes has been in one."""
    values, n_elements = extremes(datatype), max(1, math.prod(shape))
    for start in range(0, len(values), n_elements):
        yield filled(datatype, shape, values[start : start + n_elements])


def _expect_equal(sent: Array, got: Array, datatype: str) -> None:
    a, b = (shown(array.reshape(-1)[:8].tolist()) for array in (sent, got))
    expect(same(sent, got, datatype, exactly=True), f"{a} came back as {b}")


JSON_CHECKS = tuple(
    Check(
        f"datatypes.json.{datatype}",
        "MUST",
        f"limits of {datatype} go through JSON unchanged",
        TABLE,
        in_json(datatype),
    )
    for datatype in NUMPY_DTYPES
    if datatype not in SIXTEEN_BIT_FLOATS
)
SIXTEEN_BIT_CHECKS = tuple(
    Check(
        f"datatypes.json.{datatype}",
        "MAY",
        f"{datatype} in JSON, where it is taken, goes through unchanged as numbers",
        SIXTEEN_BITS,
        sixteen_bits_in_json(datatype),
    )
    for datatype in SIXTEEN_BIT_FLOATS
)
BINARY_CHECKS = tuple(
    Check(
        f"datatypes.binary.{datatype}",
        "MUST",
        f"limits of {datatype} go through binary tensors unchanged",
        BINARY,
        in_binary(datatype),
        "binary_tensor_data",
    )
    for datatype in NUMPY_DTYPES
)
