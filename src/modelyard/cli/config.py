"""yard.toml → one frozen value. The only place that reads it; unknown keys are errors."""

import tomllib
from pathlib import Path
from typing import Annotated

from msgspec import Meta, field

from modelyard.bundle.manifest import Name, Targets
from modelyard.compress.search import CompressConfig
from modelyard.errors import ConfigError
from modelyard.schema import Frozen, convert
from modelyard.training.data import DataConfig
from modelyard.training.fit_config import FitConfig
from modelyard.training.models import ModelConfig
from modelyard.training.split import SplitConfig


class Yard(Frozen, frozen=True):
    """The whole of yard.toml."""

    name: Name
    """Of the model, in the store and in URLs."""
    data: DataConfig
    description: str | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    targets: Targets = field(default_factory=Targets)
    compress: CompressConfig = field(default_factory=CompressConfig)
    store: Annotated[str, Meta(min_length=1)] = "store"
    """Folder or fsspec URL bundles are published to, relative to yard.toml."""
    work: Annotated[str, Meta(min_length=1)] = "work"
    """Folder for reports, checkpoints and bundles on their way, relative to yard.toml."""


def load_yard(path: Path) -> Yard:
    """Read yard.toml.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a wrong type or a value out of range.
    """
    if path.is_dir():
        path = path / "yard.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file; give the path of a yard.toml") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}; correct the line it names") from exc
    return convert(data, Yard, source=str(path), error=ConfigError)
