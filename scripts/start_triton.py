"""Start a real Triton on models that give their inputs back, to run the conformance suite against it.

    python3 -m venv triton && triton/bin/pip install "nvidia-pytriton==0.7.0" "numpy<2"
    triton/bin/python scripts/start_triton.py FOLDER
    python -m modelyard.testing.open_inference http://localhost:8000 --grpc localhost:8001 --model plain --allow-changes

The wheel holds tritonserver and its Python backend and runs without a GPU. FOLDER is made anew: model repository and backend
are laid out there. Runs until it is ended; python must be the one that has nvidia-pytriton, and numpy before 2, with which
that backend crashes.
"""

import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

TYPES = {
    "BOOL": "BOOL",
    **{f"{sign}INT{bits}": f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": "FP16",
    "BF16": "BF16",
    "FP32": "FP32",
    "FP64": "FP64",
    "BYTES": "STRING",
}
"""Datatype of the protocol → Triton's name in a model's configuration, behind TYPE_."""
MODELS = {
    "plain": ("INT64", "FP32", "BYTES"),
    "single": ("FP32",),
    "every": tuple(datatype for datatype in TYPES if datatype not in ("FP16", "BF16")),
    "halves": ("FP16", "BF16"),
}
MODEL_CODE = '''\
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Gives every input back, as a tensor of its own kind: NumPy has no bfloat16."""

    def initialize(self, args):
        self.names = {names!r}

    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.echo(request, name) for name in self.names]) for request in requests]

    def echo(self, request, name):
        tensor = pb_utils.get_input_tensor_by_name(request, name + "_in")
        if name == "bf16":
            return pb_utils.Tensor.from_dlpack(name + "_out", tensor.to_dlpack())
        return pb_utils.Tensor(name + "_out", tensor.as_numpy())
'''


def main() -> None:
    """Lay everything out and become tritonserver."""
    parser = argparse.ArgumentParser(description="Start a real Triton on models that give their inputs back.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    options = parser.parse_args()
    package = installed()
    shutil.rmtree(options.folder, ignore_errors=True)
    backend = options.folder / "backends" / "python"
    shutil.copytree(package / "tritonserver/backends/python", backend)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(package / f"tritonserver/python_backend_stubs/{version}/triton_python_backend_stub", backend)
    for name, datatypes in MODELS.items():
        lay_out(options.folder / "repository" / name, name, datatypes)
    command = [
        str(package / "tritonserver/bin/tritonserver"),
        f"--model-repository={options.folder}/repository",
        f"--backend-directory={options.folder}/backends",
        "--model-control-mode=explicit",  # so that models may be loaded and unloaded
        "--load-model=*",
        f"--http-port={options.http_port}",
        f"--grpc-port={options.grpc_port}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--allow-metrics=false",
    ]
    os.execve(command[0], command, environment(package))


def installed() -> Path:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: {sys.executable} has no nvidia-pytriton; pip install nvidia-pytriton 'numpy<2'")
    return Path(spec.origin).parent


def environment(package: Path) -> dict[str, str]:
    """Return the environment in which the binary finds its libraries, and the backend this Python."""
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{inherited}:{package.parent / 'nvidia_pytriton.libs'}",
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(package.parent),
    }


def lay_out(folder: Path, name: str, datatypes: tuple[str, ...]) -> None:
    """Write a model's configuration and code."""
    tensors = {
        end: ", ".join(
            f'{{ name: "{datatype.lower()}_{end}" data_type: TYPE_{TYPES[datatype]} dims: [2] }}'
            for datatype in datatypes
        )
        for end in ("in", "out")
    }
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 64\ninput [ {tensors["in"]} ]\noutput [ {tensors["out"]} ]\n'
    )
    names = tuple(datatype.lower() for datatype in datatypes)
    (folder / "1" / "model.py").write_text(MODEL_CODE.replace("{names!r}", repr(names)))


if __name__ == "__main__":
    main()
