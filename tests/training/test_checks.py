"""Each finding is made where it is due, and not where it is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from modelyard.errors import DataError
from modelyard.training.data import DataConfig, load_dataset
from modelyard.training.data_report import DataReport, Finding
from modelyard.training.split import SplitConfig

N = 600
IN_ORDER = SplitConfig(method="time", by="when", validation=0.2, test=0.2)
"""Training rows are the first 360, validation rows the next 120, test rows the last 120."""


def _report(folder: Path, split: SplitConfig | None = None, **columns: Any) -> DataReport:
    """The report on a table of honest columns, to which `columns` are added or in which they are replaced."""
    generator = np.random.default_rng(3)
    size, town = generator.normal(size=N), generator.choice(["Aix", "Bonn", "Cork"], size=N)
    noisy = size + 0.8 * (town == "Bonn") + generator.normal(size=N)
    base = {
        "when": np.arange(N),
        "size": size,
        "rooms": generator.integers(1, 9, size=N),
        "town": town,
        "label": np.where(noisy > 0.3, "yes", "no"),
    }
    pd.DataFrame(base | columns).to_parquet(folder / "rows.parquet")
    split = split or SplitConfig(validation=0.2)
    drop = ("when",) if split.method == "random" else ()
    config = DataConfig(path="rows.parquet", drop=drop)
    return load_dataset(config, split, root=folder, progress=lambda message: None)[1]


def _report_on_arrays(folder: Path, x: NDArray[Any], label: NDArray[Any]) -> DataReport:
    np.savez(folder / "rows.npz", x=x, label=label)
    config = DataConfig(path="rows.npz", task="classification")
    return load_dataset(config, SplitConfig(validation=0.2), root=folder, progress=lambda message: None)[1]


def _only(report: DataReport, code: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


def _codes(report: DataReport) -> set[str]:
    return {finding.code for finding in report.findings}


def test_honest_data_give_no_warning_and_no_error(tmp_path: Path) -> None:
    report = _report(tmp_path)
    assert not report.of("warning")
    assert not report.of("error")
    report.raise_for_errors()


# Leaks.


def _label_of(folder: Path) -> NDArray[Any]:
    _report(folder)
    return pd.read_parquet(folder / "rows.parquet")["label"].to_numpy(dtype=object)


def test_a_planted_leak_is_named_with_its_skill(tmp_path: Path) -> None:
    yes = _label_of(tmp_path) == "yes"
    leak = np.where(yes, 30.0, 5.0) + np.random.default_rng(0).normal(size=N)
    finding = _only(_report(tmp_path, delay=leak), "leak-suspect")
    assert (finding.severity, finding.column) == ("warning", "delay")
    assert finding.facts["skill"] >= 0.95
    assert "drop" in finding.message


@pytest.mark.parametrize("kind", ["text", "boolean", "missing", "missing-text"])
def test_a_leak_is_found_in_every_kind_of_column(tmp_path: Path, kind: str) -> None:
    yes = _label_of(tmp_path) == "yes"
    generator = np.random.default_rng(0)
    # Forty texts, twenty for each class, in an order that says nothing.
    texts = generator.permutation([f"reason {i}" for i in range(40)])
    leaks: dict[str, Any] = {
        "text": texts[np.where(yes, generator.integers(0, 20, N), generator.integers(20, 40, N))],
        "boolean": yes,
        "missing": np.where(yes, np.nan, generator.normal(size=N)),
        "missing-text": pd.Series(np.where(yes, "", generator.choice(["a", "b"], N))),
    }
    assert _only(_report(tmp_path, leak=leaks[kind]), "leak-suspect").column == "leak"


def test_a_leak_of_many_classes_and_of_a_quantity_is_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    code = generator.integers(0, 20, N)
    names = np.array([f"class {i:02}" for i in generator.permutation(20)])
    aliases = np.array([f"alias {i:02}" for i in generator.permutation(20)])
    as_number = _report(tmp_path, label=names[code], leak=code * 3)
    as_text = _report(tmp_path, label=names[code], leak=aliases[code])
    quantity = generator.normal(size=N)
    regression = _report(tmp_path, label=quantity, leak=quantity * 2 + 0.05 * generator.normal(size=N))
    for report in (as_number, as_text, regression):
        assert _only(report, "leak-suspect").column == "leak"


def test_an_honest_strong_column_is_no_suspect(tmp_path: Path) -> None:
    """It predicts far better than the baseline, and is wrong often enough to be believed."""
    yes = _label_of(tmp_path) == "yes"
    flipped = np.random.default_rng(0).random(N) < 0.12
    strong = np.where(yes ^ flipped, 1.0, 0.0) + np.random.default_rng(1).normal(size=N) * 0.1
    assert "leak-suspect" not in _codes(_report(tmp_path, strong=strong))


def test_an_identifier_is_no_leak_suspect_for_being_learnt_by_heart(tmp_path: Path) -> None:
    report = _report(tmp_path, key=[f"id {i}" for i in range(N)])
    assert "leak-suspect" not in _codes(report)


def test_a_leaking_feature_of_an_array_is_named_by_its_place(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, N)
    x = np.column_stack([generator.normal(size=N), label * 4 + generator.normal(size=N) * 0.1])
    assert _only(_report_on_arrays(tmp_path, x, label), "leak-suspect").column == "features[1]"


# Columns.


def test_a_constant_column_is_a_warning(tmp_path: Path) -> None:
    finding = _only(_report(tmp_path, same=[7] * N), "constant-column")
    assert (finding.severity, finding.column, finding.facts) == ("warning", "same", {"value": "7", "everywhere": True})


def test_a_column_that_is_constant_in_training_only_is_a_warning(tmp_path: Path) -> None:
    finding = _only(_report(tmp_path, IN_ORDER, late=(np.arange(N) >= 500) * 1.5), "constant-column")
    assert not finding.facts["everywhere"]
    assert "in every training row, though not in the others" in finding.message


def test_columns_without_signal_are_an_error(tmp_path: Path) -> None:
    report = _report(tmp_path, size=[1.0] * N, rooms=[2] * N, town=["Aix"] * N)
    with pytest.raises(DataError, match="every column is constant"):
        report.raise_for_errors()


def test_errors_are_raised_together(tmp_path: Path) -> None:
    nothing = np.full(N, np.nan)
    report = _report(tmp_path, a=nothing, b=pd.Series([None] * N, dtype="string"))
    assert [finding.column for finding in report.of("error")] == ["a", "b"]
    with pytest.raises(DataError, match=r"2 errors in the data:\n  'a' has no value in any .*\n  'b' has no value"):
        report.raise_for_errors()


def test_missing_values_are_a_note_and_many_a_warning(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    some, most = (np.where(generator.random(N) < share, np.nan, generator.normal(size=N)) for share in (0.1, 0.8))
    report = _report(tmp_path, some=some, most=most)
    note, warning = _only(report, "missing-values"), _only(report, "high-missing")
    assert (note.severity, note.column) == ("info", "some")
    assert (warning.severity, warning.column) == ("warning", "most")
    assert 0.7 < warning.facts["missing_share"]["train"] < 0.9


def test_values_missing_only_outside_training_are_a_warning(tmp_path: Path) -> None:
    gap = np.where(np.arange(N) >= 594, np.nan, np.random.default_rng(0).normal(size=N))
    finding = _only(_report(tmp_path, IN_ORDER, gap=gap), "missing-outside-training")
    assert finding.facts["missing_share"] == {"train": 0.0, "validation": 0.0, "test": 0.05}
    assert "5.0% of the test rows but in no training row" in finding.message


def test_unseen_categories_are_counted_by_part(tmp_path: Path) -> None:
    town = np.where(np.arange(N) % 2 == 0, "Aix", "Bonn").astype(object)
    town[-6:] = "Delft"
    finding = _only(_report(tmp_path, IN_ORDER, town=town), "unseen-categories")
    assert (finding.severity, finding.column) == ("warning", "town")
    assert finding.facts["shares"] == {"validation": 0.0, "test": 0.05}
    assert finding.facts["values"] == ["Delft"]
    town[-6:-1] = "Aix"
    assert _only(_report(tmp_path, IN_ORDER, town=town), "unseen-categories").severity == "info"


def test_a_missing_text_is_no_unseen_category(tmp_path: Path) -> None:
    town = np.where(np.arange(N) >= 500, "", "Aix")
    town[::3] = "Bonn"
    assert "unseen-categories" not in _codes(_report(tmp_path, IN_ORDER, town=town))


@pytest.mark.parametrize(
    ("values", "is_id"),
    [
        ([f"id {i}" for i in range(N)], True),
        (np.random.default_rng(0).permutation(N), True),
        (np.random.default_rng(0).normal(size=N), False),
        (np.arange(N) // 2, False),
    ],
    ids=["text", "integer", "float", "repeated"],
)
def test_an_identifier_is_warned_of(tmp_path: Path, values: Any, is_id: bool) -> None:
    report = _report(tmp_path, key=values)
    assert [finding.column for finding in report.findings if finding.code == "id-like"] == (["key"] if is_id else [])


# Rows.


def test_rows_repeated_over_parts_are_counted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=N)
    x[480:492] = x[:12]  # a tenth of the test rows
    report = _report(
        tmp_path, SplitConfig(method="time", by="when", validation=0.2, test=0.2), size=x, rooms=[1] * N, town=["a"] * N
    )
    finding = _only(report, "duplicate-rows")
    assert finding.severity == "warning"
    assert finding.facts == {"counts": {"validation": 0, "test": 12}, "shares": {"validation": 0.0, "test": 0.1}}


def test_few_repeated_rows_are_a_note(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=N)
    x[480] = x[0]
    report = _report(tmp_path, IN_ORDER, size=x, rooms=[1] * N, town=["a"] * N)
    assert _only(report, "duplicate-rows").severity == "info"


def test_equal_rows_with_different_labels_are_counted(tmp_path: Path) -> None:
    x = np.arange(N) * 0.5
    x[1], x[3] = x[0], x[2]
    label = np.array(["no", "yes"])[np.arange(N) // 4 % 2]
    label[0], label[1] = "no", "yes"  # rows 0 and 1 disagree, rows 2 and 3 agree
    report = _report(tmp_path, size=x, rooms=[1] * N, town=["a"] * N, label=label)
    assert _only(report, "contradicting-labels").facts["count"] == 2


def test_rows_differ_by_any_column_and_by_what_is_missing(tmp_path: Path) -> None:
    """Every row is its own: swapped columns, missing values and zeros are told apart."""
    a = np.arange(N) // 24.0
    b = np.arange(N) % 24.0
    a[a == 3] = np.nan
    report = _report(tmp_path, size=a, rooms=b, town=["x"] * N)
    assert not {"duplicate-rows", "contradicting-labels"} & _codes(report)


def test_repeated_images_are_counted(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (N, 4, 4), dtype=np.uint8)
    images[:300] = images[0]
    finding = _only(_report_on_arrays(tmp_path, images, np.arange(N) % 2), "duplicate-rows")
    assert finding.facts["shares"]["test"] > 0.3


# Classes.


def test_a_small_class_is_a_warning(tmp_path: Path) -> None:
    label = np.array(["a", "b"])[np.arange(N) % 2].astype(object)
    label[:12] = "rare"
    finding = _only(_report(tmp_path, label=label), "small-class")
    assert list(finding.facts["classes"]) == ["rare"]
    assert sum(finding.facts["classes"]["rare"].values()) == 12


def test_a_class_absent_from_a_part_is_a_warning(tmp_path: Path) -> None:
    label = np.array(["a", "b"])[np.arange(N) % 2].astype(object)
    label[:200:2] = "old"
    finding = _only(_report(tmp_path, IN_ORDER, label=label), "class-not-in-part")
    assert finding.facts["classes"] == {"old": ["validation", "test"]}


def test_imbalance_is_a_note_with_the_majority_accuracy(tmp_path: Path) -> None:
    label = np.where(np.arange(N) % 10 == 0, "rare", "common")
    finding = _only(_report(tmp_path, label=label), "imbalanced-label")
    assert finding.severity == "info"
    assert finding.facts["most_share"] == pytest.approx(0.9)
    assert "always answering 'common' has an accuracy of 90.0%" in finding.message


# The report.


def test_the_report_summarises_columns_classes_and_parts(tmp_path: Path) -> None:
    report = _report(tmp_path, gap=np.where(np.arange(N) % 4 == 0, np.nan, np.arange(N)))
    columns = {column.name: column for column in report.columns}
    assert (columns["rooms"].datatype, columns["rooms"].minimum, columns["rooms"].maximum) == ("INT64", 1, 8)
    assert columns["rooms"].n_distinct == 8
    assert columns["gap"].missing_share == pytest.approx(0.25)
    assert sum(share for _, share in columns["town"].top) == pytest.approx(1)
    assert sum(report.part_sizes.values()) == N
    assert {name: sum(parts.values()) for name, parts in report.class_counts.items()} == {
        name: int(n) for name, n in zip(*np.unique(_label_of(tmp_path).astype(str), return_counts=True), strict=True)
    }


def test_the_text_shows_columns_classes_and_findings(tmp_path: Path) -> None:
    text = _report(tmp_path, same=[7] * N).text()
    assert "rows.parquet: 600 rows, 4 columns; classification of 'label', 2 classes" in text
    assert "split random stratified by label, validation 0.2, test 0.2, seed 0: train 360 · validation 12" in text
    assert "found: 0 errors, 1 warning, 0 notes" in text
    assert "warning  constant-column: 'same' is '7' in every row" in text
    assert any(line.split()[:4] == ["rooms", "INT64", "0.0%", "8"] for line in text.splitlines())


def test_a_regression_report_gives_the_mean_label_of_each_part(tmp_path: Path) -> None:
    report = _report(tmp_path, IN_ORDER, label=np.arange(N) * 0.5)
    assert report.label_means == {"train": 89.75, "validation": 209.75, "test": 269.75}
    assert "mean label: train 89.75 · validation 209.75 · test 269.75" in report.text()
    assert report.class_counts == {}


def test_the_machine_form_is_plain_json(tmp_path: Path) -> None:
    report = _report(tmp_path, same=[7] * N, town=pd.Series([None, "Aix", "Bonn"] * (N // 3), dtype="string"))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["findings"][0]["code"] == "constant-column"
    assert {column["name"] for column in data["columns"]} == {"size", "rooms", "town", "same"}


def test_an_image_is_summarised_as_a_whole(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(1, 256, (N, 4, 5), dtype=np.uint8)
    images[:, 0, :] = 9
    report = _report_on_arrays(tmp_path, images, np.arange(N) % 2)
    (column,) = report.columns
    assert (column.datatype, column.shape, column.maximum) == ("UINT8", (4, 5, 1), 255)
    assert _only(report, "constant-values").facts == {"n_constant": 5, "n_values": 20}
    assert not report.of("error")


def test_a_wide_array_is_not_looked_into_feature_by_feature(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(N, 100))
    x[::9, 3] = np.nan
    report = _report_on_arrays(tmp_path, x, np.arange(N) % 2)
    assert [column.name for column in report.columns] == ["features"]
    assert _only(report, "missing-values").column == "features"


def test_classes_that_look_alike_are_named(tmp_path: Path) -> None:
    label = np.array([["p", "p ", "P", "q"][i % 4] for i in range(N)], dtype=object)
    finding = _only(_report(tmp_path, label=label), "look-alike-classes")
    assert finding.severity == "warning"
    assert sorted(finding.facts["classes"][0]) == ["P", "p", "p "]
    assert "'p '" in finding.message
    assert "'q'" not in finding.message


def test_a_label_that_32_bits_round_away_is_warned_of(tmp_path: Path) -> None:
    spread = np.random.default_rng(0).normal(size=N)
    finding = _only(_report(tmp_path, label=1e9 + spread), "label-precision")
    assert finding.severity == "warning"
    assert finding.facts["step"] == 64
    assert "subtract an offset" in finding.message
    assert "label-precision" not in _codes(_report(tmp_path, label=1e4 + spread))


def test_a_label_too_large_for_32_bits_is_refused(tmp_path: Path) -> None:
    label = np.random.default_rng(0).normal(size=N)
    label[7] = -1e300
    with pytest.raises(DataError, match=r"-1e\+300 in row 7 is too large for 32 bits"):
        _report(tmp_path, label=label)


@pytest.mark.parametrize(("odd", "says"), [("unknown", "not numbers: unknown"), ("41,5", "decimal commas")])
def test_a_column_of_numbers_with_a_stray_text_is_told_apart_from_categories(
    tmp_path: Path, odd: str, says: str
) -> None:
    age = [str(20 + i % 60) for i in range(N)]
    age[17] = odd

    finding = _only(_report(tmp_path, age=age), "mostly-numeric")

    assert finding.severity == "warning"
    assert says in finding.message


def test_a_few_numbered_codes_are_categories(tmp_path: Path) -> None:
    assert "mostly-numeric" not in {
        finding.code for finding in _report(tmp_path, gate=[["1", "2", "3b", "4"][i % 4] for i in range(N)]).findings
    }
