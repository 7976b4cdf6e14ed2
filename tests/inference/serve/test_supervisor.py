"""Workers come and go, the port stays, nothing accepted is forgotten. Real processes and signals; decisions by their laws."""

import asyncio
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from modelyard.errors import ConfigError
from modelyard.inference.serve.processes.seat import (
    CELL_BYTES,
    FDS_PER_MESSAGE,
    LONGEST_MESSAGE_BYTES,
    Attached,
    Channel,
    Command,
    Connections,
    Drain,
    Seat,
)
from modelyard.inference.serve.processes.supervisor import (
    Broadcast,
    Broadcasts,
    SupervisorSettings,
    fewest,
    restart_delay_s,
)

ECHO_WORKERS = Path(__file__).parent / "echo_workers.py"
PATIENCE_S = 60.0
"""What any single step may take on a busy machine; no test waits this long when things work."""


class Server:
    """The echo workers and what they tell."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.told: list[dict[str, Any]] = []
        self.clients: list[Client] = []
        start = self.next()
        self.ports, self.pid = start["ports"], start["pid"]

    def next(self) -> dict[str, Any]:
        """Return the next thing told; {} at the end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {}
        self.told.append(told)
        return told

    def await_event(self, words: str) -> str:
        while told := self.next():
            if words in told.get("event", ""):
                return str(told["event"])
        raise AssertionError(f"{words!r} was never told; but {self.told}")

    def await_ready(self) -> list[dict[str, Any]]:
        while told := self.next():
            if "ready" in told:
                return list(told["ready"])
        raise AssertionError(f"never ready; but {self.told}")

    def connect(self, tag: str = "http") -> "Client":
        client = Client(self.ports[tag])
        self.clients.append(client)
        return client

    def connect_to_each(self) -> dict[int, "Client"]:
        """Return a connection to each of the two workers, by number."""
        found: dict[int, Client] = {}
        while len(found) < 2:
            client = self.connect()
            found.setdefault(client.worker()[0], client)
        return found

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        while self.next():
            pass
        return self.process.wait(PATIENCE_S)

    def events(self) -> list[str]:
        return [told["event"] for told in self.told if "event" in told]


class Client:
    """A connection to a worker."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.lines = self.socket.makefile("r")

    def send(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def read(self) -> str:
        """Return the next line, empty at the end of the connection."""
        return self.lines.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        self.send(line)
        return self.read()

    def worker(self) -> tuple[int, int]:
        number, pid, _ = self.ask("who").split()
        return int(number), int(pid)

    def broadcast(self, ask: dict[str, Any], **how: Any) -> list[Any]:
        answers: list[Any] = json.loads(self.ask("broadcast " + json.dumps({"ask": ask, **how})))
        return answers

    def commands(self) -> list[dict[str, Any]]:
        done: list[dict[str, Any]] = json.loads(self.ask("commands"))
        return done

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@contextmanager
def running(options: dict[str, Any] | None = None, **settings: Any) -> Iterator[Server]:
    arguments = {**(options or {}), "settings": settings}
    process = subprocess.Popen(
        [sys.executable, str(ECHO_WORKERS), json.dumps(arguments)], stdout=subprocess.PIPE, text=True
    )
    server = Server(process)
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        for client in server.clients:
            client.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as one:
        one.await_ready()
        yield one


def gone(pid: int) -> bool:
    """Say whether a process has ended, whoever is to wait for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def await_gone(pid: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not gone(pid):
        assert time.monotonic() < deadline_s, f"{pid} lives"
        os.sched_yield()


def kill_one(server: Server) -> int:
    """Kill one worker with connections waiting in nobody's hands; return its number."""
    client = server.connect()
    number, pid = client.worker()
    os.kill(pid, signal.SIGKILL)
    assert client.read() == ""
    client.close()
    return number


# Connections.


def test_connections_are_spread_evenly_over_the_workers(server: Server) -> None:
    clients = [server.connect() for _ in range(64)]
    spread = Counter(client.worker()[0] for client in clients)
    assert sorted(spread) == [0, 1]
    assert max(spread.values()) <= 33  # one may be counted late on a busy machine


def test_whoever_has_the_fewest_gets_the_next(server: Server) -> None:
    by_worker: dict[int, list[Client]] = {0: [], 1: []}
    for _ in range(20):
        client = server.connect()
        by_worker[client.worker()[0]].append(client)
    for client in by_worker[0]:
        client.close()
    # A close is noticed by the worker, not by us: ask it until the count is known to be right.
    while (probe := server.connect()).worker()[0] != 0:
        probe.close()
    assert {server.connect().worker()[0] for _ in range(8)} == {0}


def test_a_connection_brings_the_tag_of_its_listener(server: Server) -> None:
    assert server.connect("http").ask("who").endswith(" http")
    assert server.connect("metrics").ask("who").endswith(" metrics")


def test_one_worker_is_served_the_same_way() -> None:
    with running(n_workers=1) as server:
        (report,) = server.await_ready()
        assert {server.connect().worker() for _ in range(5)} == {(0, report["pid"])}
        server.process.terminate()
        assert server.end() == 0


def test_above_the_limit_connections_wait_until_others_close() -> None:
    with running(max_connections=4) as server:
        server.await_ready()
        clients = [server.connect() for _ in range(4)]
        for client in clients:
            client.ask("echo x")
        late = server.connect()
        late.send("echo at last")
        with selectors.DefaultSelector() as selector:
            selector.register(late.socket, selectors.EVENT_READ)
            assert selector.select(0.1) == []
        clients[0].close()
        assert late.read() == "at last"


def test_a_worker_that_stops_reading_holds_up_only_itself(server: Server) -> None:
    """Far more connections than its inbox takes are opened meanwhile; the other worker answers them."""
    stalled = server.connect()
    number, pid = stalled.worker()
    os.kill(pid, signal.SIGSTOP)
    try:
        answered = 0
        clients = []
        for _ in range(400):
            client = server.connect()
            client.send("echo x")
            clients.append(client)
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client.socket, selectors.EVENT_READ)
            while answered < 400 - 100:
                for key, _ in selector.select(PATIENCE_S):
                    answered += 1
                    selector.unregister(key.fileobj)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [client.read() for client in clients] == ["x"] * 400
    assert stalled.worker() == (number, pid)


def test_while_models_load_the_first_connections_are_served_already() -> None:
    with running({"load_s": 30}) as server:
        assert server.connect().ask("echo loading") == "loading"
        server.process.terminate()
        assert server.end() == 0


# Deaths.


def test_killed_workers_are_replaced_and_no_connection_is_refused(server: Server) -> None:
    """Clients connect and ask without pause while workers die; only a connection with a dead worker ends early."""
    stop = threading.Event()
    refused: list[OSError] = []
    n_answered, n_cut, longest_s = [0, 0], [0, 0], [0.0, 0.0]

    def stream(who: int) -> None:
        while not stop.is_set():
            begun_s = time.monotonic()
            try:
                client = Client(server.ports["http"])
            except OSError as exc:
                refused.append(exc)
                return
            try:
                answer = client.ask("echo x")
            except OSError:
                answer = ""
            client.close()
            n_answered[who] += answer == "x"
            n_cut[who] += answer == ""
            longest_s[who] = max(longest_s[who], time.monotonic() - begun_s)

    threads = [threading.Thread(target=stream, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            number = kill_one(server)
            assert "was killed by SIGKILL" in server.await_event(f"worker {number} (pid")
            server.await_event("is ready")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert refused == []
    assert min(n_answered) > 0
    assert sum(n_cut) <= 4 * 2  # at most each stream's one connection at each death
    assert {server.connect().worker()[0] for _ in range(2)} == {0, 1}


def test_connections_a_dead_worker_had_not_taken_go_to_others(server: Server) -> None:
    client = server.connect()
    _, pid = client.worker()
    os.kill(pid, signal.SIGSTOP)
    untaken = [server.connect() for _ in range(20)]
    for one in untaken:
        one.send("echo saved")
    os.kill(pid, signal.SIGKILL)
    assert [one.read() for one in untaken] == ["saved"] * 20


def test_when_all_workers_are_dead_connections_wait_for_the_next(server: Server) -> None:
    for client in server.connect_to_each().values():
        os.kill(client.worker()[1], signal.SIGKILL)
    assert server.connect().ask("echo still there") == "still there"


def test_number_and_slab_pass_to_the_replacement(server: Server) -> None:
    clients = server.connect_to_each()
    assert json.loads(clients[0].ask("count")) == [1, 0]
    assert json.loads(clients[1].ask("count")) == [1, 1]
    _, pid = clients[0].worker()
    os.kill(pid, signal.SIGKILL)
    server.await_event("is ready")
    replacement = server.connect()
    number, new_pid = replacement.worker()
    assert number == 0
    assert new_pid != pid
    assert json.loads(replacement.ask("count")) == [2, 1]


@pytest.mark.parametrize(
    ("start", "code", "reason"),
    [
        ("die", 1, "was killed by SIGKILL before it was ready"),
        ("raise", 1, "ended by itself with code 1 before it was ready"),
        ("exit", 1, "ended by itself with code 3 before it was ready"),
        ("refuse", 2, "no model could be loaded"),
    ],
)
def test_when_no_worker_can_start_the_server_gives_up_and_says_why(start: str, code: int, reason: str) -> None:
    with running({"start": {"0": start, "1": start}}) as server:
        assert server.end() == code
        errors = [event for event in server.events() if event.startswith("error: ")]
        assert len(errors) == 1
        assert reason in errors[0]
        n_deaths = len([event for event in server.events() if "replaced" in event])
        assert n_deaths <= 4


def test_a_worker_that_never_becomes_ready_is_ended(tmp_path: Path) -> None:
    with running({"start": {"0": "hang"}}, n_workers=1, start_timeout_s=0.05) as server:
        assert server.end() == 1
        assert "was not ready within 0.05 s" in server.events()[-1]


def test_one_seat_that_cannot_be_filled_does_not_stop_the_others(tmp_path: Path) -> None:
    with running({"start": {"1": "exit"}}) as server:
        assert server.connect().worker()[0] == 0
        server.await_event("replaced in 0.4 s, the last 4 ended soon after their start")
        assert server.connect().worker()[0] == 0


def test_workers_end_with_their_supervisor(server: Server) -> None:
    pids = [client.worker()[1] for client in server.connect_to_each().values()]
    server.process.kill()
    for pid in pids:
        await_gone(pid)


def test_workers_forked_after_onnxruntime_was_imported_compute(tmp_path: Path) -> None:
    """And so do their replacements, forked later: the library's threads, which no fork keeps, are not missed."""
    model = tmp_path / "model.onnx"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", [x], [y])
    opset = helper.make_opsetid("", 17)
    model.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())
    with running({"model": str(model)}) as server:
        server.await_ready()
        for _ in range(5):
            kill_one(server)
            server.await_event("is ready")
        server.process.terminate()
        assert server.end() == 0


# The end.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_what_is_in_flight_is_answered(server: Server, number: signal.Signals) -> None:
    clients = [server.connect() for _ in range(10)]
    for client in clients[:6]:
        client.send("later 0.5 done")
    for client in clients[6:]:
        client.ask("echo idle now")
    server.process.send_signal(number)
    assert [client.read() for client in clients[:6]] == ["done"] * 6
    assert [client.read() for client in clients[6:]] == [""] * 4
    assert server.end() == 0
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_what_was_sent_before_the_signal_could_be_known_is_answered(server: Server) -> None:
    clients = []
    for _ in range(50):
        client = server.connect()
        client.send("echo x")
        clients.append(client)
    server.process.terminate()
    assert [client.read() for client in clients] == ["x"] * 50
    assert server.end() == 0


def test_signals_to_the_whole_group_drain_too() -> None:
    """As a terminal's Ctrl-C and systemd do: the workers leave it to the supervisor."""
    with running() as server:
        server.await_ready()
        client = server.connect()
        pids = [client.worker()[1], server.connect().worker()[1], server.pid]
        client.send("later 0.3 done")
        assert server.connect().ask("echo x") == "x"
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        assert client.read() == "done"
        assert server.end() == 0


def test_the_drain_timeout_cuts_off_what_is_left_and_says_so() -> None:
    with running(drain_timeout_s=0.2) as server:
        server.await_ready()
        client = server.connect()
        client.send("later 60 never")
        assert server.connect().ask("echo x") == "x"
        server.process.terminate()
        assert client.read() == ""
        assert server.end() == 1
        assert "ended with 1 connections unanswered" in server.events()[-1]


def test_a_second_signal_ends_at_once(server: Server) -> None:
    client = server.connect()
    client.send("later 60 never")
    idle = server.connect()
    assert idle.ask("echo x") == "x"
    server.process.terminate()
    assert idle.read() == ""  # draining has begun
    server.process.terminate()
    assert client.read() == ""
    assert server.end() == 1


def test_a_worker_that_cannot_hear_is_killed_in_the_end() -> None:
    with running(drain_timeout_s=0.1) as server:
        server.await_ready()
        client = server.connect()
        client.ask("who")
        client.send("stall 60")
        server.process.terminate()
        assert client.read() == ""
        assert server.end() == 1


def test_a_worker_killed_while_draining_is_not_replaced_and_counted(server: Server) -> None:
    clients = server.connect_to_each()
    for client in clients.values():
        client.send("later 1 done")
    idle = server.connect()
    assert idle.ask("echo x") == "x"
    _, pid = server.connect().worker()
    server.process.terminate()
    assert idle.read() == ""  # draining has begun
    os.kill(pid, signal.SIGKILL)
    assert sorted(client.read() for client in clients.values()) == ["", "done"]
    assert server.end() == 1
    assert any("was killed by SIGKILL while it was draining" in event for event in server.events())


def test_stopping_before_anything_is_ready_is_quick_and_clean() -> None:
    with running({"start": {"0": "hang"}, "load_s": 60}) as server:
        assert server.connect().worker()[0] == 1
        server.process.terminate()
        assert server.end() == 0


# Commands.


def test_a_broadcast_reaches_every_worker_and_returns_their_answers(server: Server) -> None:
    clients = server.connect_to_each()
    pids = {number: client.worker()[1] for number, client in clients.items()}
    assert clients[0].broadcast({"command": "set"}) == [[0, {"pid": pids[0]}], [1, {"pid": pids[1]}]]
    assert clients[1].broadcast({"command": "refuse"}) == [[0, {"error": "never"}], [1, {"error": "never"}]]
    assert clients[1].broadcast({"command": "raise"})[0] == [0, {"error": "ValueError: a bug"}]


def test_all_workers_see_all_commands_in_one_order(server: Server) -> None:
    clients = server.connect_to_each()
    for n in range(25):
        for client in clients.values():
            client.send("broadcast " + json.dumps({"ask": {"command": "set", "n": n}}))
    for client in clients.values():
        for _ in range(25):
            assert len(json.loads(client.read())) == 2
    assert len(clients[0].commands()) == 50
    assert clients[0].commands() == clients[1].commands()


def test_a_worker_that_dies_in_the_middle_is_answered_for(server: Server) -> None:
    clients = server.connect_to_each()
    answers = dict(clients[0].broadcast({"command": "die", "number": 1}))
    assert "pid" in answers[0]
    assert answers[1] == {"error": "worker 1 ended before it answered", "gone": True}


def test_an_asker_that_dies_does_not_stop_the_others(server: Server) -> None:
    clients = server.connect_to_each()
    clients[0].send("broadcast " + json.dumps({"ask": {"command": "die", "number": 0}}))
    assert clients[0].read() == ""
    assert {number for number, answer in clients[1].broadcast({"command": "set"}) if "pid" in answer} >= {1}


def test_a_worker_that_does_not_answer_in_time_is_answered_for(server: Server) -> None:
    clients = server.connect_to_each()
    answers = dict(clients[0].broadcast({"command": "sleep", "number": 1, "seconds": 60}, timeout_s=0.1))
    assert "pid" in answers[0]
    assert "did not answer within 0.1 s" in answers[1]["error"]


def test_a_replacement_is_told_what_it_missed_before_it_is_ready(server: Server) -> None:
    client = server.connect()
    for n in (1, 2, 1):
        client.broadcast({"command": "set", "n": n}, sticky=True)
    client.broadcast({"command": "set", "n": 3})
    client.broadcast({"command": "refuse"}, sticky=True)
    client.close()
    number = kill_one(server)
    server.await_event("is ready")
    replacement = server.connect()
    while replacement.worker()[0] != number:
        replacement = server.connect()
    assert replacement.commands() == [{"command": "set", "n": 2}, {"command": "set", "n": 1}]


def test_sighup_asks_every_worker_to_reload(server: Server) -> None:
    clients = server.connect_to_each()
    server.process.send_signal(signal.SIGHUP)
    for client in clients.values():
        while not client.commands():
            os.sched_yield()
        assert client.commands() == [{"command": "reload"}]


def test_a_worker_that_leaves_its_commands_unread_is_replaced(server: Server) -> None:
    """It could not be told in order what the others do."""
    clients = server.connect_to_each()
    _, pid = clients[1].worker()
    os.kill(pid, signal.SIGSTOP)
    for _ in range(5):
        answers = clients[0].broadcast({"command": "set", "text": "x" * 15_000_000}, timeout_s=0.01)
    assert "error" in answers[1][1]
    assert "bytes of commands unread" in server.await_event("worker 1 (pid")
    server.await_event("is ready")


def test_long_answers_travel_in_parts(server: Server) -> None:
    answers = server.connect().broadcast({"command": "shout", "n_bytes": 3_000_000})
    assert [len(answer["text"]) for _, answer in answers] == [3_000_000, 3_000_000]


def test_answers_too_long_to_travel_are_errors(server: Server) -> None:
    client = server.connect()
    answers = client.broadcast({"command": "shout", "n_bytes": LONGEST_MESSAGE_BYTES})
    assert "must have at most" in answers[0][1]["error"]
    answers = client.broadcast({"command": "shout", "n_bytes": LONGEST_MESSAGE_BYTES // 2})
    assert "must have at most" in answers[0][1]["error"]


# A worker's end.


def test_a_worker_ends_when_its_channel_does() -> None:
    asyncio.run(see_the_channel_end())


async def see_the_channel_end() -> None:
    near, far = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    slab = memoryview(bytearray(64))
    seat = Seat(0, 1, channel=far, tags=["http"], counts=memoryview(bytearray(CELL_BYTES)), slabs=[slab])
    ended = asyncio.Event()

    async def obey(command: dict[str, Any]) -> dict[str, Any]:
        return {}

    seat.attach(
        asyncio.get_running_loop(),
        on_connection=lambda tag, accepted: accepted.close(),
        on_command=obey,
        on_drain=lambda: None,
        on_end=ended.set,
    )
    assert near.receive() == Attached()
    near.close()
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    seat.close()


# The channel.


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = Channel(pair[0]), Channel(pair[1])
    yield ends
    for end in ends:
        end.close()


def test_a_channel_whose_other_end_does_not_read_never_blocks(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    sent = [Command(n, {"text": "x" * 100_000}) for n in range(50)]
    assert [near.send(command) for command in sent].count(False) > 0
    assert near.n_unsent_bytes > 0
    received: list[object] = []
    while len(received) < 50:
        message = far.receive()
        if message is None:
            near.flush()
        else:
            received.append(message)
    assert received == sent
    assert near.n_unsent_bytes == 0


def test_connections_and_messages_arrive_in_order(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fds = [listener.fileno()] * FDS_PER_MESSAGE
        near.send(Command(1, {"command": "set"}))
        assert near.hand_over(bytes(range(FDS_PER_MESSAGE)), fds)
        near.send(Drain())
        assert far.receive() == Command(1, {"command": "set"})
        connections = far.receive()
        assert isinstance(connections, Connections)
        assert connections.tags == bytes(range(FDS_PER_MESSAGE))
        for fd in connections.fds:
            assert not os.get_inheritable(fd)
            os.close(fd)
        assert far.receive() == Drain()
        assert far.receive() is None


def test_an_inbox_that_is_full_takes_no_connection(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    with socket.create_server(("127.0.0.1", 0)) as listener:
        n = 0
        while near.hand_over(b"\0", [listener.fileno()]):
            n += 1
        assert n >= 64
        for _ in range(n):
            connections = far.receive()
            assert isinstance(connections, Connections)
            os.close(connections.fds[0])
        assert far.receive() is None


def test_the_end_of_the_other_end_is_noticed(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    near.send(Drain())
    near.close()
    assert far.receive() == Drain()
    with pytest.raises(EOFError):
        far.receive()
    assert far.send(Drain())  # into the void, without complaint


# Decisions.


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 3)), max_size=8),
    st.integers(-1, 10),
)
def test_the_next_connection_goes_to_the_smallest_load_with_room(workers: list[tuple[int, int]], after: int) -> None:
    loads, rooms = [load for load, _ in workers], [room for _, room in workers]
    chosen = fewest(loads, rooms, after)
    with_room = [load for load, room in workers if room]
    if chosen is None:
        assert with_room == []
    else:
        assert rooms[chosen] > 0
        assert loads[chosen] == min(with_room)


def test_equal_loads_take_turns() -> None:
    last, turns = -1, []
    for _ in range(6):
        chosen = fewest([5, 5, 5], [1, 1, 1], last)
        assert chosen is not None
        last = chosen
        turns.append(last)
    assert turns == [0, 1, 2, 0, 1, 2]


@given(st.integers(0, 200))
def test_replacing_is_immediate_at_first_and_never_slower_than_once_a_second(n_short_lives: int) -> None:
    delay_s = restart_delay_s(n_short_lives)
    assert delay_s == 0 if n_short_lives <= 1 else 0.1 <= delay_s <= 1.0
    assert delay_s <= restart_delay_s(n_short_lives + 1)


Step = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("answer"), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("die"), st.integers(0, 2)),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 10.0])),
)


@given(st.lists(Step, max_size=40))
def test_every_command_is_settled_once_and_every_worker_knows_the_same(steps: list[Any]) -> None:
    """Three workers ask, answer, die and are replaced at once, in any order."""
    broadcasts = Broadcasts()
    now_s = 0.0
    inboxes: list[list[Command]] = [[], [], []]
    applied: list[list[Any]] = [[], [], []]  # sticky commands by worker, as told by replay or command
    sticky_ids: set[int] = set()
    asked = forgotten = settled = 0

    def go_on() -> None:
        nonlocal settled
        while True:
            done = broadcasts.settle(now_s)
            if done is not None:
                settled += 1
                assert [number for number, _ in done[1]] == [0, 1, 2]
            started = broadcasts.next(range(3), now_s)
            if started is None:
                return
            command, to = started
            for number in to:
                inboxes[number].append(command)
                if command.command["id"] in sticky_ids:
                    applied[number].append(command.command)

    for step in steps:
        match step:
            case ("ask", worker, what, sticky):
                asked += 1
                if sticky:
                    sticky_ids.add(asked)
                broadcasts.ask(Broadcast({"what": what, "id": asked}, sticky, 1.0, worker, asked))
            case ("answer", worker, good):
                if inboxes[worker]:
                    command = inboxes[worker].pop(0)
                    broadcasts.answered(worker, command.number, {} if good else {"error": "no"})
            case ("die", worker):
                before = len(broadcasts._queue)
                broadcasts.gone(worker)
                forgotten += before - len(broadcasts._queue)
                inboxes[worker].clear()
                applied[worker] = list(broadcasts.replay)
            case ("wait", seconds):
                now_s += seconds
        go_on()
    for _ in range(asked + 1):
        now_s += 10.0
        go_on()
    assert settled + forgotten == asked
    assert broadcasts.deadline_s is None
    for worker in range(3):
        kept = [command for command in applied[worker] if command in broadcasts.replay]
        assert kept == list(broadcasts.replay)


@pytest.mark.parametrize("field", ["n_workers", "max_connections", "slab_bytes", "drain_timeout_s"])
def test_settings_out_of_range_are_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least"):
        SupervisorSettings(**{field: -1})
