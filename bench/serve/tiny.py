"""The small model, where the front-end is all that costs: JSON against mosec, binary tensors and gRPC against Triton."""

import time
from collections import defaultdict

from .bars import Bar, Findings, ms, per_s
from .contenders import MOSEC, TRITON, without_target
from .generators import GeneratorFailed, OpenLoop, PerfAnalyzer, open_loop, perf_analyzer
from .measures import CONNECTIONS, Closed, Good
from .processes import ServerFailed
from .turns import Run, compare, say, series
from .workloads import TINY_BINARY, TINY_JSON

OVER_MOSEC = {1: 1.5, 8: 2.5, 32: 1.5, 64: 1.4}
GOODPUT_OVER_MOSEC = 1.4
TAIL_OVER_MOSEC = 0.5
OFFERED_PER_S = 18_000  # half of what mosec answers in a closed loop on the machine that the bars were set on
OVER_TRITON = 2.5
GRPC_OVER_TRITON = 0.7
GRPC_CONCURRENCY = 8


def tiny_json(run: Run) -> Findings:
    """Return throughput, goodput and tail of JSON requests, against the best of mosec's batch sizes at each."""
    closed, good = Closed(run, TINY_JSON.name), Good(run, TINY_JSON.name)
    offered: dict[str, dict[int, OpenLoop]] = defaultdict(dict)
    for turn, running in run.turns([run.ours, *MOSEC, *run.others(TINY_JSON)], TINY_JSON):
        top_per_s = closed.measure(turn, running)
        if top_per_s > OFFERED_PER_S:
            seen = open_loop(running.server, OFFERED_PER_S, run.pace.probe_s, turn, run.patience)
            offered[running.name][turn] = seen
            run.keep(running.name, TINY_JSON.name, turn, seen)
            time.sleep(0.3)
        good.measure(turn, running, 0.8 * top_per_s)

    ours, peers = run.ours.name, [peer.name for peer in MOSEC]
    tails = {name: series(seen, lambda one: one.p99_s) for name, seen in offered.items()}
    bars = [
        *(
            compare(
                f"tiny, JSON, {_connections(n)}: requests/s over the best mosec",
                closed.rates(ours, n),
                {name: closed.rates(name, n) for name in peers},
                "at least",
                limit,
                per_s,
            )
            for n, limit in OVER_MOSEC.items()
        ),
        compare(
            "tiny, JSON: goodput (99 % within 10 ms) over the best mosec",
            good.rates(ours),
            {name: good.rates(name) for name in peers},
            "at least",
            GOODPUT_OVER_MOSEC,
            per_s,
        ),
        compare(
            f"tiny, JSON, each offered {OFFERED_PER_S:,}/s: p99 over the best mosec",
            tails.get(ours, series({}, lambda one: 0)),
            {name: tails[name] for name in peers if name in tails},
            "at most",
            TAIL_OVER_MOSEC,
            ms,
        ),
    ]
    tables = closed.table("tiny, JSON, closed loop (wrk)"), good.table("tiny, JSON, goodput: 99 % within 10 ms")
    return Findings(tuple(bars), tables)


def tiny_binary(run: Run) -> Findings:
    """Return throughput of the Open Inference Protocol's binary tensors over HTTP, and of its gRPC, against Triton's."""
    closed = Closed(run, TINY_BINARY.name)
    grpc: dict[str, dict[int, PerfAnalyzer]] = defaultdict(dict)
    mine = without_target(run.ours)  # perf_analyzer gives up at the first refusal
    for turn, running in run.turns([mine, TRITON, *run.others(TINY_BINARY)], TINY_BINARY):
        closed.measure(turn, running)
        if not running.contender.grpc:
            continue
        try:
            running.check_grpc()
            seen = perf_analyzer(
                running.server, running.grpc_port, "grpc", GRPC_CONCURRENCY, run.pace.closed_s, run.patience
            )
        except (GeneratorFailed, ServerFailed) as error:
            say(f"  {running.name}, gRPC: {error}")
            continue
        grpc[running.name][turn] = seen
        run.keep(running.name, TINY_BINARY.name, turn, seen)

    ours, triton = mine.name, TRITON.name
    calls = {name: series(grpc[name], lambda one: one.rate_per_s) for name in (ours, triton)}
    bars: list[Bar] = [
        compare(
            f"tiny, binary tensors, {_connections(n)}: requests/s over Triton",
            closed.rates(ours, n),
            {triton: closed.rates(triton, n)},
            "at least",
            OVER_TRITON,
            per_s,
        )
        for n in CONNECTIONS
    ]
    what = f"tiny, gRPC, perf_analyzer at concurrency {GRPC_CONCURRENCY}: calls/s over Triton"
    bars.append(compare(what, calls[ours], {triton: calls[triton]}, "at least", GRPC_OVER_TRITON, per_s))
    return Findings(tuple(bars), (closed.table("tiny, binary tensors, closed loop (wrk)"),))


def _connections(n: int) -> str:
    return "1 connection" if n == 1 else f"{n} connections"
