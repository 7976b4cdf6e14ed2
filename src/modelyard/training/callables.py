"""Functions of the user's own project, named in yard.toml as "module:function"."""

import contextlib
import difflib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelyard.errors import ConfigError


def call(target: str, root: Path, *arguments: Any, field: str) -> Any:
    """Call the function that `target` names, its module looked for in `root` first, and return what it returns.

    Args:
        field: where the name was given, for the error: "[data] callable".

    Raises:
        ConfigError: not of the form "module:function", or no such module or function.
    """
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f'{field} must be "module:function", got {target!r}; correct it')
    with _importable(root, module_name):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as exc:
            if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
                raise  # the module is there; something that it imports is not
            raise ConfigError(
                f"{field} = {target!r}: no module {exc.name!r} in {root} or installed; correct the name"
            ) from exc
        function = getattr(module, function_name, None)
        if not callable(function):
            public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            close = difflib.get_close_matches(function_name, public, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"{field} = {target!r}: {module_name} has no function {function_name!r}{hint}; correct the name"
            )
        return function(*arguments)


@contextlib.contextmanager
def _importable(root: Path, module_name: str) -> Iterator[None]:
    """Put `root` first on the import path, and forget a module of the same name that another folder brought."""
    parent = module_name.partition(".")[0]
    own = {(root / f"{parent}.py").resolve(), (root / parent / "__init__.py").resolve()}
    known = getattr(sys.modules.get(parent), "__file__", None)
    if known is not None and any(path.exists() for path in own) and Path(known).resolve() not in own:
        for name in [name for name in sys.modules if name == parent or name.startswith(f"{parent}.")]:
            del sys.modules[name]
    importlib.invalidate_caches()
    sys.path.insert(0, str(root.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(root.resolve()))
