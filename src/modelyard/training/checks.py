"""What a person should know of their data before a model learns from it: findings per column, class and part.

Between loading (data.py) and training. Findings are values; nothing is changed and nothing is raised until
`DataReport.raise_for_errors`. The leak test is one decision tree per column: a column that nearly predicts the label by
itself is more often a copy of the answer than luck.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import MissingExtra
from modelyard.training.data_report import LISTED, ColumnSummary, DataReport, Finding, count, some

if TYPE_CHECKING:
    from modelyard.training.data import Dataset

LEAK_SKILL = 0.9
"""From this skill on a single column is named a leak suspect; 0 is the baseline, 1 is perfect."""
LEAK_ROWS = 20_000
LEAK_MIN_VALIDATION_ROWS = 20
DUPLICATE_SHARE = 0.01
UNSEEN_SHARE = 0.01
HIGH_MISSING_SHARE = 0.5
ID_SHARE = 0.95
ID_MIN_ROWS = 100
SMALL_CLASS_ROWS = 30
MOSTLY_NUMERIC_SHARE = 0.8
MOSTLY_NUMERIC_MIN_VALUES = 10
"""Fewer numbers than this may well be codes."""
IMBALANCE = 3.0
"""The most frequent class has this many times the rows of the rarest."""
MAX_TENSOR_COLUMNS = 64
"""An array of more features than this a row is checked as a whole, not feature by feature."""
LABEL_PRECISION = 0.01
"""Of the label's standard deviation; a float32 must tell values this far apart from each other."""
_TOP_VALUES = 3


def check_dataset(dataset: "Dataset", *, progress: Callable[[str], None], notes: Sequence[str] = ()) -> DataReport:
    """Return the report on `dataset`. Draws nothing at random.

    Args:
        progress: is told which column is looked at.
        notes: sentences from loading that a person should see.
    """
    columns = [column for name, array in dataset.inputs.items() for column in _columns(name, array)]
    findings = [Finding("info", "inferred-task", dataset.label_name, note) for note in notes]
    summaries: list[ColumnSummary] = []
    labels = _label_codes(dataset)
    for i, column in enumerate(columns, 1):
        progress(f"checking columns {i}/{len(columns)}: {column.name}")
        summary = _summary(column, dataset.n_samples)
        summaries.append(summary)
        findings += _column_findings(column, summary, dataset)
        if column.ndim == 1 and not any(
            finding.column == column.name for finding in findings if finding.severity == "error"
        ):
            findings += _leak_finding(column, labels, dataset)
    if columns and all(_is_constant(column, dataset.split.train) for column in columns):
        findings.append(
            Finding(
                "error", "no-signal", None, "every column is constant in the training rows; bring columns that vary"
            )
        )
    progress("looking for equal rows")
    findings += _duplicate_findings(dataset, labels, progress)
    findings += _class_findings(dataset)
    findings += _look_alike_findings(dataset)
    findings += _precision_findings(dataset)
    rank = {"error": 0, "warning": 1, "info": 2}
    return DataReport(
        source=dataset.lineage.source,
        task=dataset.task,
        label_name=dataset.label_name,
        split=dataset.lineage.split,
        n_samples=dataset.n_samples,
        part_sizes={part: len(rows) for part, rows in dataset.split.parts.items()},
        columns=tuple(summaries),
        class_counts=_class_counts(dataset),
        label_means={}
        if dataset.classes
        else {part: float(dataset.label[rows].mean()) for part, rows in dataset.split.parts.items()},
        findings=tuple(sorted(findings, key=lambda finding: rank[finding.severity])),
    )


@dataclass(frozen=True)
class _Column:
    """A column with its distinct values numbered; or a tensor, which is not looked into."""

    name: str
    values: NDArray[Any]
    codes: NDArray[np.int64]
    """Each row's place among `distinct`, -1 where missing; empty for a tensor."""
    distinct: NDArray[Any]

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def is_text(self) -> bool:
        return self.values.dtype == object


def _columns(name: str, array: NDArray[Any]) -> Iterator[_Column]:
    if array.ndim == 1:
        yield _encoded(name, array)
    elif array.ndim == 2 and array.shape[1] <= MAX_TENSOR_COLUMNS:
        for i in range(array.shape[1]):
            yield _encoded(f"{name}[{i}]", np.ascontiguousarray(array[:, i]))
    else:
        yield _Column(name, array, np.empty(0, dtype=np.int64), np.empty(0))


def _encoded(name: str, values: NDArray[Any]) -> _Column:
    import pandas as pd  # a data set came from data.py, which has it

    missing = values == "" if values.dtype == object else np.isnan(values) if values.dtype.kind == "f" else None
    codes, distinct = pd.factorize(values)
    codes = codes.astype(np.int64)
    if missing is not None and missing.any():
        if values.dtype == object:  # pandas takes "" for a value like others
            empty = int(codes[int(np.argmax(missing))])
            distinct = np.delete(distinct, empty)
            codes = np.where(codes > empty, codes - 1, codes)
        codes = np.where(missing, -1, codes)
    return _Column(name, values, codes, np.asarray(distinct))


def _summary(column: _Column, n_rows: int) -> ColumnSummary:
    values = column.values
    datatype = {"O": "text", "b": "BOOL", "i": "INT64", "f": "FP32", "u": "UINT8"}[values.dtype.kind]
    if column.ndim > 1:
        missing = float(np.isnan(values).mean()) if values.dtype.kind == "f" else 0.0
        return ColumnSummary(
            column.name,
            datatype,
            missing,
            _distinct_tensor_values(values),
            float(np.nanmin(values)) if missing < 1 else None,
            float(np.nanmax(values)) if missing < 1 else None,
            shape=values.shape[1:],
        )
    counts = np.bincount(column.codes[column.codes >= 0], minlength=len(column.distinct))
    missing = 1 - int(counts.sum()) / n_rows
    if column.is_text or values.dtype.kind == "b":
        most = np.argsort(-counts, kind="stable")[:_TOP_VALUES]
        top = tuple((str(column.distinct[i]), int(counts[i]) / n_rows) for i in most)
        return ColumnSummary(column.name, datatype, missing, len(column.distinct), top=top)
    if not len(column.distinct):
        return ColumnSummary(column.name, datatype, missing, 0)
    low, high = float(column.distinct.min()), float(column.distinct.max())
    return ColumnSummary(column.name, datatype, missing, len(column.distinct), low, high)


def _distinct_tensor_values(values: NDArray[Any]) -> int:
    if values.dtype == np.uint8:
        return int(np.count_nonzero(np.bincount(values.reshape(-1), minlength=256)))
    distinct = np.unique(values)
    return int(np.count_nonzero(~np.isnan(distinct)))


def _is_constant(column: _Column, rows: NDArray[np.int64]) -> bool:
    if column.ndim > 1:
        return bool((column.values[rows] == column.values[rows[0]]).all())
    codes = column.codes[rows]
    return bool((codes == codes[0]).all())


def _column_findings(column: _Column, summary: ColumnSummary, dataset: "Dataset") -> Iterator[Finding]:
    name, train = column.name, dataset.split.train
    if column.ndim > 1:
        yield from _tensor_findings(column, dataset)
        return
    missing = {part: float((column.codes[rows] < 0).mean()) for part, rows in dataset.split.parts.items()}
    if missing["train"] == 1:
        yield Finding(
            "error",
            "no-values",
            name,
            f"{name!r} has no value in any training row; put it into [data] drop",
            {"missing_share": missing},
        )
        return
    if _is_constant(column, train):
        everywhere = len(column.distinct) == 1 and summary.missing_share == 0
        value = str(column.distinct[column.codes[train[0]]])
        where = "in every row" if everywhere else "in every training row, though not in the others"
        yield Finding(
            "warning",
            "constant-column",
            name,
            f"{name!r} is {value!r} {where} and teaches nothing; put it into [data] drop",
            {"value": value, "everywhere": everywhere},
        )
    if missing["train"] >= HIGH_MISSING_SHARE:
        yield Finding(
            "warning",
            "high-missing",
            name,
            f"{name!r} is missing in {missing['train']:.1%} of the training rows; drop it unless its absence tells something",
            {"missing_share": missing},
        )
    elif missing["train"] > 0:
        yield Finding(
            "info",
            "missing-values",
            name,
            f"{name!r} is missing in {missing['train']:.1%} of the training rows; the model takes it as nullable",
            {"missing_share": missing},
        )
    elif max(missing.values()) > 0:
        held_out = {part: share for part, share in missing.items() if share > 0}
        shares = " and ".join(f"{share:.1%} of the {part} rows" for part, share in held_out.items())
        yield Finding(
            "warning",
            "missing-outside-training",
            name,
            f"{name!r} is missing in {shares} but in no training row, so the model cannot learn what that means; fill it in, "
            "drop it, or leave those rows out",
            {"missing_share": missing},
        )
    present = dataset.n_samples * (1 - summary.missing_share)
    kind = "text" if column.is_text else "integer" if column.values.dtype.kind == "i" else None
    if kind and present >= ID_MIN_ROWS and summary.n_distinct >= ID_SHARE * present:
        yield Finding(
            "warning",
            "id-like",
            name,
            f"{name!r} has {summary.n_distinct:,} distinct {kind} values in {round(present):,} rows, like an identifier that new rows "
            "will not share; put it into [data] drop",
            {"n_distinct": summary.n_distinct, "n_present": round(present)},
        )
    if column.is_text:
        yield from _mostly_numeric_finding(column)
        yield from _unseen_finding(column, dataset)


def _mostly_numeric_finding(column: _Column) -> Iterator[Finding]:
    """A few stray texts, or decimal commas, turn a column of numbers into categories."""
    values = [str(value) for value in column.distinct]
    odd = [value for value in values if not _is_number(value.replace(",", ".", 1))]
    numbers = len(values) - len(odd)
    if numbers < MOSTLY_NUMERIC_MIN_VALUES or numbers < MOSTLY_NUMERIC_SHARE * len(values):
        return
    why = f"not numbers: {some(odd)}" if odd else "written with decimal commas or kept as text"
    yield Finding(
        "warning",
        "mostly-numeric",
        column.name,
        f"{column.name!r} is taken as text, but {count(numbers, 'distinct value')} of {len(values):,} are numbers ({why}); clean them "
        "or make them empty, so that the column is read as numbers",
        {"n_numbers": numbers, "n_values": len(values), "others": odd[: 10 * LISTED]},
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _tensor_findings(column: _Column, dataset: "Dataset") -> Iterator[Finding]:
    rows = column.values[dataset.split.train]
    flat = rows.reshape(len(rows), -1)
    constant = int((flat == flat[0]).all(axis=0).sum())
    if 0 < constant < flat.shape[1]:
        yield Finding(
            "info",
            "constant-values",
            column.name,
            f"{column.name!r}: {constant:,} of the {flat.shape[1]:,} numbers in a row are the same in every training row",
            {"n_constant": constant, "n_values": flat.shape[1]},
        )
    missing = float(np.isnan(flat).mean()) if flat.dtype.kind == "f" else 0.0
    if missing > 0:
        yield Finding(
            "warning" if missing >= HIGH_MISSING_SHARE else "info",
            "high-missing" if missing >= HIGH_MISSING_SHARE else "missing-values",
            column.name,
            f"{column.name!r}: {missing:.1%} of the numbers in the training rows are missing",
            {"missing_share": {"train": missing}},
        )


def _unseen_finding(column: _Column, dataset: "Dataset") -> Iterator[Finding]:
    seen = np.zeros(len(column.distinct) + 1, dtype=bool)  # the last place is for -1, missing
    seen[column.codes[dataset.split.train]] = True
    seen[-1] = True
    held_out = {part: ~seen[column.codes[rows]] for part, rows in dataset.split.parts.items() if part != "train"}
    counts = {part: int(unseen.sum()) for part, unseen in held_out.items()}
    shares = {part: float(unseen.mean()) for part, unseen in held_out.items()}
    values = sorted(str(value) for value in column.distinct[~seen[:-1]])
    if values:
        yield Finding(
            "warning" if max(shares.values()) > UNSEEN_SHARE else "info",
            "unseen-categories",
            column.name,
            f"{column.name!r} has {count(len(values), 'value')} that no training row has ({some(values)}), in "
            f"{count(counts['validation'], 'validation row')} ({shares['validation']:.2%}) and {count(counts['test'], 'test row')} "
            f"({shares['test']:.2%}); they are answered as unknown",
            {"counts": counts, "shares": shares, "values": values[: 10 * LISTED], "n_values": len(values)},
        )


def _leak_finding(column: _Column, labels: NDArray[Any], dataset: "Dataset") -> Iterator[Finding]:
    skill = _skill(column, labels, dataset)
    if skill is not None and skill >= LEAK_SKILL:
        yield Finding(
            "warning",
            "leak-suspect",
            column.name,
            f"{column.name!r} alone predicts {dataset.label_name!r} with a skill of {skill:.2f} (0: always the baseline, 1: perfect); "
            "if it is not known when a prediction is asked for, put it into [data] drop",
            {"skill": skill},
        )


def _skill(column: _Column, labels: NDArray[Any], dataset: "Dataset") -> float | None:
    """Return (score - baseline) / (perfect - baseline) on validation rows of one small tree; None where it means nothing.

    The score is accuracy against the majority class, or the explained share of the squared error about the mean.
    """
    try:
        from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
    except ImportError as exc:
        raise MissingExtra("scikit-learn", "train", "looking for columns that give the label away") from exc
    train, validation = _thin(dataset.split.train), _thin(dataset.split.validation)
    if len(validation) < LEAK_MIN_VALIDATION_ROWS or _is_constant(column, train):
        return None
    x = _ordered(column, labels, train, dataset) if column.is_text else column.values.astype(np.float32)
    x_train, x_validation = x[train, np.newaxis], x[validation, np.newaxis]
    y_train, y_validation = labels[train], labels[validation]
    # Sixteen leaves are a depth of four; with many classes a leaf for each and as many again.
    shape: dict[str, Any] = {"max_leaf_nodes": max(16, 2 * len(dataset.classes)), "random_state": 0}
    if dataset.task == "classification":
        if len(dataset.classes) <= 8:
            shape["max_depth"] = 4
        correct = DecisionTreeClassifier(**shape).fit(x_train, y_train).predict(x_validation) == y_validation
        baseline = float((y_validation == np.bincount(y_train).argmax()).mean())
        return None if baseline == 1 else (float(correct.mean()) - baseline) / (1 - baseline)
    predicted = DecisionTreeRegressor(max_depth=4, **shape).fit(x_train, y_train).predict(x_validation)
    squared = float(((y_validation - y_train.mean()) ** 2).mean())
    return None if squared == 0 else 1 - float(((y_validation - predicted) ** 2).mean()) / squared


def _ordered(
    column: _Column, labels: NDArray[Any], train: NDArray[np.int64], dataset: "Dataset"
) -> NDArray[np.float32]:
    """Return text as numbers that a tree can cut: ordered by the label of the training rows that have it.

    By the mean label of a quantity; by the most frequent class, then by how frequent, of a class. Missing and unseen values
    have places of their own.
    """
    codes, y = column.codes[train] + 1, labels[train]  # missing becomes 0
    n_codes = len(column.distinct) + 1
    counts = np.bincount(codes, minlength=n_codes)
    if dataset.task == "regression":
        means = np.bincount(codes, weights=y, minlength=n_codes) / np.maximum(counts, 1)
        key = np.where(counts > 0, means, -np.inf)
    else:
        n_classes = len(dataset.classes)
        table = np.bincount(codes * n_classes + y, minlength=n_codes * n_classes).reshape(n_codes, n_classes)
        key = table.argmax(axis=1) + 0.5 * table.max(axis=1) / np.maximum(counts, 1)
        key = np.where(counts > 0, key, -1.0)
    place = np.empty(n_codes, dtype=np.float32)
    place[np.argsort(key, kind="stable")] = np.arange(n_codes, dtype=np.float32)
    ordered: NDArray[np.float32] = place[column.codes + 1]
    return ordered


def _thin(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most LEAK_ROWS of these rows, evenly spread."""
    if len(rows) <= LEAK_ROWS:
        return rows
    return rows[np.linspace(0, len(rows) - 1, LEAK_ROWS).astype(np.int64)]


def _label_codes(dataset: "Dataset") -> NDArray[Any]:
    """Return each row's class as its place among the classes; a quantity as it is."""
    if dataset.task == "regression":
        return dataset.label
    place = {name: code for code, name in enumerate(dataset.classes)}
    return np.fromiter((place[name] for name in dataset.label.tolist()), np.int64, dataset.n_samples)


def _duplicate_findings(dataset: "Dataset", labels: NDArray[Any], progress: Callable[[str], None]) -> Iterator[Finding]:
    hashes = _row_hashes(dataset, progress)
    split = dataset.split
    in_train = {
        part: np.isin(hashes[rows], hashes[split.train]) for part, rows in split.parts.items() if part != "train"
    }
    counts = {part: int(found.sum()) for part, found in in_train.items()}
    shares = {part: float(found.mean()) for part, found in in_train.items()}
    if any(counts.values()):
        several = max(shares.values()) > DUPLICATE_SHARE
        remedy = (
            '; the score on them is memory: remove duplicates, or keep them in one part with [split] method = "group"'
        )
        yield Finding(
            "warning" if several else "info",
            "duplicate-rows",
            None,
            f"{counts['validation']:,} validation rows ({shares['validation']:.2%}) and {counts['test']:,} test rows "
            f"({shares['test']:.2%}) have the same inputs as a training row{remedy if several else ''}",
            {"counts": counts, "shares": shares},
        )
    _, group = np.unique(hashes, return_inverse=True)
    _, label = np.unique(labels, return_inverse=True)
    pairs = np.unique(group.astype(np.int64) * (int(label.max()) + 1) + label)
    n_labels = np.bincount(pairs // (int(label.max()) + 1))  # distinct labels of each distinct row
    n_contradicting = int((n_labels[group] > 1).sum())
    if n_contradicting:
        share = n_contradicting / dataset.n_samples
        yield Finding(
            "warning" if share > DUPLICATE_SHARE and dataset.task == "classification" else "info",
            "contradicting-labels",
            None,
            f"{n_contradicting:,} rows ({share:.2%}) have the same inputs as another row and another label; no model can be right on "
            "all of them",
            {"count": n_contradicting, "share": share},
        )


def _row_hashes(dataset: "Dataset", progress: Callable[[str], None]) -> NDArray[np.uint64]:
    """Return 64 bits per row that are equal for equal inputs, and all but surely different for different ones."""
    hashes = np.zeros(dataset.n_samples, dtype=np.uint64)
    for name, array in dataset.inputs.items():
        if array.ndim == 1:
            words = _encoded(name, array).codes.astype(np.uint64)  # equal values have equal codes
        else:
            progress(f"hashing the rows of {name}")
            rows = np.ascontiguousarray(array)
            words = np.fromiter(
                (int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows),
                np.uint64,
                len(rows),
            )
        hashes = _mixed(hashes ^ _mixed(words + np.uint64(1)))
    return hashes


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), a bijection that spreads every bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed


def _class_counts(dataset: "Dataset") -> dict[str, dict[str, int]]:
    if not dataset.classes:
        return {}
    labels = _label_codes(dataset)
    counts = {
        part: np.bincount(labels[rows], minlength=len(dataset.classes)) for part, rows in dataset.split.parts.items()
    }
    return {
        str(name): {part: int(of_part[code]) for part, of_part in counts.items()}
        for code, name in enumerate(dataset.classes)
    }


def _class_findings(dataset: "Dataset") -> Iterator[Finding]:
    counts = _class_counts(dataset)
    if not counts:
        return
    small = {name: parts for name, parts in counts.items() if sum(parts.values()) < SMALL_CLASS_ROWS}
    if small:
        listed = [f"{name}: {sum(parts.values())} rows" for name, parts in small.items()]
        yield Finding(
            "warning",
            "small-class",
            dataset.label_name,
            f"{len(small)} of {len(counts)} classes have fewer than {SMALL_CLASS_ROWS} rows ({some(listed)}); scores on them say little: "
            "bring more rows or merge them",
            {"classes": small},
        )
    absent = {name: [part for part, n in parts.items() if n == 0] for name, parts in counts.items()}
    absent = {name: parts for name, parts in absent.items() if parts}
    if absent:
        listed = [f"{name} in {' and '.join(parts)}" for name, parts in absent.items()]
        yield Finding(
            "warning",
            "class-not-in-part",
            dataset.label_name,
            f"no row of {some(listed)}; the score there says nothing about such a class",
            {"classes": absent},
        )
    in_train = {name: parts["train"] for name, parts in counts.items()}
    most, least = max(in_train, key=in_train.__getitem__), min(in_train, key=in_train.__getitem__)
    n_train = len(dataset.split.train)
    if in_train[most] >= IMBALANCE * in_train[least]:
        yield Finding(
            "info",
            "imbalanced-label",
            dataset.label_name,
            f"{most!r} is {in_train[most] / n_train:.1%} of the training rows, {least!r} {in_train[least] / n_train:.1%}: always "
            f"answering {most!r} has an accuracy of {in_train[most] / n_train:.1%}",
            {
                "most": most,
                "least": least,
                "most_share": in_train[most] / n_train,
                "least_share": in_train[least] / n_train,
            },
        )


def _look_alike_findings(dataset: "Dataset") -> Iterator[Finding]:
    """Classes that differ in case or in spaces around them alone."""
    groups: dict[str, list[str]] = {}
    for name in dataset.classes:
        if isinstance(name, str):
            groups.setdefault(name.strip().casefold(), []).append(name)
    alike = [names for names in groups.values() if len(names) > 1]
    if alike:
        listed = [" and ".join(repr(name) for name in names) for names in alike]
        yield Finding(
            "warning",
            "look-alike-classes",
            dataset.label_name,
            f"classes differ in case or in spaces around them alone: {some(listed)}; if each is one class, write it in one way",
            {"classes": alike},
        )


def _precision_findings(dataset: "Dataset") -> Iterator[Finding]:
    """A quantity of which float32, the datatype of the graph's answers, keeps too few digits."""
    if dataset.task != "regression":
        return
    values = dataset.label[dataset.split.train]
    largest, std = float(np.abs(values).max()), float(values.std())
    step = float(np.spacing(np.float32(largest)))
    if step > LABEL_PRECISION * std:
        yield Finding(
            "warning",
            "label-precision",
            dataset.label_name,
            f"answers are rounded to 32 bits, which near {largest:.6g} is to steps of {step:.3g}, and the training rows spread by "
            f"{std:.3g} (standard deviation) only; subtract an offset from the label, or change its unit",
            {"largest": largest, "step": step, "std": std},
        )
