"""`modelyard serve`: a store's models over HTTP and gRPC."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli.options import allow_domain_option

if TYPE_CHECKING:
    from modelyard.inference.serve.models.loading import Loaded
    from modelyard.inference.serve.processes.seat import Seat

_LONGEST_EXAMPLE = 1000
_PORT = click.IntRange(0, 65535)


@click.command()
@click.argument("store", metavar="STORE")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A serve.toml: settings of the server and of each model. Options given here override it.",
)
@click.option("--host", help="Address to listen on; 0.0.0.0 is every one. Default: 127.0.0.1.")
@click.option("--port", type=_PORT, help="For HTTP; 0 takes a free port. Default: 8000.")
@click.option("--grpc-port", type=_PORT, help="For gRPC; 0 takes a free port. Default: no gRPC.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME[=VERSION|TAG]",
    help="Serve only this model; repeat for more. Default: every model's champion, else its latest version.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    help="Processes that answer. Default: one per core for models of microseconds, fewer for slower ones.",
)
@click.option(
    "--instances",
    "n_instances",
    type=click.IntRange(1),
    help="Runs of one model at a time, per worker. Default: as many as there are cores for it.",
)
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(0),
    help="Threads of one run; 0 is one per core. Default: 1, more where one alone would miss the target.",
)
@click.option(
    "--target",
    "target_s",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Latency to aim at, in seconds. Default: the bundle's latency_p99_s, else 1.",
)
@click.option("--max-batch", "max_batch_size", type=click.IntRange(1), help="Rows of the largest batch. Default: 64.")
@click.option(
    "--load",
    type=click.Choice(["eager", "lazy"]),
    help="Load models at the start, or each with its first request. Default: eager.",
)
@click.option(
    "--poll",
    "poll_s",
    type=click.FloatRange(0),
    metavar="S",
    help="Seconds between two looks at the store for new versions and moved tags; 0 never looks. Default: 10.",
)
@click.option(
    "--memory-budget",
    "memory_budget_bytes",
    type=click.IntRange(1),
    metavar="BYTES",
    help="For the models of all workers; the least recently used leave when it is full. Default: no limit.",
)
@click.option("--max-body-bytes", type=click.IntRange(1), help="Largest request body. Default: 64 MiB.")
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    help="Connections open at once; further ones wait. Default: 16384.",
)
@click.option(
    "--read-timeout",
    "read_timeout_s",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds a client may take to send one request. Default: 30.",
)
@click.option(
    "--idle-timeout",
    "idle_timeout_s",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds of silence after which a kept-alive HTTP connection is closed. Default: 75.",
)
@click.option(
    "--drain-timeout",
    "drain_timeout_s",
    type=click.FloatRange(0),
    metavar="S",
    help="Seconds after SIGTERM to finish what is in flight. Default: 30.",
)
@allow_domain_option
@click.option("--access-log", is_flag=True, default=None, help="Write one JSON line per request to stderr.")
@click.option(
    "--access-log-file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the access log to this file instead; SIGHUP opens it anew.",
)
@click.option(
    "--access-log-sample",
    type=click.FloatRange(0, 1),
    help="Share of requests in the access log; failed ones are always there. Default: 1.",
)
@click.option(
    "--trace-sample",
    type=click.FloatRange(0, 1),
    help="Send traces of this share of requests by OpenTelemetry (extra otel). Default: no tracing.",
)
@click.option("--triton-metrics", is_flag=True, default=None, help="Add the metrics under Triton's names.")
@click.option("--json", "as_json", is_flag=True, help='Print {"url": …, "models": …} to stdout when ready.')
def serve(store: str, models: tuple[str, ...], as_json: bool, allow_domains: tuple[str, ...], **given: Any) -> None:
    """Serve the models in STORE: rows with named columns, the Open Inference Protocol (REST and gRPC), TensorFlow Serving's REST.

    A model is verified and passes its golden cases before it reports ready. One that does not is reported and left out; the
    others serve. New versions and moved tags are noticed while serving: the new version is loaded beside the old one, and
    requests move to it in one step. SIGTERM stops accepting, answers what is in flight and ends. The page at / tries the models.

    \b
    Examples:
      modelyard serve store
      modelyard serve store --port 0 --grpc-port 8001 --model flights=champion --model digits=3
      modelyard serve store --config serve.toml --target 0.05
      curl localhost:8000/v1/models/flights:predict -d '{"instances": [{"dep_hour": 7, "carrier": "UA"}]}'
      curl localhost:8000/v2/models/flights
    """
    import json
    import sys
    from functools import partial

    from modelyard.bundle.format import MANIFEST
    from modelyard.bundle.store import open_store
    from modelyard.errors import ConfigError, NotInStore
    from modelyard.inference.serve.models.config import ServeConfig, load_config
    from modelyard.inference.serve.models.loading import ModelSettings, Pick, Turns, load
    from modelyard.inference.serve.models.polling import Library
    from modelyard.inference.serve.models.repository import Repository, choose, policies_of
    from modelyard.inference.serve.processes.scout import workers_by_measuring
    from modelyard.inference.serve.processes.server import ServerSettings, bind
    from modelyard.inference.serve.processes.server import serve as serve_on
    from modelyard.inference.serve.processes.supervisor import SupervisorSettings
    from modelyard.inference.serve.processes.worker import Models, run_worker
    from modelyard.inference.serve.transport.http import HttpLimits

    if "://" not in store and not Path(store).is_dir():
        raise NotInStore(f"{store}: no such store folder; correct the path, or publish a bundle to it first")
    if (Path(store) / MANIFEST).is_file():
        raise ConfigError(f"{store}: is a bundle; give the folder of the store it lies in, STORE/NAME/VERSION")
    opened = open_store(store)
    config_path = given.pop("config_path")
    config = ServeConfig() if config_path is None else load_config(config_path)

    def said(name: str, default: Any) -> Any:
        """Return what an option says, else the file, else the default."""
        value = given[name] if given[name] is not None else getattr(config.server, name, None)
        return default if value is None else value

    run_options = ("n_instances", "n_threads", "target_s", "max_batch_size")
    overridden = {name: given[name] for name in run_options if given[name] is not None}

    def settings_of(name: str) -> ModelSettings:
        return config.settings(name, overridden=overridden)

    policies = policies_of(models) if models else config.policies()
    tell = partial(click.echo, err=True)
    picks = choose(opened, models) if models else config.picks(opened, tell)
    config.check_traffic(opened, {pick.name for pick in picks})
    bound = {"http": bind(said("host", "127.0.0.1"), said("port", 8000))}
    grpc_port = said("grpc_port", None)
    if grpc_port is not None:
        bound["grpc"] = bind(said("host", "127.0.0.1"), grpc_port, "--grpc-port")
    lazy = said("load", "eager") == "lazy"
    load_one = partial(load, opened, allow_domains=allow_domains)

    def measured(pick: Pick) -> float:
        return load_one(pick, settings_of(pick.name)).row_s

    n_workers = said("workers", None) or workers_by_measuring([] if lazy else picks, measured)
    limits = HttpLimits()
    access_log_file = said("access_log_file", None)
    settings = ServerSettings(
        grpc_port=grpc_port,
        access_log=said("access_log", False) or access_log_file is not None,
        access_log_path=None if access_log_file is None else Path(access_log_file),
        access_log_sample=said("access_log_sample", 1.0),
        trace_sample=said("trace_sample", None),
        triton_metrics=said("triton_metrics", False),
        poll_s=said("poll_s", 10.0),
        limits=HttpLimits(
            max_body_bytes=said("max_body_bytes", limits.max_body_bytes),
            read_timeout_s=said("read_timeout_s", limits.read_timeout_s),
            idle_timeout_s=said("idle_timeout_s", limits.idle_timeout_s),
        ),
        processes=SupervisorSettings(
            n_workers=n_workers,
            drain_timeout_s=said("drain_timeout_s", 30.0),
            max_connections=said("max_connections", 16384),
        ),
    )
    defaults = {pick.name: pick.version for pick in reversed(picks)}  # the first of a name is its default
    budget_bytes = said("memory_budget_bytes", None)
    url = bound["http"].url

    def repository(**options: Any) -> Repository:
        library = Library(opened, policies, all_models=not models and config.server.all_models, settings=settings_of)
        return Repository(
            picks,
            library=library,
            lazy=lazy,
            memory_budget_bytes=None if budget_bytes is None else max(1, budget_bytes // n_workers),
            traffic=config.traffic(),
            **options,
        )

    def load_with_settings(pick: Pick) -> "Loaded":
        return load_one(pick, settings_of(pick.name), n_workers=n_workers)

    def describe(loaded: "Loaded") -> str:
        is_default = defaults.get(loaded.name, loaded.version) == loaded.version
        return _example(url, loaded, Path(store, loaded.name, str(loaded.version)), is_default=is_default)

    def on_ready(reports: list[dict[str, Any]]) -> None:
        served = reports[0]["models"]
        for model in served:
            reason = "is loaded with its first request" if model["state"] == "unloaded" else model["reason"]
            told = f"loaded in {model['load_s']:.3f} s" if "load_s" in model else f"{model['state']}: {reason}"
            click.echo(f"{model['name']} version {model['version']}: {told}", err=True)
        grpc = f", gRPC on {bound['grpc'].url.removeprefix('http://')}" if "grpc" in bound else ""
        click.echo(f"ready on {url}{grpc}, {n_workers} worker{'s' if n_workers > 1 else ''}", err=True)
        for model in served:
            if "example" in model:
                click.echo(f"  {model['example']}", err=True)
        if as_json:
            answer: dict[str, Any] = {"url": url, "workers": n_workers}
            if "grpc" in bound:
                answer["grpc"] = bound["grpc"].url.removeprefix("http://")
            answer["models"] = [{key: model[key] for key in ("name", "version", "state", "reason")} for model in served]
            click.echo(json.dumps(answer))
            sys.stdout.flush()

    turns = Turns()

    def worker(seat: "Seat") -> int:
        return run_worker(seat, settings, Models(repository, load_with_settings, describe, turns))

    code = serve_on(bound, settings, worker, on_ready=on_ready, on_event=tell)
    sys.exit(code)


def _example(url: str, model: "Loaded", bundle: Path, *, is_default: bool) -> str:
    """Return a command that asks `model` for a prediction of a golden case; by its version, where another is the default.

    That is a curl command. A row too large for a line, such as an image, is read by Python from the cases in `bundle`; where
    that is no folder here, or the row is not one plain array, the command asks what the model takes.
    """
    import json
    import shlex
    import sys

    from modelyard.bundle.format import CASES

    place = f"models/{model.name}" if is_default else f"models/{model.name}/versions/{model.version}"
    route = f"{url}/v1/{place}:predict"
    body = json.dumps({"instances": [model.example]}, ensure_ascii=False)
    if len(body) <= _LONGEST_EXAMPLE:
        return f"curl {route} -d {shlex.quote(body)}"
    cases = bundle.resolve() / CASES
    (spec, *others) = model.signature.inputs
    if others or not spec.batched or spec.datatype in ("BYTES", "BF16") or "null" in body or not cases.is_file():
        return f"curl {url}/v2/{place}"
    code = (
        "import json, numpy, urllib.request as http; "
        f'rows = numpy.load({json.dumps(str(cases), ensure_ascii=False)})["input.0"][:1].tolist(); '
        f'print(http.urlopen({json.dumps(route)}, json.dumps({{"instances": rows}}).encode()).read().decode())'
    )
    return shlex.join([sys.executable, "-c", code])
