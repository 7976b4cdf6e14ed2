"""Modelyard: from labelled data to a compressed, right-sized inference service, with the measurements that prove it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.training.importers import import_model

__all__ = ["__version__", "import_model"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what belongs to training at its first use, so that `import modelyard` stays as light as a server needs it."""
    if name == "import_model":
        return importlib.import_module("modelyard.training.importers").import_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
