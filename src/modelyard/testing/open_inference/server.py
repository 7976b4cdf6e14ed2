"""The server under test: how checks ask it, and what is known of it and its model, found out once."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np

from modelyard.errors import ConfigError
from modelyard.testing.open_inference.check import Exchange, Failed, Skipped, listed, shown
from modelyard.testing.open_inference.inference import Answer, Call, Model, TensorMetadata, read_answer, read_metadata
from modelyard.testing.open_inference.tensors import NUMPY_DTYPES, SIXTEEN_BIT_FLOATS, Array, from_json, make, same
from modelyard.testing.open_inference.wire import Address, Connection, Headers, Reply, parse_url

UNKNOWN = "no-such-model-here"
UNKNOWN_VERSION = "987654321"


@dataclass(frozen=True)
class Target:
    """What to test, as a user says it."""

    url: str
    model: str = ""
    """Empty: the first ready one of the repository index."""
    version: str = ""
    """Empty: as the server chooses."""
    grpc: str = ""
    """HOST:PORT; empty: no checks of gRPC."""
    example: Mapping[str, Any] | None = None
    """An inference request as JSON holds it, for a model that does not take made-up values."""
    allow_changes: bool = False
    """Whether models may be unloaded and settings changed; they are put back."""
    assume: frozenset[str] = frozenset()
    """Extensions to try although the server does not list them."""
    headers: Headers = ()
    """Sent with every request, as a gateway may need them."""
    timeout_s: float = 10.0


@dataclass
class Server:
    """One run's view of the server. Its properties ask once; one that cannot be had raises Skipped wherever it is needed."""

    target: Target
    exchanges: list[Exchange] = field(default_factory=list)
    """What the current check has sent and got; the runner empties it."""
    base_exchanges: tuple[Exchange, ...] = ()
    """How the plainest answer came about, for a check that looks at that one and asks nothing itself."""
    grpc_answers: dict[bool, Answer] = field(default_factory=dict)
    """The plainest answers over gRPC: to typed contents (False) and to raw ones (True)."""

    @cached_property
    def address(self) -> Address:
        return parse_url(self.target.url)

    # Asking

    def connect(self, at_most_s: float = math.inf) -> Connection:
        """Open a connection that waits for an answer as long as the target says, but not longer than `at_most_s`."""
        return Connection(self.address, min(self.target.timeout_s, at_most_s), self.exchanges)

    def head(self, method: str, path: str, headers: Headers = (), *, version: str = "HTTP/1.1") -> bytes:
        """Return request line and headers, with Host and what the target adds, up to the empty line."""
        lines = [f"{method} {self.address.prefix}{path} {version}", f"Host: {self.address.authority}"]
        own = {name.lower() for name, _ in self.target.headers}
        lines = [line for line in lines if line.partition(":")[0].lower() not in own]
        lines += [f"{name}: {value}" for name, value in (*self.target.headers, *headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def message(self, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> bytes:
        """Return a whole request. A body, or a method that takes one, brings its length."""
        if body or method == "POST":
            headers = (*headers, ("Content-Length", str(len(body))))
        return self.head(method, path, headers) + body

    def ask(self, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> Reply:
        """Send one request on a connection of its own, so that no check meets what another left behind."""
        with self.connect() as connection:
            connection.send(self.message(method, path, body, headers))
            return connection.reply(method)

    def get(self, path: str, headers: Headers = ()) -> Reply:
        return self.ask("GET", path, b"", headers)

    def post(self, path: str, value: Any) -> Reply:
        """Send JSON."""
        return self.ask("POST", path, json.dumps(value).encode(), (("Content-Type", "application/json"),))

    def post_call(self, call: Call, headers: Headers = (), *, path: str | None = None) -> Reply:
        """Send an inference request; `headers` come after its own."""
        body, own = call.encoded()
        return self.ask("POST", path or self.infer_path, body, (*own, *headers))

    def post_body(self, body: bytes, headers: Headers = (("Content-Type", "application/json"),)) -> Reply:
        """Send any bytes to where inference requests go."""
        return self.ask("POST", self.infer_path, body, headers)

    def infer(self, call: Call, headers: Headers = ()) -> Answer:
        """Return the answer to a call; raises Failed unless there is one."""
        return read_answer(self.post_call(call, headers))

    # Paths

    def model_path(self, name: str | None = None, version: str | None = None) -> str:
        """Return the path of a model; of the model under test, in the version under test, when nothing is named."""
        if name is None:
            name, version = self.name, self.target.version if version is None else version
        path = f"/v2/models/{quote(name, safe='')}"
        return f"{path}/versions/{quote(version, safe='')}" if version else path

    @property
    def infer_path(self) -> str:
        return f"{self.model_path()}/infer"

    # What is known

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Server metadata, empty where it cannot be read."""
        try:
            value = self.get("/v2").expect(200).json()
        except Failed:
            return {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def extensions(self) -> frozenset[str]:
        listed_ones = self.metadata.get("extensions")
        names = listed_ones if isinstance(listed_ones, list) else []
        return frozenset(name for name in names if isinstance(name, str)) | self.target.assume

    def need_keep_alive(self) -> None:
        """Raise Skipped unless one connection serves two requests."""
        if not self._keeps_alive:
            raise Skipped("a connection does not serve a second request; see http.keep-alive")

    @cached_property
    def _keeps_alive(self) -> bool:
        try:
            with self.connect() as connection:
                for _ in range(2):
                    connection.send(self.message("GET", self.probe))
                    connection.reply()
        except Failed:
            return False
        return True

    @cached_property
    def probe(self) -> str:
        """The path that checks of HTTP ask: the one that every server answers with 200."""
        path = "/v2/health/live"
        try:
            self.get(path).expect(200)
        except Failed as exc:
            raise Skipped(f"{path} is not answered ({exc}); see health.live") from exc
        return path

    @cached_property
    def name(self) -> str:
        """The model under test; raises ConfigError when none is named and none can be found."""
        if self.target.model:
            return self.target.model
        try:
            index = self.post("/v2/repository/index", {"ready": True}).expect(200).json()
            return str(next(entry["name"] for entry in index if entry.get("state", "READY") == "READY"))
        except (Failed, StopIteration, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(
                f"{self.target.url} names no ready model in POST /v2/repository/index ({exc}); name one with --model"
            ) from exc

    @cached_property
    def model(self) -> Model:
        try:
            model = read_metadata(self.get(self.model_path()).expect(200).json())
        except Failed as exc:
            raise Skipped(f"the model's metadata cannot be read ({exc}); see metadata.model") from exc
        odd = [tensor.datatype for tensor in (*model.inputs, *model.outputs) if tensor.datatype not in NUMPY_DTYPES]
        if odd:
            raise Skipped(f"the model's metadata names the unknown datatype {odd[0]}; see metadata.tensors")
        return model

    @cached_property
    def binary(self) -> bool:
        return "binary_tensor_data" in self.extensions

    def arrays(self, n_rows: int = 1, seed: int = 0) -> dict[str, Array]:
        """Return values for the inputs by name, `n_rows` of them where the model takes rows: from the example if there is one."""
        if self.target.example is None:
            return {spec.name: make(spec.datatype, spec.sized(n_rows), seed) for spec in self.model.inputs}
        arrays = self._example
        if self.model.batched:
            return {name: np.concatenate([array[:1]] * n_rows) for name, array in arrays.items()}
        return arrays

    def call(
        self,
        arrays: Mapping[str, Array] | None = None,
        *,
        binary: Iterable[str] | bool = (),
        in_json: str = "",
        nested: bool = False,
        binary_output: bool = False,
    ) -> Call:
        """Return a request for all outputs.

        16-bit floats, for which JSON has no agreed form, travel in binary where the server takes that.

        Args:
            arrays: inputs by name; those of one row when absent.
            binary: names of inputs that go in binary; True: all of them.
            in_json: the name of a 16-bit float that goes in JSON all the same.
            nested: whether JSON data is nested like the shape.
            binary_output: whether every output is asked for in binary.
        """
        arrays = self.arrays() if arrays is None else arrays
        in_binary = {spec.name for spec in self.model.inputs} if binary is True else set(binary or ())
        call = Call({"inputs": []})
        for spec in self.model.inputs:
            as_binary = spec.name in in_binary or (
                self.binary and spec.datatype in SIXTEEN_BIT_FLOATS and spec.name != in_json
            )
            call.add(spec, arrays[spec.name], binary=as_binary, nested=nested)
        if binary_output:
            call.body["parameters"] = {"binary_data_output": True}
        elif self.binary and any(spec.datatype in SIXTEEN_BIT_FLOATS for spec in self.model.outputs):
            for spec in self.model.outputs:
                self.ask_for(call, spec)
        return call

    def ask_for(self, call: Call, spec: TensorMetadata) -> None:
        """Request one output: in JSON, but for a 16-bit float."""
        if self.binary and spec.datatype in SIXTEEN_BIT_FLOATS:
            call.ask_for(spec.name, binary_data=True)
        else:
            call.ask_for(spec.name)

    @cached_property
    def base(self) -> Answer:
        """The answer to the plainest request: what others are compared with."""
        try:
            answer = self.infer(self.call())
            self.base_exchanges = tuple(self.exchanges[-1:])
            return answer
        except Failed as exc:
            raise Skipped(f"the plainest request is not answered ({exc}); see infer.json") from exc

    @cached_property
    def steady(self) -> Answer:
        """The plainest answer, when a second one is equal; where answers vary, nothing can be compared."""
        first = self.base
        names = {spec.name for spec in self.model.outputs}
        if set(first.outputs) != names:
            raise Skipped(f"the answer lacks some of the outputs {listed(sorted(names))}; see infer.all-outputs")
        try:
            first.expect_same(self.infer(self.call()), "the same request, asked again,")
        except Failed as exc:
            raise Skipped(f"equal requests are not answered alike: {exc}") from exc
        return first

    @cached_property
    def binary_base(self) -> Answer:
        """The answer to the plainest request with every tensor in binary."""
        self.need("binary_tensor_data")
        expected = self.base
        try:
            answer = self.infer(self.call(binary=True, binary_output=True))
        except Failed as exc:
            raise Skipped(f"a request in binary is not answered ({exc}); see binary.both") from exc
        if answer.outputs.keys() != expected.outputs.keys() or not all(o.binary for o in answer.outputs.values()):
            raise Skipped("the answer to a request in binary is not in binary; see binary.both")
        return answer

    @cached_property
    def echoes(self) -> Mapping[str, str]:
        """Input → output, where the output is the input given back: through these, any value can be sent and seen again."""
        found: dict[str, set[str]] = {}
        for seed in (1, 2):
            arrays = {s.name: make(s.datatype, s.sized(), seed, distinct=True) for s in self.model.inputs}
            try:
                answer = self.infer(self.call(arrays, binary_output=self.binary))
            except Failed:
                return {}
            for spec in self.model.inputs:
                equal = {
                    name
                    for name, output in answer.outputs.items()
                    if output.datatype == spec.datatype and same(arrays[spec.name], output.array, spec.datatype)
                }
                found[spec.name] = found.get(spec.name, equal) & equal
        return {name: min(outputs) for name, outputs in found.items() if outputs}

    def echo_of(self, datatype: str) -> tuple[TensorMetadata, str]:
        """Return an input of a datatype and the output that gives it back; raises Skipped where there is none."""
        _ = self.base
        specs = [spec for spec in self.model.inputs if spec.datatype == datatype]
        if not specs:
            raise Skipped(f"the model has no input of {datatype}")
        for spec in specs:
            if spec.name in self.echoes:
                return spec, self.echoes[spec.name]
        raise Skipped(f"no output of the model gives its input of {datatype} back")

    def need(self, extension: str) -> None:
        """Raise Skipped unless the server says it has an extension."""
        if extension not in self.extensions:
            raise Skipped(f"the server does not list {extension}; its extensions are {listed(sorted(self.extensions))}")

    def need_changes(self) -> None:
        if not self.target.allow_changes:
            raise Skipped("this changes the server; allow it with --allow-changes")

    @cached_property
    def _example(self) -> dict[str, Array]:
        """The arrays of the target's example; raises ConfigError when it does not fit the model."""
        try:
            given = {tensor["name"]: tensor for tensor in (self.target.example or {})["inputs"]}
            return {
                spec.name: from_json(given[spec.name]["data"], spec.datatype, given[spec.name]["shape"], spec.name)
                for spec in self.model.inputs
            }
        except (KeyError, TypeError, Failed) as exc:
            names = listed(spec.name for spec in self.model.inputs)
            raise ConfigError(
                f"the example must be an inference request with {names}, got {shown(self.target.example)} ({exc!r})"
            ) from exc
