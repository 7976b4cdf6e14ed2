"""What serves must not need what trains."""

import json
import pkgutil
import subprocess
import sys
from importlib import import_module

HEAVY = ("torch", "sklearn", "pandas", "scipy", "onnx", "lightgbm", "pyarrow", "PIL", "tqdm")
PROGRAM = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_under(package: str) -> list[str]:
    return [package] + [info.name for info in pkgutil.walk_packages(import_module(package).__path__, f"{package}.")]


def test_no_inference_module_imports_a_training_library() -> None:
    names = modules_under("modelyard.inference") + modules_under("modelyard.bundle")
    names += ["modelyard.cli.main", "modelyard.cli.serve", "modelyard.cli.predict", "modelyard.cli.rowfiles"]
    assert "modelyard.inference.serve.transport.http" in names
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded & set(HEAVY))
