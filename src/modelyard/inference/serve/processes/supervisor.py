"""The process that holds the port: it forks the workers, hands each accepted connection to one, and replaces the dead.

client → listener → `Supervisor` (accept) → `Channel` → seat.py (a worker's event loop) → protocol

It accepts itself because workers that share a port through SO_REUSEPORT get connections by a hash of the client's address:
in one of ten runs the busier of two workers gets 39 of 64 connections, or 6 of 8, and the tail of the latency is its tail.
Here the next connection goes to whoever has the fewest open. And since no worker owns the port, it stays open while they die.

One thread, no event loop, no model: a selector, signals that arrive through a socket, a heap of timers. It never waits for a
worker: what a worker does not take stays here or in the kernel's backlog. What it decides by is above `Supervisor`, and
knows neither sockets nor clocks.
"""

import contextlib
import ctypes
import errno
import gc
import heapq
import mmap
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NoReturn

from modelyard.errors import ConfigError, ModelyardError
from modelyard.inference.serve.processes.seat import (
    CELL_BYTES,
    FDS_PER_MESSAGE,
    LONGEST_MESSAGE_BYTES,
    Answered,
    Ask,
    Attached,
    Channel,
    Command,
    Connections,
    Drain,
    Drained,
    End,
    Failed,
    Json,
    Message,
    Ready,
    Seat,
    Settled,
)

_NEVER = float("inf")
_ON_THE_WIRE_S = 0.05
"""When draining begins, connections opened before anybody could know get this long to arrive."""
_LEAVE_S = 1.0
"""How long draining may wait for busy workers to take the last connections from the backlog."""
_INBOX = 64
"""Connections on their way to one worker; a worker that has stopped reading holds up no more than these."""
_RETRY_S = 0.005
"""How soon to look again for a worker that takes connections."""
_PATIENCE_S = 2.0
"""How long connections wait for a ready worker before one that is still loading gets them, to answer that it is."""
_SHORT_LIFE_S = 5.0
"""A worker that ends sooner after its start has died of it."""
_LONGEST_DELAY_S = 1.0
_FIRST_TRIES = 3
"""Deaths of one seat after which the start has failed, if no worker has ever been ready."""
_END_S = 1.0
"""What a worker told to end at once may take, before it is killed."""
_MOST_UNSENT_BYTES = 4 * LONGEST_MESSAGE_BYTES
_SPARE_FDS = 256
"""Descriptors of a worker that are not connections: files, channels, models."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class SupervisorSettings:
    """How many workers, and how much patience with them."""

    n_workers: int = 1
    drain_timeout_s: float = 30.0
    """From the first signal on; what is in flight then is cut off."""
    start_timeout_s: float = 600.0
    """A worker that is not ready by then is replaced."""
    max_connections: int = 16384
    """Open at once, over all workers; further ones wait in the kernel's backlog."""
    slab_bytes: int = 4 * 2**20
    """Shared memory per worker, for its metrics; pages never touched cost nothing."""
    reload_timeout_s: float = 600.0
    """How long the workers may take over SIGHUP."""

    def __post_init__(self) -> None:
        for name, least in (("n_workers", 1), ("max_connections", 1), ("slab_bytes", 0), ("drain_timeout_s", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")


def supervise(
    listeners: Mapping[str, socket.socket],
    settings: SupervisorSettings,
    worker: Callable[[Seat], int],
    *,
    on_ready: Callable[[list[Json]], None],
    on_event: Callable[[str], None],
) -> int:
    """Run the workers until SIGTERM or SIGINT, then have them drain; return the exit code.

    0: every connection was answered. 1: some were cut off, or no worker could start. 2: no worker could start, and one said by
    its exit code that its input must be corrected. A second signal ends at once; SIGHUP is broadcast as {"command": "reload"}.

    Call it on the main thread of a process that has imported what the workers need (they share those pages) and has started
    no thread and no event loop.

    Args:
        listeners: listening sockets by the tag that their connections carry to `Seat.attach`; closed in the end.
        worker: called in each forked process, which ends with the code it returns. Raising a ModelyardError ends it with the
            error's exit code and tells why.
        on_ready: called once with the workers' reports, by number, when all are ready for the first time.
        on_event: told in one line what happened: a worker died, was replaced, why nothing can start.
    """
    supervisor = Supervisor(listeners, settings, worker, on_ready=on_ready, on_event=on_event)
    return supervisor.run()


def fewest(loads: Sequence[int], rooms: Sequence[int], after: int) -> int | None:
    """Return the index with the smallest load among those with room; ties go to the next one after `after`, in a circle.

    `rooms` says how many more each could be sent; None when nobody has room.
    """
    n = len(loads)
    best, best_load = None, 0
    for step in range(1, n + 1):
        index = (after + step) % n
        if rooms[index] > 0 and (best is None or loads[index] < best_load):
            best, best_load = index, loads[index]
    return best


def restart_delay_s(n_short_lives: int) -> float:
    """Return how long to wait before the next worker of a seat whose last `n_short_lives` ended soon after their start.

    The first death costs nothing; a seat that keeps dying is filled at most once a second, which still recovers within two.
    """
    return 0.0 if n_short_lives <= 1 else min(0.1 * 2 ** (n_short_lives - 2), _LONGEST_DELAY_S)


@dataclass(frozen=True)
class Broadcast:
    """A command on its way to all workers. `asker` is None where the supervisor itself asks."""

    command: Json
    sticky: bool
    timeout_s: float
    asker: int | None = None
    ask_id: int = 0


@dataclass
class _Turn:
    """The one broadcast whose answers are awaited."""

    broadcast: Broadcast
    number: int
    awaited: set[int]
    deadline_s: float
    answers: dict[int, Json] = field(default_factory=dict)


class Broadcasts:
    """Commands for all workers, one at a time, and those that later workers must be told. Says what to send; sends nothing."""

    def __init__(self) -> None:
        self._history: list[Json] = []
        self._queue: deque[Broadcast] = deque()
        self._turn: _Turn | None = None
        self._n_turns = 0

    @property
    def replay(self) -> tuple[Json, ...]:
        """What a worker that starts now has missed, in order."""
        turn = self._turn
        current = [turn.broadcast.command] if turn is not None and turn.broadcast.sticky else []
        return (*(one for one in self._history if one not in current), *current)

    @property
    def deadline_s(self) -> float | None:
        """When the command whose turn it is stops waiting for answers."""
        return None if self._turn is None else self._turn.deadline_s

    def ask(self, broadcast: Broadcast) -> None:
        """Queue a command; `next` says when it is its turn."""
        self._queue.append(broadcast)

    def next(self, workers: Iterable[int], now_s: float) -> tuple[Command, tuple[int, ...]] | None:
        """Return the command whose turn it is now and the workers to send it to, all that live; None while one is running."""
        if self._turn is not None or not self._queue:
            return None
        broadcast = self._queue.popleft()
        self._n_turns += 1
        to = tuple(workers)
        self._turn = _Turn(broadcast, self._n_turns, set(to), now_s + broadcast.timeout_s)
        return Command(self._n_turns, broadcast.command), to

    def answered(self, worker: int, number: int, answer: Json) -> None:
        """Note an answer; one that comes too late or twice is dropped."""
        turn = self._turn
        if turn is not None and turn.number == number and worker in turn.awaited:
            turn.awaited.discard(worker)
            turn.answers[worker] = answer

    def gone(self, worker: int) -> None:
        """Note that a worker is dead: it will not answer, and is not waiting for answers."""
        self._queue = deque(one for one in self._queue if one.asker != worker)
        turn = self._turn
        if turn is None:
            return
        if worker in turn.awaited:
            turn.awaited.discard(worker)
            turn.answers[worker] = {"error": f"worker {worker} ended before it answered", "gone": True}
        if turn.broadcast.asker == worker:
            turn.broadcast = Broadcast(turn.broadcast.command, turn.broadcast.sticky, turn.broadcast.timeout_s)

    def settle(self, now_s: float) -> tuple[Broadcast, list[tuple[int, Json]]] | None:
        """Return the command that all have answered, or whose time is up, and the answers; None while it is running."""
        turn = self._turn
        if turn is None or (turn.awaited and now_s < turn.deadline_s):
            return None
        for worker in turn.awaited:
            turn.answers[worker] = {
                "error": f"worker {worker} did not answer within {turn.broadcast.timeout_s:g} s; it may still do so",
                "late": True,
            }
        self._turn = None
        answers = sorted(turn.answers.items())
        if turn.broadcast.sticky and any("error" not in answer or "late" in answer for _, answer in answers):
            command = turn.broadcast.command
            self._history = [*(one for one in self._history if one != command), command]
        return turn.broadcast, answers


@dataclass(eq=False, slots=True)
class _Worker:
    """A live process and our end of its channel."""

    number: int
    pid: int
    channel: Channel
    far_end: socket.socket
    """The worker's end. Kept, so that connections a dead worker had not taken can be taken back."""
    open_at: int
    """Where in the counts its open connections are; the ones taken are next to it."""
    started_s: float
    n_sent: int = 0
    attached: bool = False
    ready: bool = False
    writing: bool = False
    drained: bool = False
    told: str = ""
    """Why it ends, in its own words or ours."""


Phase = Literal["serving", "leaving", "draining", "ending"]


class Supervisor:
    """See `supervise`. One object per process: it owns the signal handlers while it runs."""

    def __init__(
        self,
        listeners: Mapping[str, socket.socket],
        settings: SupervisorSettings,
        worker: Callable[[Seat], int],
        *,
        on_ready: Callable[[list[Json]], None],
        on_event: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._tags = tuple(listeners)
        self._listeners = tuple(listeners.values())
        self._worker = worker
        self._on_ready, self._on_event = on_ready, on_event
        self._pid = os.getpid()
        self._phase: Phase = "serving"
        self._workers: list[_Worker | None] = [None] * settings.n_workers
        self._takers: list[_Worker] = []
        self._last_taker = -1
        self._waiting: deque[tuple[int, socket.socket]] = deque()
        self._accepting = False
        self._looking_again = False
        self._n_short_lives = [0] * settings.n_workers
        self._reports: dict[int, Json] = {}
        self._ever_ready = False
        self._all_were_ready = False
        self._patient_until_s = _NEVER
        self._broadcasts = Broadcasts()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._n_timers = 0
        self._n_cut_off = 0
        self._gave_up = False
        self._exit_code = 0
        self._max_connections = settings.max_connections

    def run(self) -> int:
        """Return the exit code; see `supervise`."""
        self._raise_file_limit()
        self._map_memory()
        self._selector = selectors.DefaultSelector()
        self._wakeup, far_wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        far_wakeup.setblocking(False)
        self._far_wakeup = far_wakeup
        for listener in self._listeners:
            listener.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_wakeup)
        # With a handler of Python's, the interpreter writes each signal's number to the wakeup socket.
        handlers = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        wakeup_before = signal.set_wakeup_fd(far_wakeup.fileno(), warn_on_full_buffer=False)
        gc.freeze()  # a collection in a worker would write to, and so copy, the pages it shares with its siblings
        try:
            for number in range(self._settings.n_workers):
                self._start(number)
            while not self._done():
                self._step()
        finally:
            self._close()
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            far_wakeup.close()
            gc.unfreeze()
        if self._n_cut_off and not self._gave_up:
            self._say(
                f"ended with {self._n_cut_off} connections unanswered; give it longer with a larger drain timeout "
                f"({self._settings.drain_timeout_s:g} s)"
            )
            return 1
        return self._exit_code

    # The loop.

    def _step(self) -> None:
        timeout_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, events in self._selector.select(timeout_s):
            key.data(events)
        if self._timers:
            now_s = time.monotonic()
            while self._timers and self._timers[0][0] <= now_s:
                heapq.heappop(self._timers)[2]()

    def _at(self, when_s: float, do: Callable[[], None]) -> None:
        """Call `do` then. Nothing is ever cancelled: what `do` is about may have passed, and it looks."""
        if when_s == _NEVER:
            return
        self._n_timers += 1
        heapq.heappush(self._timers, (when_s, self._n_timers, do))

    def _done(self) -> bool:
        return self._phase in ("draining", "ending") and not any(self._workers)

    def _on_wakeup(self, _events: int) -> None:
        for number in self._wakeup.recv(4096):
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGHUP:
                self._reload()
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stop()

    def _say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens; serving goes on
            self._on_event(text)

    # Connections.

    def _on_connections(self, tag: int, listener: socket.socket, _events: int) -> bool:
        """Accept a bounded batch and send each connection to the worker with the fewest; return whether more may be there."""
        if not self._accepting:
            return False  # the pause was among the same events
        takers = self._takers
        loads, rooms = self._loads_and_rooms()
        left = self._max_connections - self._n_open()
        batches: list[list[socket.socket]] = [[] for _ in takers]
        more = True
        for _ in range(FDS_PER_MESSAGE):
            chosen = fewest(loads, rooms, self._last_taker) if left > 0 else None
            if chosen is None:
                self._pause()
                break
            try:
                connection = listener.accept()[0]
            except BlockingIOError:
                more = False
                break
            except OSError as exc:
                if exc.errno in _OUT_OF_RESOURCES:  # it stays in the backlog
                    self._pause()
                    break
                continue  # a client that has left already costs only itself
            self._last_taker = chosen
            loads[chosen] += 1
            rooms[chosen] -= 1
            left -= 1
            batches[chosen].append(connection)
        for taker, batch in zip(takers, batches, strict=True):
            if batch:
                self._hand_over(taker, tag, batch)
        return more

    def _loads_and_rooms(self) -> tuple[list[int], list[int]]:
        """Return, of each taker, the connections it has or is about to get, and how many more may be on their way to it."""
        counts = self._counts
        loads, rooms = [], []
        for taker in self._takers:
            n_flying = taker.n_sent - counts[taker.open_at + 1]
            loads.append(counts[taker.open_at] + n_flying)
            rooms.append(0 if taker.writing else _INBOX - n_flying)
        return loads, rooms

    def _hand_over(self, worker: _Worker, tag: int, connections: list[socket.socket]) -> bool:
        """Send connections of one listener to a worker; those it cannot take now wait here, first in the line."""
        fds = [connection.fileno() for connection in connections]
        if worker.channel.hand_over(bytes((tag,)) * len(fds), fds):
            worker.n_sent += len(fds)
            for connection in connections:
                connection.close()
            return True
        self._want_to_write(worker, True)  # nothing for it until there is room in its channel
        self._waiting.extend((tag, connection) for connection in connections)
        self._pause()
        return False

    def _n_open(self) -> int:
        """Connections the workers have or are about to get."""
        counts = self._counts
        return sum(
            worker.n_sent + counts[worker.open_at] - counts[worker.open_at + 1]
            for worker in self._workers
            if worker is not None
        )

    def _pause(self) -> None:
        """Leave connections in the backlog, and look again soon: shared memory tells nobody that it has changed."""
        if self._accepting:
            self._accepting = False
            for listener in self._listeners:
                self._selector.unregister(listener)
        if not self._looking_again and self._takers:  # otherwise the next one that starts will resume
            self._looking_again = True
            self._at(time.monotonic() + _RETRY_S, self._look_again)

    def _look_again(self) -> None:
        self._looking_again = False
        self._resume()

    def _resume(self) -> None:
        """Hand over what waits here, then accept again, as far as there is room."""
        if self._phase not in ("serving", "leaving"):
            return
        while self._waiting and (taker := self._with_room()) is not None:
            tag, connection = self._waiting.popleft()
            if not self._hand_over(taker, tag, [connection]):
                self._waiting.rotate(1)
        if self._waiting or self._with_room() is None:
            self._pause()
        elif not self._accepting:
            self._accepting = True
            for tag, listener in enumerate(self._listeners):
                self._selector.register(listener, selectors.EVENT_READ, partial(self._on_connections, tag, listener))

    def _with_room(self) -> _Worker | None:
        loads, rooms = self._loads_and_rooms()
        chosen = fewest(loads, rooms, self._last_taker)
        if chosen is None or self._n_open() >= self._max_connections:
            return None
        self._last_taker = chosen
        return self._takers[chosen]

    def _choose_takers(self) -> None:
        """Decide who gets connections: the ready; where nobody has been for too long, those that load.

        At the first start nobody waits: a server that loads for minutes must be able to say that it lives.
        """
        live = [worker for worker in self._workers if worker is not None and worker.attached and not worker.told]
        ready = [worker for worker in live if worker.ready]
        now_s = time.monotonic()
        if ready or not self._ever_ready:
            self._patient_until_s = _NEVER
        elif self._patient_until_s == _NEVER:
            self._patient_until_s = now_s + _PATIENCE_S
            self._at(self._patient_until_s, self._choose_takers)
        impatient = not self._ever_ready or now_s >= self._patient_until_s
        self._takers = ready or (live if impatient else [])
        self._resume()

    # Workers.

    def _start(self, number: int) -> None:
        """Fork a worker for a seat."""
        if self._phase != "serving":
            return
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal to the whole group that met the child before it has let go of our handlers would be ours a second time.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of threads, which OpenBLAS and onnxruntime start at their import and can do without.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                near.close()
                self._be_worker(number, far, before)
        except OSError as exc:
            near.close()
            far.close()
            self._n_short_lives[number] += 1
            self._refill(number, f"cannot be started: {exc.strerror}")
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        open_at = number * (CELL_BYTES // 8)
        self._counts[open_at] = self._counts[open_at + 1] = 0
        worker = _Worker(number, pid, Channel(near), far, open_at, time.monotonic())
        self._workers[number] = worker
        self._selector.register(near, selectors.EVENT_READ, partial(self._on_channel, worker))
        self._at(worker.started_s + self._settings.start_timeout_s, partial(self._check_started, worker))

    def _be_worker(self, number: int, far: socket.socket, signals_before: Iterable[int]) -> NoReturn:
        """Live as a worker, in the process just forked. Never returns into the supervisor's code."""
        code = 1
        try:
            _die_with(self._pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A terminal or systemd sends these to all of us; the supervisor says what to do.
            for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(ignored, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, signals_before)
            self._let_go()
            channel = Channel(far)
            seat = Seat(
                number,
                self._settings.n_workers,
                channel=channel,
                tags=self._tags,
                counts=self._memory[number * CELL_BYTES : (number + 1) * CELL_BYTES],
                slabs=self._slabs,
                replay=self._broadcasts.replay,
            )
            try:
                code = int(self._worker(seat))
            except ModelyardError as exc:
                code = exc.exit_code
                seat.failed(exc.message)
            seat.close()
        except BaseException:  # noqa: BLE001  # whatever it was, this process must end here
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _let_go(self) -> None:
        """Close what belongs to the supervisor and to other workers, in a worker."""
        self._selector.close()
        self._wakeup.close()
        self._far_wakeup.close()
        for listener in self._listeners:
            listener.close()
        for _, connection in self._waiting:
            connection.close()
        for other in self._workers:
            if other is not None:
                other.channel.close()
                other.far_end.close()

    def _reap(self) -> None:
        for worker in self._workers:
            if worker is None:
                continue
            try:
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                pid, status = worker.pid, 1 << 8
            if pid:
                self._on_death(worker, os.waitstatus_to_exitcode(status))

    def _on_death(self, worker: _Worker, code: int) -> None:
        self._on_channel(worker, selectors.EVENT_READ)  # its last words
        self._workers[worker.number] = None
        self._reports.pop(worker.number, None)
        self._selector.unregister(worker.channel.socket)
        worker.channel.close()
        n_cut_off = self._counts[worker.open_at] + self._take_back(worker)
        self._choose_takers()  # they also get what was taken back
        if self._phase == "serving":
            self._replace(worker, code)
        else:
            self._count_out(worker, code, n_cut_off)
        self._broadcasts.gone(worker.number)
        self._go_on_broadcasting()

    def _replace(self, dead: _Worker, code: int) -> None:
        number = dead.number
        short = not dead.ready or time.monotonic() - dead.started_s < _SHORT_LIFE_S
        self._n_short_lives[number] = self._n_short_lives[number] + 1 if short else 0
        if not self._ever_ready and (code == 2 or self._n_short_lives[number] >= _FIRST_TRIES):
            self._give_up(2 if code == 2 else 1, dead.told or f"worker {number} {_ended(code)} before it was ready")
        else:
            self._refill(number, f"(pid {dead.pid}) {dead.told or _ended(code)}")

    def _refill(self, number: int, why: str) -> None:
        """Put a new worker on a seat, at once or after a while."""
        n_short = self._n_short_lives[number]
        delay_s = restart_delay_s(n_short)
        if delay_s == 0:
            self._say(f"worker {number} {why}; replaced")
            self._start(number)
        else:
            self._say(
                f"worker {number} {why}; replaced in {delay_s:g} s, the last {n_short} ended soon after their start"
            )
            self._at(time.monotonic() + delay_s, partial(self._start, number))

    def _count_out(self, worker: _Worker, code: int, n_cut_off: int) -> None:
        """Note how a worker has ended, now that all are to end."""
        if self._phase != "leaving":
            self._drop_waiting()
        if not worker.drained:
            self._n_cut_off += n_cut_off
        if worker.attached and code:
            self._exit_code = self._exit_code or 1
            if not worker.told:
                self._say(f"worker {worker.number} (pid {worker.pid}) {_ended(code)} while it was draining")

    def _take_back(self, worker: _Worker) -> int:
        """Read what a dead worker had not: those connections go to others. Returns how many could not be saved."""
        far = Channel(worker.far_end)
        n_saved = 0
        with contextlib.suppress(EOFError):
            while (item := far.receive()) is not None:
                if isinstance(item, Connections):
                    n_saved += len(item.fds)
                    for tag, fd in zip(item.tags, item.fds, strict=False):
                        self._waiting.append((tag, socket.socket(fileno=fd)))
        far.close()
        return max(0, worker.n_sent - self._counts[worker.open_at + 1] - n_saved)

    def _check_started(self, worker: _Worker) -> None:
        if self._workers[worker.number] is worker and not worker.ready:
            self._kill(worker, f"was not ready within {self._settings.start_timeout_s:g} s")

    def _kill(self, worker: _Worker, why: str) -> None:
        if self._workers[worker.number] is worker:
            worker.told = worker.told or why
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)

    def _give_up(self, code: int, reason: str) -> None:
        """End without ever having served."""
        self._say(f"error: {reason}")
        self._phase = "ending"
        self._exit_code, self._gave_up = code, True
        for worker in self._workers:
            if worker is not None:
                self._kill(worker, "none could start")

    # Messages.

    def _on_channel(self, worker: _Worker, events: int) -> None:
        if self._workers[worker.number] is not worker:
            return  # its death was among the same events
        if events & selectors.EVENT_WRITE and worker.channel.flush():
            self._want_to_write(worker, False)
        if events & selectors.EVENT_READ:
            try:
                while (message := worker.channel.receive()) is not None:
                    if not isinstance(message, Connections):
                        self._hear(worker, message)
            except (EOFError, ValueError) as exc:
                self._kill(worker, f"sent what is no message: {exc}")

    def _hear(self, worker: _Worker, message: Message) -> None:
        match message:
            case Attached():
                worker.attached = True
                self._choose_takers()
            case Ready(report):
                self._on_worker_ready(worker, report)
            case Ask(ask_id, command, sticky, timeout_s):
                self._broadcasts.ask(Broadcast(command, sticky, timeout_s, worker.number, ask_id))
                self._go_on_broadcasting()
            case Answered(number, answer):
                self._broadcasts.answered(worker.number, number, answer)
                self._go_on_broadcasting()
            case Drained(n_cut_off):
                worker.drained = True
                self._n_cut_off += n_cut_off
            case Failed(text):
                worker.told = text

    def _on_worker_ready(self, worker: _Worker, report: Json) -> None:
        worker.ready = self._ever_ready = True
        self._reports[worker.number] = report
        self._choose_takers()
        if len(self._reports) == self._settings.n_workers and not self._all_were_ready:
            self._all_were_ready = True
            with contextlib.suppress(BrokenPipeError):
                self._on_ready([self._reports[number] for number in range(self._settings.n_workers)])
        elif self._all_were_ready:
            self._say(f"worker {worker.number} (pid {worker.pid}) is ready")

    def _reload(self) -> None:
        self._broadcasts.ask(Broadcast({"command": "reload"}, sticky=False, timeout_s=self._settings.reload_timeout_s))
        self._go_on_broadcasting()

    def _go_on_broadcasting(self) -> None:
        """Settle what is settled and start what can start, until one has to wait."""
        while True:
            now_s = time.monotonic()
            settled = self._broadcasts.settle(now_s)
            if settled is not None:
                self._tell(*settled)
            started = self._broadcasts.next([one.number for one in self._workers if one is not None], now_s)
            if started is None:
                return
            command, numbers = started
            for number in numbers:
                worker = self._workers[number]
                if worker is not None:
                    self._send(worker, command)
            assert self._broadcasts.deadline_s is not None
            self._at(self._broadcasts.deadline_s, self._go_on_broadcasting)

    def _tell(self, broadcast: Broadcast, answers: list[tuple[int, Json]]) -> None:
        if broadcast.asker is None:
            for number, answer in answers:
                if "error" in answer:
                    self._say(f"worker {number}: {broadcast.command.get('command')} failed: {answer['error']}")
            return
        asker = self._workers[broadcast.asker]
        if asker is None:
            return
        try:
            self._send(asker, Settled(broadcast.ask_id, answers))
        except ValueError as exc:
            self._send(asker, Settled(broadcast.ask_id, [(number, {"error": str(exc)}) for number, _ in answers]))

    def _send(self, worker: _Worker, message: Command | Settled | Drain | End) -> None:
        if worker.channel.send(message):
            return
        self._want_to_write(worker, True)
        if worker.channel.n_unsent_bytes > _MOST_UNSENT_BYTES:
            self._kill(worker, f"has left {worker.channel.n_unsent_bytes} bytes of commands unread")

    def _want_to_write(self, worker: _Worker, wanted: bool) -> None:
        if worker.writing != wanted:
            worker.writing = wanted
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
            self._selector.modify(worker.channel.socket, events, partial(self._on_channel, worker))

    # The end.

    def _stop(self) -> None:
        """The first signal: drain. The second: end at once."""
        if self._phase == "serving":
            self._phase = "leaving"
            now_s = time.monotonic()
            self._leave_by_s = now_s + _LEAVE_S
            self._at(now_s + _ON_THE_WIRE_S, self._drain)
            self._at(now_s + self._settings.drain_timeout_s, self._end)
        elif self._phase != "ending":
            self._end()

    def _drain(self) -> None:
        """Hand over what is in the backlog, close the port, and let the workers finish."""
        if self._phase != "leaving":
            return
        for tag, listener in enumerate(self._listeners):
            while self._accepting and self._on_connections(tag, listener, selectors.EVENT_READ):
                pass
        if self._takers and not self._accepting and time.monotonic() < self._leave_by_s:
            self._at(time.monotonic() + _RETRY_S, self._drain)  # the workers are too busy to take the last ones
            return
        self._close_port()
        self._phase = "draining"
        for worker in self._workers:
            if worker is not None:
                if worker.attached:
                    self._send(worker, Drain())
                else:
                    self._kill(worker, "had not begun")

    def _end(self) -> None:
        if self._phase == "ending":
            return
        self._close_port()
        self._phase = "ending"
        for worker in self._workers:
            if worker is not None and worker.attached:
                self._send(worker, End())
                self._at(time.monotonic() + _END_S, partial(self._kill, worker, "did not end"))
            elif worker is not None:
                self._kill(worker, "had not begun")

    def _close_port(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self._listeners:
                self._selector.unregister(listener)
        for listener in self._listeners:
            listener.close()
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        self._n_cut_off += len(self._waiting)
        while self._waiting:
            self._waiting.popleft()[1].close()

    def _close(self) -> None:
        """Leave nothing behind, also after a bug of ours."""
        self._close_port()
        for worker in self._workers:
            if worker is not None:
                self._kill(worker, "the supervisor ended")
                os.waitpid(worker.pid, 0)
                worker.channel.close()
                worker.far_end.close()
        self._selector.close()
        self._wakeup.close()

    # The start.

    def _map_memory(self) -> None:
        """Lay out the shared memory: a page or more of counts, then the slabs, all zero."""
        n, size = self._settings.n_workers, _pages(self._settings.slab_bytes)
        first = _pages(n * CELL_BYTES)
        self._memory = memoryview(mmap.mmap(-1, first + n * size))  # anonymous and shared
        self._counts = self._memory[: n * CELL_BYTES].cast("Q")
        starts = [first + number * size for number in range(n)]
        self._slabs = tuple(self._memory[start : start + self._settings.slab_bytes] for start in starts)

    def _raise_file_limit(self) -> None:
        """Let a worker hold all connections, which it may have to when the others are dead."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self._settings.max_connections + _SPARE_FDS
        if soft < wanted and soft != resource.RLIM_INFINITY:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if soft < wanted:
                self._max_connections = max(1, soft - _SPARE_FDS)
                self._say(
                    f"at most {self._max_connections} connections instead of {self._settings.max_connections}: a process may "
                    f"have {soft} open files here; raise that with ulimit -n"
                )


def _ignore(_number: int, _frame: object) -> None:
    """Be there: the wakeup socket tells."""


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _ended(code: int) -> str:
    """Return how a process ended, given what os.waitstatus_to_exitcode says."""
    if code >= 0:
        return f"ended by itself with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies. Other systems than Linux rely on the channel's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
