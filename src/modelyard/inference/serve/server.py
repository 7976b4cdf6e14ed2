"""A server's life: bind, load, serve, drain, end. Sockets, signals and threads live here and nowhere else."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from modelyard.errors import ConfigError, StoreError
from modelyard.inference.serve.app import App
from modelyard.inference.serve.http import Connections, HttpLimits, Served
from modelyard.inference.serve.repository import Entry, Loaded, Pick, Repository

_SWEEP_EVERY_S = 1.0
_BACKLOG = 1024
_ON_THE_WIRE_S = 0.05
"""When draining begins, requests sent before anybody could know get this long to arrive."""


@dataclass(frozen=True)
class ServerSettings:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    drain_timeout_s: float = 30.0
    access_log: bool = False
    limits: HttpLimits = field(default_factory=HttpLimits)


@dataclass(frozen=True)
class Bound:
    """A socket that listens, and the URL it is reached by."""

    socket: socket.socket
    url: str


def bind(settings: ServerSettings) -> Bound:
    """Return a listening socket; raises ConfigError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"--host {settings.host}: {exc}; give an address of this machine") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"--port {settings.port}: cannot listen on {settings.host} ({exc.strerror}); stop what uses the port, or take another "
            "(0 takes a free one)"
        ) from exc
    host, port = listener.getsockname()[:2]
    return Bound(listener, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


async def serve(
    bound: Bound,
    repository: Repository,
    load_one: Callable[[Pick], Loaded],
    settings: ServerSettings,
    *,
    on_change: Callable[[Entry], None],
    on_ready: Callable[[], None],
) -> int:
    """Serve until SIGTERM or SIGINT, then answer what is in flight; return how many connections were cut off unanswered.

    Draining ends early with a second signal, or after `settings.drain_timeout_s`.

    Args:
        load_one: loads a version; called on a thread.
        on_change: told of each version as it becomes ready or fails.
        on_ready: called once when all versions are loaded or failed.

    Raises:
        StoreError: not one version could be loaded.
    """
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    connections = Connections(
        App(repository).answer, settings.limits, _write_access_log if settings.access_log else None
    )
    server = await loop.create_server(connections.new_connection, sock=bound.socket, backlog=_BACKLOG)
    sweeper = loop.create_task(_sweep(connections))
    loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
    loading = loop.create_task(repository.load_all(load_one, loader, on_change))
    try:
        await _first(loading, stop.wait())
        if loading.done():
            await loading
            if not repository.ready:
                raise StoreError(
                    "no model could be loaded, for the reasons above; correct them, or serve others with --model"
                )
            on_ready()
            await stop.wait()
        repository.drain()
        await _first(stop_now.wait(), asyncio.sleep(_ON_THE_WIRE_S))
        server.close()
        connections.drain()
        await _first(connections.none_open.wait(), stop_now.wait(), asyncio.sleep(settings.drain_timeout_s))
        return connections.n_busy
    finally:
        server.close()
        connections.abort()
        sweeper.cancel()
        loading.cancel()
        loader.shutdown(wait=False, cancel_futures=True)
        repository.close()


async def _first(*awaitables: Awaitable[object]) -> None:
    """Return when the first of them is done; coroutines among them are cancelled then, tasks are left alone."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for one, task in zip(awaitables, tasks, strict=True):
        if one is not task:
            task.cancel()


async def _sweep(connections: Connections) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_EVERY_S)
        connections.sweep(loop.time())


def _write_access_log(served: Served) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads the log; serving goes on
        sys.stderr.write(msgspec.json.encode(served).decode() + "\n")
