"""serve.toml → one frozen value: how a server runs, and how each of its models does. The only place that reads it.

`modelyard serve STORE --config serve.toml`; a flag on the command line overrides the file. docs/reference/serve-toml.md has
every key.
"""

import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from modelyard.bundle.manifest import Name
from modelyard.bundle.store import CHAMPION, Store
from modelyard.errors import ConfigError, NotInStore
from modelyard.inference.serve.models.loading import ModelSettings, Pick
from modelyard.inference.serve.models.repository import choose
from modelyard.inference.serve.models.traffic import Traffic
from modelyard.inference.serve.models.versions import Listing, VersionPolicy, read_policy, wanted
from modelyard.schema import Frozen, convert

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class ServerConfig(Frozen, frozen=True):
    """[server]. None leaves it to the flag of the same name, or to its default."""

    host: str | None = None
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    grpc_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    workers: Positive | None = None
    load: Literal["eager", "lazy"] | None = None
    """Whether models are loaded at the start, or each with its first request."""
    poll_s: Annotated[float, Meta(ge=0)] | None = None
    """Seconds between two looks at the store; 0 never looks again."""
    memory_budget_bytes: Positive | None = None
    """For the models of all workers together."""
    all_models: bool = True
    """Whether models of the store without a table in this file are served too."""
    max_body_bytes: Positive | None = None
    max_connections: Positive | None = None
    """Over all workers."""
    read_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    drain_timeout_s: Annotated[float, Meta(ge=0)] | None = None
    access_log: bool | None = None
    """To stderr."""
    access_log_file: Annotated[str, Meta(min_length=1)] | None = None
    """To this file instead."""
    access_log_sample: Share | None = None
    trace_sample: Share | None = None
    triton_metrics: bool | None = None


class RunConfig(Frozen, frozen=True):
    """[defaults]: how models run that do not say otherwise. None is derived from the bundle and what is measured."""

    target_s: Seconds | None = None
    n_instances: Positive | None = None
    n_threads: NonNegative | None = None
    """0 takes every core."""
    max_batch_size: Positive | None = None
    max_rows: Positive | None = None
    """Of one request."""
    max_queued_rows: Positive | None = None
    batch_sizes: Annotated[tuple[Positive, ...], Meta(min_length=1)] | None = None
    priority_weights: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)] | None = None
    cache_bytes: NonNegative | None = None
    pinned: bool | None = None
    memory_bytes: Positive | None = None


class ModelConfig(RunConfig, frozen=True):
    """[models.NAME]."""

    versions: str | dict[str, Positive] | tuple[Positive | str, ...] = CHAMPION
    """ "champion": that or the latest; "all"; { latest = N }; or a list of versions and tags, the first of them the default."""
    traffic: Traffic = field(default_factory=Traffic)


class ServeConfig(Frozen, frozen=True):
    """The whole of serve.toml."""

    server: ServerConfig = field(default_factory=ServerConfig)
    defaults: RunConfig = field(default_factory=RunConfig)
    models: dict[Name, ModelConfig] = field(default_factory=dict)

    def settings(self, name: str, overridden: Mapping[str, Any] | None = None) -> ModelSettings:
        """Return how the versions of a model are run; what nothing is said of, here or in `overridden`, is by default."""
        own = self.models.get(name, self.defaults)
        said: dict[str, Any] = {}
        for key in RunConfig.__struct_fields__:
            value = getattr(own, key)
            said[key] = getattr(self.defaults, key) if value is None else value
        return ModelSettings(
            **{key: value for key, value in said.items() if value is not None} | dict(overridden or {})
        )

    def policies(self) -> dict[str, VersionPolicy]:
        """Return which versions to serve of each model that has a table; raises ConfigError."""
        return {name: read_policy(model.versions, f"models.{name}.versions") for name, model in self.models.items()}

    def picks(self, store: Store, tell: Callable[[str], None]) -> tuple[Pick, ...]:
        """Return the versions to serve of a store; the first of a name is its default.

        Args:
            tell: told in one line of a tag that is not set while something else of its model is served. It is waited for:
                tags come and go while servers run.

        Raises:
            NotInStore: a table names a model, a version or tags that the store has not.
            ConfigError: there is nothing to serve.
        """
        policies = self.policies()
        if not policies and not self.server.all_models:
            raise ConfigError(
                "server.all_models = false and no [models.NAME] table: nothing to serve; add a table for each model to "
                "serve, or leave all_models out"
            )
        found: dict[str, tuple[Pick, ...]] = {}
        if self.server.all_models:
            found = {pick.name: (pick,) for pick in choose(store)}
        for name, policy in policies.items():
            found[name] = tuple(Pick(name, version) for version in _versions(store, name, policy, tell))
        return tuple(pick for picks in found.values() for pick in picks)

    def traffic(self) -> dict[str, Traffic]:
        """Return the splits and shadows to begin with."""
        return {name: model.traffic for name, model in self.models.items() if model.traffic != Traffic()}

    def check_traffic(self, store: Store, names: Collection[str]) -> None:
        """Raise NotInStore where the traffic of one of these models is to meet a version that the store has not."""
        for name, traffic in self.traffic().items():
            if name not in names:
                continue
            versions = store.versions(name)
            for version in traffic.versions:
                if version not in versions:
                    raise NotInStore(_absent(f"models.{name}.traffic", name, f"version {version}", versions))


def load_config(path: Path) -> ServeConfig:
    """Read serve.toml.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a wrong type, a value out of range, or settings that do not fit
            together.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror}); give the path of a serve.toml") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}; correct the line it names") from exc
    config = convert(data, ServeConfig, source=str(path), error=ConfigError)
    config.policies()
    for name in config.models:
        _check_sizes(config.settings(name), f"{path}: models.{name}")
    _check_sizes(config.settings(""), f"{path}: defaults")
    return config


def _versions(store: Store, name: str, policy: VersionPolicy, tell: Callable[[str], None]) -> tuple[int, ...]:
    """Return which versions of a model its table asks for."""
    listing = Listing(store.versions(name), store.tags(name))
    if not listing.versions:
        raise NotInStore(
            f"models.{name}: the store has no model {name!r}; there are {', '.join(store.names()[:20]) or 'none'}; "
            "correct the table's name, or publish the model first"
        )
    found = wanted(policy, listing)
    for ref in found.missing:
        if isinstance(ref, int):
            raise NotInStore(_absent(f"models.{name}.versions", name, f"version {ref}", listing.versions))
        if not found.versions or ref.isdecimal():
            raise NotInStore(_absent(f"models.{name}.versions", name, f"tag {ref!r}", listing.versions, listing.tags))
        tell(f"models.{name}.versions: {name} has no tag {ref!r}; what it points at is served as soon as it is set")
    return found.versions


def _absent(source: str, name: str, what: str, versions: Iterable[int], tags: Iterable[str] | None = None) -> str:
    known = f"versions {', '.join(map(str, versions))}"
    if tags is not None:
        known += f" and tags {', '.join(tags) or 'none'}"
    return f"{source}: {name} has no {what}; there are {known}; correct it in serve.toml, or publish or tag it first"


def _check_sizes(settings: ModelSettings, source: str) -> None:
    sizes = settings.batch_sizes
    if sizes is not None and list(sizes) != sorted(set(sizes)):
        raise ConfigError(
            f"{source}.batch_sizes must rise, got {list(sizes)}; write each size once, the smallest first"
        )
