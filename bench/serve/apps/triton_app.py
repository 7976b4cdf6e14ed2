"""Triton: lays out a model repository and becomes the tritonserver binary that the nvidia-pytriton wheel ships."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytriton  # type: ignore[import-not-found, unused-ignore]  # in its own environment

from serve.apps.common import GRPC_PORT, MAX_BATCH, MODEL, PORT, WAIT_MS, WORKERS

_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [ {{ name: "{input}" data_type: TYPE_FP32 dims: {shape} }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [{width}] }} ]
instance_group [ {{ kind: KIND_CPU count: {workers} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {wait_us} }}
"""


def main() -> None:
    package = Path(pytriton.__file__).parent
    work = Path(tempfile.mkdtemp(prefix="triton-"))
    backend = work / "backends" / "python"
    shutil.copytree(package / "tritonserver/backends/python", backend)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(package / f"tritonserver/python_backend_stubs/{version}/triton_python_backend_stub", backend)
    folder = work / "repository" / MODEL.name
    (folder / "1").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("triton_model.py"), folder / "1" / "model.py")
    (folder / "config.pbtxt").write_text(
        _CONFIG.format(
            name=MODEL.name,
            max_batch=MAX_BATCH,
            input=MODEL.input,
            shape=list(MODEL.shape),
            output=MODEL.output,
            width=MODEL.width,
            workers=WORKERS,
            wait_us=int(WAIT_MS * 1000),
        )
    )
    site_packages = next(path for path in sys.path if path.endswith("site-packages"))
    libraries = package.parent / "nvidia_pytriton.libs"
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{os.environ.get('LD_LIBRARY_PATH', '')}:{libraries}",
        "PYTHONPATH": site_packages,
        "BENCH": str(
            Path(__file__).resolve().parents[2]
        ),  # the stub keeps one entry of PYTHONPATH; triton_model.py adds this
    }
    binary = str(package / "tritonserver/bin/tritonserver")
    os.execve(
        binary,
        [
            binary,
            f"--model-repository={work}/repository",
            f"--backend-directory={work}/backends",
            f"--http-port={PORT}",
            f"--grpc-port={GRPC_PORT}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--allow-metrics=false",
            "--http-thread-count=2",
        ],
        env,
    )


if __name__ == "__main__":
    main()
