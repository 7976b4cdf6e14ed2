"""A server of lines, for the tests of the supervisor: `python echo_workers.py '{"n_workers": 2}'`.

Writes JSON lines to stdout: the ports first, then what the supervisor tells. A connection takes one command a line; see `Line`.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import uvloop

from modelyard.errors import StoreError
from modelyard.inference.serve.processes.seat import Seat
from modelyard.inference.serve.processes.supervisor import SupervisorSettings, supervise


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Worker:
    """One worker's state, on its loop."""

    def __init__(self, seat: Seat, options: Mapping[str, Any]) -> None:
        self.seat = seat
        self.options = options
        self.open: set[Line] = set()
        self.n_adopting = 0
        self.n_busy = 0
        self.commands: list[dict[str, Any]] = []
        self.draining = False
        self.ended = asyncio.Event()
        self.idle = asyncio.Event()

    async def live(self) -> int:
        loop = asyncio.get_running_loop()
        self.seat.attach(
            loop,
            on_connection=lambda tag, accepted: self.adopt(loop, tag, accepted),
            on_command=self.obey,
            on_drain=self.drain,
            on_end=self.ended.set,
        )
        over = [loop.create_task(one.wait()) for one in (self.ended, self.idle)]
        await asyncio.wait(over, timeout=self.options.get("load_s", 0), return_when=asyncio.FIRST_COMPLETED)
        if "model" in self.options:
            self.compute(self.options["model"])
        self.seat.ready({"number": self.seat.number, "pid": os.getpid(), "commands": self.commands})
        await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        self.seat.drained(self.n_busy)
        return 0

    def compute(self, path: str) -> None:
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        x = session.get_inputs()[0]
        session.run(None, {x.name: np.zeros([1, *x.shape[1:]], np.float32)})

    def adopt(self, loop: asyncio.AbstractEventLoop, tag: str, accepted: socket.socket) -> None:
        async def make() -> None:
            try:
                await loop.connect_accepted_socket(lambda: Line(self, tag), accepted)
            except OSError:
                accepted.close()
            finally:
                self.n_adopting -= 1
                self.count()

        self.n_adopting += 1
        self.count()
        self.task = loop.create_task(make())

    def count(self) -> None:
        self.seat.count_open(len(self.open) + self.n_adopting)
        if self.draining and not self.open and not self.n_adopting:
            self.idle.set()

    def drain(self) -> None:
        self.draining = True
        for line in tuple(self.open):
            if not line.n_busy:
                line.transport.close()
        self.count()

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        number = self.seat.number
        self.commands.append(command)
        match command["command"]:
            case "die" if command["number"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep" if command["number"] == number:
                await asyncio.sleep(command["seconds"])
            case "refuse":
                return {"error": "never"}
            case "raise":
                raise ValueError("a bug")
            case "shout":
                return {"text": "x" * command["n_bytes"]}
        return {"pid": os.getpid()}


class Line(asyncio.Protocol):
    """A connection: `echo X`, `who`, `later SECONDS X`, `stall SECONDS`, `broadcast JSON`, `commands`, `count`."""

    def __init__(self, worker: Worker, tag: str) -> None:
        self.worker = worker
        self.tag = tag
        self.buffer = b""
        self.n_busy = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.worker.open.add(self)
        self.worker.count()

    def connection_lost(self, exc: Exception | None) -> None:
        self.worker.open.discard(self)
        self.worker.count()

    def data_received(self, data: bytes) -> None:
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self.n_busy += 1
            self.worker.n_busy += 1
            word, _, rest = line.decode().partition(" ")
            if word == "echo":
                self.reply(rest)
            else:
                task = asyncio.get_running_loop().create_task(self.do(word, rest))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    def reply(self, text: str) -> None:
        self.transport.write(text.encode() + b"\n")
        self.n_busy -= 1
        self.worker.n_busy -= 1
        if self.worker.draining and not self.n_busy:
            self.transport.close()

    async def do(self, word: str, rest: str) -> None:
        seat = self.worker.seat
        if word == "who":
            self.reply(f"{seat.number} {os.getpid()} {self.tag}")
        elif word == "later":
            seconds, _, text = rest.partition(" ")
            await asyncio.sleep(float(seconds))
            self.reply(text)
        elif word == "stall":
            time.sleep(float(rest))
            self.reply("stalled")
        elif word == "broadcast":
            asked = json.loads(rest)
            self.reply(json.dumps(await seat.broadcast(asked.pop("ask"), **asked)))
        elif word == "commands":
            self.reply(json.dumps(self.worker.commands))
        elif word == "count":  # one more in this seat's slab; all seats' counts
            cells = seat.slab.cast("Q")
            cells[-1] += 1
            self.reply(json.dumps([slab.cast("Q")[-1] for slab in seat.slabs]))


def main() -> int:
    options = json.loads(sys.argv[1])
    if "model" in options:  # as a real supervisor does, so that the workers share these pages
        import onnxruntime  # noqa: F401
    begun_s = time.monotonic()
    listeners = {tag: socket.create_server(("127.0.0.1", 0), backlog=1024) for tag in ("http", "metrics")}
    tell(ports={tag: one.getsockname()[1] for tag, one in listeners.items()}, pid=os.getpid())

    def worker(seat: Seat) -> int:
        match options.get("start", {}).get(str(seat.number)):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("a bug at the start")
            case "refuse":
                raise StoreError("no model could be loaded")
            case "exit":
                return 3
            case "hang":
                time.sleep(600)
        return int(uvloop.run(Worker(seat, options).live()))

    settings = SupervisorSettings(**{"n_workers": 2, "slab_bytes": 65536, **options.get("settings", {})})
    code = supervise(
        listeners,
        settings,
        worker,
        on_ready=lambda reports: tell(ready=reports, ready_s=time.monotonic() - begun_s),
        on_event=lambda text: tell(event=text),
    )
    tell(code=code)
    return code


if __name__ == "__main__":
    sys.exit(main())
