"""How answers of two versions are compared, and that a shadow is never in anybody's way."""

import threading
from typing import Any

import numpy as np
import pytest

from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.inference.serve.calls import Call, Run
from modelyard.inference.serve.executor import Executor
from modelyard.inference.serve.metrics.metrics import new_slabs
from modelyard.inference.serve.metrics.observe import ModelMetrics, ServerMetrics
from modelyard.inference.serve.models.loading import Loaded
from modelyard.inference.serve.models.served_model import ServedModel
from modelyard.inference.serve.models.shadow import MAX_PENDING, Mirror, Shadow, ShadowCounts, compare, same_inputs
from modelyard.inference.serve.models.traffic import Traffic
from modelyard.inference.serve.packing import Packer
from modelyard.inference.serve.scheduling.latency_model import LatencyModel
from modelyard.inference.serve.scheduling.scheduling import Policy, Scheduler

X = TensorSpec(name="x", datatype="FP32", shape=(BATCH,))
Y = TensorSpec(name="y", datatype="FP32", shape=(BATCH,))
LABEL = TensorSpec(name="label", datatype="BYTES", shape=(BATCH,), labels=("no", "yes"))
SCORES = TensorSpec(name="scores", datatype="FP32", shape=(BATCH, 2), labels=("no", "yes"))
SIGNATURE = Signature(inputs=(X,), outputs=(Y,))


def floats(*values: Any) -> Any:
    return np.array(values, dtype=np.float32)


def test_rows_agree_that_have_the_same_label_whatever_their_scores() -> None:
    signature = Signature(inputs=(X,), outputs=(LABEL, SCORES))
    ours = {"label": np.array(["yes", "no"], dtype=object), "scores": floats([0.2, 0.8], [0.6, 0.4])}
    theirs = {"label": np.array(["yes", "yes"], dtype=object), "scores": floats([0.3, 0.7], [0.4, 0.6])}
    found = compare(ours, theirs, signature, 2)
    assert (found.n_rows, found.n_agreeing) == (2, 1)
    assert found.max_abs_difference == pytest.approx(0.2)


def test_without_labels_of_their_own_the_best_score_is_the_label() -> None:
    signature = Signature(inputs=(X,), outputs=(SCORES,))
    found = compare(
        {"scores": floats([0.2, 0.8], [0.6, 0.4])}, {"scores": floats([0.4, 0.6], [0.4, 0.6])}, signature, 2
    )
    assert found.n_agreeing == 1


def test_without_classes_rows_agree_that_have_the_same_numbers() -> None:
    found = compare({"y": floats(1, 2, np.nan)}, {"y": floats(1.0001, 2.1, np.nan)}, SIGNATURE, 3)
    assert found.n_agreeing == 2
    assert found.max_abs_difference == pytest.approx(0.1, abs=1e-6)


def test_a_number_against_none_is_infinitely_far_and_another_shape_agrees_nowhere() -> None:
    assert compare({"y": floats(1)}, {"y": floats(np.nan)}, SIGNATURE, 1).max_abs_difference == float("inf")
    assert compare({"y": floats(1)}, {"y": floats([1])}, SIGNATURE, 1).n_agreeing == 0
    assert compare({"y": floats(1)}, {"z": floats(1)}, SIGNATURE, 1).n_agreeing == 0


def test_versions_that_take_other_inputs_cannot_be_shadowed() -> None:
    wider = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(BATCH, 3)),), outputs=(Y,))
    assert same_inputs(SIGNATURE, Signature(inputs=(X,), outputs=(SCORES,)))
    assert not same_inputs(SIGNATURE, wider)


class Twice:
    """An engine that may be told to wait or to fail."""

    name = "twice 1"

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails = False

    def run(self, inputs: Any) -> Any:
        assert self.go_on.wait(60)
        if self.fails:
            raise ValueError("no")
        return {"y": 2 * inputs["x"]}

    def close(self) -> None:
        """Nothing to give back."""


def loaded(engine: Twice, version: int) -> Loaded:
    packer = Packer(SIGNATURE)
    scheduler = Scheduler(Policy(target_s=1.0, max_batch_size=8), LatencyModel(8))
    executor = Executor(engine, packer, scheduler, name="m", max_batch_size=8)
    return Loaded("m", version, SIGNATURE, executor, 1.0, {"x": 1.0}, 0.0, compute=engine.run, packer=packer)


def answered(first_row: int = 0) -> Call:
    call = Call((floats(3).tobytes(),), 1)
    call.run = Run({"y": floats(5, 6)}, 2, 2, "instance free", 0.0, 1.0)
    call.first_row = first_row
    return call


class Pair:
    """Two versions, the one a shadow of the other."""

    def __init__(self, metrics: ModelMetrics | None = None) -> None:
        self.engine = Twice()
        self.first, self.second = loaded(Twice(), 1), loaded(self.engine, 2)
        self.first.executor.metrics = metrics
        self.counts, self.mirror = ShadowCounts(), Mirror()
        self.shadow = Shadow(self.first, self.second, 1.0, self.counts, self.mirror)

    def finish(self) -> None:
        """Return when everything offered before is counted."""
        self.mirror.close()
        assert self.mirror._thread is not None
        self.mirror._thread.join(60)


def test_answers_are_compared_row_for_row() -> None:
    pair = Pair()
    pair.shadow.offer(answered(first_row=0))
    pair.shadow.offer(answered(first_row=1))
    pair.finish()
    assert (pair.counts.n_differed, pair.counts.n_agreed) == (1, 1)
    assert pair.counts.max_abs_difference == 1.0


def test_the_metrics_count_every_call_once_also_those_of_traffic_that_has_changed_since() -> None:
    metrics = ServerMetrics(new_slabs())
    pair = Pair(metrics.model("m", 1))
    pair.shadow.offer(answered(first_row=0))
    model = ServedModel("m", shadow_counts=pair.counts)
    model.share(Traffic())
    assert model.shadow_counts.n_agreed + model.shadow_counts.n_differed == 0
    pair.shadow.offer(answered(first_row=1))  # still on its way when the traffic changed
    pair.finish()
    for _ in range(2):
        model.shadow_counts.totals.tell()
        lines = metrics.exposition()[1].decode().splitlines()
        assert sorted(line for line in lines if line.startswith("modelyard_shadow_requests_total{")) == [
            'modelyard_shadow_requests_total{model="m",version="1",shadow_version="2",outcome="agreed"} 1',
            'modelyard_shadow_requests_total{model="m",version="1",shadow_version="2",outcome="differed"} 1',
        ]


def test_a_shadow_that_fails_is_counted_and_nothing_else() -> None:
    pair = Pair()
    pair.engine.fails = True
    pair.shadow.offer(answered())
    pair.finish()
    assert pair.counts.n_failed == 1
    assert pair.counts.last_error == "ValueError: no"


def test_a_slow_shadow_holds_up_nobody_and_is_left_out() -> None:
    pair = Pair()
    pair.engine.go_on.clear()
    for _ in range(3 * MAX_PENDING):
        pair.shadow.offer(answered())
    assert pair.counts.n_skipped >= 2 * MAX_PENDING - 1
    pair.engine.go_on.set()
    pair.finish()
    assert pair.counts.n_skipped + pair.counts.n_agreed + pair.counts.n_differed == 3 * MAX_PENDING


def test_nothing_is_repeated_while_calls_wait() -> None:
    pair = Pair()
    waiting = Call((floats(1).tobytes(),), 1)
    waiting.deadline_s = 1e9
    pair.first.executor.scheduler.arrive(waiting, 0.0)
    pair.shadow.offer(answered())
    assert pair.counts.n_skipped == 1


def test_a_version_that_has_left_memory_is_not_asked() -> None:
    pair = Pair()
    pair.engine.go_on.clear()
    pair.shadow.offer(answered())
    pair.shadow.offer(answered())
    pair.second.compute = None  # as the repository does before it frees
    pair.engine.go_on.set()
    pair.mirror.wait()
    pair.finish()
    assert pair.counts.n_failed == 0
    assert pair.counts.n_agreed + pair.counts.n_differed <= 1
