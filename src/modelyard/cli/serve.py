"""`modelyard serve`: a store's models over HTTP."""

from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.options import allow_domain_option

if TYPE_CHECKING:
    from pathlib import Path

    from modelyard.inference.serve.repository import Loaded
    from modelyard.inference.serve.seat import Seat

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
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes that answer.")
@click.option(
    "--target",
    "target_s",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Latency to aim at, in seconds. Default: the bundle's latency_p99_s, else 1.",
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
    workers: int,
    target_s: float | None,
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
    import sys
    from functools import partial
    from pathlib import Path

    from modelyard.bundle.format import MANIFEST
    from modelyard.bundle.store import open_store
    from modelyard.errors import ConfigError, NotInStore
    from modelyard.inference.serve.http import HttpLimits
    from modelyard.inference.serve.repository import Loaded, ModelSettings, Repository, choose, load
    from modelyard.inference.serve.server import ServerSettings, bind
    from modelyard.inference.serve.server import serve as serve_on
    from modelyard.inference.serve.supervisor import SupervisorSettings
    from modelyard.inference.serve.worker import run_worker

    if "://" not in store and not Path(store).is_dir():
        raise NotInStore(f"{store}: no such store folder; correct the path, or publish a bundle to it first")
    if (Path(store) / MANIFEST).is_file():
        raise ConfigError(f"{store}: is a bundle; give the folder of the store it lies in, STORE/NAME/VERSION")
    opened = open_store(store)
    picks = choose(opened, models)
    settings = ServerSettings(
        host=host,
        port=port,
        access_log=access_log,
        limits=HttpLimits(max_body_bytes=max_body_bytes, read_timeout_s=read_timeout_s),
        processes=SupervisorSettings(n_workers=workers, drain_timeout_s=drain_timeout_s),
    )
    bound = bind(host, port)

    def describe(loaded: Loaded) -> str:
        return _example(bound.url, loaded, Path(store, loaded.name, str(loaded.version)))

    def on_ready(reports: list[dict[str, Any]]) -> None:
        served = reports[0]["models"]
        for model in served:
            said = f"loaded in {model['load_s']:.3f} s" if "load_s" in model else f"{model['state']}: {model['reason']}"
            click.echo(f"{model['name']} version {model['version']}: {said}", err=True)
        click.echo(f"ready on {bound.url}", err=True)
        for model in served:
            if "example" in model:
                click.echo(f"  {model['example']}", err=True)
        if as_json:
            told = [{key: model[key] for key in ("name", "version", "state", "reason")} for model in served]
            click.echo(json.dumps({"url": bound.url, "models": told}))
            sys.stdout.flush()

    model_settings = ModelSettings(n_threads=threads, target_s=target_s)
    load_one = partial(load, opened, settings=model_settings, allow_domains=allow_domains)

    def worker(seat: "Seat") -> int:
        return run_worker(seat, settings, Repository(picks), load_one, describe)

    code = serve_on({"http": bound}, settings, worker, on_ready=on_ready, on_event=partial(click.echo, err=True))
    if code == 1:
        click.echo("ended with connections unanswered; give them longer with --drain-timeout", err=True)
    sys.exit(code)


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
