"""The model that Triton's own python backend runs; triton_app.py copies it into the repository."""

import os
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found, unused-ignore]  # Triton puts it on the path

sys.path.insert(0, os.environ["BENCH"])
from serve.apps.common import MODEL, Runner


class TritonPythonModel:
    """One instance, called by the backend's stub process."""

    def initialize(self, arguments: dict[str, str]) -> None:
        self.runner = Runner()

    def execute(self, requests: list[Any]) -> list[Any]:
        parts = [triton.get_input_tensor_by_name(request, MODEL.input).as_numpy() for request in requests]
        y = self.runner(np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0]))
        responses, at = [], 0
        for part in parts:
            responses.append(triton.InferenceResponse([triton.Tensor(MODEL.output, y[at : at + len(part)])]))
            at += len(part)
        return responses
