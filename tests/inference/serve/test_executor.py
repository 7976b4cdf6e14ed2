"""Laws of the executor: every call is answered once, with its own rows, whatever shared its batch and wherever it ran."""

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.errors import DeadlineExceeded, ModelyardError, Overloaded, RequestError
from modelyard.inference.runtime._base import Arrays
from modelyard.inference.serve.calls import Call
from modelyard.inference.serve.executor import Executor
from modelyard.inference.serve.front import HttpAdapter
from modelyard.inference.serve.models.repository import Loaded
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.protocols import open_inference, tensorflow
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Policy, Scheduler
from modelyard.inference.serve.transport.messages import Head, Request, Response

ON_THE_LOOP, ON_THREADS = 1e9, 0.0
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", datatype="FP32", shape=(BATCH, 2)),
        TensorSpec(name="note", datatype="BYTES", shape=(BATCH,), nullable=True),
    ),
    outputs=(
        TensorSpec(name="sum", datatype="FP32", shape=(BATCH,)),
        TensorSpec(name="note", datatype="BYTES", shape=(BATCH,)),
    ),
)
POISON = np.float32(-1.0)


class Poisoned(RuntimeError):
    """What the engine raises for a batch that holds the marker."""


class Summing:
    """An engine that adds each row's numbers and repeats its text; a batch with the marker in it fails as a whole."""

    name = "summing 1"

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self.sizes = sizes
        """The only row counts it takes, like a graph of fixed shapes; empty: any."""
        self.batches: list[int] = []
        self.closed = False

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        assert not self.closed
        x = inputs["x"]
        assert not self.sizes or len(x) in self.sizes, f"{len(x)} rows"
        assert len(inputs["note"]) == len(x)
        self.batches.append(len(x))
        if (x == POISON).any():
            raise Poisoned("a row holds the marker")
        return {"sum": x.sum(axis=1), "note": inputs["note"]}

    def close(self) -> None:
        self.closed = True


def executor_of(
    engine: Any,
    signature: Signature = SIGNATURE,
    *,
    inline_below_s: float = ON_THE_LOOP,
    max_batch_size: int = 8,
    sizes: tuple[int, ...] = (),
    n_instances: int = 1,
    target_s: float = 60.0,
    waits: bool = True,
) -> Executor:
    """Return an executor; `waits` for company where that gains something, as it is by default."""
    policy = Policy(
        target_s=target_s,
        max_batch_size=max_batch_size,
        n_instances=n_instances,
        allowed_sizes=sizes,
        batching_gain=1.1 if waits else 1e9,
    )
    scheduler = Scheduler(policy, LatencyModel(max_batch_size, guess_row_s=1e-6), perf_counter())
    return Executor(
        engine,
        Packer(signature),
        scheduler,
        name="m version 1",
        max_batch_size=max_batch_size,
        inline_below_s=inline_below_s,
    )


@dataclass
class Asked:
    """One call of a test and what became of it."""

    n_rows: int
    poisoned: bool = False
    nan: bool = False
    """Comes in binary with NaN in its last row."""
    cancelled: bool = False
    pause: int = 0
    """Turns of the loop before it."""
    timeout_s: float = 60.0
    call: Call = field(init=False)
    n_done: int = 0
    refused: Exception | None = None

    def prepare(self, packer: Packer, number: int, on_done: Callable[["Asked"], None]) -> None:
        x = np.full((self.n_rows, 2), 10 * number, dtype=np.float32) + np.arange(self.n_rows, dtype=np.float32)[:, None]
        if self.poisoned:
            x[self.n_rows // 2, 0] = POISON
        if self.nan:
            x[-1, 1] = np.nan
        note = np.array([f"call {number} row {i}" for i in range(self.n_rows)], dtype=object)
        self.x, self.note = x, note
        self.call = packer.pack({"x": x, "note": note}, self.n_rows, unchecked=self.nan)

        def done(call: Call) -> None:
            assert call is self.call
            self.n_done += 1
            on_done(self)

        self.call.on_done = done
        self.call.arrived_s = perf_counter()
        self.call.deadline_s = self.call.arrived_s + self.timeout_s

    def check(self) -> None:
        """Its answer is right."""
        call = self.call
        if self.nan:
            assert isinstance(call.error, RequestError)
            assert "'x' holds NaN" in str(call.error)
        elif self.poisoned:
            assert isinstance(call.error, Poisoned)
        else:
            assert call.error is None
            np.testing.assert_array_equal(call.output("sum"), self.x.sum(axis=1))
            assert call.output("note").tolist() == self.note.tolist()


async def submit_all(executor: Executor, asked: Sequence[Asked]) -> None:
    """Submit every call and return when all have ended one way or the other, but for those cancelled."""
    packer = Packer(SIGNATURE)
    all_done = asyncio.Event()
    waiting: set[int] = set(range(len(asked)))

    def ended(number: int) -> None:
        waiting.discard(number)
        if not waiting:
            all_done.set()

    for number, one in enumerate(asked):
        for _ in range(one.pause):
            await asyncio.sleep(0)
        one.prepare(packer, number + 1, lambda _, number=number: ended(number))  # type: ignore[misc]  # the default binds it
        try:
            executor.submit(one.call)
        except (Overloaded, DeadlineExceeded) as exc:
            one.refused = exc
            ended(number)
            continue
        if one.cancelled:
            before = one.n_done
            executor.cancel(one.call)
            assert one.n_done == before == 0
            ended(number)
    await asyncio.wait_for(all_done.wait(), 60)
    await asyncio.to_thread(executor.close)
    for _ in range(3):  # whatever would be told too often is told by now
        await asyncio.sleep(0)


asked_calls = st.lists(
    st.builds(
        Asked,
        n_rows=st.integers(1, 5),
        poisoned=st.sampled_from([False] * 5 + [True]),
        nan=st.sampled_from([False] * 5 + [True]),
        cancelled=st.sampled_from([False] * 5 + [True]),
        pause=st.sampled_from([0, 0, 0, 1, 2]),
    ),
    min_size=1,
    max_size=14,
)
shapes = st.sampled_from([(1, ()), (3, ()), (8, ()), (64, ()), (8, (1, 2, 4, 8)), (4, (4,))])


@pytest.mark.parametrize("inline_below_s", [ON_THE_LOOP, ON_THREADS], ids=["on the loop", "on threads"])
@given(asked=asked_calls, shape=shapes, n_instances=st.integers(1, 3))
def test_every_call_is_answered_once_with_its_own_rows_and_its_own_error(
    inline_below_s: float, asked: list[Asked], shape: tuple[int, tuple[int, ...]], n_instances: int
) -> None:
    for one in asked:  # one fault a call, so that it is known which is told
        one.nan = one.nan and not one.poisoned
    max_batch_size, sizes = shape
    engine = Summing(sizes)
    executor = executor_of(
        engine,
        inline_below_s=inline_below_s,
        max_batch_size=max_batch_size,
        sizes=sizes,
        n_instances=n_instances,
        waits=n_instances == 1,
    )
    asyncio.run(submit_all(executor, asked))
    for one in asked:
        assert one.refused is None
        assert one.n_done == (0 if one.cancelled else 1)
        if not one.cancelled:
            one.check()
    assert max(engine.batches, default=0) <= max_batch_size
    assert engine.closed


@pytest.mark.parametrize("inline_below_s", [ON_THE_LOOP, ON_THREADS], ids=["on the loop", "on threads"])
@given(
    asked=asked_calls,
    timeouts_s=st.lists(st.sampled_from([1e-9, 2e-6, 5e-5, 1e-3, 0.02, 60.0]), min_size=1),
    n_instances=st.integers(1, 3),
)
def test_whatever_the_deadlines_a_call_is_refused_or_answered_and_never_both(
    inline_below_s: float, asked: list[Asked], timeouts_s: list[float], n_instances: int
) -> None:
    for number, one in enumerate(asked):
        one.timeout_s = timeouts_s[number % len(timeouts_s)]
        one.nan = one.poisoned = False
    executor = executor_of(Summing(), inline_below_s=inline_below_s, n_instances=n_instances, target_s=0.02)
    asyncio.run(submit_all(executor, asked))
    for one in asked:
        if one.refused is not None:
            assert one.n_done == 0
            assert one.refused.facts["retry_after_s"] > 0  # type: ignore[attr-defined]  # both kinds have them
        elif one.cancelled:
            assert one.n_done == 0
        else:
            assert one.n_done == 1
            if isinstance(one.call.error, DeadlineExceeded):
                assert one.call.error.cause in ("expired", "hopeless")
            else:
                one.check()


def test_calls_of_one_turn_share_a_batch() -> None:
    engine = Summing()
    asked = [Asked(n_rows=1) for _ in range(6)]
    asyncio.run(submit_all(executor_of(engine), asked))
    assert engine.batches == [6]
    assert {one.call.run.n_calls for one in asked if one.call.run} == {6}


def test_a_failing_batch_is_halved_until_the_one_is_found() -> None:
    engine = Summing()
    asked = [Asked(n_rows=1, poisoned=number == 5) for number in range(8)]
    asyncio.run(submit_all(executor_of(engine), asked))
    assert engine.batches == [8, 4, 4, 2, 1, 1, 2]
    assert [one.call.error is None for one in asked] == [number != 5 for number in range(8)]
    for one in asked:
        one.check()


def test_a_call_larger_than_a_batch_is_computed_in_parts() -> None:
    engine = Summing()
    asked = [Asked(n_rows=21)]
    asyncio.run(submit_all(executor_of(engine), asked))
    assert engine.batches == [8, 8, 5]
    asked[0].check()


def test_where_the_graph_takes_certain_sizes_only_every_batch_is_padded_and_no_answer_is() -> None:
    engine = Summing(sizes=(2, 8))
    asked = [Asked(n_rows=1, pause=0), Asked(n_rows=3, pause=3), Asked(n_rows=11, pause=3)]
    asyncio.run(submit_all(executor_of(engine, sizes=(2, 8)), asked))
    assert engine.batches == [2, 8, 8, 8]
    for one in asked:
        one.check()
        assert len(one.call.output("sum")) == one.n_rows


class Held(Summing):
    """Computes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.go_on = threading.Event(), threading.Event()

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        self.started.set()
        assert self.go_on.wait(60)
        return super().run(inputs)


def test_close_finishes_what_runs_and_frees_the_engine_after_it() -> None:
    async def main() -> Asked:
        engine = Held()
        executor = executor_of(engine, inline_below_s=ON_THREADS)
        one = Asked(n_rows=2)
        done = asyncio.Event()
        one.prepare(Packer(SIGNATURE), 1, lambda _: done.set())
        executor.submit(one.call)
        await asyncio.to_thread(engine.started.wait, 60)
        closing = asyncio.create_task(asyncio.to_thread(executor.close))
        await asyncio.sleep(0)
        too_early = engine.closed
        engine.go_on.set()
        await closing
        assert (too_early, engine.closed) == (False, True)
        await asyncio.wait_for(done.wait(), 60)
        return one

    one = asyncio.run(main())
    assert one.n_done == 1
    one.check()


def test_a_call_cancelled_while_it_runs_is_not_told_and_its_mates_are() -> None:
    async def main() -> list[Asked]:
        engine = Held()
        executor = executor_of(engine, inline_below_s=ON_THREADS)
        asked = [Asked(n_rows=1) for _ in range(3)]
        done = asyncio.Event()
        for number, one in enumerate(asked):
            one.prepare(Packer(SIGNATURE), number, lambda one: done.set() if one is asked[2] else None)
            executor.submit(one.call)
        await asyncio.to_thread(engine.started.wait, 60)
        executor.cancel(asked[0].call)
        executor.cancel(asked[1].call)
        engine.go_on.set()
        await asyncio.wait_for(done.wait(), 60)
        await asyncio.to_thread(executor.close)
        return asked

    asked = asyncio.run(main())
    assert [one.n_done for one in asked] == [0, 0, 1]
    asked[2].check()


def test_threads_are_as_many_as_instances_that_were_needed() -> None:
    """Three batches at once on three threads; the fourth waits for one of them."""

    class Meeting(Summing):
        def __init__(self) -> None:
            super().__init__()
            self.barrier = threading.Barrier(3)
            self.threads: set[int] = set()

        def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
            self.threads.add(threading.get_ident())
            self.barrier.wait(60)
            return super().run(inputs)

    engine = Meeting()
    asked = [Asked(n_rows=1) for _ in range(6)]
    executor = executor_of(engine, inline_below_s=ON_THREADS, max_batch_size=1, n_instances=3)
    asyncio.run(submit_all(executor, asked))
    assert len(engine.threads) == 3
    for one in asked:
        one.check()


# Different protocols, one batch.

ROWS = [[0.5, 1.0], [2.0, -4.0], [3.25, 8.0]]


def json_rows(row: Sequence[float], note: str) -> bytes:
    return json.dumps({"instances": [{"x": row, "note": note}]}).encode()


def oip_json(row: Sequence[float], note: str) -> bytes:
    tensors = [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": row},
        {"name": "note", "datatype": "BYTES", "shape": [1], "data": [note]},
    ]
    return json.dumps({"inputs": tensors}).encode()


def oip_binary(row: Sequence[float], note: str) -> tuple[bytes, bytes]:
    x = np.array([row], dtype="<f4").tobytes()
    text = len(note.encode()).to_bytes(4, "little") + note.encode()
    tensors = [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": len(x)}},
        {"name": "note", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(text)}},
    ]
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return head + x + text, b"%d" % len(head)


def asked_in(protocol: str, row: Sequence[float], note: str) -> tuple[HttpAdapter, Request]:
    if protocol == "rows":
        return tensorflow.Predict(), Request(Head("POST", "/"), json_rows(row, note), 0.0)
    if protocol == "json":
        return open_inference.Infer(), Request(Head("POST", "/"), oip_json(row, note), 0.0)
    body, length = oip_binary(row, note)
    return open_inference.Infer(), Request(
        Head("POST", "/", headers={b"inference-header-content-length": length}), body, 0.0
    )


def answers_of(requests: Sequence[tuple[HttpAdapter, Request]]) -> tuple[list[Response | ModelyardError], list[int]]:
    """Submit the requests in one turn; return the answers, or errors, and the sizes of the batches that ran."""
    engine = Summing()

    async def main() -> list[Response | ModelyardError]:
        executor = executor_of(engine)
        loaded = Loaded("m", 1, SIGNATURE, executor, 60.0, {}, 0.0)
        waiting: list[asyncio.Future[Response | ModelyardError]] = []
        for adapter, request in requests:
            call = adapter.read(request, loaded)
            answered: asyncio.Future[Response | ModelyardError] = asyncio.get_running_loop().create_future()

            def done(call: Call, request: Request = request, answered: Any = answered, adapter: Any = adapter) -> None:
                answered.set_result(call.error or adapter.write(request, call))

            call.loaded, call.on_done = loaded, done
            call.arrived_s = perf_counter()
            call.deadline_s = call.arrived_s + 60.0
            executor.submit(call)
            waiting.append(answered)
        answers = list(await asyncio.gather(*waiting))
        executor.close()
        return answers

    return asyncio.run(main()), engine.batches


@given(
    wanted=st.lists(
        st.tuples(
            st.sampled_from(["rows", "json", "binary"]), st.sampled_from(ROWS), st.sampled_from(["", "é", "a b"])
        ),
        min_size=1,
        max_size=8,
    )
)
def test_requests_of_different_protocols_share_a_batch_and_are_answered_as_if_alone(
    wanted: list[tuple[str, list[float], str]],
) -> None:
    together, batches = answers_of([asked_in(*one) for one in wanted])
    assert batches == [len(wanted)]
    for one, answer in zip(wanted, together, strict=True):
        (alone,), _ = answers_of([asked_in(*one)])
        assert answer == alone


def test_nan_in_binary_fails_its_own_request_only() -> None:
    nan = float("nan")
    requests = [asked_in("rows", ROWS[0], "a"), asked_in("binary", [1.0, nan], "b"), asked_in("json", ROWS[1], "c")]
    answers, _ = answers_of(requests)
    assert [isinstance(answer, Response) for answer in answers] == [True, False, True]
    assert "'x' holds NaN" in str(answers[1])
