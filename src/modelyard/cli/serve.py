"""`modelyard serve`: a store's models over HTTP."""

from functools import partial
from typing import TYPE_CHECKING

import click

from modelyard.cli.options import allow_domain_option

if TYPE_CHECKING:
    from pathlib import Path

    from modelyard.inference.serve.repository import Loaded

_LONGEST_EXAMPLE = 1000


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME[=VERSION|TAG]",
    help="Serve only this model; repeat for more. Default: every model's champion, else its latest version.",
)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Threads one run of a model may use; 0 is one per core.",
)
@click.option(
    "--max-body-bytes", default=64 * 2**20, show_default=True, type=click.IntRange(1), help="Largest request body."
)
@click.option(
    "--read-timeout",
    "read_timeout_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds a client may take to send one request.",
)
@click.option(
    "--drain-timeout",
    "drain_timeout_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="S",
    help="Seconds after SIGTERM to finish what is in flight.",
)
@allow_domain_option
@click.option("--access-log", is_flag=True, help="Write one JSON line per request to stderr.")
@click.option("--json", "as_json", is_flag=True, help='Print {"url": …, "models": …} to stdout when ready.')
def serve(
    store: str,
    host: str,
    port: int,
    models: tuple[str, ...],
    threads: int,
    max_body_bytes: int,
    read_timeout_s: float,
    drain_timeout_s: float,
    allow_domains: tuple[str, ...],
    access_log: bool,
    as_json: bool,
) -> None:
    """Serve the models in STORE over HTTP: rows with named columns, and the Open Inference Protocol.

    A model is verified and passes its golden cases before it reports ready. One that does not is reported and left out; the
    others serve. SIGTERM stops accepting, answers what is in flight and ends.

    \b
    Examples:
      modelyard serve store
      modelyard serve store --port 0 --model flights=champion --model digits=3
      curl localhost:8000/v1/models/flights:predict -d '{"instances": [{"dep_hour": 7, "carrier": "UA"}]}'
      curl localhost:8000/v2/models/flights
    """
    import json
    import os
    import sys
    from pathlib import Path

    import uvloop

    from modelyard.bundle.format import MANIFEST
    from modelyard.bundle.store import open_store
    from modelyard.errors import ConfigError, NotInStore
    from modelyard.inference.serve.http import HttpLimits
    from modelyard.inference.serve.repository import Entry, Repository, choose, load
    from modelyard.inference.serve.server import ServerSettings, bind
    from modelyard.inference.serve.server import serve as serve_on

    if "://" not in store and not Path(store).is_dir():
        raise NotInStore(f"{store}: no such store folder; correct the path, or publish a bundle to it first")
    if (Path(store) / MANIFEST).is_file():
        raise ConfigError(f"{store}: is a bundle; give the folder of the store it lies in, STORE/NAME/VERSION")
    opened = open_store(store)
    picks = choose(opened, models)
    settings = ServerSettings(
        host=host,
        port=port,
        drain_timeout_s=drain_timeout_s,
        access_log=access_log,
        limits=HttpLimits(max_body_bytes=max_body_bytes, read_timeout_s=read_timeout_s),
    )
    bound = bind(settings)
    repository = Repository(picks)
    entries: list[Entry] = []

    def on_change(entry: Entry) -> None:
        entries.append(entry)
        if entry.loaded is not None:
            click.echo(f"{entry.name} version {entry.version}: loaded in {entry.loaded.load_s:.3f} s", err=True)
        else:
            click.echo(f"{entry.name} version {entry.version}: {entry.state}: {entry.reason}", err=True)

    def on_ready() -> None:
        click.echo(f"ready on {bound.url}", err=True)
        for entry in entries:
            if entry.loaded is not None:
                bundle = Path(store, entry.name, str(entry.version))
                click.echo(f"  {_example(bound.url, entry.loaded, bundle)}", err=True)
        if as_json:
            served = [{"name": e.name, "version": e.version, "state": e.state, "reason": e.reason} for e in entries]
            click.echo(json.dumps({"url": bound.url, "models": served}))
            sys.stdout.flush()

    load_one = partial(load, opened, n_threads=threads, allow_domains=allow_domains)
    cut_off = uvloop.run(serve_on(bound, repository, load_one, settings, on_change=on_change, on_ready=on_ready))
    if cut_off:
        click.echo(f"ended with {cut_off} connections unanswered; give it longer with --drain-timeout", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if cut_off else 0)  # a thread may be deep in a run or a load that nobody waits for any more


def _example(url: str, model: "Loaded", bundle: "Path") -> str:
    """Return a command that asks `model` for a prediction of a golden case.

    That is a curl command. A row too large for a line, such as an image, is read by Python from the cases in `bundle`; where
    that is no folder here, or the row is not one plain array, the command asks what the model takes.
    """
    import json
    import shlex
    import sys

    from modelyard.bundle.format import CASES

    route = f"{url}/v1/models/{model.name}:predict"
    body = json.dumps({"instances": [model.example]}, ensure_ascii=False)
    if len(body) <= _LONGEST_EXAMPLE:
        return f"curl {route} -d {shlex.quote(body)}"
    cases = bundle.resolve() / CASES
    (spec, *others) = model.signature.inputs
    if others or not spec.batched or spec.datatype in ("BYTES", "BF16") or "null" in body or not cases.is_file():
        return f"curl {url}/v2/models/{model.name}"
    code = (
        "import json, numpy, urllib.request as http; "
        f'rows = numpy.load({json.dumps(str(cases), ensure_ascii=False)})["input.0"][:1].tolist(); '
        f'print(http.urlopen({json.dumps(route)}, json.dumps({{"instances": rows}}).encode()).read().decode())'
    )
    return shlex.join([sys.executable, "-c", code])
