"""The conformance suite is itself conformant: it passes a server that keeps the rules, and catches one that breaks any.

The reference server breaks one rule at a time. Each fault must fail exactly the checks that are meant for it, and each check
must be failed by some fault: one that nothing can fail would prove nothing.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import reference_server
from reference_server import MODELS, ReferenceServer

from modelyard.testing.open_inference.__main__ import main
from modelyard.testing.open_inference.check import Failed
from modelyard.testing.open_inference.messages import message
from modelyard.testing.open_inference.pytest_suite import OpenInferenceTests
from modelyard.testing.open_inference.server import Server, Target
from modelyard.testing.open_inference.suite import CHECKS, run, run_check, selected
from modelyard.testing.open_inference.tensors import NUMPY_DTYPES, extremes, filled, from_raw, to_raw
from modelyard.testing.open_inference.wire import Address, parse_url

HAS_GRPC = bool(ReferenceServer().grpc_is_installed())
NAMES = [check.id for check in CHECKS]


@dataclass(frozen=True)
class Fault:
    """What the reference server does wrong, and the checks that fail for it."""

    name: str
    caught_by: frozenset[str]
    model: str = "plain"

    @property
    def expected(self) -> set[str]:
        return {each for each in self.caught_by if HAS_GRPC or not each.startswith("grpc.")}


def _fault(name: str, caught_by: str, model: str = "plain") -> Fault:
    return Fault(name, frozenset(caught_by.split()), model)


def _of_rule(rule: str, caught_by: str, model: str = "plain") -> Iterator[Fault]:
    """A request against a rule may be taken, or refused with the status of a server's own fault."""
    ids = caught_by.split()
    yield Fault(f"takes {rule}", frozenset(ids), model)
    blamed = [f"{each}.code" if each.startswith("grpc.") else f"{each}.status" for each in ids]
    yield Fault(f"500 for {rule}", frozenset(set(blamed) & set(NAMES)), model)


RULES = (
    *_of_rule(
        "what is no JSON",
        "faults.malformed-json faults.truncated-json faults.trailing-text faults.empty-body binary.no-header binary.header-too-small",
    ),
    *_of_rule("what is not UTF-8", "faults.not-utf-8"),
    *_of_rule("a body that is no object", "faults.null faults.array"),
    *_of_rule("inputs that are no objects", "faults.no-inputs faults.inputs-no-array faults.inputs-of-numbers"),
    *_of_rule("an id that is no string", "faults.id-no-string"),
    *_of_rule("parameters that are no object", "faults.parameters-no-object"),
    *_of_rule("outputs that are no array", "faults.outputs-no-array"),
    *_of_rule("an input without a name", "faults.no-name"),
    *_of_rule("a shape that is no array", "faults.no-shape faults.shape-no-array"),
    *_of_rule("a size that is no integer", "faults.fractional-size"),
    *_of_rule("a negative size", "faults.negative-size grpc.negative-size"),
    *_of_rule("an input without data", "faults.no-data"),
    *_of_rule("data that is no array", "faults.data-no-array"),
    *_of_rule("an unknown input", "faults.unknown-input faults.extra-input grpc.unknown-input"),
    *_of_rule("an input given twice", "faults.duplicate-input"),
    *_of_rule("a request that lacks an input", "faults.empty-inputs faults.missing-input grpc.missing-input"),
    *_of_rule("an unknown output", "faults.unknown-output grpc.unknown-output"),
    *_of_rule("another datatype than the model's", "faults.wrong-datatype"),
    *_of_rule("another rank", "faults.wrong-rank"),
    *_of_rule("another size", "faults.wrong-size"),
    *_of_rule("inputs with different rows", "faults.different-rows"),
    *_of_rule("data nested in another way", "faults.ragged-data faults.half-nested-data faults.deep-data"),
    *_of_rule("an object among the data", "faults.object-in-data"),
    *_of_rule(
        "data of another length",
        "faults.data-too-short faults.data-too-long faults.overflowing-shape "
        "grpc.contents-too-short grpc.contents-too-long grpc.overflowing-shape",
    ),
    *_of_rule("a length beyond the body", "binary.header-too-large binary.header-huge"),
    *_of_rule("a length that is no number", "binary.header-negative binary.header-no-number"),
    *_of_rule("a binary size beyond the body", "binary.size-too-large binary.size-huge binary.body-too-short"),
    *_of_rule("a binary size that is no number", "binary.size-negative binary.size-no-number binary.size-fraction"),
    *_of_rule("bytes behind the last tensor", "binary.bytes-left binary.size-too-small"),
    *_of_rule("data beside binary data", "binary.data-and-size"),
    *_of_rule("an element beyond its tensor", "binary.element-lies binary.tensor-too-short grpc.raw-too-short"),
    *_of_rule("a length that is cut", "binary.element-cut binary.tensor-too-long grpc.raw-too-long"),
    *_of_rule("another number of elements", "binary.elements-missing binary.elements-too-many"),
    *_of_rule(
        "binary data of another size",
        "binary.tensor-too-long binary.tensor-too-short binary.raw-wrong-size grpc.raw-too-short grpc.raw-too-long",
        model="single",
    ),
    *_of_rule("raw contents beside others", "grpc.raw-and-contents"),
    *_of_rule("another number of raw contents", "grpc.raw-missing grpc.raw-left"),
    *_of_rule("elements in another field", "grpc.contents-of-another-type"),
    *_of_rule("typed 16-bit floats", "grpc.sixteen-bits-in-contents", model="halves"),
    *_of_rule("an unknown version in infer", "faults.unknown-version grpc.unknown-version"),
    _fault("takes an unknown model in infer", "faults.unknown-model grpc.unknown-model repository.unload-load"),
    _fault("500 for an unknown model in infer", "faults.unknown-model.status grpc.unknown-model.code"),
    _fault(
        "takes an unknown datatype",
        "faults.no-datatype faults.unknown-datatype grpc.unknown-datatype grpc.stream-error",
    ),
    _fault(
        "500 for an unknown datatype",
        "faults.no-datatype.status faults.unknown-datatype.status grpc.unknown-datatype.code",
    ),
    _fault("takes an unknown model in ready", "health.unknown-model repository.unload-load"),
    _fault("takes an unknown version in ready", "health.unknown-version"),
    _fault("takes an unknown model in metadata", "metadata.unknown-model"),
    _fault("500 for an unknown model in metadata", "metadata.unknown-model.status"),
    _fault("takes an unknown version in metadata", "metadata.unknown-version"),
    *(_fault(f"{verb} an odd version in metadata", "metadata.odd-version") for verb in ("takes", "500 for")),
    _fault("takes an unknown model in config", "configuration.unknown-model"),
    _fault("takes an unknown model in stats", "statistics.unknown-model"),
    _fault("takes an unknown model in trace", "trace.unknown-model"),
    _fault("takes an unknown model in load", "repository.load-unknown"),
    _fault("500 for an unknown model in load", "repository.load-unknown.status"),
    _fault("takes an unknown model in unload", "repository.unload-unknown"),
    _fault("takes an unknown model in gRPC's ready", "grpc.unknown-model-ready"),
    _fault("takes an unknown version in gRPC's ready", "grpc.unknown-model-ready"),
    _fault("takes an unknown model in gRPC's metadata", "grpc.unknown-model-metadata"),
    _fault("takes an unknown version in gRPC's metadata", "grpc.unknown-model-metadata"),
    *(_fault(f"{verb} an unknown service", "grpc.health-unknown") for verb in ("takes", "500 for")),
    _fault("takes an unknown region", "shared-memory.unknown-region"),
    *(_fault(f"{verb} no such trace setting", "trace.unknown-setting") for verb in ("takes", "500 for")),
    *(_fault(f"{verb} no such log setting", "logging.wrong-type") for verb in ("takes", "500 for")),
    *(_fault(f"{verb} an unknown coding", "compression.unknown") for verb in ("takes", "500 for")),
    *(_fault(f"{verb} a broken coding", "compression.broken") for verb in ("takes", "500 for")),
    _fault("500 for a wrong number of classes", "classification.zero"),
)

FAULTS = (
    *RULES,
    # Health and metadata
    _fault("live is 503", "health.live"),
    _fault("ready is 503", "health.ready"),
    _fault("live has no body", "health.live-body"),
    _fault("ready has no body", "health.ready-body"),
    _fault("a model is never ready", "health.model-ready"),
    _fault("a model's ready has no body", "health.model-ready-body"),
    _fault("a version is never ready", "health.version-ready"),
    _fault("the server's version is a number", "metadata.server grpc.server-metadata"),
    _fault("no /v2/", "metadata.server-slash"),
    _fault("metadata has another name", "metadata.model metadata.versions"),
    _fault("metadata names FLOAT32", "metadata.tensors"),
    _fault("metadata has no platform", "metadata.platform"),
    _fault("the platform is python", "metadata.platform-format"),
    _fault("metadata of a version is not there", "metadata.versions"),
    _fault("metadata's errors have no text", "metadata.unknown-model metadata.unknown-version"),
    # Inference
    _fault("never answers", "infer.json"),
    _fault("no model_name", "infer.model-name"),
    _fault("another model_version", "infer.model-version metadata.version-infer"),
    _fault("leaves an output out", "infer.all-outputs"),
    _fault("FP32 comes as FP64", "infer.outputs-fit-metadata"),
    _fault("all outputs, whatever is asked", "infer.requested-outputs"),
    _fault("the id is lost", "infer.id"),
    _fault("an id is made up", "infer.no-id"),
    _fault("flat data alone", "infer.nested"),
    _fault(
        "inputs by position",
        "infer.input-order faults.unknown-input binary.order grpc.input-order grpc.unknown-input",
    ),
    _fault("answers the first row alone", "infer.batch-shape"),
    _fault("mixes rows", "infer.batch-values"),
    _fault("refuses unknown parameters", "infer.parameters grpc.parameters"),
    _fault("refuses empty parameters", "infer.empty-parameters"),
    _fault("refuses unknown members", "infer.unknown-member"),
    _fault("refuses JSON over several lines", "infer.json-escapes"),
    _fault("JSON as text/plain", "infer.content-type"),
    _fault("wants a Content-Type", "infer.no-content-type"),
    _fault("wants application/json and no more", "infer.charset"),
    _fault("breaks down over a value", "infer.coercion"),
    _fault("breaks down over no rows", "infer.no-rows"),
    _fault("writes Infinity", "infer.strict-json"),
    # Datatypes
    *(
        _fault(f"spoils {each} in {form}", caught_by.format(each), "halves" if each in ("FP16", "BF16") else "every")
        for each in NUMPY_DTYPES
        for form, caught_by in (
            ("JSON", "datatypes.json.{0}"),
            ("binary", "datatypes.binary.{0} grpc.raw.{0}"),
            ("typed contents", "grpc.contents.{0}"),
        )
        if form != "typed contents" or f"grpc.contents.{each}" in NAMES
    ),
    _fault("reads whole numbers as doubles", "datatypes.json.INT64 datatypes.json.UINT64", model="every"),
    # Binary tensors
    _fault("binary_data_output is ignored", "binary.both"),
    _fault("binary answers differ", "binary.same-answer binary.output"),
    _fault("binary in, binary out", "binary.input"),
    _fault("one in binary, all in binary", "binary.output"),
    _fault("binary_data false is ignored", "binary.output-false"),
    _fault("refuses JSON beside binary", "binary.mixed-inputs"),
    _fault("binary tensors in the order of metadata", "binary.order"),
    _fault("refuses padding", "binary.any-offset"),
    _fault("no length of the JSON", "binary.both binary.response-header"),
    _fault("binary as application/json", "binary.content-type"),
    _fault("wants application/octet-stream", "binary.any-content-type"),
    _fault("refuses a length without binary tensors", "binary.header-of-json"),
    _fault("no raw requests", "binary.raw", model="single"),
    _fault("raw requests are answered in JSON", "binary.raw", model="single"),
    _fault("refuses empty elements", "binary.bytes-empty datatypes.binary.BYTES grpc.raw.BYTES"),
    _fault("wants UTF-8", "binary.bytes-any"),
    _fault("16-bit lengths of elements", "binary.bytes-long"),
    # HTTP
    _fault("closes after each answer", "http.keep-alive"),
    _fault("drops the client after an error", "http.keep-alive-after-error"),
    _fault("keeps open what is to be closed", "http.close"),
    _fault("loses what is pipelined", "http.pipelining"),
    _fault("chunks for HTTP/1.0", "http.1.0"),
    _fault("keeps HTTP/1.0 open", "http.1.0"),
    _fault("HEAD is 405", "http.head"),
    _fault("HEAD has a body", "http.head"),
    _fault("takes any method", "http.wrong-method"),
    _fault("400 for a wrong method", "http.wrong-method.status"),
    _fault("405 without Allow", "http.allow"),
    _fault("400 for an unknown path", "http.unknown-path"),
    _fault("wants a length", "http.chunked"),
    _fault("takes a head in one piece", "http.pieces-of-head http.long-header"),
    _fault("takes a body in one piece", "http.pieces-of-body binary.bytes-long"),
    _fault("never says 100", "http.expect-continue"),
    _fault("needs no Host", "http.no-host"),
    _fault("paths alone", "http.absolute-form"),
    _fault("headers in one spelling", "http.header-case"),
    _fault("leaves paths encoded", "http.percent-encoding"),
    _fault("takes the query for path", "http.query"),
    _fault("wants both halves open", "http.half-close"),
    _fault("takes two lengths", "http.two-lengths"),
    _fault("goes on behind length and chunks", "http.length-and-chunks"),
    _fault("hangs on what is no HTTP", "http.no-http"),
    _fault("takes any length", "http.bad-length"),
    _fault("resets long headers", "http.long-header"),
    _fault("errors as text/plain", "http.error-type"),
    # Compression
    *(
        fault
        for coding in ("gzip", "deflate")
        for fault in (
            _fault(
                f"answers {coding} with something else",
                f"compression.request-{coding} compression.request-{coding}-binary",
            ),
            _fault(f"counts bytes of {coding}", f"compression.request-{coding}-binary"),
            _fault(
                f"{coding} without saying so",
                f"compression.answer-{coding} compression.answer-{coding}-binary"
                + (" compression.refusal" if coding == "gzip" else ""),
            ),
            _fault(
                f"{coding} is something else",
                f"compression.answer-{coding} compression.answer-{coding}-binary"
                + (" compression.refusal" if coding == "gzip" else ""),
            ),
        )
    ),
    _fault("compresses unasked", "compression.unasked"),
    _fault("ignores what it does not know", "compression.unknown"),
    _fault("errors are broken when compressed", "compression.refusal"),
    # Other extensions
    _fault("lowest class first", "classification.top"),
    _fault("classes by index first", "classification.top"),
    _fault("classes in one row", "classification.shape"),
    _fault("durations in seconds", "statistics.model"),
    _fault("counts nothing", "statistics.counts statistics.rows grpc.statistics"),
    _fault("counts requests for rows", "statistics.rows"),
    _fault("counts refused requests", "statistics.failures"),
    _fault("statistics of nothing", "statistics.all"),
    _fault("statistics of all versions", "statistics.version"),
    _fault("the index has no names", "repository.index repository.state repository.ready-only"),
    _fault("states in lower case", "repository.state repository.ready-only"),
    _fault("ready is ignored", "repository.ready-only"),
    _fault("wants a body for the index", "repository.empty-body"),
    _fault("loads once", "repository.reload"),
    _fault("unloads nothing", "repository.unload-load"),
    _fault("config has another name", "configuration.get"),
    _fault("trace settings are numbers", "trace.get trace.update"),
    _fault("a model has no trace settings", "trace.model"),
    _fault("keeps trace as it is", "trace.update"),
    _fault("log settings are lists", "logging.get"),
    _fault("keeps logging as it is", "logging.update"),
    _fault("refuses priority", "schedule.parameters"),
    _fault("regions in an object", "shared-memory.status"),
    _fault("does not list statistics", "extensions.unlisted"),
    # gRPC
    _fault("gRPC is not live", "grpc.live"),
    _fault("gRPC is not ready", "grpc.ready"),
    _fault("gRPC's model is not ready", "grpc.model-ready"),
    _fault("gRPC lists less", "grpc.server-metadata"),
    _fault("gRPC's metadata has another shape", "grpc.model-metadata"),
    _fault("no typed contents", "grpc.infer"),
    _fault("no raw contents", "grpc.infer-raw"),
    _fault("gRPC answers twice over", "grpc.infer grpc.infer-raw"),
    _fault("gRPC names no model", "grpc.model-name"),
    _fault("gRPC loses the id", "grpc.id grpc.stream"),
    _fault("gRPC ignores requested outputs", "grpc.requested-outputs"),
    _fault("gRPC answers one row", "grpc.batch"),
    _fault("gRPC breaks over gzip", "grpc.compression"),
    _fault("any method is taken", "grpc.unknown-method"),
    _fault("bytes that are no message are taken", "grpc.malformed-message"),
    _fault("a stream loses ids", "grpc.stream"),
    _fault("a wrong request ends the stream", "grpc.stream-error"),
    _fault("health says NOT_SERVING", "grpc.health"),
    _fault("gRPC's index is empty", "grpc.repository-index"),
    _fault("gRPC has no trace settings", "grpc.trace"),
    _fault("gRPC has no log settings", "grpc.logging"),
)
TRIED = [fault for fault in FAULTS if fault.expected]


def _target(reference: ReferenceServer, model: str = "plain", *, timeout_s: float = 2.0) -> Target:
    return Target(reference.url, model=model, grpc=reference.grpc, allow_changes=True, timeout_s=timeout_s)


@pytest.mark.parametrize("model", MODELS)
def test_a_server_that_keeps_the_rules_fails_no_check(model: str) -> None:
    with ReferenceServer() as reference:
        failed = {
            result.check.id: result.reason for result in run(_target(reference, model)) if result.status == "fail"
        }
    assert failed == {}


def test_every_check_can_be_passed_and_can_be_failed() -> None:
    passed = set()
    for model in MODELS:
        with ReferenceServer() as reference:
            passed |= {result.check.id for result in run(_target(reference, model)) if result.status == "pass"}
    tried = {each for each in NAMES if HAS_GRPC or not each.startswith("grpc.")}
    assert tried - passed == set()
    assert set(NAMES) - {each for fault in FAULTS for each in fault.caught_by} == set()


@pytest.mark.parametrize("fault", TRIED, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault) -> None:
    with ReferenceServer(fault.name) as reference:
        server = Server(_target(reference, fault.model, timeout_s=1.0))
        results = [run_check(check, server) for check in CHECKS if check.id in fault.expected]
    assert {result.check.id: result.status for result in results} == dict.fromkeys(fault.expected, "fail")
    assert all(result.reason and (result.exchanges or result.check.area == "grpc") for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("fault", TRIED, ids=lambda fault: fault.name)
def test_a_fault_is_caught_by_no_check_that_is_not_meant_for_it(fault: Fault) -> None:
    with ReferenceServer(fault.name) as reference:
        failed = {r.check.id: r.reason for r in run(_target(reference, fault.model)) if r.status == "fail"}
    assert set(failed) == fault.expected, failed


def test_every_fault_of_the_reference_server_is_tried() -> None:
    source = Path(reference_server.__file__).read_text()
    named = set(re.findall(r'has\(\s*"([^"]+)"', source))
    assert named - {fault.name for fault in FAULTS} == set()
    rules = set(re.findall(r'rule\(\s*"([^"]+)"', source))
    taken = {fault.name.removeprefix("takes ") for fault in FAULTS}
    # A value of another kind may be taken or refused, and so may a number of classes below one.
    assert rules - taken == {"a value of another kind", "a wrong number of classes"}


def test_ids_of_checks_are_different() -> None:
    assert len(NAMES) == len(set(NAMES))


# The rest of the suite


@pytest.mark.parametrize("datatype", NUMPY_DTYPES)
def test_extremes_survive_their_binary_form(datatype: str) -> None:
    array = filled(datatype, (3, 4), extremes(datatype))
    assert to_raw(from_raw(to_raw(array, datatype), datatype, (3, 4), "x"), datatype) == to_raw(array, datatype)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    from modelyard.testing.open_inference.tensors import from_bfloat16, to_bfloat16

    numbers = np.array([1.0, -2.5, 3.14159, 1e30, 1 / 3], dtype=np.float32)
    assert np.allclose(from_bfloat16(to_bfloat16(numbers)), numbers, rtol=2**-8)


@pytest.mark.parametrize(
    ("raw", "datatype"),
    [(b"\x01\x00\x00", "INT32"), (b"\x05\x00\x00\x00ab", "BYTES"), (b"\x01\x00", "BYTES"), (b"", "BOOL")],
)
def test_a_binary_tensor_that_does_not_fit_is_told(raw: bytes, datatype: str) -> None:
    with pytest.raises(Failed):
        from_raw(raw, datatype, (1,), "x")


def test_messages_have_the_numbers_and_types_of_the_public_protocol() -> None:
    public = pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR.message_types_by_name
    own = {"TensorMetadata": "ModelMetadataResponse", "InferInputTensor": "ModelInferRequest"}
    own |= {"InferRequestedOutputTensor": "ModelInferRequest", "InferOutputTensor": "ModelInferResponse"}
    for name in (
        "ModelMetadataResponse",
        "ModelInferRequest",
        "ModelInferResponse",
        "ModelStatistics",
        *own,
        *CONTENTS_ALIKE,
    ):
        theirs = public[own[name]].nested_types_by_name[name] if name in own else public[name]
        for field in message(name).DESCRIPTOR.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, field.type) == (other.number, other.type), f"{name}.{field.name}"


CONTENTS_ALIKE = (
    "InferTensorContents",
    "InferParameter",
    "ModelReadyRequest",
    "ServerMetadataResponse",
    "RepositoryIndexRequest",
)


@pytest.fixture(scope="module")
def reference() -> Iterator[ReferenceServer]:
    with ReferenceServer() as started:
        yield started


class TestUnderPytest(OpenInferenceTests):
    """The suite as others use it."""

    @pytest.fixture
    def target(self, reference: ReferenceServer) -> Target:
        return _target(reference)


class WithKnownFailures(OpenInferenceTests):
    known_failures: ClassVar[dict[str, str]] = {"health.live": "it used to fail", "no.such-check": "misspelt"}


def test_a_known_failure_is_expected_and_a_pass_is_not() -> None:
    suite, live = WithKnownFailures(), selected(["health.live"])[0]
    with ReferenceServer("live is 503") as broken, pytest.raises(pytest.xfail.Exception, match="it used to fail"):
        suite.test_the_rule_holds(Server(_target(broken)), live)
    with ReferenceServer() as mended, pytest.raises(AssertionError, match=r"health.live passes; take it out"):
        suite.test_the_rule_holds(Server(_target(mended)), live)
    with pytest.raises(AssertionError, match=r"there is no check no\.such-check"):
        suite.test_known_failures_name_checks()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", Address("localhost", 8000)),
        ("localhost:8000", Address("localhost", 8000)),
        ("https://models.example/serving/", Address("models.example", 443, "/serving", tls=True)),
        ("http://[::1]:80/v2", Address("::1", 80)),
    ],
)
def test_urls_are_read(url: str, address: Address) -> None:
    assert parse_url(url) == address


def test_patterns_choose_checks() -> None:
    assert {check.area for check in selected(["binary"])} == {"binary"}
    assert [check.id for check in selected(["infer.id", "*.no-id"])] == ["infer.id", "infer.no-id"]
    assert selected() == CHECKS


def test_the_command_line_tells_what_failed_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with ReferenceServer("live is 503") as reference:
        assert main([reference.url, "--model", "plain", "--only", "health", "infer.id", "--verbose"]) == 1
    told = capsys.readouterr().out
    assert "fail     health.live  (MUST)" in told
    assert "why    the status is 503, expected 200" in told
    assert "sent   GET /v2/health/live HTTP/1.1" in told
    assert "got    HTTP/1.1 503" in told
    assert "pass     infer.id  (MUST)" in told
    assert "1 failed (1 MUST)" in told.splitlines()[-1]


def test_a_should_counts_when_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    with ReferenceServer("no /v2/") as reference:
        arguments = [reference.url, "--model", "plain", "--only", "metadata"]
        assert [main(arguments), main([*arguments, "--strict"])] == [0, 1]


def test_json_holds_every_result(capsys: pytest.CaptureFixture[str]) -> None:
    with ReferenceServer() as reference:
        assert main([reference.url, "--only", "infer", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["server"]["name"]) == ("plain", "reference")  # the first of the repository index
    assert {result["id"] for result in told["results"]} == {check.id for check in selected(["infer"])}
    assert all(result["status"] in ("pass", "skipped") for result in told["results"])


def test_the_summary_says_for_which_reasons_checks_were_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    with ReferenceServer() as reference:
        assert main([reference.url, "--model", "single", "--only", "grpc", "http", "repository"]) == 0
    *reasons, total = capsys.readouterr().out.splitlines()
    assert reasons[0].endswith("no address of gRPC is given; give one with --grpc HOST:PORT")
    n_skipped = [int(line.removeprefix("skipped").partition(":")[0]) for line in reasons]
    assert len(reasons) == 6
    assert reasons[-1].endswith("other reasons; see --verbose")
    assert total.endswith(f"0 failed, {sum(n_skipped)} skipped")


def test_grpc_that_cannot_be_tried_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with ReferenceServer() as reference:
        arguments = [reference.url, "--model", "plain", "--grpc", "127.0.0.1:1"]
        assert main(arguments) == 2
        assert (
            capsys.readouterr().err == "error: --grpc needs grpcio, which is not installed; run: pip install grpcio\n"
        )
        assert main([*arguments, "--only", "health"]) == 0  # nothing of it was asked


@pytest.mark.skipif(not HAS_GRPC, reason="needs grpcio")
def test_grpc_where_nothing_answers_it_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with ReferenceServer() as reference:
        for address in ("127.0.0.1:1", reference.url.removeprefix("http://")):
            arguments = [reference.url, "--model", "plain", "--grpc", address, "--only", "grpc", "--timeout", "2"]
            assert main(arguments) == 2
            assert f"--grpc must be HOST:PORT where the server speaks gRPC, got '{address}'" in capsys.readouterr().err
        with ReferenceServer("gRPC is not live") as broken:
            assert main([broken.url, "--model", "plain", "--grpc", broken.grpc, "--only", "grpc.live"]) == 1


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    command = [sys.executable, "-m", "modelyard.testing.open_inference", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_checks_can_be_listed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in NAMES if f"\n{name} " not in f"\n{listed}"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give the URL"),
        (["http://localhost:x"], "cannot be read"),
        (["http://127.0.0.1:1", "--model", "m"], "no connection to 127.0.0.1:1"),
        (["URL", "--model", "unheard-of"], "has no model 'unheard-of'"),
        (["URL", "--only", "nothing.like.it"], "matches no check"),
        (["URL", "--header", "no colon"], "NAME:VALUE"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ReferenceServer() as reference:
        assert main([reference.url if each == "URL" else each for each in arguments]) == 2
    assert says in capsys.readouterr().err


def test_an_example_is_asked_instead_of_made_up_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = tmp_path / "example.json"
    inputs: list[dict[str, Any]] = [
        {"name": "int64_in", "shape": [1, 2], "datatype": "INT64", "data": [41, 42]},
        {"name": "fp32_in", "shape": [1, 2], "datatype": "FP32", "data": [[0.125, 0.25]]},
        {"name": "bytes_in", "shape": [1, 2], "datatype": "BYTES", "data": ["from", "example"]},
    ]
    example.write_text(json.dumps({"inputs": inputs}))
    with ReferenceServer() as reference:
        target = Target(reference.url, model="plain", example=json.loads(example.read_text()))
        assert Server(target).base["int64_out"].array.tolist() == [[41, 42]]
        assert main([reference.url, "--model", "plain", "--example", str(example), "--only", "infer", "faults"]) == 0
        example.write_text(json.dumps({"inputs": inputs[:1]}))
        assert main([reference.url, "--model", "plain", "--example", str(example), "--only", "infer"]) == 2
    assert "must be an inference request with int64_in, fp32_in, bytes_in" in capsys.readouterr().err
