"""What loading a version gives, and that freeing it gives its memory back to the system."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelyard.bundle.cases import CaseSet
from modelyard.bundle.format import BundleContent, write_bundle
from modelyard.bundle.manifest import BATCH, Signature, TensorSpec
from modelyard.bundle.profile import Latency, Profile, add_profile, fingerprint
from modelyard.bundle.reference import summarise
from modelyard.bundle.store import LocalStore
from modelyard.errors import DigestMismatch, NotInStore
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine
from modelyard.inference.serve.models.loading import (
    ModelSettings,
    Pick,
    Turns,
    load,
    load_quietly,
    loader_pool,
    resident_bytes,
)
from modelyard.testing.bundles import LINEAGE, late_bundle

MIB = 2**20
PATIENCE_S = 60.0


def wide_content(n_mib: int) -> BundleContent:
    """A model that is one matrix of that size."""
    n_columns = n_mib * MIB // 4 // 64
    weights = np.random.default_rng(1).normal(size=(64, n_columns)).astype(np.float32)
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(BATCH, 64)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(BATCH,)),),
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["wide"]),
            helper.make_node("ReduceMean", ["wide"], ["y"], axes=[1], keepdims=0),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    rows = {"x": np.ones((2, 64), dtype=np.float32)}
    answers = OnnxRuntimeEngine(model).run(rows)
    return BundleContent(
        name="wide",
        task="other",
        signature=signature,
        model=model,
        cases=CaseSet(rows, answers),
        cases_origin="generated",
        reference=summarise(rows, answers, signature),
        lineage=LINEAGE,
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    late_bundle(tmp_path / "late")
    store.publish(tmp_path / "late")
    return store


def test_a_loaded_version_knows_what_it_is_and_how_it_runs(store: LocalStore) -> None:
    loaded = load(store, Pick("late", 1), ModelSettings(cache_bytes=1000, pinned=True, target_s=0.25))
    try:
        assert (loaded.name, loaded.version, loaded.pinned, loaded.target_s) == ("late", 1, True, 0.25)
        assert len(loaded.digest) == 64
        assert loaded.memory_bytes > 0
        assert loaded.load_s > 0
        assert loaded.example == {"delay": 0.0, "origin": "EWR"}
        assert loaded.cache is not None
        assert not loaded.busy
        assert loaded.executor.scheduler.policy.max_batch_size == 64
    finally:
        loaded.close()
    assert loaded.compute is None


def test_allowed_sizes_and_priorities_reach_the_scheduler(store: LocalStore) -> None:
    settings = ModelSettings(batch_sizes=(1, 4, 16), priority_weights=(4.0, 1.0), n_instances=2, max_queued_rows=10)
    loaded = load(store, Pick("late", 1), settings)
    policy = loaded.executor.scheduler.policy
    assert (policy.allowed_sizes, policy.max_batch_size) == ((1, 4, 16), 16)
    assert (policy.priority_weights, policy.n_instances, policy.max_queued_rows) == ((4.0, 1.0), 2, 10)
    loaded.close()


def test_what_was_measured_on_this_hardware_is_where_learning_starts(store: LocalStore) -> None:
    import onnxruntime

    folder = store.fetch("late", 1)
    here = fingerprint(f"onnxruntime {onnxruntime.__version__}")
    latencies = tuple(
        Latency(batch_size=size, n_threads=threads, n_runs=9, p50_s=p50_s, p99_s=p50_s, mean_s=p50_s)
        for size, threads, p50_s in ((1, 1, 0.25), (64, 1, 0.5), (1, 2, 9.0))
    )
    add_profile(folder / "profile.json", Profile(hardware=here, measured_at="2026-01-01", latencies=latencies))
    loaded = load(store, Pick("late", 1))
    latency = loaded.executor.scheduler.latency_of()
    assert latency.high_s(1) == pytest.approx(0.25)
    assert latency.high_s(64) == pytest.approx(0.5)
    loaded.close()


def test_a_version_that_must_not_be_served_is_not_loaded(store: LocalStore) -> None:
    with pytest.raises(NotInStore):
        load(store, Pick("late", 2))
    (store.root / "late" / "1" / "model.onnx").write_bytes(
        b"x" * (store.root / "late" / "1" / "model.onnx").stat().st_size
    )
    with pytest.raises(DigestMismatch):
        load(store, Pick("late", 1))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_comes_back_to_the_system_however_often_a_model_is_loaded(tmp_path: Path) -> None:
    """20 loads of a model of 50 MiB; what the first one leaves behind is the runtime itself."""
    store = LocalStore(tmp_path / "store")
    write_bundle(tmp_path / "wide", wide_content(50))
    store.publish(tmp_path / "wide")
    seen: list[int] = []
    with loader_pool() as pool:

        def cycle() -> Any:
            loaded = pool.submit(load, store, Pick("wide", 1)).result()
            during = resident_bytes()
            assert loaded.memory_bytes >= 50 * MIB
            pool.submit(loaded.close).result()
            return during

        cycle()
        gc.collect()
        before = resident_bytes()
        for _ in range(20):
            assert cycle() - before > 40 * MIB  # it was there
            seen.append(resident_bytes())
    assert max(seen[-5:]) - before < 10 * MIB, [round(one / MIB) for one in seen]


def test_processes_load_in_turns_and_one_that_dies_gives_its_turn_back() -> None:
    turns = Turns()
    inside, outside = os.pipe()
    child = os.fork()
    if not child:
        with turns:
            os.write(outside, b"mine")
            time.sleep(PATIENCE_S)
        os._exit(0)
    assert os.read(inside, 4) == b"mine"
    taken = threading.Event()

    def take() -> None:
        with turns:
            taken.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert not taken.wait(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert taken.wait(PATIENCE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_a_quiet_load_leaves_the_processor_to_everybody_else() -> None:
    def policy(pick: Pick) -> Any:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), pick

    pick = Pick("m", 1)
    found: Any = load_quietly(policy, Turns(), pick)
    assert found == (19, pick)
    assert policy(pick)[0] < 19
