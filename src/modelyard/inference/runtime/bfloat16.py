"""BF16 tensors through onnxruntime: NumPy has no such type, so that the bits travel as UINT16, in a bundle as in here."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

_TYPE = "tensor(bfloat16)"
_ONNX_TYPE = 16  # TensorProto.BFLOAT16


class Bfloat16Session:
    """Runs a session of which inputs or outputs are BF16, as its own `run` would if it knew the type."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Raises ValueError for text inputs beside BF16 outputs: `run` cannot return these, `run_with_ort_values` not take those."""
        self._session = session
        self._inputs = frozenset(one.name for one in session.get_inputs() if one.type == _TYPE)
        self._outputs = any(one.type == _TYPE for one in session.get_outputs())
        texts = [one.name for one in session.get_inputs() if one.type == "tensor(string)"]
        if texts and self._outputs:
            raise ValueError(
                f"the text input {texts[0]!r} cannot stand beside an output of BF16; cast the output to FP32 in the graph"
            )

    @staticmethod
    def wanted(session: ort.InferenceSession) -> bool:
        """Whether any input or output is BF16."""
        return any(one.type == _TYPE for one in (*session.get_inputs(), *session.get_outputs()))

    def run(
        self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]], options: ort.RunOptions
    ) -> list[NDArray[Any]]:
        given = {name: self._value(name, array) for name, array in inputs.items()}
        if not self._outputs:
            answers: list[NDArray[Any]] = self._session.run(outputs, given, options)
            return answers
        held = {
            name: one if isinstance(one, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(one)
            for name, one in given.items()
        }
        return [_array(value) for value in self._session.run_with_ort_values(outputs, held, options)]

    def _value(self, name: str, array: NDArray[Any]) -> Any:
        if name not in self._inputs:
            return array
        if array.dtype != np.uint16:
            raise TypeError(f"{name!r} must be uint16 bits of BF16, got {array.dtype}")
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _ONNX_TYPE)


def _array(value: ort.OrtValue) -> NDArray[Any]:
    if value.element_type() != _ONNX_TYPE:
        array: NDArray[Any] = value.numpy()
        return array
    bits = np.empty(value.shape(), dtype=np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return bits
