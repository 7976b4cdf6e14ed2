"""Writing, reading and comparing bundles; the bundle of every released format version opens."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from numpy.typing import NDArray

from modelyard.bundle.cases import CaseSet, differing_rows
from modelyard.bundle.format import differences, read_bundle, write_bundle
from modelyard.bundle.jsonfile import read_digested, strict_json, write_digested
from modelyard.bundle.manifest import Manifest, TensorSpec
from modelyard.bundle.npz import read_npz, write_npz
from modelyard.bundle.profile import Latency, Profile, add_profile, fingerprint
from modelyard.bundle.reference import CategoryReference, NumericReference
from modelyard.errors import GoldenCaseFailed, MalformedManifest, SignatureMismatch
from modelyard.inference.runtime import open_engine
from modelyard.testing.bundles import SIGNATURE, late_bundle, late_cases, late_content, late_model

ROOT = Path(__file__).parents[2]
V1 = ROOT / "tests" / "fixtures" / "bundle-v1"

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ARRAYS = st.one_of(
    stnp.arrays(
        st.one_of(stnp.boolean_dtypes(), stnp.integer_dtypes(), stnp.unsigned_integer_dtypes(), stnp.floating_dtypes()),
        stnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    st.lists(TEXT, max_size=5).map(lambda values: np.array(values, dtype=np.str_)),
)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    content = late_content()
    written = write_bundle(tmp_path / "b", content)
    bundle = read_bundle(tmp_path / "b")
    assert bundle == written
    assert bundle.signature == content.signature
    assert bundle.manifest.lineage == content.lineage
    assert bundle.model_path.read_bytes() == content.model
    assert bundle.size_bytes == sum((tmp_path / "b" / f.path).stat().st_size for f in bundle.manifest.files)
    cases = bundle.cases()
    for spec in SIGNATURE.inputs:
        np.testing.assert_array_equal(cases.inputs[spec.name], content.cases.inputs[spec.name])
    for spec in SIGNATURE.outputs:
        np.testing.assert_array_equal(cases.outputs[spec.name], content.cases.outputs[spec.name])
    assert repr(bundle.reference()) == repr(content.reference)


def test_the_reference_counts_what_is_missing(tmp_path: Path) -> None:
    reference = late_bundle(tmp_path / "b").reference()
    delay, origin = reference["input:delay"], reference["input:origin"]
    assert isinstance(delay, NumericReference)
    assert (delay.n_samples, delay.n_missing, delay.minimum, delay.maximum) == (6, 1, -12, 30)
    assert isinstance(origin, CategoryReference)
    assert (origin.n_missing, origin.values[0], origin.counts.tolist()) == (1, "JFK", [2, 1, 1, 1])
    assert set(reference) == {"input:delay", "input:origin", "output:probability", "output:label"}


def test_equal_content_has_equal_identity_and_other_content_another(tmp_path: Path) -> None:
    first, again = late_bundle(tmp_path / "1"), late_bundle(tmp_path / "2")
    other = late_bundle(tmp_path / "3", weight=0.5)
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert (tmp_path / "1" / "bundle.json").read_bytes() == (tmp_path / "2" / "bundle.json").read_bytes()


def test_a_profile_is_replaced_without_changing_the_identity(tmp_path: Path) -> None:
    bundle = late_bundle(tmp_path / "b")

    def measure(p50_s: float, engine: str) -> Profile:
        at = Latency(batch_size=1, n_threads=1, n_runs=9, p50_s=p50_s, p99_s=1.0, mean_s=0.5)
        return Profile(hardware=fingerprint(engine), measured_at="2026-01-01", latencies=(at,))

    assert bundle.profiles() == ()
    for p50_s, engine in ((0.1, "a 1"), (0.2, "a 1"), (0.3, "b 1")):
        add_profile(bundle.path / "profile.json", measure(p50_s, engine))
    read = read_bundle(bundle.path)
    assert read.digest == bundle.digest
    assert read.profiles() == (measure(0.2, "a 1"), measure(0.3, "b 1"))
    assert read.profiles()[0].latencies[0].rows_per_s == 2


def test_a_bundle_is_never_overwritten(tmp_path: Path) -> None:
    before = late_bundle(tmp_path / "b").digest
    with pytest.raises(FileExistsError, match="never overwritten"):
        late_bundle(tmp_path / "b", weight=2.0)
    assert read_bundle(tmp_path / "b").digest == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    wrong = replace(late_content(), name="no / name")
    with pytest.raises(MalformedManifest, match="name"):
        write_bundle(tmp_path / "b", wrong)
    short = {"probability": np.zeros(5, np.float32), "label": np.full(6, "late", object)}
    with pytest.raises(SignatureMismatch, match="rows"):
        write_bundle(tmp_path / "b", replace(late_content(), cases=CaseSet(inputs=late_cases().inputs, outputs=short)))
    with pytest.raises(KeyError):
        write_bundle(tmp_path / "b", replace(late_content(), cases=CaseSet(inputs={}, outputs={})))
    assert list(tmp_path.iterdir()) == []


def test_of_writers_to_one_path_one_wins_whole(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    digests: list[str] = []

    def write(weight: float) -> None:
        content = late_content(weight=weight)
        barrier.wait()
        try:
            digests.append(write_bundle(tmp_path / "b", content).digest)
        except OSError:  # FileExistsError, or the rename found the folder of another writer
            return

    threads = [threading.Thread(target=write, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [read_bundle(tmp_path / "b").digest]
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_external_data_is_carried_listed_and_verified(tmp_path: Path) -> None:
    import onnx

    model = onnx.load_from_string(late_model())
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    weight.dims[:] = [1]
    weight.ClearField("float_data")
    weight.raw_data = np.array([0.0625], np.float32).tobytes()
    onnx.external_data_helper.set_external_data(weight, "weights/w.bin", offset=0, length=4)
    (tmp_path / "weights").mkdir()
    onnx.save_model(model, tmp_path / "model.onnx")
    assert (tmp_path / "weights" / "w.bin").stat().st_size == 4
    bundle = write_bundle(tmp_path / "b", replace(late_content(), model=tmp_path / "model.onnx"))
    assert bundle.graph.external_files == ("weights/w.bin",)
    assert "weights/w.bin" in [entry.path for entry in bundle.manifest.files]
    open_engine(read_bundle(bundle.path)).close()


def test_golden_cases_are_answered_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    open_engine(late_bundle(tmp_path / "right")).close()
    cases = late_cases()
    probability = cases.outputs["probability"] + np.array([0, 0, 0.1, 0, 0, 0], np.float32)
    wrong = {**cases.outputs, "probability": probability}
    bundle = write_bundle(
        tmp_path / "wrong", replace(late_content(), cases=CaseSet(inputs=cases.inputs, outputs=wrong))
    )
    with pytest.raises(GoldenCaseFailed, match=r"golden case 2 of 6: output 'probability'.*do not serve") as caught:
        open_engine(bundle)
    assert caught.value.row == 2


def test_golden_cases_that_cannot_be_computed_are_the_bundles_fault(tmp_path: Path) -> None:
    import onnx

    model = onnx.load_from_string(late_model())
    model.graph.initializer.append(onnx.helper.make_tensor("seven", onnx.TensorProto.INT64, [1], [7]))
    sigmoid = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    sigmoid.op_type, sigmoid.input[:] = "Reshape", ["logit", "seven"]
    bundle = write_bundle(tmp_path / "b", replace(late_content(), model=model.SerializeToString()))
    with pytest.raises(GoldenCaseFailed, match="cannot be computed on this machine"):
        open_engine(bundle)


def test_differences_name_the_leaf(tmp_path: Path) -> None:
    old = late_bundle(tmp_path / "1").manifest
    content = late_content(weight=0.5)
    inputs = (msgspec.structs.replace(SIGNATURE.inputs[0], unit="s"), SIGNATURE.inputs[1])
    signature = msgspec.structs.replace(SIGNATURE, inputs=inputs)
    new = write_bundle(tmp_path / "2", replace(content, signature=signature, rtol=0.5)).manifest
    found = differences(old, new)
    assert found["signature.inputs.delay.unit"] == ("min", "s")
    assert found["cases.rtol"] == (1e-4, 0.5)
    assert {"digest", "files.model.onnx.sha256"} <= set(found)
    assert "signature.inputs.origin.datatype" not in found
    assert differences(old, old) == {}


def test_the_bundle_of_format_version_1_opens_verifies_and_answers() -> None:
    bundle = read_bundle(V1)
    assert bundle.digest == "c9ba842365114304df088a905a03e451a04fae286a9eb3a53c13bdb88ea73398"
    assert bundle.manifest.format_version == 1
    assert [spec.datatype for spec in bundle.signature.inputs] == ["FP32", "BYTES"]
    assert bundle.cases().n_samples == bundle.manifest.cases.n_samples == 6
    assert len(bundle.reference()) == 4
    assert bundle.profiles()[0].hardware.processor == "an example"
    open_engine(bundle).close()


def test_the_published_schema_is_current_and_fits_a_real_manifest() -> None:
    """docs/bundle-format.md says how to write the schema again."""
    published = json.loads((ROOT / "docs" / "bundle.schema.json").read_text())
    assert published == json.loads(msgspec.json.encode(msgspec.json.schema(Manifest)))
    manifest = json.loads((V1 / "bundle.json").read_text())
    jsonschema.validate(manifest, published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"surprise": 1}, published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"name": "../x"}, published)


@given(arrays=st.dictionaries(st.from_regex(r"[a-z.0-9]{1,9}", fullmatch=True), ARRAYS, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_plain_arrays_survive_an_npz(tmp_path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    write_npz(tmp_path / "a.npz", arrays)
    read = read_npz(tmp_path / "a.npz")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as numpys:  # the format is NumPy's own
        for name, array in arrays.items():
            np.testing.assert_array_equal(numpys[name], array)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(data=st.dictionaries(TEXT.filter(lambda key: key != "digest"), JSON, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_json_survives_a_digested_file(tmp_path: Path, data: dict[str, Any]) -> None:
    digest = write_digested(tmp_path / "f.json", data)
    assert read_digested(tmp_path / "f.json", 2**20) == {"digest": digest} | data


@given(raw=st.binary(max_size=60) | JSON.map(lambda data: json.dumps(data).encode()))
def test_strict_json_returns_what_json_means_or_refuses(raw: bytes) -> None:
    try:
        data = strict_json(raw, "f.json")
    except MalformedManifest as exc:
        assert str(exc).startswith("f.json: ")  # noqa: PT017
    else:
        assert data == json.loads(raw)


@given(
    values=stnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 3))),
    row=st.integers(0, 4),
    column=st.integers(0, 2),
)
def test_a_changed_row_is_found_and_only_that(values: NDArray[np.float32], row: int, column: int) -> None:
    row, column = row % values.shape[0], column % values.shape[1]
    changed = values.copy()
    changed[row, column] = 0.0 if np.isnan(values[row, column]) else np.nan
    assert differing_rows(values, values, rtol=0, atol=0).size == 0
    assert differing_rows(values, changed, rtol=1e-3, atol=1e-3).tolist() == [row]


def test_the_arrays_of_a_model_without_a_batch_are_compared_whole() -> None:
    assert differing_rows(np.float32(1) * np.ones(()), np.ones(()), rtol=0, atol=0).size == 0
    assert differing_rows(np.ones(()), np.zeros(()), rtol=0, atol=0).tolist() == [0]


@pytest.mark.parametrize("name", ["a\n", "", "-a", "a/b", "a" * 129, "ä"])
def test_a_name_is_a_safe_folder_name(name: str) -> None:
    data = json.loads((V1 / "bundle.json").read_text()) | {"name": name}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(data, Manifest)


def test_a_specification_knows_its_row() -> None:
    assert TensorSpec(name="x", datatype="FP32", shape=("batch", 3)).row_shape == (3,)
    assert TensorSpec(name="x", datatype="BF16", shape=(3,)).row_shape == (3,)
    assert TensorSpec(name="x", datatype="BF16", shape=(3,)).numpy_dtype == np.uint16
