"""Equal calls get equal answers without computing; the cache stays within its bytes."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from modelyard.inference.serve.calls import Call, Run
from modelyard.inference.serve.models.cache import ResponseCache, key_of

ROW = np.arange(4, dtype=np.float32)


def call(*inputs: Any, n_rows: int = 1, bucket: Any = None) -> Call:
    return Call(inputs or (ROW.tobytes(),), n_rows, bucket)


def computed(made: Call, scores: Any, first_row: int = 0, n_rows: int | None = None) -> Call:
    outputs = {"scores": np.asarray(scores, dtype=np.float32)}
    made.run = Run(outputs, n_rows or len(scores), 1, "instance free", 0.0, 1.0)
    made.first_row = first_row
    return made


def test_an_equal_call_gets_the_rows_that_were_computed_for_the_first() -> None:
    cache = ResponseCache(10_000)
    assert cache.get(call(), 5.0) is None
    cache.put(computed(call(), [[1.0], [2.0], [3.0]], first_row=1))
    again = call(memoryview(b"head" + ROW.tobytes())[4:])
    again.run = cache.get(again, 5.0)
    assert again.run is not None
    assert again.output("scores").tolist() == [[2.0]]
    assert (again.run.reason, again.run.compute_s, again.run.n_calls) == ("cached", 0.0, 1)
    assert (cache.n_hits, cache.n_misses) == (1, 1)


def test_what_is_kept_is_nobody_elses() -> None:
    cache = ResponseCache(10_000)
    batch = computed(call(), [[1.0], [2.0]], n_rows=2)
    cache.put(batch)
    assert batch.run is not None
    batch.run.outputs["scores"][:] = 9.0
    found = cache.get(call(), 0.0)
    assert found is not None
    assert found.outputs["scores"].tolist() == [[1.0]]
    assert not found.outputs["scores"].flags.writeable


@given(st.lists(st.lists(st.text(max_size=3), max_size=3).map(tuple), min_size=2, max_size=2, unique=True))
def test_different_texts_are_different_calls(texts: list[tuple[str, ...]]) -> None:
    one, other = (key_of(call(list(text), n_rows=2)) for text in texts)
    assert one != other or one is None


def test_rows_and_shapes_are_part_of_what_is_equal() -> None:
    keys = {
        key_of(call(ROW.tobytes(), n_rows=1, bucket=((4,),))),
        key_of(call(ROW.tobytes(), n_rows=2, bucket=((2,),))),
        key_of(call(ROW.tobytes(), n_rows=4, bucket=((1,),))),
        key_of(call(ROW.tobytes(), n_rows=1, bucket=((2, 2),))),
    }
    assert len(keys) == 4


def test_text_that_is_no_unicode_is_not_kept() -> None:
    cache = ResponseCache(10_000)
    odd = computed(call(["\ud800"]), [[1.0]])
    cache.put(odd)
    assert cache.get(odd, 0.0) is None
    assert len(cache) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=200))
def test_the_least_recently_used_go_first_and_the_bytes_are_counted(steps: list[tuple[int, bool]]) -> None:
    """Against the simplest thing that could be right: a list in order of use."""
    cache = ResponseCache(8 * 1000)
    order: list[int] = []
    for number, puts in steps:
        made = call(bytes([number]) * 300)
        if puts:
            cache.put(computed(made, [[float(number)] * 50]))
            if number not in order:
                order.append(number)
        else:
            found = cache.get(made, 0.0)
            assert (found is not None) == (number in order)
            if found is not None:
                assert found.outputs["scores"][0, 0] == number
                order.remove(number)
                order.append(number)
        order = order[len(order) - len(cache) :]
        assert cache.size_bytes <= cache.max_bytes
    assert len(cache) >= min(8, len(order))


def test_an_answer_larger_than_its_share_is_not_kept() -> None:
    cache = ResponseCache(10_000)
    cache.put(computed(call(), [[0.0] * 1000]))
    assert len(cache) == 0
    cache.put(computed(call(), [[0.0]]))
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)
