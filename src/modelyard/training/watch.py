"""Where a training run tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelyard.training.fit import FitProgress


@dataclass(frozen=True)
class Watch:
    """Callbacks of one run; each may be left as it is."""

    step: Callable[[str], None] = lambda _: None
    """A new step begins."""
    detail: Callable[[str], None] = lambda _: None
    """How far the step is."""
    fit: "Callable[[FitProgress], None]" = lambda _: None
    """How far the training loop is."""
