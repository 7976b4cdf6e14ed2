"""Which versions a policy asks for, and which of them answers by default."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import ConfigError
from modelyard.inference.serve.models.versions import Listing, VersionPolicy, read_policy, wanted

FIVE = Listing((1, 2, 3, 4, 5), {"champion": 2, "challenger": 4, "old": 1})


def served(policy: VersionPolicy, listing: Listing = FIVE) -> tuple[int, ...]:
    return wanted(policy, listing).versions


def test_the_champion_is_served_else_the_latest() -> None:
    assert served(VersionPolicy()) == (2,)
    assert served(VersionPolicy(), Listing((1, 2, 3))) == (3,)


def test_the_latest_n_are_served_and_the_champion_among_them_answers() -> None:
    assert served(VersionPolicy(latest=2)) == (5, 4)
    assert served(VersionPolicy(latest=4)) == (2, 5, 4, 3)
    assert served(VersionPolicy(latest=9)) == (2, 5, 4, 3, 1)


def test_all_are_served_and_the_champion_answers() -> None:
    assert served(VersionPolicy(all=True)) == (2, 5, 4, 3, 1)


def test_of_a_list_of_versions_and_tags_the_first_answers() -> None:
    assert served(VersionPolicy(refs=("challenger", 1, "champion", 4))) == (4, 1, 2)
    assert served(VersionPolicy(refs=("", 5))) == (2, 5)


def test_what_a_list_names_and_the_store_has_not_is_told() -> None:
    found = wanted(VersionPolicy(refs=(9, "canary", 3)), FIVE)
    assert (found.versions, found.missing) == ((3,), (9, "canary"))


def test_labels_are_the_tags_of_versions_that_are_served() -> None:
    assert wanted(VersionPolicy(refs=("challenger", 1)), FIVE).labels == {"challenger": 4, "old": 1}


def test_a_tag_on_a_version_that_has_gone_means_nothing() -> None:
    assert wanted(VersionPolicy(), Listing((3, 4), {"champion": 2})).versions == (4,)


policies = st.one_of(
    st.builds(VersionPolicy, latest=st.integers(0, 6)),
    st.builds(VersionPolicy, all=st.just(True)),
    st.builds(
        VersionPolicy,
        refs=st.lists(st.one_of(st.integers(1, 7), st.sampled_from(["champion", "x", ""])), max_size=4).map(tuple),
    ),
)
listings = st.sets(st.integers(1, 6)).flatmap(
    lambda versions: st.builds(
        Listing,
        st.just(tuple(sorted(versions))),
        st.dictionaries(st.sampled_from(["champion", "x"]), st.integers(1, 7)),
    )
)


@given(policies, listings)
def test_only_versions_of_the_store_are_wanted_and_each_once(policy: VersionPolicy, listing: Listing) -> None:
    found = wanted(policy, listing)
    assert set(found.versions) <= set(listing.versions)
    assert len(set(found.versions)) == len(found.versions)
    assert set(found.labels.values()) <= set(found.versions)
    if listing.versions and not policy.refs:
        assert found.versions


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("champion", VersionPolicy()),
        ("all", VersionPolicy(all=True)),
        ({"latest": 3}, VersionPolicy(latest=3)),
        ((1, "challenger"), VersionPolicy(refs=(1, "challenger"))),
    ],
)
def test_a_policy_is_read_as_serve_toml_writes_it(value: object, policy: VersionPolicy) -> None:
    assert read_policy(value, "versions") == policy  # type: ignore[arg-type]  # all kinds in one list


@pytest.mark.parametrize("value", ["latest", {"latest": 0}, {"newest": 1}, ()])
def test_another_policy_is_refused_and_the_message_says_which_there_are(value: object) -> None:
    with pytest.raises(ConfigError, match=r'models\.m\.versions must be "champion", "all", \{ latest = N \}'):
        read_policy(value, "models.m.versions")  # type: ignore[arg-type]  # wrong on purpose
