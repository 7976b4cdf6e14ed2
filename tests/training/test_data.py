"""Every kind of source becomes the same arrays; every kind of bad input is refused with its name and a remedy."""

import datetime
import hashlib
import struct
import sys
import types
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from modelyard.bundle.manifest import TensorSpec
from modelyard.errors import ConfigError, DataError
from modelyard.schema import convert
from modelyard.training.data import DataConfig, Dataset, data_digest, load_dataset, rows_for
from modelyard.training.data_report import DataReport
from modelyard.training.split import SplitConfig

N = 60


def _table(n_rows: int = N, **columns: Any) -> pd.DataFrame:
    """A small table with a label of two classes; `columns` are added or replaced."""
    generator = np.random.default_rng(0)
    base = {
        "size": generator.normal(size=n_rows),
        "rooms": generator.integers(1, 9, size=n_rows),
        "town": generator.choice(["Aix", "Bonn", "Cork"], size=n_rows),
        "label": np.array(["no", "yes"])[np.arange(n_rows) % 2],
    }
    return pd.DataFrame(base | columns)


def _load(path: Path, split: SplitConfig | None = None, **settings: Any) -> tuple[Dataset, DataReport]:
    data = DataConfig(path=path.name, **settings)
    return load_dataset(data, split or SplitConfig(), root=path.parent, progress=lambda message: None)


def _csv(folder: Path, table: pd.DataFrame) -> Path:
    path = folder / "rows.csv"
    table.to_csv(path, index=False)
    return path


def _parquet(folder: Path, table: pd.DataFrame) -> Path:
    path = folder / "rows.parquet"
    table.to_parquet(path)
    return path


def _npz(folder: Path, **arrays: NDArray[Any]) -> Path:
    path = folder / "rows.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub lets **kwds shadow its flag
    return path


def _module(folder: Path, name: str, body: str) -> None:
    (folder / f"{name}.py").write_text(body)


# Tables.


def test_columns_become_the_datatypes_of_the_graph(tmp_path: Path) -> None:
    table = _table(sunny=np.arange(N) % 3 == 0)
    dataset, report = _load(
        _csv(tmp_path, table), units={"size": "m2"}, descriptions={"town": "where it stands"}, task="classification"
    )
    assert [(s.name, s.datatype, s.shape) for s in dataset.specs] == [
        ("size", "FP32", ("batch",)),
        ("rooms", "INT64", ("batch",)),
        ("town", "BYTES", ("batch",)),
        ("sunny", "BOOL", ("batch",)),
    ]
    assert [array.dtype for array in dataset.inputs.values()] == [np.float32, np.int64, object, np.bool_]
    assert np.array_equal(dataset.inputs["size"], table["size"].to_numpy().astype(np.float32))
    assert dataset.specs[0].unit == "m2"
    assert dataset.specs[2].description == "where it stands"
    assert dataset.specs[2].categories == ("Aix", "Bonn", "Cork")
    assert (dataset.task, dataset.classes) == ("classification", ("no", "yes"))
    assert dataset.label.dtype == object
    assert dataset.label.tolist() == table["label"].tolist()
    assert set(dataset.slices) == {"town", "sunny"}
    assert report.n_samples == dataset.n_samples == N


def test_csv_parquet_and_a_callable_give_the_same_data_digest(tmp_path: Path) -> None:
    table = _table(size=np.round(np.linspace(0, 1, N), 3))
    _csv(tmp_path, table)
    _parquet(tmp_path, table)
    _module(
        tmp_path,
        "same_rows",
        "import pandas as pd\ndef table():\n    return pd.read_parquet(__file__[:-12] + 'rows.parquet')\n",
    )
    configs = [DataConfig(path="rows.csv"), DataConfig(path="rows.parquet"), DataConfig(callable="same_rows:table")]
    lineages = [
        load_dataset(config, SplitConfig(), root=tmp_path, progress=lambda message: None)[0].lineage
        for config in configs
    ]
    assert len({lineage.digest for lineage in lineages}) == 1
    assert len({lineage.split_digest for lineage in lineages}) == 1
    assert [lineage.source for lineage in lineages] == ["rows.csv", "rows.parquet", "same_rows:table"]
    assert lineages[0].n_train + lineages[0].n_validation + lineages[0].n_test == N
    assert lineages[0].split == "random stratified by label, validation 0.1, test 0.2, seed 0"


def test_missing_values_stay_missing_and_make_a_column_nullable(tmp_path: Path) -> None:
    table = _table(
        rooms=pd.array([None if i % 4 == 0 else i for i in range(N)], dtype="Int64"),
        town=pd.Series([None if i % 5 == 0 else "Aix" for i in range(N)], dtype="string"),
        open=pd.array([None if i % 6 == 0 else bool(i % 2) for i in range(N)], dtype="boolean"),
    )
    dataset, _ = _load(_parquet(tmp_path, table))
    nullable = {spec.name: spec.nullable for spec in dataset.specs}
    assert nullable == {"size": False, "rooms": True, "town": True, "open": True}
    assert dataset.inputs["rooms"].dtype == np.float32
    assert np.isnan(dataset.inputs["rooms"][4])
    assert dataset.inputs["rooms"][5] == 5
    assert dataset.inputs["town"][:2].tolist() == ["", "Aix"]
    assert dataset.inputs["open"].dtype == np.float32
    assert next(spec for spec in dataset.specs if spec.name == "town").categories == ("Aix",)


def test_nullable_and_categories_are_read_off_the_training_rows_alone(tmp_path: Path) -> None:
    when = np.arange(N)
    table = _table(
        when=when, size=np.where(when == N - 1, np.nan, 1.5 * when), town=np.where(when == N - 1, "Delft", "Aix")
    )
    dataset, report = _load(_csv(tmp_path, table), SplitConfig(method="time", by="when"))
    specs = {spec.name: spec for spec in dataset.specs}
    assert not specs["size"].nullable
    assert specs["town"].categories == ("Aix",)
    assert "when" not in specs
    assert {finding.code for finding in report.findings} >= {"missing-outside-training", "unseen-categories"}


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (pd.Categorical(["a", "b"] * (N // 2)), object),
        (pd.Categorical([1, 2] * (N // 2)), np.int64),
        (pd.Categorical([1.5, None] * (N // 2)), np.float32),
        (pd.array([1, 2] * (N // 2), dtype="UInt8"), np.int64),
        (pd.array([1.5, 2.5] * (N // 2), dtype="Float64"), np.float32),
        ([Decimal("1.5"), Decimal("2")] * (N // 2), np.float32),
        (pd.Series([1, 2.5] * (N // 2), dtype=object), np.float32),
        (pd.Series([True, False] * (N // 2), dtype=object), np.bool_),
        (pd.Series(["a", None] * (N // 2), dtype=object), object),
        (np.array([1, 2] * (N // 2), dtype=np.uint64), np.int64),
    ],
    ids=[
        "category",
        "category-int",
        "category-float",
        "UInt8",
        "Float64",
        "decimal",
        "object",
        "object-bool",
        "text",
        "uint64",
    ],
)
def test_every_way_pandas_holds_a_value_is_understood(tmp_path: Path, values: Any, dtype: Any) -> None:
    dataset = _from_frame(tmp_path, _table(odd=values))
    assert dataset.inputs["odd"].dtype == dtype
    assert len(dataset.inputs["odd"]) == N


def _from_frame(folder: Path, frame: pd.DataFrame, **settings: Any) -> Dataset:
    """Load a frame as a callable returns it, without a file in between."""
    module = types.ModuleType("handed_over")
    vars(module)["table"] = lambda: frame
    sys.modules["handed_over"] = module
    try:
        config = DataConfig(callable="handed_over:table", **settings)
        return load_dataset(config, SplitConfig(), root=folder, progress=lambda message: None)[0]
    finally:
        del sys.modules["handed_over"]


def test_features_drop_and_the_split_column_decide_what_goes_in(tmp_path: Path) -> None:
    path = _csv(tmp_path, _table(who=np.arange(N) % 12))
    by_group = SplitConfig(method="group", by="who")
    keep = SplitConfig(method="group", by="who", keep=True)
    assert list(_load(path, by_group)[0].inputs) == ["size", "rooms", "town"]
    assert list(_load(path, keep)[0].inputs) == ["size", "rooms", "town", "who"]
    assert list(_load(path, by_group, drop=("town",))[0].inputs) == ["size", "rooms"]
    assert list(_load(path, by_group, features=("town", "size"))[0].inputs) == ["town", "size"]
    with pytest.raises(ConfigError, match="'who' is what the split is made by"):
        _load(path, by_group, features=("who",))
    with pytest.raises(ConfigError, match="'label' is also the label or in drop"):
        _load(path, features=("label",))
    with pytest.raises(DataError, match="no column is left"):
        _load(path, drop=("size", "rooms", "town", "who"))


def test_a_time_split_reads_dates_from_csv_text_and_parquet(tmp_path: Path) -> None:
    day = pd.Timestamp("2013-01-01") + pd.to_timedelta(np.arange(N)[::-1], unit="D")
    split = SplitConfig(method="time", by="day")
    results = [
        _load(_csv(tmp_path, _table(day=day)), split)[0],
        _load(_csv(tmp_path, _table(day=day.strftime("%Y-%m-%dT%H:%M:%SZ"))), split)[0],
        _load(_parquet(tmp_path, _table(day=day.tz_localize("America/New_York"))), split)[0],
        _load(_parquet(tmp_path, _table(day=day.strftime("%Y-%m-%d"))), split)[0],
        _load(_parquet(tmp_path, _table(day=day.date)), split)[0],
    ]
    assert {dataset.split.digest for dataset in results} == {results[0].split.digest}
    assert results[0].split.test.tolist() == list(range(12))  # the latest days come first in the file
    assert results[0].lineage.split == "time by day, validation 0.1, test 0.2"


def test_take_returns_the_rows_asked_for(tmp_path: Path) -> None:
    dataset, _ = _load(_csv(tmp_path, _table()))
    rows = np.array([3, 1, 1])
    taken = dataset.take(rows)
    assert {name: array.tolist() for name, array in taken.items()} == {
        name: array[rows].tolist() for name, array in dataset.inputs.items()
    }


def test_progress_names_each_column(tmp_path: Path) -> None:
    said: list[str] = []
    load_dataset(DataConfig(path=_csv(tmp_path, _table()).name), SplitConfig(), root=tmp_path, progress=said.append)
    assert "reading rows.csv" in said
    assert "converting columns 3/3: town" in said
    assert "checking columns 3/3: town" in said


# Labels.


@pytest.mark.parametrize(
    ("label", "task", "classes"),
    [
        (["a", "b"] * (N // 2), "classification", ("a", "b")),
        ([0, 1] * (N // 2), "classification", (0, 1)),
        ([True, False] * (N // 2), "classification", (0, 1)),
        ([0.0, 1.0] * (N // 2), "classification", (0, 1)),
        ([0.5, 1.0] * (N // 2), "regression", ()),
        (np.linspace(0, 1, N), "regression", ()),
        (np.arange(N) * 1.0, "regression", ()),
        (pd.Categorical(["b", "a"] * (N // 2)), "classification", ("a", "b")),
    ],
    ids=["text", "integer", "boolean", "whole-floats", "halves", "floats", "many-whole-floats", "category"],
)
def test_the_task_follows_from_the_label(tmp_path: Path, label: Any, task: str, classes: tuple[Any, ...]) -> None:
    dataset = _from_frame(tmp_path, _table(label=label))
    assert (dataset.task, dataset.classes) == (task, classes)
    assert dataset.label.dtype == (
        np.float64 if task == "regression" else object if isinstance(classes[0], str) else np.int64
    )


def test_integers_with_many_values_are_a_quantity_and_the_report_says_so(tmp_path: Path) -> None:
    n_rows = 300
    dataset, report = _load(_csv(tmp_path, _table(n_rows, label=np.arange(n_rows) * 7)))
    assert dataset.task == "regression"
    note = next(finding for finding in report.findings if finding.code == "inferred-task")
    assert "300 distinct whole numbers, taken as regression" in note.message
    assert 'task = "classification"' in note.message


def test_the_task_can_be_set(tmp_path: Path) -> None:
    path = _csv(tmp_path, _table(label=np.arange(N) % 5))
    assert _load(path, task="regression")[0].classes == ()
    assert _load(path, task="classification")[0].classes == (0, 1, 2, 3, 4)
    assert "inferred-task" not in {finding.code for finding in _load(path, task="regression")[1].findings}


@pytest.mark.parametrize(
    ("label", "settings", "complaint"),
    [
        (["a", None, "b"] * (N // 3), {}, r"'label' is missing in 20 of 60 rows, first in row 1; leave those rows out"),
        ([1.5, np.nan, 2.5] * (N // 3), {}, r"is missing in 20 of 60 rows"),
        (["a", "", "b"] * (N // 3), {}, r"is missing in 20 of 60 rows"),
        (["a"] * N, {}, r"every row has the class 'a'"),
        ([3.5] * N, {}, r"every row has the value 3.5"),
        (["a", "b"] * (N // 2), {"task": "regression"}, r"is text, which cannot be regressed"),
        ([0.5, 1.5] * (N // 2), {"task": "classification"}, r"0.5 in row 0 cannot name a class"),
        ([0.5, np.inf] * (N // 2), {}, r"inf in row 1 is not finite"),
        (["a", 1] * (N // 2), {}, r"mixes kinds: 'a' \(str\) and 1 \(int\)"),
        (pd.to_datetime(["2013-01-01"] * N), {}, r"holds timestamps"),
        (["a", "b"] * 29 + ["c", "c"], {}, r"1 of 3 classes have fewer than 3 rows.*'c': 2"),
    ],
    ids=["none", "nan", "empty", "one-class", "one-value", "text", "halves", "infinite", "mixed", "time", "small"],
)
def test_a_label_that_cannot_be_learnt_is_refused(
    tmp_path: Path, label: Any, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        _from_frame(tmp_path, _table(label=pd.Series(label)), **settings)


# Columns that cannot be used.


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([1.0, np.inf] * (N // 2), r"column 'odd': inf in row 1 is not finite in 32 bits \(30 such values\)"),
        ([1.0, 1e39] * (N // 2), r"column 'odd': 1e\+39 in row 1 is not finite in 32 bits"),
        ([1, "two"] * (N // 2), r"column 'odd' mixes kinds: 1 \(int\) and 'two' \(str\)"),
        ([True, 3] * (N // 2), r"column 'odd' mixes kinds: True \(bool\) and 3 \(int\)"),
        ([[1, 2]] * N, r"column 'odd' holds values of type list"),
        ([b"x"] * N, r"column 'odd' holds values of type bytes"),
        ([1 + 2j] * N, r"column 'odd' holds values of type complex128"),
        ([2**63] * N, r"column 'odd' holds integers that do not fit into 64 bits"),
        (
            pd.to_datetime(["2013-01-01"] * N),
            r"column 'odd' holds timestamps.*derive numeric columns \(hour, weekday\)",
        ),
        ([datetime.date(2013, 1, 1)] * N, r"column 'odd' holds timestamps"),
        (pd.to_timedelta([1] * N, unit="h"), r"column 'odd' holds durations.*total_seconds"),
        ([f"id {i}" for i in range(N)], r"column 'odd' has 60 distinct texts, max_categories is 50; .*drop"),
    ],
    ids=[
        "inf",
        "overflow",
        "mixed",
        "mixed-bool",
        "list",
        "bytes",
        "complex",
        "large",
        "time",
        "date",
        "duration",
        "text",
    ],
)
def test_a_column_that_cannot_be_an_input_is_refused(tmp_path: Path, values: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        _from_frame(tmp_path, _table(odd=pd.Series(values)), max_categories=50)


def test_all_unusable_columns_are_told_at_once(tmp_path: Path) -> None:
    table = _table(a=[np.inf] * N, b=pd.to_datetime(["2013-01-01"] * N))
    with pytest.raises(
        DataError, match=r"2 columns cannot be used:\n  column 'a': inf.*\n  column 'b' holds timestamps"
    ):
        _load(_parquet(tmp_path, table))


# Names and files.


@pytest.mark.parametrize(
    ("settings", "split", "complaint"),
    [
        ({"label": "lable"}, SplitConfig(), r"\[data\] label: no column 'lable' \(did you mean 'label'\?\)"),
        ({"drop": ("Town",)}, SplitConfig(), r"\[data\] drop: no column 'Town' \(did you mean 'town'\?\)"),
        ({"features": ("sise",)}, SplitConfig(), r"\[data\] features: no column 'sise' \(did you mean 'size'\?\)"),
        ({"units": {"rom": "1"}}, SplitConfig(), r"\[data\] units: no column 'rom' \(did you mean 'rooms'\?\)"),
        (
            {"descriptions": {"zzz": ""}},
            SplitConfig(),
            r"descriptions: no column 'zzz'; the columns are size, rooms, town;",
        ),
        ({}, SplitConfig(method="group", by="towns"), r"\[split\] by: no column 'towns' \(did you mean 'town'\?\)"),
    ],
    ids=["label", "drop", "features", "units", "descriptions", "by"],
)
def test_an_unknown_name_is_refused_with_close_ones(
    tmp_path: Path, settings: dict[str, Any], split: SplitConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        _load(_csv(tmp_path, _table()), split, **settings)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b"a,label\n", "has no rows"),
        (b"a,b,a,label\n1,2,3,x\n", "several columns are named 'a'"),
        (b"a,label\n1,x\n1,2,3\n", "not readable as CSV.*Expected 2 columns, got 3"),
        (b"a" * 200_000, "is no CSV header"),
        (b"a,label\n\xff\xfe,x\n", "column 'a' is not text in UTF-8"),
    ],
    ids=["empty", "no-rows", "duplicate-names", "ragged", "no-header", "not-utf-8"],
)
def test_a_csv_that_is_no_table_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        _load(path)


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.npz"):
        (tmp_path / name).write_bytes(b"not this format at all")
        with pytest.raises(DataError, match=name):
            _load(tmp_path / name)
    with pytest.raises(DataError, match=r"nowhere.csv: no such file or folder.*relative to"):
        _load(tmp_path / "nowhere.csv")
    (tmp_path / "rows.xlsx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tables are .csv or .parquet"):
        _load(tmp_path / "rows.xlsx")


def test_an_npz_with_pickles_is_refused_unread(tmp_path: Path) -> None:
    path = _npz(tmp_path, x=np.array([{"a": 1}] * N, dtype=object), label=np.arange(N))
    with pytest.raises(DataError, match="no arrays of Python objects"):
        _load(path)


def test_column_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column name 7 is not text"):
        _from_frame(tmp_path, _table().rename(columns={"size": 7}))


def test_a_named_index_is_a_column(tmp_path: Path) -> None:
    dataset, _ = _load(_parquet(tmp_path, _table().set_index("rooms")))
    assert "rooms" in dataset.inputs


@pytest.mark.parametrize("settings", [{}, {"path": "a.csv", "callable": "a:b"}], ids=["neither", "both"])
def test_data_come_from_exactly_one_place(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either path or callable"):
        DataConfig(**settings)
    with pytest.raises(ConfigError, match="either path or callable"):
        convert(settings, DataConfig, source="yard.toml", error=ConfigError)


# Callables.


def test_a_callable_may_return_columns_as_arrays(tmp_path: Path) -> None:
    body = "import numpy as np\ndef rows():\n    return {'x': np.arange(60), 'label': np.array(['a', 'b'] * 30)}\n"
    _module(tmp_path, "as_columns", body)
    config = DataConfig(callable="as_columns:rows")
    dataset, _ = load_dataset(config, SplitConfig(), root=tmp_path, progress=lambda message: None)
    assert [spec.datatype for spec in dataset.specs] == ["INT64"]
    assert dataset.classes == ("a", "b")


def test_two_projects_may_have_a_module_of_the_same_name(tmp_path: Path) -> None:
    sizes = []
    for i, folder in enumerate([tmp_path / "one", tmp_path / "two"], 1):
        folder.mkdir()
        body = f"import numpy as np\ndef rows():\n    return {{'x': np.arange({60 * i}), 'label': np.arange({60 * i}) % 2}}\n"
        _module(folder, "project_rows", body)
        config = DataConfig(callable="project_rows:rows")
        sizes.append(load_dataset(config, SplitConfig(), root=folder, progress=lambda message: None)[0].n_samples)
    assert sizes == [60, 120]
    assert str(tmp_path / "one") not in sys.path


@pytest.mark.parametrize(
    ("target", "error", "complaint"),
    [
        ("rows_of", ConfigError, '"module:function"'),
        ("no_such_module:rows", ConfigError, r"no module 'no_such_module' in"),
        ("bad_rows:row", ConfigError, r"no function 'row' \(did you mean 'rows'\?\)"),
        ("bad_rows:rows", DataError, r"returned a list; return a pandas DataFrame or a dict of arrays"),
    ],
)
def test_a_callable_that_cannot_be_used_is_refused(
    tmp_path: Path, target: str, error: type[Exception], complaint: str
) -> None:
    _module(tmp_path, "bad_rows", "def rows():\n    return [1, 2]\n")
    with pytest.raises(error, match=complaint):
        load_dataset(DataConfig(callable=target), SplitConfig(), root=tmp_path, progress=lambda message: None)


@pytest.mark.parametrize(
    ("body", "complaint", "cause"),
    [
        ("import not_installed_anywhere\n", "importing failing raised .*not_installed_anywhere", ModuleNotFoundError),
        ("def rows(:\n", "importing failing raised SyntaxError", SyntaxError),
        (
            "def rows():\n    raise KeyError('town')\n",
            r"the function raised KeyError: 'town' \(failing.py, line 2\)",
            KeyError,
        ),
        ("def rows(path):\n    return 1\n", r"called with 0 arguments, but its parameters are \(path\)", TypeError),
    ],
    ids=["import", "syntax", "raises", "parameters"],
)
def test_a_callable_that_fails_is_named_with_what_it_raised(
    tmp_path: Path, body: str, complaint: str, cause: type[Exception]
) -> None:
    _module(tmp_path, "failing", body)
    config = DataConfig(callable="failing:rows")
    with pytest.raises(ConfigError, match=rf"\[data\] callable = 'failing:rows'.*{complaint}") as caught:
        load_dataset(config, SplitConfig(), root=tmp_path, progress=lambda message: None)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(("separator", "called"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_separated_otherwise_is_recognised(tmp_path: Path, separator: str, called: str) -> None:
    lines = [separator.join(cells) for cells in (["x", "label"], *([str(i), "ab"[i % 2]] for i in range(30)))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"seems to be separated by {called}; write it with commas"):
        load_dataset(DataConfig(path="rows.csv"), SplitConfig(), root=tmp_path, progress=lambda message: None)


def test_a_class_called_na_is_told_why_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,label\n" + "".join(f"{i},{['EU', 'NA'][i % 2]}\n" for i in range(30)))
    with pytest.raises(
        DataError, match=r"missing in 15 of 30 rows, first in row 1.*in CSV an empty field, NA, .*otherwise"
    ):
        load_dataset(DataConfig(path="rows.csv"), SplitConfig(), root=tmp_path, progress=lambda message: None)


# Arrays.


@pytest.mark.parametrize(
    ("x", "name", "datatype", "shape"),
    [
        (np.zeros((N, 4, 5), dtype=np.uint8), "image", "UINT8", ("batch", 4, 5, 1)),
        (np.zeros((N, 4, 5, 3), dtype=np.uint8), "image", "UINT8", ("batch", 4, 5, 3)),
        (np.arange(N * 3).reshape(N, 3), "features", "FP32", ("batch", 3)),
        (np.zeros((N, 3), dtype=np.uint8) + np.arange(N, dtype=np.uint8)[:, None], "features", "FP32", ("batch", 3)),
    ],
    ids=["gray", "colour", "integers", "bytes"],
)
def test_arrays_become_an_image_or_features(
    tmp_path: Path, x: NDArray[Any], name: str, datatype: str, shape: tuple[Any, ...]
) -> None:
    dataset, _ = _load(_npz(tmp_path, x=x, y=np.arange(N) % 2), label="y", units={name: "1"})
    assert [(s.name, s.datatype, s.shape, s.unit) for s in dataset.specs] == [(name, datatype, shape, "1")]
    assert dataset.inputs[name].shape == (N, *shape[1:])
    assert dataset.label_name == "y"


def test_arrays_may_be_split_by_another_array(tmp_path: Path) -> None:
    group = np.array(["a", "b", "c", "d", "e", "f"])[np.arange(N) % 6]
    path = _npz(tmp_path, x=np.random.default_rng(0).normal(size=(N, 2)), label=np.arange(N) % 2, who=group)
    dataset, _ = _load(path, SplitConfig(method="group", by="who"))
    assert not set(group[dataset.split.train]) & set(group[dataset.split.test])


def test_missing_features_of_an_array_make_it_nullable(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(N, 2))
    x[::7, 1] = np.nan
    assert _load(_npz(tmp_path, x=x, label=np.arange(N) % 2))[0].specs[0].nullable


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        (
            {"x": np.zeros((N, 4, 5)), "label": np.arange(N) % 2},
            r"dtype float64 and shape \(60, 4, 5\); give images as uint8",
        ),
        (
            {"x": np.zeros((N, 3, 8, 8), np.uint8), "label": np.arange(N) % 2},
            r"channels belong on the last axis; .*transpose",
        ),
        ({"x": np.zeros((N, 8, 8, 9), np.uint8), "label": np.arange(N) % 2}, r"give 1, 3 or 4 channels"),
        ({"x": np.full((N, 2), np.inf), "label": np.arange(N) % 2}, r"array 'x': inf in row 0, column 0 is not finite"),
        ({"x": np.full((N, 2), "a"), "label": np.arange(N) % 2}, r"array 'x' has dtype <U1; give numbers"),
        ({"x": np.zeros((N, 2)), "label": np.zeros((N, 2))}, r"label 'label' has shape \(60, 2\); .*argmax"),
        ({"x": np.zeros((N, 2)), "label": np.arange(N - 1)}, r"different numbers of rows"),
        ({"x": np.zeros((N, 2)), "z": np.zeros((N, 2)), "label": np.arange(N)}, r"needs one array .* got \['x', 'z'\]"),
        ({"x": np.zeros((0, 2)), "label": np.zeros(0)}, r"has no rows"),
    ],
    ids=["float-image", "channels-first", "channels", "inf", "text", "one-hot", "lengths", "several", "empty"],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, NDArray[Any]], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        _load(_npz(tmp_path, **arrays))


# Image folders.


def _images(root: Path, n_per_class: int = 6, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> Path:
    folder = root / "pictures"
    generator = np.random.default_rng(0)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(n_per_class):
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_an_image_folder_gives_pixels_and_the_folder_names(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    (folder / "cat" / "notes.txt").write_text("not an image")
    dataset, _ = _load(folder)
    assert [(s.name, s.datatype, s.shape) for s in dataset.specs] == [("image", "UINT8", ("batch", 4, 5, 3))]
    assert dataset.classes == ("cat", "dog")
    assert dataset.label.tolist() == ["cat"] * 6 + ["dog"] * 6
    assert np.array_equal(dataset.inputs["image"][7], np.asarray(Image.open(folder / "dog" / "1.png")))


def test_grayscale_has_one_channel(tmp_path: Path) -> None:
    dataset, _ = _load(_images(tmp_path, mode="L"), image_mode="L")
    assert dataset.specs[0].shape == ("batch", 4, 5, 1)


def test_the_digest_of_images_covers_pixels_and_names(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    first = _load(folder)[0].lineage.digest
    (folder / "cat" / "5.png").rename(folder / "cat" / "6.png")
    renamed = _load(folder)[0].lineage.digest
    Image.new("RGB", (5, 4)).save(folder / "cat" / "6.png")
    assert len({first, renamed, _load(folder)[0].lineage.digest}) == 3


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    Image.new("RGB", (9, 8)).save(folder / "dog" / "3.png")
    with pytest.raises(DataError, match=r"cat/0.png is 5 × 4, dog/3.png is 9 × 8; resize all images"):
        _load(folder)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    whole = (folder / "dog" / "3.png").read_bytes()
    for damaged in (b"not an image", whole[: len(whole) // 2]):
        (folder / "dog" / "3.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"dog/3.png: not a readable image"):
            _load(folder)


def test_more_than_eight_bits_a_channel_are_refused(tmp_path: Path) -> None:
    folder = _images(tmp_path, mode="L")
    Image.fromarray(np.full((4, 5), 40_000, dtype=np.uint16)).save(folder / "dog" / "3.png")
    with pytest.raises(DataError, match=r"dog/3.png: has more than 8 bits a channel"):
        _load(folder, image_mode="L")


def test_a_decompression_bomb_is_refused_undecoded(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = (folder / "dog" / "3.png").read_bytes()
    chunk = b"IHDR" + header
    bomb = png[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    (folder / "dog" / "3.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"dog/3.png: .*decompression bomb.*resize it beforehand"):
        _load(folder)


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    folder = _images(tmp_path)
    (folder / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu: holds no .png"):
        _load(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"holds no sub-folder with images"):
        _load(tmp_path / "nothing")


def test_an_image_folder_has_no_column_to_split_by(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an image folder has no columns"):
        _load(_images(tmp_path), SplitConfig(method="group", by="who"))


# The digest.


def test_the_digest_follows_its_written_rule() -> None:
    def text(value: str) -> bytes:
        return struct.pack("<q", len(value.encode())) + value.encode()

    columns: list[tuple[str, NDArray[Any]]] = [
        ("x", np.array([[1.5, np.nan]], dtype=np.float32)),
        ("town", np.array(["é", "", "é"], dtype=object)),
    ]
    expected = text("x") + text("f4") + struct.pack("<qqq", 2, 1, 2) + struct.pack("<f", 1.5) + b"\x00\x00\xc0\x7f"
    expected += text("town") + text("text") + struct.pack("<qq", 1, 3)
    expected += struct.pack("<q", 2) + text("é") + text("") + struct.pack("<iii", 0, 1, 0)
    assert data_digest(columns) == hashlib.sha256(expected).hexdigest()


@given(
    texts=st.lists(st.text(max_size=3), min_size=1, max_size=8),
    other=st.lists(st.text(max_size=3), min_size=1, max_size=8),
)
def test_texts_have_the_same_digest_only_when_they_are_the_same(texts: list[str], other: list[str]) -> None:
    first, second = np.array(texts, dtype=object), np.array(other, dtype=object)
    assert (data_digest([("t", first)]) == data_digest([("t", second)])) == (texts == other)


def test_names_types_and_row_order_are_part_of_the_digest() -> None:
    x = np.array([1, 2], dtype=np.int64)
    digests = {
        data_digest([("x", x)]),
        data_digest([("y", x)]),
        data_digest([("x", x[::-1])]),
        data_digest([("x", x.astype(np.float32))]),
        data_digest([("x", x[:, None])]),
        data_digest([("x", x), ("x", x)]),
    }
    assert len(digests) == 6


# Rows for a given signature.

SPECS = (
    TensorSpec(name="size", datatype="FP32", shape=("batch",), nullable=True),
    TensorSpec(name="rooms", datatype="INT64", shape=("batch", 1)),
    TensorSpec(name="zip", datatype="BYTES", shape=("batch",)),
)


def test_rows_are_read_as_a_signature_asks_for(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("zip,size,rooms,ignored\n0123,1.5,3,x\n,,4,y\n")
    pd.DataFrame({"zip": ["0123", None], "size": [1.5, None], "rooms": [3, 4]}).to_parquet(tmp_path / "rows.parquet")
    zips, size = np.array(["0123", ""]), np.array([1.5, np.nan])
    np.savez(tmp_path / "rows.npz", zip=zips, size=size, rooms=np.array([3, 4]))
    for name in ("rows.csv", "rows.parquet", "rows.npz"):
        rows = rows_for(tmp_path / name, SPECS)
        assert rows["zip"].tolist() == ["0123", ""]
        assert rows["rooms"].tolist() == [[3], [4]]
        assert rows["size"].dtype == np.float32
        assert rows["size"][0] == 1.5
        assert np.isnan(rows["size"][1])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("zip,sise,rooms\na,1,2\n", r"no column 'size' \(did you mean 'sise'\?\)"),
        ("zip,size,rooms\na,1,\nb,2,3\n", r"'rooms' is missing in 1 rows, and INT64 has no missing value"),
        ("zip,size,rooms\na,big,2\n", r"'size' does not read as FP32"),
        ("zip,size,rooms\na,1,2.5\n", r"'rooms' holds values that INT64 cannot hold"),
        ("zip,size,rooms\na,1,x\n", r"does not fit 'rooms', INT64"),
    ],
)
def test_rows_that_do_not_fit_the_signature_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        rows_for(path, SPECS)
    with pytest.raises(DataError, match=r"rows are read from .csv, .parquet and .npz"):
        rows_for(tmp_path / "rows.json", SPECS)
