"""No product but a ceiling: an asyncio protocol on uvloop, httptools, orjson, and one or more processes on one port.

It checks nothing, limits nothing, counts nothing. Its batcher never waits: the requests parsed within one turn of the event
loop run as one batch at its end.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, cast

import httptools
import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray

from serve.apps.common import MAX_BATCH, MODEL, PORT, WORKERS, Runner, row

Done = Callable[[NDArray[Any]], None]


class Batcher:
    """Collects rows until the event loop's turn ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.runner = loop, Runner()
        self.pending: list[tuple[NDArray[Any], Done]] = []

    def submit(self, x: NDArray[Any], done: Done) -> None:
        if not self.pending:
            self.loop.call_soon(self.flush)
        self.pending.append((x, done))

    def flush(self) -> None:
        pending, self.pending = self.pending, []
        for start in range(0, len(pending), MAX_BATCH):
            part = pending[start : start + MAX_BATCH]
            y = self.runner(part[0][0] if len(part) == 1 else np.concatenate([x for x, _ in part]))
            for i, (_, done) in enumerate(part):
                done(y[i : i + 1])


class Http(asyncio.Protocol):
    """One connection."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.url, self.header_len = b"", 0
        self.parts: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"inference-header-content-length":
            self.header_len = int(value)

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        if self.url == b"/predict":
            self.batcher.submit(row(orjson.loads(body)["inputs"])[None], self.reply_json)
        else:
            self.batcher.submit(self.decode(body), self.reply_binary)

    def decode(self, body: bytes) -> NDArray[Any]:
        """Return the row of a binary request of the Open Inference Protocol."""
        tensor = orjson.loads(body[: self.header_len])["inputs"][0]
        if tensor["name"] != MODEL.input or tuple(tensor["shape"][1:]) != MODEL.shape:
            raise ValueError("not the model's input")
        return np.frombuffer(body, np.float32, offset=self.header_len).reshape(tensor["shape"])

    def reply_json(self, y: NDArray[Any]) -> None:
        out = orjson.dumps({"outputs": y[0]}, option=orjson.OPT_SERIALIZE_NUMPY)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        self.transport.write(head % (len(out), out))

    def reply_binary(self, y: NDArray[Any]) -> None:
        data = y.tobytes()
        size = {"binary_data_size": len(data)}
        tensor = {"name": MODEL.output, "datatype": "FP32", "shape": y.shape, "parameters": size}
        header = orjson.dumps({"model_name": MODEL.name, "outputs": [tensor]})
        head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n%b%b"
        self.transport.write(head % (len(header), len(header) + len(data), header, data))


async def serve() -> None:
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", PORT))
    batcher = Batcher(loop)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    await loop.create_server(lambda: Http(batcher), sock=sock, backlog=4096)
    await ended.wait()


if __name__ == "__main__":
    children: list[int] = []
    for _ in range(WORKERS - 1):
        if not (pid := os.fork()):
            children = []
            break
        children.append(pid)
    uvloop.run(serve())
    for pid in children:
        os.kill(pid, signal.SIGTERM)
