"""How rows become an HTTP request in each body format, and how the answer becomes an array again."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .workloads import Model

JSON = {"Content-Type": "application/json"}
OCTETS = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Post:
    """A request to be sent as often as a generator likes."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def raw(self) -> bytes:
        """Return the whole request as it goes over the wire, for a generator that builds none itself."""
        fields = {"Host": "127.0.0.1", **self.headers, "Content-Length": str(len(self.body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + self.body


def post(form: str, path: str, model: Model, x: NDArray[Any]) -> Post:
    """Return the rows `x`, shape (rows, *model.shape), as a request in the body format `form`.

    Only the formats of the Open Inference Protocol carry more than one row. `path` may hold {model}.
    Raises KeyError where the format is unknown.
    """
    return Post(path.format(model=model.name), *BUILDERS[form](model, x))


def answer(form: str, headers: Mapping[str, str], body: bytes) -> NDArray[Any]:
    """Return the answered values, flat."""
    if not form.startswith("oip"):
        data = json.loads(body)
        return np.asarray(data["outputs"] if isinstance(data, dict) else data, np.float32).ravel()
    size = headers.get("Inference-Header-Content-Length")
    (output, *_) = json.loads(body[: int(size)] if size else body)["outputs"]
    if "data" in output:
        return np.asarray(output["data"], np.float32).ravel()
    return np.frombuffer(body, np.float32, offset=int(size or 0))


_Built = tuple[dict[str, str], bytes]


def _flat(x: NDArray[Any]) -> list[float]:
    return [round(float(value), 4) for value in x.ravel()]  # the rows hold at most four decimals


def _b64(x: NDArray[Any]) -> str:
    return base64.b64encode(x.tobytes()).decode()


def _json(model: Model, x: NDArray[Any]) -> _Built:
    return JSON, json.dumps({"inputs": _flat(x)}).encode()


def _json_b64(model: Model, x: NDArray[Any]) -> _Built:
    return JSON, json.dumps({"b64": _b64(x)}).encode()


def _json_list(model: Model, x: NDArray[Any]) -> _Built:
    return JSON, json.dumps({"inputs": [_flat(x)]}).encode()


def _json_b64_list(model: Model, x: NDArray[Any]) -> _Built:
    return JSON, json.dumps({"inputs": [_b64(x)]}).encode()


def _raw(model: Model, x: NDArray[Any]) -> _Built:
    return OCTETS, x.tobytes()


def _oip_json(model: Model, x: NDArray[Any]) -> _Built:
    tensor = {"name": model.input, "shape": x.shape, "datatype": "FP32", "data": _flat(x)}
    return JSON, json.dumps({"inputs": [tensor]}).encode()


def _oip_b64(model: Model, x: NDArray[Any]) -> _Built:
    tensor = {"name": model.input, "shape": [len(x), 1], "datatype": "BYTES", "data": [_b64(row) for row in x]}
    return JSON, json.dumps({"inputs": [tensor]}).encode()


def _oip_binary(model: Model, x: NDArray[Any]) -> _Built:
    raw = x.tobytes()
    size = {"binary_data_size": len(raw)}
    tensor = {"name": model.input, "shape": x.shape, "datatype": "FP32", "parameters": size}
    wanted = {"name": model.output, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    return {**OCTETS, "Inference-Header-Content-Length": str(len(head))}, head + raw


BUILDERS = {
    "json": _json,
    "json-b64": _json_b64,
    "json-list": _json_list,
    "json-b64-list": _json_b64_list,
    "raw": _raw,
    "oip-json": _oip_json,
    "oip-b64": _oip_b64,
    "oip-binary": _oip_binary,
}
