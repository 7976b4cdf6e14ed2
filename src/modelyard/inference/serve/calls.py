"""One inference on its way through the server: what came in, by when it is wanted, and what became of it.

    protocol (bytes → packed inputs) → Call → admission → queue → Run (one run of the engine, for one or more calls) → protocol

Both belong to the event loop, but for the short time in which an instance's thread computes a run.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from modelyard.errors import RequestError
from modelyard.inference.serve.transport.messages import Head

if TYPE_CHECKING:
    from modelyard.inference.serve.models.repository import Loaded

Part = bytes | memoryview | list[str]
"""One input of a call, its rows one behind the other: little-endian numbers, or texts."""

TIMEOUT = b"modelyard-timeout-ms"
PRIORITY = b"modelyard-priority"
TENANT = b"modelyard-tenant"
KEY = b"modelyard-key"
EXPLAIN = b"modelyard-explain"
TRACEPARENT = b"traceparent"


class Terms(msgspec.Struct, frozen=True):
    """What a client asks for beside its rows."""

    timeout_s: float | None = None
    """From arrival; None takes the model's target."""
    priority: int = 0
    """1 is the highest, as in Triton; 0 the default level."""
    tenant: str = ""
    key: bytes = b""
    """Requests with the same key meet the same version while traffic is split."""
    explain: bool = False
    traceparent: bytes = b""


NO_TERMS = Terms()


class Run:
    """One run of an engine: the outputs of all its calls, row by row."""

    __slots__ = ("computed_s", "n_calls", "n_rows", "outputs", "reason", "scratch", "started_s")

    def __init__(
        self,
        outputs: Mapping[str, NDArray[Any]],
        n_rows: int,
        n_calls: int,
        reason: str,
        started_s: float,
        computed_s: float,
    ) -> None:
        self.outputs = outputs
        self.n_rows = n_rows
        self.n_calls = n_calls
        self.reason = reason
        """Why it started when it did, in the scheduler's words."""
        self.started_s = started_s
        self.computed_s = computed_s
        self.scratch: dict[Any, Any] = {}
        """What writers have made of the outputs for all calls at once."""

    @property
    def compute_s(self) -> float:
        return self.computed_s - self.started_s


class Call:
    """One inference. `on_done` is called once, on the event loop, when `run` or `error` is set."""

    __slots__ = (
        "adapter",
        "admitted_s",
        "arrived_s",
        "asker",
        "bucket",
        "cancelled",
        "cause",
        "deadline_s",
        "error",
        "explain",
        "finished_s",
        "first_row",
        "form",
        "inputs",
        "load_wait_s",
        "loaded",
        "n_rows",
        "on_done",
        "priority",
        "queued",
        "run",
        "terms",
        "timeout_s",
        "unchecked",
    )

    def __init__(
        self, inputs: tuple[Part, ...], n_rows: int, bucket: Hashable = None, *, unchecked: bool = False
    ) -> None:
        self.inputs = inputs
        """In the order of the signature."""
        self.n_rows = n_rows
        self.bucket = bucket
        """The sizes of the axes that may vary, None where none may; calls of one bucket can share a run."""
        self.unchecked = unchecked
        """Numbers came in binary and nobody has looked for NaN yet."""
        self.arrived_s = 0.0
        self.admitted_s = 0.0
        self.finished_s = 0.0
        self.deadline_s = 0.0
        self.timeout_s: float | None = None
        """Asked for in the body; None takes the headers' or the model's."""
        self.priority = 0
        self.explain = False
        """Whether the answer is to tell the call's timeline."""
        self.terms = NO_TERMS
        self.queued = False
        self.cancelled = False
        self.asker: Any = None
        self.adapter: Any = None
        self.form: Any = None
        """What the adapter needs to know again when it answers."""
        self.loaded: Loaded | None = None
        self.run: Run | None = None
        self.first_row = 0
        self.load_wait_s = 0.0
        """How long it waited for its version to be loaded."""
        self.cause = ""
        """Of `error`, as it is counted."""
        self.error: Exception | None = None
        self.on_done: Callable[[Call], None] = _nobody

    def cancel(self) -> None:
        """The client has gone."""
        if self.loaded is not None:
            self.loaded.executor.cancel(self)

    def output(self, name: str) -> NDArray[Any]:
        """Return this call's rows of an output; all of it where it has no batch axis."""
        run = self.run
        assert run is not None
        array = run.outputs[name]
        if run.n_rows == self.n_rows:
            return array
        return array[self.first_row : self.first_row + self.n_rows]

    def outputs(self) -> dict[str, NDArray[Any]]:
        assert self.run is not None
        return {name: self.output(name) for name in self.run.outputs}


def _nobody(call: Call) -> None:
    """Whoever asked has gone."""


def terms_of(head: Head) -> Terms:
    """Return what the headers ask for, kept with the head; raises RequestError."""
    terms: Terms | None = head.terms
    if terms is None:
        terms = head.terms = read_terms(head.headers)
    return terms


def read_terms(headers: Mapping[bytes, bytes]) -> Terms:
    """Return what HTTP headers or gRPC metadata ask for; raises RequestError."""
    if not any(name.startswith(b"modelyard-") or name == TRACEPARENT for name in headers):
        return NO_TERMS
    explain = headers.get(EXPLAIN, b"false").lower()
    if explain not in (b"true", b"1", b"false", b"0"):
        raise RequestError(f"header Modelyard-Explain must be true or false, got {_shown(explain)}")
    return Terms(
        timeout_s=_number(headers, TIMEOUT, 86_400_000) / 1e3 if TIMEOUT in headers else None,
        priority=int(_number(headers, PRIORITY, 1_000)) if PRIORITY in headers else 0,
        tenant=headers.get(TENANT, b"").decode("latin-1")[:128],
        key=headers.get(KEY, b""),
        explain=explain in (b"true", b"1"),
        traceparent=headers.get(TRACEPARENT, b""),
    )


def _number(headers: Mapping[bytes, bytes], name: bytes, highest: float) -> float:
    text = headers[name]
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= highest or (name is TIMEOUT and value == 0):
        title = name.decode().title()
        least = "above 0, up to" if name is TIMEOUT else "from 0 to"
        raise RequestError(f"header {title} must be a number {least} {highest:.0f}, got {_shown(text)}")
    return value


def _shown(text: bytes) -> str:
    return repr(text.decode("latin-1"))[:60]
