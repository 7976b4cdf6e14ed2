"""What clients ask for beside their rows, and which rows of a run are a call's own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import RequestError
from modelyard.inference.serve.calls import NO_TERMS, Call, Run, Terms, read_terms, terms_of
from modelyard.inference.serve.transport.messages import Head


def test_headers_become_terms() -> None:
    headers = {
        b"modelyard-timeout-ms": b"250",
        b"modelyard-priority": b"2",
        b"modelyard-tenant": b"acme",
        b"modelyard-key": b"user 7",
        b"modelyard-explain": b"True",
        b"traceparent": b"00-1-2-01",
    }
    assert read_terms(headers) == Terms(
        timeout_s=0.25, priority=2, tenant="acme", key=b"user 7", explain=True, traceparent=b"00-1-2-01"
    )


def test_without_any_there_is_nothing_to_make() -> None:
    assert read_terms({b"host": b"x", b"content-length": b"3"}) is NO_TERMS


def test_terms_are_read_once_per_head() -> None:
    head = Head("POST", "/", headers={b"modelyard-tenant": b"acme"})
    assert terms_of(head) is terms_of(head)


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        (b"modelyard-timeout-ms", b"0", "Modelyard-Timeout-Ms must be a number above 0, up to 86400000"),
        (b"modelyard-timeout-ms", b"-1", "Modelyard-Timeout-Ms"),
        (b"modelyard-timeout-ms", b"nan", "Modelyard-Timeout-Ms"),
        (b"modelyard-timeout-ms", b"inf", "Modelyard-Timeout-Ms"),
        (b"modelyard-timeout-ms", b"", "Modelyard-Timeout-Ms"),
        (b"modelyard-timeout-ms", b"1s", "got '1s'"),
        (b"modelyard-priority", b"-1", "Modelyard-Priority must be a number from 0 to 1000"),
        (b"modelyard-priority", b"1001", "Modelyard-Priority"),
        (b"modelyard-priority", b"high", "Modelyard-Priority"),
        (b"modelyard-explain", b"perhaps", "Modelyard-Explain must be true or false, got 'perhaps'"),
    ],
)
def test_what_a_header_cannot_mean_is_refused_by_name(header: bytes, value: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_terms({header: value})


@given(
    headers=st.dictionaries(
        st.sampled_from(
            [
                b"modelyard-timeout-ms",
                b"modelyard-priority",
                b"modelyard-tenant",
                b"modelyard-key",
                b"modelyard-explain",
            ]
        ),
        st.binary(max_size=200),
    )
)
def test_any_headers_are_read_or_refused(headers: dict[bytes, bytes]) -> None:
    try:
        terms = read_terms(headers)
    except RequestError as exc:
        reason = str(exc)
    else:
        assert terms.timeout_s is None or 0 < terms.timeout_s <= 86_400
        assert 0 <= terms.priority <= 1000
        assert len(terms.tenant) <= 128
        return
    assert 0 < len(reason) < 200


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_the_outputs_of_a_call_are_its_own_rows_and_all_rows_are_somebodys(sizes: list[int]) -> None:
    n_rows = sum(sizes)
    outputs: dict[str, Any] = {"a": np.arange(n_rows), "b": np.arange(n_rows * 2).reshape(n_rows, 2)}
    run = Run(outputs, n_rows, len(sizes), "instance free", 1.0, 1.5)
    assert run.compute_s == 0.5
    first, seen = 0, []
    for size in sizes:
        call = Call((), size)
        call.run, call.first_row = run, first
        first += size
        own = call.outputs()
        assert own["a"].tolist() == own["b"][:, 0].tolist() or (own["b"][:, 0] // 2).tolist() == own["a"].tolist()
        seen += own["a"].tolist()
    assert seen == list(range(n_rows))


def test_an_output_without_a_batch_axis_is_given_whole() -> None:
    call = Call((), 1)
    call.run = Run({"a": np.zeros((256, 256))}, 1, 1, "instance free", 0.0, 0.0)
    assert call.output("a").shape == (256, 256)


def test_a_call_of_no_version_can_be_cancelled() -> None:
    Call((), 1).cancel()
