"""Bundles from an enemy. Each attack is refused with an error of its own that names the file and the remedy.

The enemy can compute digests too, so every attack below carries correct ones unless the digest is the attack.
"""

import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from modelyard.bundle.format import read_bundle, sha256_of
from modelyard.bundle.jsonfile import BLANK, write_digested
from modelyard.bundle.limits import Limits
from modelyard.bundle.npz import read_npz
from modelyard.bundle.profile import read_profiles
from modelyard.errors import (
    BundleError,
    DigestMismatch,
    ForbiddenOperator,
    MalformedGraph,
    MalformedManifest,
    MissingFile,
    SignatureMismatch,
    TooLarge,
    TruncatedFile,
    UnknownFormatVersion,
    UnsafeArchive,
    UnsafePath,
)
from modelyard.testing.bundles import late_bundle, late_model

HUGE = 2**40
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return late_bundle(tmp_path / "bundle").path


def read_everything(path: Path, **options: Any) -> None:
    bundle = read_bundle(path, **options)
    bundle.cases()
    bundle.reference()
    bundle.profiles()


def refused(error: type[BundleError], file: str, remedy: str, path: Path, **options: Any) -> BundleError:
    """Read the bundle, expecting exactly `error`, naming `file` and containing `remedy`."""
    with pytest.raises(BundleError) as caught:
        read_everything(path, **options)
    assert type(caught.value) is error, caught.value
    assert file in str(caught.value)
    assert remedy in str(caught.value)
    return caught.value


def sign(path: Path, edit: Edit = lambda data: None) -> None:
    """Change the manifest and give it a correct digest, with correct sizes and digests of the files first."""
    data = json.loads((path / "bundle.json").read_text())
    for entry in data["files"]:
        if (path / entry["path"]).is_file():
            entry["size_bytes"] = (path / entry["path"]).stat().st_size
            entry["sha256"] = sha256_of(path / entry["path"])
    edit(data)
    write_digested(path / "bundle.json", data)


def sign_text(path: Path, text: str) -> None:
    """Write a manifest's text as it is, after putting the right digest in the place of BLANK."""
    assert BLANK in text
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "bundle.json").write_bytes(text.replace(BLANK, digest, 1).encode())


def replaced(path: Path, file: str, content: bytes) -> Path:
    (path / file).write_bytes(content)
    sign(path)
    return path


# --- digests, sizes, versions ---


def test_wrong_digest_of_a_file(bundle: Path) -> None:
    raw = bytearray((bundle / "model.onnx").read_bytes())
    raw[40] ^= 1
    (bundle / "model.onnx").write_bytes(raw)
    refused(DigestMismatch, "model.onnx", "fetch the bundle again", bundle)


def test_wrong_digest_of_the_whole(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace('"late"', '"soon"', 1))
    refused(DigestMismatch, "bundle.json", "fetch the bundle again", bundle)


def test_missing_digest_of_the_whole(bundle: Path) -> None:
    data = json.loads((bundle / "bundle.json").read_text())
    del data["digest"]
    (bundle / "bundle.json").write_text(json.dumps(data))
    refused(DigestMismatch, "bundle.json", "fetch the bundle again", bundle)


def test_missing_digest_of_a_file(bundle: Path) -> None:
    sign(bundle, lambda data: data["files"][0].pop("sha256"))
    refused(MalformedManifest, "bundle.json", "correct this field", bundle)


def test_truncated_file(bundle: Path) -> None:
    raw = (bundle / "cases.npz").read_bytes()
    (bundle / "cases.npz").write_bytes(raw[:-1])
    refused(TruncatedFile, "cases.npz", "fetch the bundle again", bundle)


def test_truncated_manifest(bundle: Path) -> None:
    raw = (bundle / "bundle.json").read_bytes()
    (bundle / "bundle.json").write_bytes(raw[: len(raw) // 2])
    refused(MalformedManifest, "bundle.json", "fetch the file again", bundle)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5, []])
def test_unknown_format_version(bundle: Path, version: object) -> None:
    sign(bundle, lambda data: data.update(format_version=version))
    if version is True:  # equal to 1 in Python, but no integer in JSON
        refused(MalformedManifest, "bundle.json", "correct this field", bundle)
    else:
        refused(UnknownFormatVersion, "bundle.json", "install a newer modelyard", bundle)


def test_missing_file(bundle: Path) -> None:
    (bundle / "reference.npz").unlink()
    refused(MissingFile, "reference.npz", "fetch the bundle again", bundle)


def test_required_file_not_listed(bundle: Path) -> None:
    sign(bundle, lambda data: data["files"].pop(1))
    refused(MissingFile, "cases.npz", "write the bundle again", bundle)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    refused(MissingFile, "nowhere", "folder with a bundle.json", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(MissingFile, "bundle.json", "fetch the bundle again", tmp_path / "empty")


# --- the manifest ---


def test_manifest_larger_than_the_limit(bundle: Path) -> None:
    sign(bundle, lambda data: data.update(description="x" * 2**22))
    refused(TooLarge, "bundle.json", "fetch it again", bundle)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_number_that_is_not_finite(bundle: Path, token: str) -> None:
    text = (bundle / "bundle.json").read_text()
    digest = json.loads(text)["digest"]
    sign_text(bundle, text.replace(digest, BLANK).replace("0.75", token, 1))
    refused(MalformedManifest, "bundle.json", "use a finite number", bundle)


def test_duplicate_key(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    digest = json.loads(text)["digest"]
    sign_text(bundle, text.replace(digest, BLANK).replace('"name"', '"task": "other", "name"', 1))
    error = refused(MalformedManifest, "bundle.json", "keep one", bundle)
    assert "'task'" in str(error)


@pytest.mark.parametrize(
    "hostile",
    [
        '{"digest": "' + BLANK + '", "a": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"digest": "' + BLANK + '", "a": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
        '{"digest": "' + BLANK + '", "format_version": ' + "1" * 10_000 + "}",
        '{"digest": "' + BLANK + '", "name": "\\ud800"}',
        '{"digest": "' + BLANK + '",}',
    ],
    ids=["deep-lists", "deep-objects", "a-number-of-10000-digits", "half-a-character", "bad-syntax"],
)
def test_json_that_would_choke_a_parser(bundle: Path, hostile: str) -> None:
    sign_text(bundle, hostile)
    refused(MalformedManifest, "bundle.json", "fetch the file again", bundle)


def test_manifest_that_is_not_utf8(bundle: Path) -> None:
    (bundle / "bundle.json").write_text((bundle / "bundle.json").read_text(), encoding="utf-16")
    refused(MalformedManifest, "bundle.json", "fetch the file again", bundle)


def test_manifest_that_is_not_an_object(bundle: Path) -> None:
    (bundle / "bundle.json").write_text("[]")
    refused(MalformedManifest, "bundle.json", "fetch the bundle again", bundle)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data.pop("lineage"), "lineage"),
        (lambda data: data.update(name="../up"), "name"),
        (lambda data: data.update(name="late\n"), "name"),
        (lambda data: data["signature"]["inputs"][0].update(datatype="FP8"), "signature.inputs[0].datatype"),
        (lambda data: data["signature"]["inputs"][0].update(shape=[-1]), "signature.inputs[0].shape[0]"),
        (lambda data: data["signature"].update(inputs=[]), "signature.inputs"),
        (lambda data: data["files"][0].update(size_bytes=-1), "files[0].size_bytes"),
        (lambda data: data["files"][0].update(sha256="0" * 63), "files[0].sha256"),
        (lambda data: data["cases"].update(rtol="much"), "cases.rtol"),
    ],
)
def test_field_that_breaks_the_schema(bundle: Path, edit: Edit, field: str) -> None:
    sign(bundle, edit)
    error = refused(MalformedManifest, "bundle.json", "correct this field", bundle)
    assert field in str(error)


@pytest.mark.parametrize("time", ["", "yesterday", "2026-13-01T00:00:00", "1767225600", "2026-01-01T00:00:00+99:00"])
def test_time_that_is_none(bundle: Path, time: str) -> None:
    sign(bundle, lambda data: data["lineage"].update(created_at=time))
    error = refused(MalformedManifest, "bundle.json: lineage.created_at", "correct this field", bundle)
    assert error.field == "lineage.created_at"


def test_metric_of_a_later_version_does_not_keep_a_bundle_from_being_read(bundle: Path) -> None:
    sign(bundle, lambda data: data.update(targets={"metric": "metric-of-2040"}))
    read_everything(bundle)


@pytest.mark.parametrize("listed", ["bundle.json", "profile.json"])
def test_file_that_must_not_be_listed(bundle: Path, listed: str) -> None:
    sign(bundle, lambda data: data["files"].append({"path": listed, "size_bytes": 1, "sha256": BLANK}))
    refused(MalformedManifest, "bundle.json", "remove the entry", bundle)


def test_path_listed_twice(bundle: Path) -> None:
    sign(bundle, lambda data: data["files"].append(data["files"][0]))
    refused(MalformedManifest, "bundle.json", "keep one", bundle)


def test_file_declared_larger_than_the_limits(bundle: Path) -> None:
    sign(bundle, lambda data: data["files"][0].update(size_bytes=HUGE))
    refused(TooLarge, "bundle.json", "raise the limit", bundle)
    sign(bundle)
    refused(TooLarge, "bundle.json", "raise the limit", bundle, limits=Limits(max_bundle_bytes=2000))
    refused(TooLarge, "bundle.json", "raise the limit", bundle, limits=Limits(max_files=2))


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../model.onnx", "a/../../b", "a\\b", "C:/b", "a\0b", ".", "a\nb", "*/b", "./a", "a//b", "a/"],
)
def test_path_in_the_manifest_that_leaves_the_bundle(bundle: Path, path: str) -> None:
    sign(bundle, lambda data: data["files"].append({"path": path, "size_bytes": 1, "sha256": BLANK}))
    refused(UnsafePath, "bundle.json", "plain", bundle)


def test_path_that_no_file_system_can_hold(bundle: Path) -> None:
    sign(bundle, lambda data: data["files"].append({"path": "a" * 400, "size_bytes": 1, "sha256": BLANK}))
    refused(MissingFile, "aaa", "fetch the bundle again", bundle)


@pytest.mark.parametrize("file", ["bundle.json", "model.onnx", "cases.npz", "profile.json"])
def test_link_in_the_place_of_a_file(bundle: Path, tmp_path: Path, file: str) -> None:
    (bundle / file).touch()
    (bundle / file).rename(tmp_path / "elsewhere")
    (bundle / file).symlink_to(tmp_path / "elsewhere")
    refused(UnsafePath, file, "replace it by the file itself", bundle)


def test_link_in_the_place_of_a_folder(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(b"")
    (bundle / "weights").symlink_to(tmp_path / "elsewhere")
    entry = {"path": "weights/w.bin", "size_bytes": 0, "sha256": sha256_of(tmp_path / "elsewhere" / "w.bin")}
    sign(bundle, lambda data: data["files"].append(entry))
    refused(UnsafePath, "weights", "replace it by the file itself", bundle)


@pytest.mark.parametrize("file", ["bundle.json", "model.onnx", "profile.json"])
def test_pipe_in_the_place_of_a_file_is_not_waited_for(bundle: Path, file: str) -> None:
    (bundle / file).unlink(missing_ok=True)
    os.mkfifo(bundle / file)
    refused(UnsafePath, file, "replace it by one", bundle)


def test_profile_that_was_tampered_with(bundle: Path) -> None:
    (bundle / "profile.json").write_text('{"digest": "' + BLANK + '", "profile_version": 1, "profiles": []}')
    refused(DigestMismatch, "profile.json", "fetch the bundle again", bundle)
    write_digested(bundle / "profile.json", {"profile_version": 2, "profiles": []})
    refused(MalformedManifest, "profile.json", "measure again", bundle)
    write_digested(bundle / "profile.json", {"profile_version": 1, "profiles": [{}]})
    refused(MalformedManifest, "profile.json", "correct this field", bundle)
    assert read_profiles(bundle / "no-profile.json") == ()


# --- the graph ---


def model_with(
    nodes: list[Any] | None = None,
    initializers: list[Any] | None = None,
    *,
    functions: list[Any] | None = None,
    opsets: list[tuple[str, int]] | None = None,
) -> onnx.ModelProto:
    """Return the bundle's own model with more in it, so that only what was added can be the reason of a refusal."""
    model = onnx.load_from_string(late_model())
    model.graph.node.extend(nodes or [])
    model.graph.initializer.extend(initializers or [])
    model.functions.extend(functions or [])
    model.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets or [])
    return model


def with_model(bundle: Path, model: onnx.ModelProto) -> Path:
    return replaced(bundle, "model.onnx", model.SerializeToString())


def subgraph(name: str, node: Any, output: str) -> Any:
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\x08", b"\xff" * 100, b"\x3a\x00", pickle.dumps({"a": 1})])
def test_garbage_in_the_place_of_the_graph(bundle: Path, raw: bytes) -> None:
    refused(MalformedGraph, "model.onnx", "export it again", replaced(bundle, "model.onnx", raw))


def test_graphs_nested_too_deeply(bundle: Path) -> None:
    node = b""
    for _ in range(300):
        node = message(5, message(6, message(1, node)))  # Node.attribute, Attribute.g, Graph.node
    raw = late_model() + message(7, message(1, node))  # Model.graph, which is merged with the one before
    refused(MalformedGraph, "model.onnx", "export it again", replaced(bundle, "model.onnx", raw))


def test_small_file_of_very_many_nodes_is_not_unpacked(bundle: Path) -> None:
    """Five megabytes of empty nodes would take a quarter of a gigabyte; as many bytes of weights are nothing."""
    raw = late_model() + message(7, message(1, b"") * 2_500_000)
    few = Limits(max_graph_fields=10_000)
    refused(TooLarge, "model.onnx", "raise the limit", replaced(bundle, "model.onnx", raw), limits=few)
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**21], raw_data=bytes(2**23))
    read_everything(with_model(bundle, model_with([], [weights])), limits=few)


def test_large_garbage_in_the_place_of_the_graph(bundle: Path) -> None:
    for raw in (b"\xff" * 2**23, b"\x0b" * 2**23, late_model() + b"\x3a" + b"\x7f" * 2**23):
        refused(MalformedGraph, "model.onnx", "export it again", replaced(bundle, "model.onnx", raw))


def message(field: int, content: bytes) -> bytes:
    """Encode one protobuf field that holds bytes or a message."""
    length, n_bytes = bytearray(), len(content)
    while n_bytes > 127:
        length.append(n_bytes & 127 | 128)
        n_bytes >>= 7
    return bytes([field << 3 | 2, *length, n_bytes]) + content


def test_names_that_are_not_utf8(bundle: Path) -> None:
    raw = late_model().replace(b"Sigmoid", b"Sigm\xff\xfed")
    refused(MalformedGraph, "model.onnx", "export it again", replaced(bundle, "model.onnx", raw))


EVIL = helper.make_node("Run", ["delay"], ["ran"], domain="evil.ops")


def test_operator_domain_that_is_not_allowed(bundle: Path) -> None:
    path = with_model(bundle, model_with([EVIL], opsets=[("evil.ops", 1)]))
    error = refused(ForbiddenOperator, "model.onnx", "consent with --allow-domain evil.ops", path)
    assert (error.domain, error.operator) == ("evil.ops", "Run")


def test_operator_domain_that_is_not_allowed_in_a_branch(bundle: Path) -> None:
    branch = helper.make_node(
        "If",
        ["is_late"],
        ["chosen"],
        then_branch=subgraph("a", helper.make_node("Identity", ["delay"], ["x"]), "x"),
        else_branch=subgraph("b", EVIL, "ran"),
    )
    refused(ForbiddenOperator, "model.onnx", "--allow-domain evil.ops", with_model(bundle, model_with([branch])))


def test_operator_domain_that_is_not_allowed_in_a_loop_in_a_branch(bundle: Path) -> None:
    loop = helper.make_node("Loop", ["", "is_late"], ["looped"], body=subgraph("body", EVIL, "ran"))
    branch = helper.make_node("If", ["is_late"], ["chosen"], then_branch=subgraph("a", loop, "looped"))
    refused(ForbiddenOperator, "model.onnx", "--allow-domain evil.ops", with_model(bundle, model_with([branch])))


def test_operator_domain_that_is_not_allowed_in_a_function(bundle: Path) -> None:
    function = helper.make_function("harmless", "F", ["delay"], ["ran"], [EVIL], [helper.make_opsetid("evil.ops", 1)])
    model = model_with(
        [helper.make_node("F", ["delay"], ["ran"], domain="harmless")], functions=[function], opsets=[("harmless", 1)]
    )
    refused(ForbiddenOperator, "model.onnx", "--allow-domain evil.ops", with_model(bundle, model))


def test_functions_of_allowed_operators_need_no_consent(bundle: Path) -> None:
    body = [helper.make_node("Neg", ["delay"], ["out"])]
    function = helper.make_function("harmless", "F", ["delay"], ["out"], body, [helper.make_opsetid("", 17)])
    model = model_with(
        [helper.make_node("F", ["delay"], ["out"], domain="harmless")], functions=[function], opsets=[("harmless", 1)]
    )
    read_everything(with_model(bundle, model))
    undefined = model_with([helper.make_node("G", ["delay"], ["out"], domain="harmless")], functions=[function])
    refused(ForbiddenOperator, "model.onnx", "--allow-domain harmless", with_model(bundle, undefined))


def test_consent_is_given_by_the_reader(bundle: Path) -> None:
    path = with_model(bundle, model_with([EVIL], opsets=[("evil.ops", 1)]))
    read_everything(path, allow_domains=["evil.ops"])
    sign(path, lambda data: data.update(extra_domains=["evil.ops"]))  # the writer's consent is not the reader's
    refused(ForbiddenOperator, str(path), "consent with --allow-domain evil.ops", path)
    read_everything(path, allow_domains=["evil.ops"])
    refused(ForbiddenOperator, str(path), "--allow-domain evil.ops", path, allow_domains=["other.ops"])


def test_compiled_blob_in_the_place_of_operators(bundle: Path) -> None:
    node = helper.make_node("EPContext", ["delay"], ["x"], domain="com.microsoft", ep_cache_context="../../lib.so")
    refused(ForbiddenOperator, "model.onnx", "export the plain graph", with_model(bundle, model_with([node])))


def test_tensor_declared_larger_than_its_file(bundle: Path) -> None:
    tensor = TensorProto(name="lie", data_type=TensorProto.FLOAT, dims=[1000], raw_data=b"\0" * 8)
    error = refused(TooLarge, "model.onnx", "export the model again", with_model(bundle, model_with([], [tensor])))
    assert (error.declared, error.stored) == (4000, 8)


@pytest.mark.parametrize("dims", [[HUGE], [2**62, 2**62, 2**62], [2**20, 2**20]])
def test_tensor_declared_larger_than_the_limit(bundle: Path, dims: list[int]) -> None:
    tensor = TensorProto(name="lie", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 8)
    refused(TooLarge, "model.onnx", "raise the limit", with_model(bundle, model_with([], [tensor])))


def test_tensor_declared_larger_than_its_file_in_an_attribute_of_a_branch(bundle: Path) -> None:
    tensor = TensorProto(name="lie", data_type=TensorProto.STRING, dims=[5], string_data=[b"one"])
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    branch = helper.make_node("If", ["is_late"], ["chosen"], then_branch=subgraph("a", constant, "c"))
    refused(TooLarge, "model.onnx", "export the model again", with_model(bundle, model_with([branch])))


@pytest.mark.parametrize(
    ("dims", "data_type"), [([-5], TensorProto.FLOAT), ([1], 99), ([1], 0), ([1] * 10_000, TensorProto.FLOAT)]
)
def test_tensor_that_makes_no_sense(bundle: Path, dims: list[int], data_type: int) -> None:
    tensor = TensorProto(name="lie", data_type=data_type, dims=dims, raw_data=b"\0" * 8)
    refused(MalformedGraph, "model.onnx", "export it again", with_model(bundle, model_with([], [tensor])))


def test_sparse_tensor_that_unpacks_to_terabytes(bundle: Path) -> None:
    model = model_with()
    sparse = model.graph.sparse_initializer.add(dims=[HUGE])
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [0]))
    refused(TooLarge, "model.onnx", "raise the limit", with_model(bundle, model))


SHAPE = helper.make_tensor("shape", TensorProto.INT64, [2], [2**20, 2**20])
RAW_SHAPE = TensorProto(name="shape", data_type=TensorProto.INT64, dims=[2], raw_data=struct.pack("<2q", 2**20, 2**20))
FILL = helper.make_node("ConstantOfShape", ["shape"], ["filled"])


@pytest.mark.parametrize(
    ("nodes", "initializers"),
    [
        ([FILL], [SHAPE]),
        ([FILL], [RAW_SHAPE]),
        ([helper.make_node("Constant", [], ["shape"], value=SHAPE), FILL], []),
        ([helper.make_node("Constant", [], ["shape"], value_ints=[2**20, 2**20]), FILL], []),
        ([helper.make_node("If", ["is_late"], ["x"], then_branch=subgraph("a", FILL, "filled"))], [SHAPE]),
        ([helper.make_node("Expand", ["delay", "shape"], ["x"])], [SHAPE]),
        ([helper.make_node("Tile", ["delay", "shape"], ["x"])], [SHAPE]),
        ([helper.make_node("RandomNormal", [], ["x"], shape=[2**20, 2**20])], []),
    ],
    ids=["initializer", "raw", "constant", "constant-ints", "outer-scope", "expand", "tile", "random"],
)
def test_a_few_bytes_that_ask_for_terabytes(bundle: Path, nodes: list[Any], initializers: list[Any]) -> None:
    error = refused(TooLarge, "model.onnx", "raise the limit", with_model(bundle, model_with(nodes, initializers)))
    assert "attack on memory" in str(error)


def test_a_shape_of_an_ordinary_size_is_fine(bundle: Path) -> None:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [4, -1])
    read_everything(with_model(bundle, model_with([helper.make_node("Expand", ["delay", "shape"], ["x"])], [shape])))


# --- external data ---


def external(location: str, *, n: int = 2, data_type: int = TensorProto.FLOAT, **entries: object) -> Any:
    tensor = TensorProto(name="far", data_type=data_type, dims=[n], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": location} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_weights(bundle: Path, tensor: Any, *nodes: Any, raw: bytes = b"\0" * 8, file: str = "w.bin") -> Path:
    """Add the tensor and a listed file for it."""
    (bundle / file).parent.mkdir(exist_ok=True, parents=True)
    (bundle / file).write_bytes(raw)
    (bundle / "model.onnx").write_bytes(model_with(list(nodes), [tensor]).SerializeToString())
    entry = {"path": file, "size_bytes": len(raw), "sha256": sha256_of(bundle / file)}
    sign(bundle, lambda data: data["files"].append(entry))
    return bundle


def test_external_data_that_is_listed_is_fine(bundle: Path) -> None:
    read_everything(with_weights(bundle, external("w.bin", offset=0, length=8)))


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "a/../../w.bin", "", "C:\\w.bin"])
def test_external_data_outside_the_bundle(bundle: Path, location: str) -> None:
    refused(UnsafePath, "model.onnx", "use a relative path", with_weights(bundle, external(location)))


def test_external_data_that_is_an_address_in_memory(bundle: Path) -> None:
    """onnxruntime marks its own tensors by this location; a file may carry the name too."""
    location = "*/_ORT_MEM_ADDR_/*"
    tensor = external(location, offset=0, length=8)
    with_model(bundle, model_with([], [tensor]))
    refused(UnsafePath, "model.onnx", "use a relative path", bundle)


def test_external_data_that_is_not_listed(bundle: Path) -> None:
    (bundle / "hidden.bin").write_bytes(b"\0" * 8)
    refused(UnsafePath, "model.onnx", "list it", with_weights(bundle, external("hidden.bin")))


def test_external_data_that_is_a_link(bundle: Path, tmp_path: Path) -> None:
    with_weights(bundle, external("w.bin"))
    (bundle / "w.bin").rename(tmp_path / "elsewhere.bin")
    (bundle / "w.bin").symlink_to(tmp_path / "elsewhere.bin")
    refused(UnsafePath, "w.bin", "replace it by the file itself", bundle)


@pytest.mark.parametrize(
    "entries",
    [{"n": 1000}, {"offset": 4}, {"offset": HUGE}, {"length": 4}, {"length": HUGE}],
    ids=lambda entries: str(entries),
)
def test_external_tensor_declared_larger_than_its_file(bundle: Path, entries: dict[str, int]) -> None:
    refused(TooLarge, "model.onnx", "export the model again", with_weights(bundle, external("w.bin", **entries)))


@pytest.mark.parametrize("offset", ["-1", "0x10", "1_0", "one", "", "9" * 40, "٣"])
def test_external_offset_that_readers_could_read_differently(bundle: Path, offset: str) -> None:
    refused(MalformedGraph, "model.onnx", "again", with_weights(bundle, external("w.bin", offset=offset)))


def test_external_location_stated_twice(bundle: Path) -> None:
    tensor = external("w.bin")
    tensor.external_data.add(key="location", value="/etc/passwd")
    refused(MalformedGraph, "model.onnx", "export the model again", with_weights(bundle, tensor))


def test_external_shape_that_asks_for_terabytes(bundle: Path) -> None:
    tensor = external("w.bin", data_type=TensorProto.INT64)
    raw = struct.pack("<2q", 2**20, 2**20)
    path = with_weights(bundle, tensor, helper.make_node("ConstantOfShape", ["far"], ["filled"]), raw=raw)
    refused(TooLarge, "model.onnx", "raise the limit", path)


# --- signature ---


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["signature"]["inputs"].reverse(),
        lambda data: data["signature"]["inputs"][0].update(name="other"),
        lambda data: data["signature"]["inputs"][0].update(datatype="FP64"),
        lambda data: data["signature"]["outputs"][0].update(shape=["batch", 2]),
        lambda data: data["signature"]["outputs"].pop(),
    ],
)
def test_signature_that_is_not_the_graphs(bundle: Path, edit: Edit) -> None:
    sign(bundle, edit)
    refused(SignatureMismatch, str(bundle), "write the bundle again", bundle)


def scored_model() -> bytes:
    """Return a model of "x" (n, 3) with "scores" (n, 3), fixed, "open" (n, ?) and "label" (n,)."""
    value, node = helper.make_tensor_value_info, helper.make_node
    graph = helper.make_graph(
        [
            node("Softmax", ["x"], ["scores"]),
            node("Identity", ["x"], ["open"]),
            node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        ],
        "scored",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [
            value("scores", TensorProto.FLOAT, ["n", 3]),
            value("open", TensorProto.FLOAT, ["n", "k"]),
            value("label", TensorProto.INT64, ["n"]),
        ],
    )
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return raw


def with_labels(path: Path, **labels: list[str]) -> Path:
    """Put the scored model in the place of the bundle's own, with these labels; only the manifest and the graph are read."""
    (path / "model.onnx").write_bytes(scored_model())
    outputs: list[dict[str, Any]] = [
        {"name": "scores", "datatype": "FP32", "shape": ["batch", 3]},
        {"name": "open", "datatype": "FP32", "shape": ["batch", "k"]},
        {"name": "label", "datatype": "INT64", "shape": ["batch"]},
    ]
    for output in outputs:
        output |= {"labels": labels[output["name"]]} if output["name"] in labels else {}
    inputs = [{"name": "x", "datatype": "FP32", "shape": ["batch", 3]}]
    sign(path, lambda data: data.update(signature={"inputs": inputs, "outputs": outputs}))
    return path


ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("labels", "output", "remedy"),
    [
        ({"scores": ["a", "b", "a"]}, "scores", "name every class once"),
        ({"label": ["1", 1]}, "label", "name every class once"),
        ({"label": []}, "label", "name every class once"),
        ({"scores": ["a", "b"]}, "scores", "one label per column"),
        ({"scores": ["a", "b", "c", "d"]}, "scores", "one label per column"),
        ({"scores": ABC, "label": ["c", "b", "a"]}, "label", "the same labels in the same order"),
        ({"scores": ABC, "open": ["a", "b"]}, "open", "the same labels in the same order"),
    ],
)
def test_class_labels_that_contradict_each_other(
    bundle: Path, labels: dict[str, list[str]], output: str, remedy: str
) -> None:
    error = refused(SignatureMismatch, "bundle.json", remedy, with_labels(bundle, **labels))
    assert (error.output, f"'{output}'" in str(error)) == (output, True)


@pytest.mark.parametrize("labels", [{}, {"scores": ABC}, {"open": ABC, "label": ABC}, {"open": ["a"], "label": ["a"]}])
def test_class_labels_that_agree_are_fine(bundle: Path, labels: dict[str, list[str]]) -> None:
    read_bundle(with_labels(bundle, **labels))


def test_fewer_cases_than_announced(bundle: Path) -> None:
    sign(bundle, lambda data: data["cases"].update(n_samples=7))
    refused(SignatureMismatch, "cases.npz", "write the bundle again", bundle)


# --- archives ---


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(text: str, *, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode("latin1") + data


def archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as writer:
        for name, content in members:
            writer.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return buffer.getvalue()


@pytest.mark.parametrize("file", ["cases.npz", "reference.npz"])
@pytest.mark.parametrize("raw", [b"", b"garbage", b"PK\x05\x06", b"PK\x03\x04" * 20])
def test_archive_that_is_none(bundle: Path, file: str, raw: bytes) -> None:
    refused(UnsafeArchive, file, "fetch the bundle again", replaced(bundle, file, raw))


@pytest.mark.parametrize("before", [b"#!/bin/sh\nexit\n", b"PK\x03\x04" + bytes(40)], ids=["script", "like-a-member"])
def test_archive_behind_a_file_of_another_kind(bundle: Path, before: bytes) -> None:
    for file in ("cases.npz", "reference.npz"):
        plain = (bundle / file).read_bytes()
        path = replaced(bundle, file, before + plain)
        with zipfile.ZipFile(path / file) as found:
            assert found.testzip() is None  # a reader of zips minds nothing
        error = refused(UnsafeArchive, file, "write the archive again", path)
        assert "before the archive" in str(error)
        replaced(bundle, file, plain)


def test_empty_archive_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(archive([]))
    assert read_npz(tmp_path / "a.npz") == {}


def test_decompression_bomb(bundle: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte; never unpacked."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as writer,
        writer.open("input.0.npy", "w") as member,
    ):
        member.write(header("{'descr': '|u1', 'fortran_order': False, 'shape': (536870912,), }\n"))
        for _ in range(64):
            member.write(bytes(2**23))
    assert len(buffer.getvalue()) < 2**20
    error = refused(TooLarge, "cases.npz", "raise the limit", replaced(bundle, "cases.npz", buffer.getvalue()))
    assert "decompression bomb" in str(error)


def test_archive_that_unpacks_to_more_than_it_admits(tmp_path: Path) -> None:
    """The sizes in the zip's directory are lies as well; no more than they say is unpacked."""
    honest = archive([("a.npy", npy(np.zeros(2**20, np.uint8)))], zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", len(npy(np.zeros(2**20, np.uint8))))
    lying = honest.replace(size, struct.pack("<I", 200))
    assert lying != honest
    (tmp_path / "a.npz").write_bytes(lying)
    with pytest.raises((UnsafeArchive, TooLarge), match=r"a\.npz"):
        read_npz(tmp_path / "a.npz")


def test_objects_are_never_unpickled(bundle: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    objects = npy(np.array([Trap()], dtype=object))
    plain = (bundle / "cases.npz").read_bytes()
    path = replaced(bundle, "cases.npz", archive([("input.0.npy", objects)]))
    refused(UnsafeArchive, "cases.npz: input.0.npy", "never pickles", path)
    replaced(bundle, "cases.npz", plain)
    path = replaced(bundle, "reference.npz", archive([("names.npy", pickle.dumps(Trap()))]))
    refused(UnsafeArchive, "reference.npz: names.npy", "write the archive again", path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../a.npy", "/a.npy", "a/b.npy", "a\\b.npy", "a.txt", "a.pkl", ".npy/"])
def test_member_that_is_a_path_or_no_array(bundle: Path, name: str) -> None:
    raw = archive([(name, npy(np.zeros(1)))])
    refused(UnsafeArchive, "cases.npz", "write the archive again", replaced(bundle, "cases.npz", raw))


def test_member_that_stands_twice(bundle: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        raw = archive([("input.0.npy", npy(np.zeros(1))), ("input.0.npy", npy(np.ones(1)))])
    refused(UnsafeArchive, "cases.npz", "write the archive again", replaced(bundle, "cases.npz", raw))


def test_member_that_does_not_belong(bundle: Path) -> None:
    with zipfile.ZipFile(bundle / "cases.npz", "a") as writer:
        writer.writestr("input.2.npy", npy(np.zeros(6)))
    sign(bundle)
    refused(SignatureMismatch, "cases.npz", "write the cases again", bundle)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression(bundle: Path, compression: int) -> None:
    raw = archive([("input.0.npy", npy(np.zeros(1)))], compression)
    refused(UnsafeArchive, "cases.npz", "store or deflate", replaced(bundle, "cases.npz", raw))


@pytest.mark.parametrize(
    ("shape", "descr"),
    [("(1000,)", "<f4"), ("(1099511627776,)", "|u1"), (f"({2**62},{2**62})", "<f8"), ("(0,)", "<U536870911")],
)
def test_header_that_declares_more_than_the_member_holds(bundle: Path, shape: str, descr: str) -> None:
    raw = header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n", data=b"\0" * 8)
    path = replaced(bundle, "cases.npz", archive([("input.0.npy", raw)]))
    refused(TooLarge, "cases.npz: input.0.npy", "write the archive again", path)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)}",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 3000 + ")" * 3000 + "}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 100 + ")}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (9,)}",
        "__import__('os').abort()",
        "[]",
        "\xff",
        "",
        " " * 20_000,
    ],
)
def test_header_that_is_not_numpys(bundle: Path, text: str) -> None:
    for version in (b"\x01\x00", b"\x02\x00"):
        raw = archive([("input.0.npy", header(text, data=b"\0" * 4, version=version))])
        refused(UnsafeArchive, "cases.npz", "again", replaced(bundle, "cases.npz", raw))


def test_header_of_an_unknown_version(bundle: Path) -> None:
    raw = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", data=b"\0" * 4, version=b"\x09\x00")
    path = replaced(bundle, "cases.npz", archive([("input.0.npy", raw)]))
    refused(UnsafeArchive, "cases.npz: input.0.npy", "write the archive again", path)


@pytest.mark.parametrize("code", [0xD800, 0x110000, 0xFFFFFFFF])
def test_text_that_is_no_unicode(bundle: Path, code: int) -> None:
    raw = header("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", data=struct.pack("<I", code))
    path = replaced(bundle, "cases.npz", archive([("input.0.npy", raw)]))
    refused(UnsafeArchive, "cases.npz: input.0.npy", "write the archive again", path)


def test_member_longer_than_its_header_says(bundle: Path) -> None:
    raw = archive([("input.0.npy", npy(np.zeros(6, np.float32)) + b"more")])
    refused(UnsafeArchive, "cases.npz: input.0.npy", "write the archive again", replaced(bundle, "cases.npz", raw))


def test_damaged_compressed_data(bundle: Path) -> None:
    raw = bytearray(archive([("input.0.npy", npy(np.arange(999)))], zipfile.ZIP_DEFLATED))
    raw[60:90] = b"\xff" * 30
    refused(UnsafeArchive, "cases.npz", "fetch the bundle again", replaced(bundle, "cases.npz", bytes(raw)))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"names": np.array(["a"])},
        {"names": np.array([1.0]), "0.counts": np.array([1, 0])},
        {"names": np.array(["a"]), "0.counts": np.array([np.inf, 0.0]), "0.moments": np.zeros(4)},
        {"names": np.array(["a"]), "0.counts": np.array([1, 0]), "0.moments": np.array(["x"] * 4)},
        {"names": np.array(["a"]), "0.counts": np.array([1, 0]), "0.moments": np.zeros(4), "0.quantiles": np.zeros(3)},
        {"names": np.array(["a"]), "0.counts": np.array(3), "0.values": np.array(["b"])},
        {"names": np.array("a")},
    ],
)
def test_reference_that_is_none(bundle: Path, arrays: dict[str, Any]) -> None:
    raw = archive([(f"{name}.npy", npy(array)) for name, array in arrays.items()])
    refused(UnsafeArchive, "reference.npz", "write the bundle again", replaced(bundle, "reference.npz", raw))


# --- anything at all ---

FILES = ["bundle.json", "model.onnx", "cases.npz", "reference.npz", "profile.json"]
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8)
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)


def damaged(raw: bytes, edits: list[tuple[float, int]], keep: float) -> bytes:
    """Flip bits at relative places, then keep the beginning."""
    changed = bytearray(raw)
    for place, bits in edits:
        changed[math.floor(place * len(raw))] ^= bits
    return bytes(changed[: math.ceil(keep * len(raw))])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = late_bundle(tmp_path_factory.mktemp("sound") / "bundle").path
    write_digested(path / "profile.json", {"profile_version": 1, "profiles": []})
    return {file: (path / file).read_bytes() for file in FILES}


def laid_out(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for file, raw in files.items():
        (path / file).write_bytes(raw)
    return path


@given(file=st.sampled_from(FILES), edits=EDITS, keep=st.just(1.0) | st.floats(0, 1))
@FUZZ
def test_any_damage_to_any_file_is_noticed(
    tmp_path: Path, sound: dict[str, bytes], file: str, edits: list[tuple[float, int]], keep: float
) -> None:
    raw = damaged(sound[file], edits, keep)
    path = laid_out(tmp_path / "b", sound | {file: raw})
    if raw == sound[file]:  # two flips can cancel out
        read_everything(path)
    else:
        with pytest.raises(BundleError, match=re.escape(str(path))):
            read_everything(path)


@given(file=st.sampled_from(FILES[1:4]), edits=EDITS, keep=st.just(1.0) | st.floats(0, 1))
@FUZZ
def test_damage_that_was_signed_is_read_or_refused_but_never_crashes(
    tmp_path: Path, sound: dict[str, bytes], file: str, edits: list[tuple[float, int]], keep: float
) -> None:
    path = laid_out(tmp_path / "b", sound | {file: damaged(sound[file], edits, keep)})
    sign(path)
    try:
        read_everything(path)
    except BundleError as exc:
        assert str(tmp_path) in str(exc)  # noqa: PT017


@given(edits=EDITS)
@FUZZ
def test_a_damaged_manifest_that_was_signed_is_read_or_refused_but_never_crashes(
    tmp_path: Path, sound: dict[str, bytes], edits: list[tuple[float, int]]
) -> None:
    raw = damaged(sound["bundle.json"], edits, 1.0)
    start = raw.find(b'"digest": "') + 11
    raw = raw[:start] + BLANK.encode() + raw[start + 64 :]
    raw = raw[:start] + hashlib.sha256(raw).hexdigest().encode() + raw[start + 64 :]
    path = laid_out(tmp_path / "b", sound | {"bundle.json": raw})
    try:
        read_everything(path)
    except BundleError as exc:
        assert str(tmp_path) in str(exc)  # noqa: PT017
