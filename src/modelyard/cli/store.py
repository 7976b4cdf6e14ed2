"""`modelyard store`: what a store holds, and moving its versions and tags."""

import json
from pathlib import Path
from typing import Any

import click

from modelyard.cli.options import allow_domain_option, as_json_option
from modelyard.cli.terminal import printable


@click.group()
def store() -> None:
    """List, publish and tag the versions in a store.

    STORE is a folder or a URL that fsspec knows, such as s3://bucket/models.
    """


@store.command("list")
@click.argument("store_url", metavar="STORE")
@as_json_option
def list_(store_url: str, as_json: bool) -> None:
    """Print each model with its versions and tags.

    \b
    Examples:
      modelyard store list store
      modelyard store list s3://bucket/models --json
    """
    from modelyard.bundle.store import LocalStore, open_store
    from modelyard.errors import NotInStore

    opened = open_store(store_url)
    if isinstance(opened, LocalStore) and not opened.root.is_dir():
        raise NotInStore(f"{store_url}: no such store folder; publish a bundle to it and it will be made")
    models = [
        {"name": name, "versions": list(opened.versions(name)), "tags": opened.tags(name)} for name in opened.names()
    ]
    if as_json:
        click.echo(json.dumps({"store": store_url, "models": models}, indent=2))
        return
    if not models:
        click.echo(f"{store_url}: no models yet", err=True)
    for model in models:
        click.echo(_line(model))


@store.command()
@click.argument("store_url", metavar="STORE")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--name", help="Publish under this name rather than the one in the manifest.")
@allow_domain_option
@as_json_option
def publish(store_url: str, bundle: Path, name: str | None, allow_domains: tuple[str, ...], as_json: bool) -> None:
    """Verify a bundle and copy it into a store as its next version.

    \b
    Examples:
      modelyard store publish store out/flights
      modelyard store publish s3://bucket/models out/flights --name flights-eu
    """
    from modelyard.bundle.format import read_manifest
    from modelyard.bundle.store import open_store

    name = name or read_manifest(bundle).name
    version = open_store(store_url).publish(bundle, name, allow_domains=allow_domains)
    if as_json:
        click.echo(json.dumps({"store": store_url, "name": name, "version": version}, indent=2))
    else:
        click.echo(f"{name} version {version}")


@store.command()
@click.argument("store_url", metavar="STORE")
@click.argument("name")
@click.argument("tag")
@click.argument("version")
@click.option("--reason", help="Why, for those who read the history.")
@as_json_option
def tag(store_url: str, name: str, tag: str, version: str, reason: str | None, as_json: bool) -> None:
    """Point a tag at a version, or at what another tag means now.

    \b
    Examples:
      modelyard store tag store flights champion 3 --reason "beats 2 on June"
      modelyard store tag store flights champion challenger
    """
    from modelyard.bundle.store import open_store
    from modelyard.schema import to_builtins

    opened = open_store(store_url)
    record = opened.tag(name, tag, opened.resolve(name, version), reason=reason)
    if as_json:
        click.echo(json.dumps({"name": name, "tag": tag} | to_builtins(record), indent=2))
    else:
        click.echo(f"{name} {tag} is version {record.version}")


@store.command()
@click.argument("store_url", metavar="STORE")
@click.argument("name")
@click.argument("tag")
@as_json_option
def history(store_url: str, name: str, tag: str, as_json: bool) -> None:
    """Print every move of a tag, oldest first.

    \b
    Examples:
      modelyard store history store flights champion
    """
    from modelyard.bundle.store import open_store
    from modelyard.errors import NotInStore
    from modelyard.schema import to_builtins

    opened = open_store(store_url)
    records = opened.tag_history(name, tag)
    if not records:
        raise NotInStore(
            f"{store_url}: {name} has no tag {tag!r}; there are {', '.join(opened.tags(name)) or 'none'}; set it with store tag"
        )
    if as_json:
        click.echo(json.dumps({"name": name, "tag": tag, "records": to_builtins(records)}, indent=2))
        return
    for record in records:
        where = "removed" if record.version is None else f"version {record.version}"
        click.echo(printable("  ".join((record.moved_at, where, record.by, record.reason or "")).rstrip()))


def _line(model: dict[str, Any]) -> str:
    tags = ", ".join(f"{tag} {version}" for tag, version in model["tags"].items())
    versions = ", ".join(map(str, model["versions"]))
    return f"{model['name']}  versions {versions}" + (f"  ({tags})" if tags else "")
