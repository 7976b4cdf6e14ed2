"""`modelyard serve` keeps the rules of the Open Inference Protocol, for models of every datatype."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from echo_models import MODELS, publish_all

from modelyard.testing.open_inference.server import Target
from modelyard.testing.open_inference.suite import run

ON_PURPOSE = {
    "binary.bytes-any": "BYTES are text here, and text is UTF-8: onnxruntime's strings hold nothing else",
}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server of every model that gives its inputs back, over HTTP and gRPC."""
    store = tmp_path_factory.mktemp("conformance") / "store"
    publish_all(store)
    command = [sys.executable, "-m", "modelyard", "serve", str(store), "--port", "0", "--grpc-port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.parametrize("model", MODELS)
def test_no_rule_is_broken_but_on_purpose(addresses: dict[str, str], model: str) -> None:
    target = Target(addresses["url"], model=model, grpc=addresses["grpc"], allow_changes=True)
    results = list(run(target))
    broken = {result.check.id: result.reason for result in results if result.status == "fail"}
    assert {name: reason for name, reason in broken.items() if name not in ON_PURPOSE} == {}
    assert sum(result.status == "pass" for result in results) > 200
