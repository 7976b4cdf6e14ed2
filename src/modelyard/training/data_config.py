"""How labelled data is named and read; apart from data.py, so that every kind of source can use it."""

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta, field

from modelyard.errors import ConfigError
from modelyard.schema import Frozen

Task = Literal["classification", "regression"]
Progress = Callable[[str], None]
"""Is told, in a few words, what is being worked on."""


class DataConfig(Frozen, frozen=True):
    """The [data] table of yard.toml."""

    path: str | None = None
    """.csv, .parquet, .npz, or an image folder with one sub-folder per class; relative to yard.toml.

    In CSV an empty field, NA, N/A, NaN, NULL and None are missing values.
    """
    callable: str | None = None
    """"module:function", importable from yard.toml's folder; returns a pandas DataFrame or a dict of arrays."""
    label: Annotated[str, Meta(min_length=1)] = "label"
    """Column of the table or name of the array; for an image folder the name that the folder names get."""
    task: Task | None = None
    """None: text, booleans and whole numbers with few distinct values are classes, everything else is a quantity."""
    features: tuple[str, ...] = ()
    """(): every column but the label, `drop` and the column the split is made by."""
    drop: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    max_categories: Annotated[int, Meta(ge=2)] = 1000
    image_mode: Literal["RGB", "L"] = "RGB"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.callable is None):
            found = "neither" if self.path is None else f"both ({self.path!r} and {self.callable!r})"
            raise ConfigError(f"[data] needs either path or callable, got {found}; name one of them")

    @property
    def source(self) -> str:
        """Where the rows come from, as written in the configuration."""
        return self.path or self.callable or ""
