"""One line per request, whatever the disk and the reader do; against real files, pipes and a device that is always full."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from modelyard.errors import ConfigError
from modelyard.inference.serve.metrics.access_log import AccessLog, access_line
from modelyard.inference.serve.metrics.observe import Timeline

ANSWERED = Timeline(
    request_id=b"abc-1",
    protocol="rest-v2",
    path="/v2/models/late/infer",
    status=200,
    arrived_s=100.0,
    finished_s=100.030,
    request_bytes=120,
    response_bytes=80,
    model="late",
    version="3",
    tenant="acme",
    n_rows=2,
    batch_rows=8,
    admitted_s=100.001,
    started_s=100.011,
    computed_s=100.025,
)
REFUSED = Timeline(
    request_id=b"abc-2",
    protocol="rest-v2",
    path="/v2/models/late/infer",
    status=503,
    arrived_s=100.0,
    finished_s=100.0001,
    cause="overload",
)

# Python 3.12 warns of forking where a library has left a thread behind.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_happened_to_a_request(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    log.start()
    log.record(ANSWERED)
    log.record(REFUSED)
    before_s = time.time()
    log.close()
    answered, refused = read_lines(tmp_path / "access.log")
    uptime_s = time.perf_counter()
    assert answered.pop("time_s") == pytest.approx(before_s - uptime_s + 100.03, abs=30)
    assert answered == {
        "request_id": "abc-1",
        "protocol": "rest-v2",
        "method": "POST",
        "path": "/v2/models/late/infer",
        "status": 200,
        "cause": "",
        "model": "late",
        "version": "3",
        "tenant": "acme",
        "rows": 2,
        "batch_rows": 8,
        "queue_s": 0.01,
        "compute_s": 0.014,
        "duration_s": 0.03,
        "request_bytes": 120,
        "response_bytes": 80,
    }
    assert (refused["status"], refused["cause"], refused["queue_s"], refused["compute_s"]) == (
        503,
        "overload",
        None,
        None,
    )
    assert log.n_dropped == 0


def test_lines_appear_without_waiting_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    log.start()
    log.record(ANSWERED)
    until(lambda: path.stat().st_size > 0)
    for _ in range(2000):
        log.record(ANSWERED)
    until(lambda: path.read_text().count("\n") == 2001)
    log.close()
    assert len(read_lines(path)) == 2001


def test_names_from_strangers_cannot_break_a_line() -> None:
    line = json.loads(
        msgspec.json.encode(access_line(Timeline(b'a"\nb', "rest", '/v2/"\n\x00é', 404, 1.0, 2.0, tenant="\n{"), 0.0))
    )
    assert (line["request_id"], line["path"], line["tenant"]) == ('a"\nb', '/v2/"\n\x00é', "\n{")


def test_a_full_disk_drops_lines_and_counts_them() -> None:
    log = AccessLog(Path("/dev/full"))
    log.start()
    for _ in range(100):
        log.record(ANSWERED)
    log.close()
    assert log.n_dropped == 100


def test_after_a_full_disk_lines_are_whole_again(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    line_bytes = len(msgspec.json.encode(access_line(ANSWERED, 0.0))) + 1

    def work() -> int:
        """Runs in a process of its own, whose files may not grow beyond a limit: the write that meets it stops short."""
        log = AccessLog(path)
        log.start()
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * line_bytes, resource.RLIM_INFINITY))
        for _ in range(10):
            log.record(ANSWERED)
        until(lambda: log.n_dropped > 0)
        n_dropped = log.n_dropped
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.record(ANSWERED)
        log.close()
        return n_dropped

    pid = os.fork()
    if pid == 0:
        n_dropped = 255
        try:
            n_dropped = work()
        finally:
            os._exit(n_dropped)
    n_dropped = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    *before, last = path.read_text().splitlines()
    assert json.loads(last)["request_id"] == "abc-1"
    whole = [line for line in before if line.endswith("}")]
    assert len(whole) == 10 - n_dropped
    assert len(before) - len(whole) <= 1


def test_a_reader_that_hangs_holds_nobody_up() -> None:
    reader, writer = os.pipe()
    log = AccessLog(Path(f"/dev/fd/{writer}"), max_pending=1000)
    log.start()
    for _ in range(5000):  # the pipe takes 64 KiB, the log a thousand lines more
        log.record(ANSWERED)
    assert log.n_dropped > 3000
    os.close(writer)
    os.close(reader)  # the log's own end now has no reader: the write that hung fails, and all later ones
    log.close(20)
    assert log.n_dropped > 4500


def test_a_pipe_that_does_not_block_gets_every_line() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    log = AccessLog(Path(f"/dev/fd/{writer}"))
    log.start()
    for _ in range(3000):
        log.record(ANSWERED)
    with os.fdopen(reader) as lines:
        for _ in range(3000):
            assert json.loads(lines.readline())["status"] == 200
    log.close()
    os.close(writer)
    assert log.n_dropped == 0


def test_lines_of_several_workers_do_not_mix_in_a_pipe() -> None:
    reader, writer = os.pipe()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            log = AccessLog(Path(f"/dev/fd/{writer}"))
            log.start()
            for _ in range(3000):
                log.record(ANSWERED)
            log.close(60)
            os._exit(log.n_dropped)
        pids.append(pid)
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert sum(json.loads(line)["status"] == 200 for line in lines) == 6000
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    log.start()
    log.record(ANSWERED)
    until(lambda: path.stat().st_size > 0)
    path.rename(tmp_path / "access.log.1")
    log.reopen()
    until(path.exists)
    log.record(REFUSED)
    log.close()
    assert [line["status"] for line in read_lines(tmp_path / "access.log.1")] == [200]
    assert [line["status"] for line in read_lines(path)] == [503]


def test_a_sample_keeps_its_share_of_answers_and_every_error() -> None:
    log = AccessLog(sample=0.25)
    assert [log.wanted(200) for _ in range(8)] == [False, False, False, True] * 2
    assert all(log.wanted(status) for status in (400, 503, 500))
    assert not any(AccessLog(sample=0.0).wanted(200) for _ in range(100))
    assert all(AccessLog().wanted(200) for _ in range(100))


def test_a_wrong_share_and_a_wrong_path_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--access-log-sample must be in \[0, 1\], got 2"):
        AccessLog(sample=2)
    with pytest.raises(ConfigError, match=r"cannot be opened \(No such file or directory\)"):
        AccessLog(tmp_path / "absent" / "access.log").start()


def test_nothing_is_written_before_anything_happens(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    log.start()
    log.close()
    assert (tmp_path / "access.log").read_bytes() == b""
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN, (
        "a reader that has gone is an error of the write, not our end"
    )
