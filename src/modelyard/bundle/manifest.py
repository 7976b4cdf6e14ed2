"""What a bundle says of itself: the values behind bundle.json.

Shapes carry one named axis, "batch", always the first; every other axis is an integer, or a name where it may vary.
Datatypes are spelled as in the Open Inference Protocol: BOOL, INT8 to INT64, UINT8 to UINT64, FP16, BF16, FP32, FP64, BYTES.
"""

from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, field

from modelyard.metering import Metered
from modelyard.schema import Frozen

FORMAT_VERSION = 1
BATCH = "batch"
ALLOWED_DOMAINS = ("ai.onnx", "ai.onnx.ml", "com.microsoft")

# Python's "$" also matches before a final newline; the look-ahead shuts that door and means nothing elsewhere.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(?!\n)$"

Datatype = Literal[
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "BF16", "FP32", "FP64", "BYTES"
]  # fmt: skip
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
Axis = Annotated[int, Meta(ge=0, le=2**31 - 1)] | Annotated[str, Meta(min_length=1, max_length=128)]
NonNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
"""NumPy's type for each datatype; BF16 has none and is carried as UINT16 bit patterns where it is carried at all."""


class TensorSpec(Frozen, frozen=True, omit_defaults=True):
    """One named input or output.

    A missing value is NaN in a float column and the empty string in a BYTES column; `nullable` says whether the model was
    made to cope with it.
    """

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    datatype: Datatype
    shape: tuple[Axis, ...]
    """First axis "batch" unless the model takes no batches."""
    nullable: bool = False
    categories: tuple[str, ...] | None = None
    """Values of a BYTES column seen in training; others are answered as "unknown", not refused."""
    labels: tuple[str | int, ...] | None = None
    """Class labels: of the columns of a score output, or of the values of a label output."""
    unit: str | None = None
    description: str | None = None

    @property
    def batched(self) -> bool:
        return bool(self.shape) and self.shape[0] == BATCH

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy's type for the tensor; UINT16 bit patterns for BF16."""
        return NUMPY_DTYPES["UINT16" if self.datatype == "BF16" else self.datatype]

    @property
    def row_shape(self) -> tuple[int | str, ...]:
        """The shape of one row: without the batch axis."""
        return self.shape[1:] if self.batched else self.shape


class Signature(Frozen, frozen=True):
    """Inputs and outputs in the graph's own order."""

    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]

    def input(self, name: str) -> TensorSpec:
        return next(spec for spec in self.inputs if spec.name == name)

    def output(self, name: str) -> TensorSpec:
        return next(spec for spec in self.outputs if spec.name == name)


class Score(Frozen, frozen=True):
    """A metric on held-out rows with its 95 % confidence interval."""

    metric: str
    value: float
    low: float
    high: float
    n_samples: Count


class DataLineage(Frozen, frozen=True, omit_defaults=True):
    """Which rows the model was made of."""

    source: str
    digest: Sha256
    n_samples: Count
    split: str
    """How it was split, e.g. "time by sched_dep"."""
    split_digest: Sha256
    n_train: Count
    n_validation: Count
    n_test: Count


class Lineage(Frozen, frozen=True, omit_defaults=True):
    """Where a bundle comes from and what it cost to make."""

    created_at: str
    """UTC, ISO 8601."""
    made_by: str
    """The step that wrote it: "train", "import", "compress: static-int8"."""
    parent: Sha256 | None = None
    data: DataLineage | None = None
    code_revision: str | None = None
    """The git commit of the user's project, "-dirty" behind it where files had changed."""
    seeds: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    """Package or platform name to version."""
    spent: Metered | None = None
    """For this step alone; the whole cost is the sum over the parents."""
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()
    """What a person should know: a threshold tie excused, cases that were generated."""


class Targets(Frozen, frozen=True, omit_defaults=True):
    """What the model has to reach; compression and planning hold themselves to it."""

    metric: str | None = None
    positive: str | int | None = None
    """Which of two classes AUC and F1 look for; the last one if not said."""
    keep: Annotated[float, Meta(gt=0, lt=1)] = 0.99
    """A child must keep this share of its parent's score."""
    latency_p99_s: Annotated[float, Meta(gt=0)] | None = None


class Cases(Frozen, frozen=True):
    """The golden cases in cases.npz and how closely they must be met."""

    n_samples: Annotated[int, Meta(ge=1)]
    origin: Literal["held-out", "samples", "generated"]
    rtol: NonNegative = 1e-4
    atol: NonNegative = 1e-4


class FileEntry(Frozen, frozen=True):
    """One file of the bundle; `path` is relative, with "/" between its parts."""

    path: Annotated[str, Meta(min_length=1, max_length=512)]
    size_bytes: Count
    sha256: Sha256


class Manifest(Frozen, frozen=True, omit_defaults=True):
    """The whole of bundle.json."""

    digest: Sha256
    """Of the whole: SHA-256 of bundle.json with these 64 characters set to "0"."""
    format_version: int
    name: Name
    task: Literal["classification", "regression", "other"]
    signature: Signature
    cases: Cases
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1)]
    lineage: Lineage
    targets: Targets = field(default_factory=Targets)
    rows_independent: bool = True
    """False: an answer depends on its batch mates; such a model is run one row at a time."""
    extra_domains: tuple[str, ...] = ()
    """Operator domains beyond the allowed ones that whoever wrote this consented to; a reader must consent again."""
    description: str | None = None
