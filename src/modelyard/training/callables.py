"""Functions of the user's own project, named in yard.toml as "module:function"."""

import contextlib
import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelyard.errors import ConfigError, ModelyardError

_PACKAGE = Path(__file__).resolve().parents[1]


def call(target: str, root: Path, *arguments: Any, field: str) -> Any:
    """Call the function that `target` names, its module looked for in `root` first, and return what it returns.

    Args:
        field: where the name was given, for the error: "[data] callable".

    Raises:
        ConfigError: not of the form "module:function", no such module or function, a module that cannot be imported, or a
            function that takes other arguments or raises; chained to what was raised.
    """
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f'{field} must be "module:function", got {target!r}; correct it')
    with _importable(root, module_name):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as exc:
            if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
                # The module is there; something that it imports is not.
                raise failed(exc, f"{field} = {target!r}: importing {module_name}", "correct or install it") from exc
            raise ConfigError(
                f"{field} = {target!r}: no module {exc.name!r} in {root} or installed; correct the name"
            ) from exc
        except Exception as exc:  # a module of the user's own may raise anything
            raise failed(exc, f"{field} = {target!r}: importing {module_name}", "correct the module") from exc
        function = getattr(module, function_name, None)
        if not callable(function):
            public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            close = difflib.get_close_matches(function_name, public, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"{field} = {target!r}: {module_name} has no function {function_name!r}{hint}; correct the name"
            )
        _require_arguments(function, arguments, f"{field} = {target!r}")
        try:
            return function(*arguments)
        except ModelyardError:
            raise
        except Exception as exc:  # a function of the user's own may raise anything
            raise failed(exc, f"{field} = {target!r}: the function", "correct it") from exc


def failed(exc: BaseException, what: str, remedy: str) -> ConfigError:
    """Return the error that says which code of the user's own raised what, where, and what to do.

    Args:
        what: the field and what was done, e.g. "[model] callable = 'own:model': fit()".
    """
    lines = str(exc).strip().splitlines()
    raised = f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
    own = [frame for frame in traceback.extract_tb(exc.__traceback__) if _is_users(frame.filename)]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return ConfigError(f"{what} raised {raised}{where}; {remedy}")


def _is_users(filename: str) -> bool:
    path = Path(filename)
    return not filename.startswith("<") and "site-packages" not in path.parts and _PACKAGE not in path.parents


def _require_arguments(function: Any, arguments: tuple[Any, ...], where: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C tell none
        return
    try:
        signature.bind(*arguments)
    except TypeError as exc:
        given = f"{len(arguments)} argument{'' if len(arguments) == 1 else 's'}"
        raise ConfigError(
            f"{where} is called with {given}, but its parameters are {signature} ({exc}); correct the parameters"
        ) from exc


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
