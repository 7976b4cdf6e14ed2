"""serve.toml: what it says reaches the models, mistakes are named, and its reference says what the code does."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from modelyard.bundle.format import write_bundle
from modelyard.bundle.store import LocalStore
from modelyard.cli.serve import serve
from modelyard.errors import ConfigError, NotInStore
from modelyard.inference.serve.models.config import ModelConfig, RunConfig, ServeConfig, ServerConfig, load_config
from modelyard.inference.serve.models.loading import ModelSettings, Pick
from modelyard.inference.serve.models.traffic import Traffic
from modelyard.inference.serve.models.versions import VersionPolicy
from modelyard.schema import to_builtins
from modelyard.testing.bundles import late_content

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "serve-toml.md"


def config_of(path: Path, text: str) -> ServeConfig:
    file = path / "serve.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, "")
    assert config == ServeConfig()
    assert config.settings("any") == ModelSettings()
    assert (config.policies(), config.traffic()) == ({}, {})


def test_a_model_has_its_own_settings_before_the_defaults(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        """
        [defaults]
        target_s = 0.5
        cache_bytes = 100
        pinned = true

        [models.a]
        target_s = 0.25
        pinned = false
        batch_sizes = [1, 8]
        """,
    )
    a, other = config.settings("a"), config.settings("other")
    assert (a.target_s, a.cache_bytes, a.pinned, a.batch_sizes) == (0.25, 100, False, (1, 8))
    assert (other.target_s, other.cache_bytes, other.pinned) == (0.5, 100, True)
    assert config.settings("a", {"target_s": 0.75}).target_s == 0.75


def test_versions_and_traffic_are_read_per_model(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        """
        [models.a]
        versions = "all"
        [models.b]
        versions = { latest = 2 }
        [models.c]
        versions = [3, "challenger"]
        traffic = { split = { 3 = 0.9, 4 = 0.1 }, shadow = 5 }
        [models."d.1"]
        """,
    )
    assert config.policies() == {
        "a": VersionPolicy(all=True),
        "b": VersionPolicy(latest=2),
        "c": VersionPolicy(refs=(3, "challenger")),
        "d.1": VersionPolicy(),
    }
    assert config.traffic() == {"c": Traffic(split={"3": 0.9, "4": 0.1}, shadow=5)}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[sever]", "unknown key 'sever', did you mean 'server'"),
        ("[server]\nload = 'later'", "server.load: must be one of eager, lazy, got 'later'"),
        ("[server]\nworkers = 0", "server.workers: must be a whole number of at least 1, got 0"),
        ("[defaults]\nversions = 'all'", "unknown key 'versions'"),
        ("[models.a]\nmax_batch = 4", "unknown key 'max_batch', did you mean 'max_batch_size'"),
        ("[models.a]\nversions = 'newest'", 'models.a.versions must be "champion", "all"'),
        ("[models.a]\nbatch_sizes = [8, 1]", "models.a.batch_sizes must rise, got \\[8, 1\\]"),
        ("[models.a.traffic]\nsplit = { 1 = 0.0 }", "finite weight above 0"),
        (
            "[models.a.traffic]\nsplit = { 1 = 0.5, champion = 1.0 }",
            r"serve\.toml: models\.a\.traffic\.split: the key must be text .*, got 'champion'; correct",
        ),
        ("[models.b]\n[models.a.traffic]\nshadow_share = 2.0", r"models\.a\.traffic\.shadow_share: .* 1\.0, got 2\.0"),
        ("[models.'a/b']", r"models: the key must be text .*, got 'a/b'"),
        ("[server]\naccess_log_sample = 2", r"server\.access_log_sample: must be a number of at most 1"),
        ("[server", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config_of(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_config(tmp_path / "nowhere.toml")


# What a store has of it.


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Versions 1 and 2 of "late", version 1 of "early"."""
    store = LocalStore(tmp_path / "store")
    for name, weight in (("late", 0.25), ("late", 0.5), ("early", 0.25)):
        bundle = tmp_path / f"{name}-{weight}"
        write_bundle(bundle, late_content(name=name, weight=weight))
        store.publish(bundle)
    return store


def test_a_table_says_which_versions_are_served_and_which_first(tmp_path: Path, store: LocalStore) -> None:
    told: list[str] = []
    config = config_of(tmp_path, "[models.late]\nversions = [1, 2]")
    assert config.picks(store, told.append) == (Pick("early", 1), Pick("late", 1), Pick("late", 2))
    config = config_of(tmp_path, "[server]\nall_models = false\n[models.late]")
    assert config.picks(store, told.append) == (Pick("late", 2),)
    assert not told


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[models.late]\nversions = [9]", r"models\.late\.versions: late has no version 9; there are versions 1, 2;"),
        ("[models.late]\nversions = [1, 9]", r"models\.late\.versions: late has no version 9;"),
        ("[models.late]\nversions = ['1']", r"late has no tag '1'; there are versions 1, 2 and tags none;"),
        ("[models.late]\nversions = ['canary']", r"late has no tag 'canary'; there are versions 1, 2 and tags none;"),
        ("[models.lat]", r"models\.lat: the store has no model 'lat'; there are early, late; correct the table's name"),
        ("[server]\nall_models = false\n[models.lat]", r"models\.lat: the store has no model 'lat'"),
    ],
)
def test_a_table_for_what_the_store_has_not_is_named(
    tmp_path: Path, store: LocalStore, text: str, complaint: str
) -> None:
    with pytest.raises(NotInStore, match=complaint):
        config_of(tmp_path, text).picks(store, print)


def test_a_tag_that_is_not_set_is_told_where_something_else_is_served(tmp_path: Path, store: LocalStore) -> None:
    told: list[str] = []
    config = config_of(tmp_path, "[server]\nall_models = false\n[models.late]\nversions = [1, 'canary']")
    assert config.picks(store, told.append) == (Pick("late", 1),)
    assert [line.partition(";")[0] for line in told] == ["models.late.versions: late has no tag 'canary'"]
    store.tag("late", "canary", 2)
    assert config.picks(store, told.append) == (Pick("late", 1), Pick("late", 2))


def test_a_file_that_serves_nothing_is_an_error(tmp_path: Path, store: LocalStore) -> None:
    with pytest.raises(ConfigError, match=r"all_models = false and no \[models\.NAME\] table: nothing to serve; add"):
        config_of(tmp_path, "[server]\nall_models = false").picks(store, print)


@pytest.mark.parametrize("traffic", ["split = { 1 = 0.9, 9 = 0.1 }", "shadow = 9"])
def test_traffic_to_a_version_that_is_not_there_is_named(tmp_path: Path, store: LocalStore, traffic: str) -> None:
    config = config_of(tmp_path, f"[models.late.traffic]\n{traffic}")
    with pytest.raises(NotInStore, match=r"models\.late\.traffic: late has no version 9; there are versions 1, 2;"):
        config.check_traffic(store, {"early", "late"})
    config.check_traffic(store, {"early"})  # which is all that is served


# The reference.


def sections() -> dict[str, str]:
    """Heading → the text below it, up to the next heading."""
    parts = re.split(r"^#{2,3} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def default_text(field: structs.FieldInfo) -> str:
    """The default as TOML, or "–" for none."""
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    value = to_builtins(value)
    return "–" if value is None else json.dumps(value)


@pytest.mark.parametrize(
    ("title", "struct", "apart"),
    [
        ("[server]", ServerConfig, ()),
        ("[models.NAME]", ModelConfig, ("traffic",)),
        ("[models.NAME.traffic]", Traffic, ()),
    ],
)
def test_the_reference_names_every_key_with_its_default(title: str, struct: Any, apart: tuple[str, ...]) -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `?([^|`]+)`? \|", sections()[title], re.MULTILINE)
    assert dict(rows) == {
        one.encode_name: default_text(one) for one in structs.fields(struct) if one.encode_name not in apart
    }


def test_the_defaults_have_the_keys_of_a_model_but_two() -> None:
    assert "`versions` and `traffic`" in sections()["[defaults]"]
    assert set(RunConfig.__struct_fields__) == set(ModelConfig.__struct_fields__) - {"versions", "traffic"}


def test_every_setting_of_a_model_can_be_given() -> None:
    assert set(RunConfig.__struct_fields__) == set(ModelSettings.__dataclass_fields__)


def test_the_server_has_the_options_of_the_command_line() -> None:
    """But for what says which models are served, what is of one model, and consent."""
    elsewhere = {"store", "config_path", "models", "as_json", "allow_domains"} | set(RunConfig.__struct_fields__)
    assert set(ServerConfig.__struct_fields__) - {"all_models"} == {one.name for one in serve.params} - elsewhere


def test_the_example_is_read_and_has_every_table(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```ini\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert tomllib.loads(example).keys() == set(ServeConfig.__struct_fields__)
    config = config_of(tmp_path, example)
    assert config.settings("digits").target_s == 0.05
    assert config.traffic()["flights"].versions == (3, 4, 5)
