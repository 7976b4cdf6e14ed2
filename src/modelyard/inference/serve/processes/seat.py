"""What a worker gets of its supervisor: connections, commands and a piece of shared memory.

supervisor.py (accepts) → `Channel` → `Seat` (on the worker's event loop) → protocol. A worker is a process that may die; its
seat stays: the number and the slab pass to the replacement. The messages of both directions are defined here.
"""

import asyncio
import contextlib
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

Json = dict[str, Any]

FDS_PER_MESSAGE = 32
"""Connections that travel together; the kernel takes up to 253."""
LONGEST_MESSAGE_BYTES = 16 * 2**20
_PART_BYTES = 32 * 2**10
"""A datagram must fit into the socket's send buffer (200 KiB by default), next to others that wait there."""
_ITEMS_PER_WAKEUP = 16
_LAST_WORDS_S = 1.0
_CONNECTIONS, _PART, _END_PART = 0, 1, 2
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_MESSAGE * 4)
_OPEN, _TAKEN = 0, 1
CELL_BYTES = 64
"""A worker's counts in shared memory, a cache line of its own: connections open now, connections taken ever."""


# From the worker.


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """The event loop runs: connections and commands may come."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """What the replacement must know has been applied, and the worker has loaded what it wanted to."""

    report: Json


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Give `command` to every worker and tell what they answer."""

    ask_id: int
    command: Json
    sticky: bool
    timeout_s: float


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """This worker's answer to the command of that number."""

    number: int
    answer: Json


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """The worker is about to end; so many connections were cut off before they were answered."""

    n_cut_off: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why the worker ends by itself, in words for the person who started the server."""

    message: str


# From the supervisor.


class Command(msgspec.Struct, frozen=True, tag="command"):
    """Do this, after all commands before it, and answer with its number."""

    number: int
    command: Json


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """What all workers answered to what this one asked for."""

    ask_id: int
    answers: list[tuple[int, Json]]


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """No connection comes after this: answer what is in flight, then end."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """End at once; what is in flight is cut off."""


FromWorker = Attached | Ready | Ask | Answered | Drained | Failed
FromSupervisor = Command | Settled | Drain | End
Message = FromWorker | FromSupervisor


class Connections(msgspec.Struct, frozen=True):
    """Accepted sockets, as bare descriptors that the receiver owns; `tags[i]` is the number of the listener of `fds[i]`."""

    tags: bytes
    fds: tuple[int, ...]


class Channel:
    """One end of a Unix SOCK_SEQPACKET pair: JSON messages and connections, each whole and in order. Never blocks.

    A datagram is a kind byte and its content: the tags of the connections in its ancillary data, or a part of a JSON message.
    """

    __slots__ = ("_decoder", "_outbox", "_parts", "n_unsent_bytes", "socket")

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.socket = end
        self.n_unsent_bytes = 0
        self._outbox: deque[bytes] = deque()
        self._parts = bytearray()
        self._decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)

    def send(self, message: Message) -> bool:
        """Send what the other end takes now and keep the rest for `flush`; return whether nothing is left.

        Raises:
            ValueError: the message is longer than LONGEST_MESSAGE_BYTES.
        """
        body = msgspec.json.encode(message)
        if len(body) > LONGEST_MESSAGE_BYTES:
            raise ValueError(
                f"a {type(message).__name__.lower()} message must have at most {LONGEST_MESSAGE_BYTES} bytes, got {len(body)}; "
                "say less, or in several commands"
            )
        for start in range(0, len(body), _PART_BYTES):
            kind = _PART if start + _PART_BYTES < len(body) else _END_PART
            self._outbox.append(bytes((kind,)) + body[start : start + _PART_BYTES])
        self.n_unsent_bytes += len(body)
        return self.flush()

    def flush(self) -> bool:
        """Send on; return whether nothing is left. What the other end can never get, since it is gone, is dropped."""
        outbox = self._outbox
        while outbox:
            try:
                self.socket.send(outbox[0])
            except BlockingIOError:
                return False
            except OSError:
                outbox.clear()
                self.n_unsent_bytes = 0
                return True
            self.n_unsent_bytes -= len(outbox.popleft()) - 1
        return True

    def hand_over(self, tags: bytes, fds: Sequence[int]) -> bool:
        """Send connections, at most FDS_PER_MESSAGE; False when the inbox is full, and none has been sent.

        The descriptors stay the caller's to close.
        """
        try:
            self.socket.sendmsg(
                [b"\0" + tags], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
            )
        except (
            OSError
        ):  # full (EAGAIN), too many in flight in the whole system (ETOOMANYREFS), or the other end is gone
            return False
        return True

    def receive(self) -> Message | Connections | None:
        """Return what came next, None when nothing is there yet.

        Raises:
            EOFError: the other end is closed, and all it sent has been read.
        """
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(_PART_BYTES + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except ConnectionResetError as exc:
                raise EOFError("the other end closed the channel") from exc
            if not data:
                raise EOFError("the other end closed the channel")
            kind = data[0]
            if kind == _CONNECTIONS:
                # Where this process has no descriptor left, the kernel closes what does not fit and delivers the rest.
                rights = ancillary[0][2] if ancillary else b""
                return Connections(data[1:], struct.unpack(f"{len(rights) // 4}i", rights))
            self._parts += memoryview(data)[1:]
            if kind == _END_PART:
                body, self._parts = self._parts, bytearray()
                return self._decoder.decode(body)
            if len(self._parts) > LONGEST_MESSAGE_BYTES:
                raise EOFError("the other end sent a message without end")

    def last_words(self, timeout_s: float = _LAST_WORDS_S) -> None:
        """Send what is left, waiting up to `timeout_s`; the one method that blocks, for a process about to end."""
        self.socket.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            while self._outbox:
                self.socket.send(self._outbox.popleft())

    def close(self) -> None:
        self.socket.close()


class Seat:
    """A worker's place among its siblings. Belongs to the worker's event loop; not thread-safe.

    A worker calls `attach` as soon as its loop runs, `ready` when it has loaded, and ends by returning after `on_drain`:

        def worker(seat: Seat) -> int:
            return uvloop.run(serve(seat))
    """

    def __init__(
        self,
        number: int,
        n_workers: int,
        *,
        channel: Channel,
        tags: Sequence[str],
        counts: memoryview,
        slabs: Sequence[memoryview],
        replay: Sequence[Json] = (),
    ) -> None:
        """`counts` are this seat's CELL_BYTES, `slabs` everybody's; `replay` are the commands this worker has missed."""
        self.number = number
        self.n_workers = n_workers
        self.slab = slabs[number]
        """This seat's piece of shared memory; what earlier workers of the seat wrote is still in it."""
        self.slabs = tuple(slab.toreadonly() for slab in slabs)
        self._channel = channel
        self._tags = tuple(tags)
        self._counts = counts.cast("Q")
        self._replay = replay
        self._replayed = False
        self._report: Json | None = None
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._asked: dict[int, asyncio.Future[list[tuple[int, Json]]]] = {}
        self._n_asked = 0
        self._writing = False

    def attach(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_connection: Callable[[str, socket.socket], None],
        on_command: Callable[[Json], Awaitable[Json]],
        on_drain: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Take part from now on. The callbacks are called on `loop`.

        Args:
            on_connection: takes over a non-blocking accepted socket, given the tag of its listener. It counts as open from here
                on, while its transport is still being made too: see `count_open`.
            on_command: does what a command says and returns the answer; one at a time, in the order that all workers share. It
                must not wait for a `broadcast` of its own, whose turn cannot come. What it raises is answered as
                {"error": ...}. Commands that were given before this worker started come first.
            on_drain: no connection will come any more; answer what is in flight, report `drained` and return.
            on_end: return at once, cutting off what is in flight. Comes after the drain timeout, with a second signal, or
                when the supervisor is gone; the process is killed if it has not ended a second later.
        """
        self._loop = loop
        self._on_connection, self._on_command = on_connection, on_command
        self._on_drain, self._on_end = on_drain, on_end
        loop.add_reader(self._channel.socket, self._on_readable)
        self._obeying = loop.create_task(self._obey())
        self._send(Attached())

    def ready(self, report: Json) -> None:
        """Say that this worker has loaded; `report` is any JSON object. Connections may have come before.

        Is passed on once the commands that the worker had missed are done.
        """
        self._report = report
        if self._replayed:
            self._send(Ready(report))

    async def broadcast(
        self, command: Json, *, sticky: bool = False, timeout_s: float = 30.0
    ) -> list[tuple[int, Json]]:
        """Have every worker, this one included, do `command`; return (number, answer) of each, in order.

        All workers see all commands in the same order. One that dies before it answers, or does not answer in time, is
        there with {"error": why}.

        Args:
            sticky: workers that start later do it too, before they are ready. A command sets something (it says "loaded", not
                "one more"), so of equal ones only the last is kept; and one that every worker answered with an error is
                forgotten.
            timeout_s: counts from when it is this command's turn.

        Raises:
            ValueError: the command is longer than LONGEST_MESSAGE_BYTES.
        """
        self._n_asked += 1
        ask_id = self._n_asked
        future: asyncio.Future[list[tuple[int, Json]]] = self._loop.create_future()
        self._asked[ask_id] = future
        try:
            self._send(Ask(ask_id, command, sticky, timeout_s))
            return await future
        finally:
            del self._asked[ask_id]

    def count_open(self, n: int) -> None:
        """Say how many connections this worker has now. The supervisor gives the next one to whom has the fewest.

        Call it whenever that changes, in `on_connection` first: a connection whose transport is still being made counts.
        """
        self._counts[_OPEN] = n

    def drained(self, n_cut_off: int = 0) -> None:
        """Say that this worker is about to end, having left `n_cut_off` connections without their answer."""
        self._send(Drained(n_cut_off))

    def failed(self, message: str) -> None:
        """Say why this worker is about to end by itself."""
        self._channel.send(Failed(message[: LONGEST_MESSAGE_BYTES // 16]))

    def close(self) -> None:
        """Make sure that the last words reach the supervisor; blocks for a moment at most. The loop has ended by now."""
        self._channel.last_words()
        self._channel.close()

    def _on_readable(self) -> None:
        """Take what has come, but let the loop's other work have its turn."""
        try:
            for _ in range(_ITEMS_PER_WAKEUP):
                item = self._channel.receive()
                if item is None:
                    return
                if isinstance(item, Connections):
                    self._take(item)
                else:
                    self._hear(item)
        except EOFError:  # the supervisor is gone
            self._loop.remove_reader(self._channel.socket)
            self._on_end()

    def _take(self, connections: Connections) -> None:
        for tag, fd in zip(connections.tags, connections.fds, strict=False):  # fewer fds where descriptors ran out
            try:
                accepted = socket.socket(fileno=fd)
                accepted.setblocking(False)
                self._on_connection(self._tags[tag], accepted)
            except Exception:  # noqa: BLE001  # one bad connection must not cost the others
                traceback.print_exc(file=sys.stderr)
        n_lost = len(connections.tags) - len(connections.fds)
        if n_lost:
            sys.stderr.write(
                f"worker {self.number}: no file descriptors left, {n_lost} connections lost; see ulimit -n\n"
            )
        # After on_connection has counted them: until then the supervisor counts them as on their way.
        self._counts[_TAKEN] += len(connections.tags)

    def _hear(self, message: Message) -> None:
        match message:
            case Command():
                self._commands.put_nowait(message)
            case Settled(ask_id, answers):
                future = self._asked.get(ask_id)
                if future is not None and not future.done():
                    future.set_result(answers)
            case Drain():
                self._on_drain()
            case End():
                self._on_end()

    async def _obey(self) -> None:
        for missed in self._replay:
            answer = await self._do(missed)
            if "error" in answer:
                sys.stderr.write(f"worker {self.number}: {missed} failed when repeated: {answer['error']}\n")
        self._replayed = True
        if self._report is not None:
            self._send(Ready(self._report))
        while True:
            command = await self._commands.get()
            answer = await self._do(command.command)
            try:
                self._send(Answered(command.number, answer))
            except (ValueError, TypeError) as exc:  # too long, or no JSON
                self._send(Answered(command.number, {"error": str(exc)}))

    async def _do(self, command: Json) -> Json:
        try:
            return await self._on_command(command)
        except Exception as exc:  # noqa: BLE001  # the asker gets to know; commands go on
            traceback.print_exc(file=sys.stderr)
            return {"error": f"{type(exc).__name__}: {exc}"}

    def _send(self, message: FromWorker) -> None:
        if not self._channel.send(message) and not self._writing:
            self._writing = True
            self._loop.add_writer(self._channel.socket, self._on_writable)

    def _on_writable(self) -> None:
        if self._channel.flush():
            self._writing = False
            self._loop.remove_writer(self._channel.socket)
