"""A model of milliseconds, where the cores are the limit: against onnxruntime in-process on both, and against every peer."""

from .bars import Bar, Findings, per_s
from .ceiling import Ceiling, ceiling
from .contenders import FASTAPI, MOSEC_MID, TRITON, without_target
from .generators import wrk
from .measures import Closed, Good
from .turns import Run, compare, series
from .workloads import MID_BINARY

CONNECTIONS = (8, 32, 64)
OVER_CEILING = 0.95
GOODPUT_OVER_CEILING = 0.90


def mid(run: Run) -> Findings:
    """Return throughput and goodput beside the ceiling, which is measured once in every turn."""
    closed, good = Closed(run, MID_BINARY.name, CONNECTIONS), Good(run, MID_BINARY.name, n_probes=6)
    ceilings: dict[int, Ceiling] = {}
    peers = [MOSEC_MID, TRITON, FASTAPI, *run.others(MID_BINARY)]
    # 64 connections mean 64 × 1.7 ms of work ahead of each request: with a target of 50 ms that would rightly be refused.
    in_closed_loop = without_target(run.ours)
    for turn, running in run.turns([in_closed_loop, run.ours, *peers], MID_BINARY):
        if turn not in ceilings:  # the server that was just started is idle meanwhile
            ceilings[turn] = ceiling(MID_BINARY.model, run.pace.closed_s, run.patience)
            run.keep("onnxruntime", MID_BINARY.name, turn, ceilings[turn])
        if running.contender != run.ours:
            top_per_s = closed.measure(turn, running)
        else:
            top_per_s = wrk(running.server, CONNECTIONS[0], run.pace.closed_s, run.patience).rate_per_s
        if running.contender != in_closed_loop:
            good.measure(turn, running, 0.8 * top_per_s)

    names = [peer.name for peer in peers]
    limit = {"onnxruntime in-process": series(ceilings, lambda one: one.rate_per_s)}
    bars: list[Bar] = []
    for n in CONNECTIONS:
        rates = closed.rates(in_closed_loop.name, n)
        what = f"mid, {n} connections: requests/s over"
        bars.append(
            compare(f"{what} onnxruntime in-process on both cores", rates, limit, "at least", OVER_CEILING, per_s)
        )
        theirs = {name: closed.rates(name, n) for name in names}
        bars.append(compare(f"{what} the best peer", rates, theirs, "at least", 1, per_s))
    what = "mid, goodput (99 % within 50 ms) over onnxruntime in-process on both cores"
    bars.append(compare(what, good.rates(run.ours.name), limit, "at least", GOODPUT_OVER_CEILING, per_s))
    tables = closed.table("mid, closed loop (wrk)"), good.table("mid, goodput: 99 % within 50 ms")
    return Findings(tuple(bars), tables)
