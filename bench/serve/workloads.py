"""What is asked: a model, the rows of a request, and the latency within which the answer counts as in time."""

from dataclasses import dataclass
from pathlib import Path

from .places import MODELS


@dataclass(frozen=True)
class Model:
    """A benchmark model: what it takes and gives. `shape` and `width` are of one row, without the batch axis."""

    name: str
    input: str
    shape: tuple[int, ...]
    output: str
    width: int

    @property
    def path(self) -> Path:
        return MODELS / f"{self.name}.onnx"

    @property
    def vectors(self) -> Path:
        """64 distinct rows `x`, and the answers `y` of in-process onnxruntime."""
        return MODELS / f"{self.name}.npz"


TINY = Model("tiny", "features", (30,), "probs", 2)
MID = Model("mid", "image", (3, 64, 64), "probs", 10)
SMALL = Model("small", "features", (8,), "probs", 2)
SLEEP = Model("sleep", "x", (1,), "y", 1)


@dataclass(frozen=True)
class Workload:
    """One kind of request. Contenders say by its name how they take it."""

    name: str
    model: Model
    target_s: float
    n_rows: int = 1


TINY_JSON = Workload("tiny-json", TINY, target_s=0.010)
TINY_BINARY = Workload("tiny-binary", TINY, target_s=0.010)
MID_BINARY = Workload("mid", MID, target_s=0.050)
SMALL_JSON = Workload("small-json", SMALL, target_s=0.010)
SLEEP_ONE = Workload("sleep-1", SLEEP, target_s=0.020)
SLEEP_SIXTEEN = Workload("sleep-16", SLEEP, target_s=0.020, n_rows=16)
