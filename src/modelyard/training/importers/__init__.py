"""Models trained elsewhere → one ONNX graph, one library per file; `import_model` takes any of them."""

from modelyard.training.importers.from_python import import_model

__all__ = ["import_model"]
