"""Who leaves memory for whom."""

from hypothesis import given
from hypothesis import strategies as st

from modelyard.inference.serve.models.residency import Key, Resident, can_ever_fit, evictions


def resident(name: str, memory_bytes: int, used_s: float, **flags: bool) -> Resident:
    return Resident((name, 1), memory_bytes, used_s, **flags)


OLD, MIDDLE, NEW = resident("old", 40, 1.0), resident("middle", 40, 2.0), resident("new", 20, 3.0)


def test_nobody_leaves_while_there_is_room() -> None:
    assert evictions([OLD, MIDDLE, NEW], 0, 100) == ()


def test_the_least_recently_used_leave_first_and_no_more_than_necessary() -> None:
    assert evictions([NEW, OLD, MIDDLE], 30, 100) == (("old", 1),)
    assert evictions([NEW, OLD, MIDDLE], 70, 100) == (("old", 1), ("middle", 1))


def test_pinned_and_busy_ones_stay() -> None:
    pinned, busy = resident("old", 40, 1.0, pinned=True), resident("middle", 40, 2.0, busy=True)
    assert evictions([pinned, busy, NEW], 20, 100) == (("new", 1),)
    assert evictions([pinned, busy, NEW], 30, 100) is None


def test_what_does_not_fit_beside_the_pinned_never_will() -> None:
    pinned, busy = resident("old", 40, 1.0, pinned=True), resident("middle", 40, 2.0, busy=True)
    assert can_ever_fit([pinned, busy, NEW], 60, 100)
    assert not can_ever_fit([pinned, busy, NEW], 61, 100)


residents = st.lists(
    st.builds(
        Resident,
        st.tuples(st.text(max_size=2), st.integers(1, 3)),
        st.integers(0, 50),
        st.sampled_from([0.0, 1.0, 2.0]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.key,
)


@given(residents, st.integers(0, 60), st.integers(1, 200))
def test_after_evictions_the_rest_and_the_newcomer_fit(them: list[Resident], needed: int, budget: int) -> None:
    leaving = evictions(them, needed, budget)
    free_to_go = [one for one in them if not one.pinned and not one.busy]
    least = sum(one.memory_bytes for one in them if one not in free_to_go) + needed
    if leaving is None:
        assert least > budget
        return
    by_key: dict[Key, Resident] = {one.key: one for one in them}
    assert all(by_key[key] in free_to_go for key in leaving)
    staying = sum(one.memory_bytes for one in them if one.key not in leaving)
    assert staying + needed <= budget
    if leaving:  # the last one to be chosen was needed too
        assert staying + by_key[leaving[-1]].memory_bytes + needed > budget


@given(st.permutations([OLD, MIDDLE, NEW, resident("a", 10, 1.0)]), st.integers(0, 100))
def test_the_order_in_which_they_are_given_does_not_matter(them: list[Resident], needed: int) -> None:
    assert evictions(them, needed, 110) == evictions(sorted(them, key=lambda one: one.key), needed, 110)
