"""The one door through which every protocol asks a model: choose the version, admit, run, answer, and remember what happened.

    protocol's route → Front.ask → repository.pick → adapter.read (bytes → Call) → executor → adapter.done (Call → bytes)

A protocol brings an Adapter; everything it would otherwise do by itself and differently lives here.
"""

import sys
import traceback
from time import perf_counter
from typing import Any, Protocol

from modelyard.errors import (
    BodyTooLarge,
    ClientTooSlow,
    Cold,
    DeadlineExceeded,
    HeadersTooLarge,
    MethodNotAllowed,
    ModelyardError,
    NotReady,
    Overloaded,
    RequestError,
    UnknownModel,
    UnknownPath,
    UnsupportedEncoding,
)
from modelyard.inference.serve.calls import NO_TERMS, Call, Terms
from modelyard.inference.serve.explain import explained, timeline
from modelyard.inference.serve.metrics.observe import ServerMetrics
from modelyard.inference.serve.metrics.vocabulary import Outcome
from modelyard.inference.serve.models.repository import COLD_PATIENCE_S, Loaded, Repository
from modelyard.inference.serve.transport.messages import Request, Response, error_response, json_response

_PROMPT_S = 1e-3
"""A request read within this time has not waited; what its deadline allows is the scheduler's to judge."""
_CAUSES: dict[type, str] = {
    UnknownModel: "unknown_model",
    UnknownPath: "unknown_path",
    MethodNotAllowed: "method",
    BodyTooLarge: "body_too_large",
    ClientTooSlow: "client_too_slow",
    HeadersTooLarge: "headers_too_large",
    UnsupportedEncoding: "unsupported_encoding",
}


class Asker(Protocol):
    """Whoever asks: an HTTP request, a gRPC call."""

    arrived_s: float
    on_gone: Any

    @property
    def request_id(self) -> bytes: ...


class Adapter(Protocol):
    """How one protocol says an inference."""

    protocol: str
    """For metrics, e.g. "rest-v2"."""

    def own_timeout_s(self, asker: Any) -> float | None:
        """Return the timeout that the body asks for, as far as can be seen without reading its rows; raises nothing."""
        ...

    def read(self, asker: Any, loaded: Loaded) -> Call:
        """Return what is asked, packed; raises RequestError. May set the call's timeout_s and priority."""
        ...

    def done(self, asker: Any, call: Call) -> None:
        """Answer: `call.run` is there."""
        ...

    def fail(self, asker: Any, error: Exception, call: Call | None) -> None:
        """Answer with an error."""
        ...


class Front:
    """Asks models on behalf of protocols. Belongs to the event loop."""

    def __init__(self, repository: Repository, metrics: ServerMetrics) -> None:
        self._repository = repository
        self._metrics = metrics

    def ask(
        self,
        asker: Asker,
        terms: Terms,
        adapter: Adapter,
        name: str,
        version: str | None = None,
        label: str | None = None,
    ) -> None:
        """Answer `asker` by way of `adapter`, now or later; raises nothing."""
        try:
            loaded = self._repository.pick(name, version, label, terms.key)
        except Cold as cold:
            self._wait(asker, terms, adapter, cold)
        except Exception as exc:  # noqa: BLE001  # becomes the answer; a bug goes to the log as well
            self._refuse(asker, adapter, exc, terms)
        else:
            self._ask(asker, terms, adapter, loaded, asker.arrived_s)

    def _wait(self, asker: Asker, terms: Terms, adapter: Adapter, cold: Cold) -> None:
        """Have the version loaded; the request waits within its deadline, or for some time where it brings none."""

        waits = True
        began_s = perf_counter()
        own_s = adapter.own_timeout_s(asker) or terms.timeout_s

        def then(loaded: Loaded) -> None:
            nonlocal waits
            waits = False
            now_s = perf_counter()
            # Its own deadline counts from arrival; the model's target from when there is a model.
            self._ask(asker, terms, adapter, loaded, asker.arrived_s if own_s else now_s, now_s - began_s)

        def otherwise(error: Exception) -> None:
            nonlocal waits
            waits = False
            self._refuse(asker, adapter, error, terms)

        deadline_s = asker.arrived_s + (own_s or COLD_PATIENCE_S)
        forget = self._repository.when_ready(cold, deadline_s, then, otherwise)
        if waits:  # else it is answered, or on its way, already
            asker.on_gone = forget

    def _ask(
        self, asker: Asker, terms: Terms, adapter: Adapter, loaded: Loaded, since_s: float, load_wait_s: float = 0.0
    ) -> None:
        """Submit to a version; `since_s` is what its deadline counts from, `load_wait_s` how long it waited for the version."""
        call = None
        try:
            now_s = perf_counter()
            budget_s = terms.timeout_s or loaded.target_s
            executor = loaded.executor
            # What has waited for this long to be read will wait as long again for its answer to be written.
            waited_s = now_s - since_s
            if waited_s + waited_s > budget_s and waited_s > _PROMPT_S and adapter.own_timeout_s(asker) is None:
                self._turn_away(asker, terms, adapter, loaded)
                return
            refusal = executor.refusal(1, since_s + budget_s, now_s)
            if refusal is not None and adapter.own_timeout_s(asker) is None:
                raise refusal
            try:
                call = adapter.read(asker, loaded)
            except RecursionError as exc:
                raise RequestError("the body is nested too deeply; rows and tensors have a few levels at most") from exc
            call.asker = asker
            call.adapter = adapter
            call.loaded = loaded
            call.arrived_s = asker.arrived_s
            call.deadline_s = since_s + (call.timeout_s or budget_s)
            call.priority = call.priority or terms.priority
            call.explain = call.explain or terms.explain
            call.terms = terms
            call.load_wait_s = load_wait_s
            call.on_done = self._done
            check_rows(call.n_rows, loaded)
            if loaded.cache is not None and self._is_cached(call, loaded, now_s):
                return
            executor.submit(call)
            asker.on_gone = call.cancel
        except Exception as exc:  # noqa: BLE001  # as above
            self._refuse(asker, adapter, exc, terms, loaded, call)

    def _turn_away(self, asker: Asker, terms: Terms, adapter: Adapter, loaded: Loaded) -> None:
        """Refuse what was read too late, for less than an answer costs: else an overload of the reader would never end."""
        late = loaded.too_late.get(adapter) or _too_late(adapter, loaded)
        error, metrics = late.error, loaded.executor.metrics
        assert error is not None
        if terms is not NO_TERMS or metrics is None:
            self._refuse(asker, adapter, error, terms, loaded)
            return
        metrics.ended(adapter.protocol, "refused", "overload")
        adapter.fail(asker, error, late)

    def _is_cached(self, call: Call, loaded: Loaded, now_s: float) -> bool:
        """Answer from the cache, if an equal call was answered before."""
        assert loaded.cache is not None
        call.run = loaded.cache.get(call, now_s)
        metrics = loaded.executor.metrics
        if call.run is None:
            if metrics is not None:
                metrics.cache_miss()
            return False
        if metrics is not None:
            metrics.cache_hit()
        call.admitted_s = now_s
        self._done(call)
        return True

    def _done(self, call: Call) -> None:
        asker, adapter, loaded = call.asker, call.adapter, call.loaded
        assert loaded is not None
        asker.on_gone = None
        call.finished_s = finished_s = perf_counter()
        error = call.error
        if error is None:
            try:
                adapter.done(asker, call)
            except Exception as exc:  # noqa: BLE001  # as above
                error = exc
            else:
                metrics, run = loaded.executor.metrics, call.run
                if metrics is not None and run is not None:
                    metrics.answered(adapter.protocol, finished_s - call.arrived_s, run.started_s - call.admitted_s)
                if loaded.cache is not None:
                    loaded.cache.put(call)
                if loaded.shadow is not None:
                    loaded.shadow.offer(call)
                return
        self._refuse(asker, adapter, error, call.terms, loaded, call, admitted=True)

    def _refuse(
        self,
        asker: Asker,
        adapter: Adapter,
        error: Exception,
        terms: Terms,
        loaded: Loaded | None = None,
        call: Call | None = None,
        *,
        admitted: bool = False,
    ) -> None:
        """Answer with an error; `call` is there when it was read."""
        asker.on_gone = None
        if not is_explained(error):
            text = "".join(traceback.format_exception(error))
            sys.stderr.write(f"bug: request {asker.request_id.decode('latin-1')} failed:\n{text}")
        metrics = None if loaded is None else loaded.executor.metrics
        ended = self._metrics.ended if metrics is None else metrics.ended
        outcome, cause = outcome_of(error, admitted=admitted)
        ended(adapter.protocol, outcome, cause)
        if call is None:  # what the log and a timeline can tell of it
            call = Call((), 0)
            call.asker, call.adapter, call.loaded, call.terms = asker, adapter, loaded, terms
            call.explain, call.arrived_s = terms.explain, asker.arrived_s
            budget_s = terms.timeout_s or (loaded.target_s if loaded is not None else COLD_PATIENCE_S)
            call.deadline_s = asker.arrived_s + budget_s
        if not admitted:
            call.admitted_s = 0.0
        call.error, call.cause = error, cause
        adapter.fail(asker, error, call)
        if is_explained(error):  # its frames hold all that was read of the body, and the call holds the error
            error.__traceback__ = error.__cause__ = error.__context__ = None


def _too_late(adapter: Adapter, loaded: Loaded) -> Call:
    """Return what stands for every request that was read too late, kept with the version."""
    late = loaded.too_late[adapter] = Call((), 0)
    late.adapter, late.loaded, late.cause = adapter, loaded, "overload"
    late.error = Overloaded(
        f"{loaded.name}: refused, since the server reads requests later than they could be answered in time; try again in "
        "1 s, or allow more time with the header Modelyard-Timeout-Ms",
        cause="overload",
        retry_after_s=1.0,
    )
    return late


def check_rows(n_rows: int, loaded: Loaded) -> None:
    """Raise BodyTooLarge for more rows than one request may have; an adapter that knows early asks before the work."""
    if n_rows > loaded.max_rows:
        raise BodyTooLarge(
            f"{loaded.name}: at most {loaded.max_rows} rows per request, got {n_rows}; split the request, or raise max_rows in serve.toml"
        )


def is_explained(error: Exception) -> bool:
    """Whether the client may be told: its own fault, overload, a deadline, not ready. Anything else is a bug of ours."""
    return isinstance(error, RequestError | Overloaded | DeadlineExceeded) or (
        isinstance(error, ModelyardError) and error.status < 500
    )


def outcome_of(error: Exception, *, admitted: bool) -> tuple[Outcome, str]:
    """Return what an error counts as, and its cause in a word of ours."""
    if isinstance(error, Overloaded | DeadlineExceeded):
        return ("dropped" if admitted else "refused"), error.facts.get("cause", "overload")
    if isinstance(error, NotReady):
        return "refused", "not_ready"
    if is_explained(error):
        return "client_error", _CAUSES.get(type(error), "bad_request")
    return "error", "bug"


def fault(error: Exception, request_id: bytes) -> Response:
    """Return the HTTP answer for an error; a bug keeps its details to the log."""
    if isinstance(error, ModelyardError) and is_explained(error):
        return error_response(error)
    return json_response(
        {"error": f"internal error; see the server's log for request {request_id.decode('latin-1')}"}, 500
    )


class HttpAdapter:
    """What adapters over HTTP share. A subclass brings `protocol`, `read`, and `write`, which returns the answer."""

    protocol = "http"

    def own_timeout_s(self, request: Request) -> float | None:
        return None

    def read(self, request: Request, loaded: Loaded) -> Call:
        raise NotImplementedError

    def write(self, request: Request, call: Call) -> Response:
        raise NotImplementedError

    def done(self, request: Request, call: Call) -> None:
        response = self.write(request, call)
        if call.explain:
            response = explained(response, timeline(call))
        request.served = call
        request.reply(response)

    def fail(self, request: Request, error: Exception, call: Call | None) -> None:
        if call is not None and call.asker is None:  # one for many, see Front
            response = call.form = call.form or fault(error, b"")
        else:
            response = fault(error, request.request_id)
        if call is not None:
            request.served = call if call.loaded is not None else call.cause
            if call.explain:
                response = explained(response, timeline(call))
        request.reply(response)
