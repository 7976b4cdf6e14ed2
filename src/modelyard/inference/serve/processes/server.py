"""A server's life in the parent process: bind the port, then have a supervisor run the workers until a signal ends them."""

import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelyard.errors import ConfigError
from modelyard.inference.serve.processes.seat import Json, Seat
from modelyard.inference.serve.processes.stderr import unfailing_stderr
from modelyard.inference.serve.processes.supervisor import SupervisorSettings, supervise
from modelyard.inference.serve.transport.http import HttpLimits

_BACKLOG = 1024


@dataclass(frozen=True)
class ServerSettings:
    """How to serve; `bind` says where."""

    grpc_port: int | None = None
    """None serves no gRPC."""
    access_log: bool = False
    access_log_path: Path | None = None
    """None is stderr."""
    access_log_sample: float = 1.0
    trace_sample: float | None = None
    """Share of requests whose trace is sent by OpenTelemetry; None sends none."""
    triton_metrics: bool = False
    """Add the same numbers under Triton's names."""
    poll_s: float = 10.0
    """Seconds between two looks at the store; 0 never looks again."""
    command_timeout_s: float = 600.0
    """How long the workers may take over a command such as loading a model."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    processes: SupervisorSettings = field(default_factory=SupervisorSettings)


@dataclass(frozen=True)
class Bound:
    """A socket that listens, and the URL it is reached by."""

    socket: socket.socket
    url: str


def bind(host: str, port: int, option: str = "--port") -> Bound:
    """Return a listening socket; raises ConfigError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"--host {host}: {exc}; give an address of this machine") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"{option} {port}: cannot listen on {host} ({exc.strerror}); stop what uses the port, or take another (0 takes a free one)"
        ) from exc
    host, port = listener.getsockname()[:2]
    return Bound(listener, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def serve(
    bound: Mapping[str, Bound],
    settings: ServerSettings,
    worker: Callable[[Seat], int],
    *,
    on_ready: Callable[[list[Json]], None],
    on_event: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT, then answer what is in flight; return the exit code, 1 if something was cut off.

    Args:
        bound: sockets by protocol: "http", "grpc".
        worker: runs in each worker process; see worker.py.
        on_ready: called once with the workers' reports when all models are loaded or failed.
        on_event: told in one line what happens to workers.
    """
    sys.stderr = unfailing_stderr()
    listeners = {tag: one.socket for tag, one in bound.items()}
    return supervise(listeners, settings.processes, worker, on_ready=on_ready, on_event=on_event)
