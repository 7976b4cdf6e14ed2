"""Golden cases: inputs with the answers the writer's machine gave. Every machine re-checks them before it serves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.bundle.limits import DEFAULT_LIMITS, Limits
from modelyard.bundle.manifest import Cases, Signature, TensorSpec
from modelyard.bundle.npz import read_npz, write_npz
from modelyard.errors import GoldenCaseFailed, RequestError, SignatureMismatch

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], Arrays]
"""Answers named inputs of n rows with named outputs of n rows."""


@dataclass(frozen=True)
class CaseSet:
    """Named inputs and outputs of the same rows."""

    inputs: Arrays
    outputs: Arrays

    @property
    def n_samples(self) -> int:
        """Rows of the first input; 1 where a model takes a bare scalar."""
        first = next(iter(self.inputs.values()))
        return len(first) if first.ndim else 1


def write_cases(path: Path, cases: CaseSet, signature: Signature) -> None:
    """Write `cases` by position ("input.0", "output.1"), since tensor names may hold any character."""
    arrays = {f"input.{i}": cases.inputs[spec.name] for i, spec in enumerate(signature.inputs)}
    arrays |= {f"output.{i}": cases.outputs[spec.name] for i, spec in enumerate(signature.outputs)}
    write_npz(path, arrays)


def read_cases(path: Path, signature: Signature, limits: Limits = DEFAULT_LIMITS) -> CaseSet:
    """Return the cases in `path`; raises SignatureMismatch when they do not fit `signature`."""
    arrays = read_npz(path, limits)

    def take(role: str, specs: tuple[TensorSpec, ...]) -> dict[str, NDArray[Any]]:
        named = {}
        for i, spec in enumerate(specs):
            array = arrays.pop(f"{role}.{i}", None)
            if array is None:
                raise SignatureMismatch(f"{path}: no {role}.{i} for {role} {spec.name!r}; write the cases again")
            check_array(array, spec, f"{path}: {role}.{i}")
            named[spec.name] = array.astype(object) if spec.datatype == "BYTES" else array
        return named

    cases = CaseSet(inputs=take("input", signature.inputs), outputs=take("output", signature.outputs))
    if arrays:
        raise SignatureMismatch(f"{path}: holds {sorted(arrays)} beyond the signature; write the cases again")
    if any(spec.batched for spec in signature.inputs):
        lengths = {len(cases.inputs[spec.name]) for spec in signature.inputs if spec.batched}
        lengths |= {len(cases.outputs[spec.name]) for spec in signature.outputs if spec.batched}
        if len(lengths) != 1:
            raise SignatureMismatch(
                f"{path}: arrays have {sorted(lengths)} rows; they must agree; write the cases again"
            )
    return cases


def check_array(array: NDArray[Any], spec: TensorSpec, source: str) -> None:
    """Raise SignatureMismatch when `array` has not the datatype or shape of `spec`."""
    kinds = {"BYTES": "UO", "BF16": "u"}
    fits = array.dtype.kind in kinds[spec.datatype] if spec.datatype in kinds else array.dtype == spec.numpy_dtype
    shape_fits = array.ndim == len(spec.shape) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or not shape_fits:
        raise SignatureMismatch(
            f"{source}: {array.dtype} of shape {array.shape} does not fit {spec.name!r}, {spec.datatype} {list(spec.shape)}; "
            "write it as the signature says, or say in the signature what it is"
        )


def check_cases(cases: CaseSet, expected: Cases, signature: Signature, run: Run, *, source: str) -> None:
    """Run the cases and compare: floats within the manifest's tolerances, everything else exactly.

    Raises:
        GoldenCaseFailed: names the first row and output that differ, and by how much; or the cases cannot be computed.
    """
    try:
        answers = run(cases.inputs)
    except RequestError as exc:
        raise GoldenCaseFailed(
            f"{source}: the golden cases cannot be computed on this machine: {exc}; do not serve this bundle here"
        ) from exc
    for spec in signature.outputs:
        wanted, got = cases.outputs[spec.name], answers[spec.name]
        wrong = differing_rows(wanted, got, rtol=expected.rtol, atol=expected.atol)
        if wrong.size:
            row = int(wrong[0])
            should, computes = (np.atleast_1d(array)[row : row + 1] for array in (wanted, got))
            raise GoldenCaseFailed(
                f"{source}: golden case {row} of {cases.n_samples}: output {spec.name!r} should be {_short(should)}, this machine "
                f"computes {_short(computes)} ({wrong.size} cases differ; rtol {expected.rtol}, atol {expected.atol}); do not serve "
                "this bundle here: use its parent, or compress again on this kind of processor",
                row=row,
                output=spec.name,
            )


def differing_rows(wanted: NDArray[Any], got: NDArray[Any], *, rtol: float, atol: float) -> NDArray[np.intp]:
    """Return the indices of rows that differ: by tolerance for floats (NaN equals NaN), exactly otherwise."""
    if wanted.shape != got.shape:
        return np.arange(max(1, len(np.atleast_1d(wanted))))
    if wanted.dtype.kind == "f":
        same = np.isclose(got, wanted, rtol=rtol, atol=atol, equal_nan=True)
    else:
        same = np.asarray(wanted.astype(object) == got.astype(object), dtype=bool)
    rows = np.atleast_1d(same)
    return np.flatnonzero(~rows.reshape(len(rows), -1).all(axis=1))


def _short(value: Any) -> str:
    text = np.array2string(np.asarray(value), precision=6, threshold=8, edgeitems=3)
    return " ".join(text.split())
