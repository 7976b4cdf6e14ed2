"""A started server: its processes, what they use, and the answers it is asked for before anything is timed.

Reads /proc, so Linux only. Ends only processes that it started: the root and the descendants it has seen.
"""

import concurrent.futures
import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bodies import Post, answer, post
from .workloads import Workload

TOLERANCE = 1e-4
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ServerFailed(RuntimeError):
    """A server under test did not start, or answered wrongly; its log says why."""


class Refused(ServerFailed):
    """It had too much to do just then; no answer, but no wrong one."""


@dataclass(frozen=True)
class Memory:
    """RSS counts shared pages once per process, PSS once in all."""

    rss_bytes: int
    pss_bytes: int
    n_processes: int


@dataclass(frozen=True)
class Asking:
    """How a server takes rows: the body format, and the path to post it to, which may hold {model}."""

    form: str
    path: str


class Server:
    """One started process tree that answers `workload` on `port`.

    `stop` must be called. Only `ask` may be called from several threads at once.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        log: Path,
        port: int,
        asking: Asking,
        workload: Workload,
    ) -> None:
        self.port, self.asking, self.workload, self.log = port, asking, workload, log
        with np.load(workload.model.vectors) as vectors:
            self.x: NDArray[Any] = vectors["x"]
            self.y: NDArray[Any] = vectors["y"]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started_s = time.perf_counter()
        with log.open("wb") as sink:
            self._root = subprocess.Popen(
                argv, env={**os.environ, **env}, cwd=folder, stdout=sink, stderr=sink, start_new_session=True
            )
        self._seen: dict[int, str] = {}  # pid → start time, so that a number used again is not taken for ours

    @property
    def pid(self) -> int:
        return self._root.pid

    def post(self, first: int = 0, name: str | None = None) -> Post:
        """Return a request for the workload's number of rows, from row `first` on, round and round.

        `name` asks a model of that name, which must be the same but for its name.
        """
        rows = np.arange(first, first + self.workload.n_rows) % len(self.x)
        model = self.workload.model
        return post(self.asking.form, self.asking.path, replace(model, name=name or model.name), self.x[rows])

    def ask(self, first: int = 0, name: str | None = None) -> float:
        """Ask for rows over a connection of its own; return how far off the answer is at most.

        Raises:
            Refused: too much to do just then.
            ServerFailed: any other answer than one of the right form.
        """
        request = self.post(first, name)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", request.path, request.body, dict(request.headers))
            response = connection.getresponse()
            body = response.read()
        if response.status != 200:
            raise (Refused if response.status in (429, 503, 504) else ServerFailed)(
                f"status {response.status}: {body[:300]!r}"
            )
        rows = np.arange(first, first + self.workload.n_rows) % len(self.x)
        got = answer(self.asking.form, dict(response.headers), body)
        wanted = self.y[rows].ravel()
        if got.shape != wanted.shape:
            raise ServerFailed(f"answered {got.size} values, not {wanted.size}: {body[:300]!r}")
        return float(np.abs(got - wanted).max())

    def first_answer_s(self, timeout_s: float = 90, wrong_for_s: float = 10) -> float:
        """Wait for a right answer and return the seconds since the start; raises ServerFailed.

        Args:
            timeout_s: until it answers at all.
            wrong_for_s: from its first answer to the first right one, since some listen before they have loaded.
        """
        error, give_up_s = "nothing", timeout_s
        while (passed_s := time.perf_counter() - self._started_s) < give_up_s:
            if self._root.poll() is not None:
                raise ServerFailed(f"ended with {self._root.returncode}: {self.tail()}")
            try:
                if self.ask() < TOLERANCE:
                    return time.perf_counter() - self._started_s
                error = "a wrong answer"
                give_up_s = min(give_up_s, passed_s + wrong_for_s)
            except (OSError, http.client.HTTPException) as reason:
                error = str(reason)
            except (ValueError, ServerFailed) as reason:
                error, give_up_s = str(reason), min(give_up_s, passed_s + wrong_for_s)
            time.sleep(0.005 if passed_s < 2 else 0.05)
        raise ServerFailed(f"no right answer in {passed_s:.0f} s, last {error}: {self.tail()}")

    def check(self, names: Sequence[str] = ()) -> float:
        """Ask every row, eight at a time so that a batching server does batch; return the largest error.

        A refusal is asked again, since a server that aims at a latency refuses while the machine is busy otherwise.

        Args:
            names: of further models to ask, the same but for their names.

        Raises:
            ServerFailed: some answer is wrong.
        """

        def error(row: int, name: str | None = None) -> float:
            for _ in range(50):
                try:
                    return self.ask(row, name)
                except Refused:
                    time.sleep(0.02)
            return self.ask(row, name)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            worst = max(*pool.map(error, range(len(self.x))), *pool.map(error, range(len(names)), names))
        if worst > TOLERANCE:
            raise ServerFailed(f"wrong answers when asked eight at a time, off by up to {worst:.2g}")
        return worst

    def tail(self) -> str:
        """Return the end of the log: its last lines that are no drawn table."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip("+-| ")]
        return " / ".join(line.strip() for line in lines[-3:])[-600:]

    def cpu_s(self) -> float:
        """CPU seconds that the tree's living processes have used."""
        return sum(_cpu_s(pid) for pid in self._tree())

    def memory(self) -> Memory:
        sizes = [size for pid in self._tree() if (size := _memory(pid)) is not None]
        return Memory(sum(rss for rss, _ in sizes), sum(pss for _, pss in sizes), len(sizes))

    def stop(self, by: signal.Signals = signal.SIGTERM, timeout_s: float = 8) -> None:
        """Ask the tree to end, and end what is left of it after `timeout_s`."""
        self._tree()
        self._root.send_signal(by)
        deadline_s = time.perf_counter() + timeout_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._root.wait(timeout_s)
        while self._left() and time.perf_counter() < deadline_s:
            time.sleep(0.02)
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._root.wait()

    def _tree(self) -> list[int]:
        pids = _descendants(self._root.pid)
        for pid in pids:
            if (started := _start_time(pid)) is not None:
                self._seen.setdefault(pid, started)
        return pids

    def _left(self) -> list[int]:
        self._root.poll()  # reaps it
        return [pid for pid, started in self._seen.items() if _start_time(pid) == started]


def machine_cpu_s() -> float:
    """CPU seconds that anything on this machine has used since it started; stolen ones count as used."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo.extend(map(int, children.read_text().split()))
    return found


def _stat(pid: int) -> list[str] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before it may hold spaces
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def _start_time(pid: int) -> str | None:
    return None if (fields := _stat(pid)) is None else fields[19]


def _cpu_s(pid: int) -> float:
    return 0.0 if (fields := _stat(pid)) is None else (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _memory(pid: int) -> tuple[int, int] | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    size_bytes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines) if rest.endswith("kB")
    }
    return (size_bytes["Rss"], size_bytes["Pss"]) if "Rss" in size_bytes else None
