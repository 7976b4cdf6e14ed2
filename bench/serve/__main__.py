"""Our server and its peers, in turns, on this machine: measures every bar that the server is held to and judges it.

    python -m bench.serve                                everything, about 40 minutes; exit code 1 when a bar is missed
    python -m bench.serve --only tiny-json,footprint     these sections alone
    python -m bench.serve --quick --only tiny-json       a look of about a minute, which judges nothing

What is missing is installed first. Results go to .cache/bench-serve/results/. Client and servers share the machine's cores.
"""

import argparse
import atexit
import contextlib
import io
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # machine.py, which the scripts beside this folder print too
from machine import heading

from . import installing, models, report
from .bars import Findings
from .contenders import BARE, CONTENDERS, FASTAPI, MOSEC, MOSEC_MID, OTHERS, TRITON, Contender, ours, publish_all
from .footprint import footprint
from .generators import Patience
from .mid import mid
from .overload import overload
from .places import RESULTS, SCRATCH
from .quick import look
from .synthetic import synthetic
from .tiny import tiny_binary, tiny_json
from .turns import Pace, Run, say
from .version_load import version_load
from .workloads import MID_BINARY, TINY_BINARY, TINY_JSON

SECTIONS = {
    "tiny-json": (tiny_json, MOSEC),
    "tiny-binary": (tiny_binary, (TRITON,)),
    "mid": (mid, (MOSEC_MID, TRITON, FASTAPI)),
    "overload": (overload, (MOSEC[-1], MOSEC_MID, TRITON)),
    "version-load": (version_load, ()),
    "footprint": (footprint, ()),
    "synthetic": (synthetic, ()),
}
QUICK = {
    "tiny-json": (TINY_JSON, (BARE[0], *MOSEC)),
    "tiny-binary": (TINY_BINARY, (BARE[0], TRITON)),
    "mid": (MID_BINARY, (MOSEC_MID, TRITON)),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="SECTION,...", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help=f"closed loop only, of {', '.join(QUICK)}; judges nothing")
    parser.add_argument(
        "--peers", metavar="NAME,...", help="with --quick: beside these; otherwise `all` adds every known peer"
    )
    parser.add_argument("--turns", type=int, help="fresh starts of each server; default 3, with --quick 1")
    parser.add_argument("--seconds", type=int, help="of one closed-loop measurement; default 2, with --quick 1")
    parser.add_argument(
        "--patience", type=float, metavar="S", help="to wait for a quiet machine in all; default 600, with --quick 20"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the Markdown here too, e.g. docs/benchmarks.md"
    )
    parser.add_argument("--workers", type=int, help="of our server; default: what it finds right for the model")
    parser.add_argument("--serve-args", default="", metavar="ARGS", help="further arguments of `modelyard serve`")
    options = parser.parse_args()
    known = list(QUICK if options.quick else SECTIONS)
    sections = options.only.split(",") if options.only else known
    if unknown := set(sections) - set(known):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    SCRATCH.mkdir(parents=True)
    atexit.register(shutil.rmtree, SCRATCH)
    models.make()
    publish_all()
    mine = ours(*options.serve_args.split(), n_workers=options.workers)
    return _look(mine, sections, options) if options.quick else _judge(mine, sections, options)


def _look(mine: Contender, sections: Sequence[str], options: argparse.Namespace) -> int:
    run = Run(mine, Pace(options.turns or 1, options.seconds or 1), Patience(_or(options.patience, 20)))
    for section in sections:
        workload, peers = QUICK[section]
        if options.peers is not None:
            peers = tuple(CONTENDERS[name] for name in options.peers.split(",") if name)
        installing.install((peer.venv for peer in peers), perf_analyzer=False)
        look(run, [peer for peer in peers if workload.name in peer.asking], workload)
    return 0


def _judge(mine: Contender, sections: Sequence[str], options: argparse.Namespace) -> int:
    run = Run(
        mine,
        Pace(options.turns or 3, options.seconds or 2),
        Patience(_or(options.patience, 600)),
        with_others=options.peers == "all",
    )
    peers = [peer for section in sections for peer in SECTIONS[section][1]] + list(OTHERS if run.with_others else ())
    installing.install((peer.venv for peer in peers), perf_analyzer="tiny-binary" in sections)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        heading("the inference server and its peers", "onnxruntime", "numpy", "uvloop", "httptools", "orjson")
    versions = sorted({installing.version(peer.venv) for peer in peers if peer.venv})
    conditions = printed.getvalue().strip("\n") + (f"\n  peers: {', '.join(versions)}" if versions else "")
    print(conditions, flush=True)
    found: list[Findings] = []
    for section in sections:
        say(f"{section}")
        before_s = time.perf_counter()
        found.append(SECTIONS[section][0](run))
        say(f"{section}: {time.perf_counter() - before_s:.0f} s")
    bars = [bar for each in found for bar in each.bars]
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = RESULTS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    stem.with_suffix(".json").write_text(report.to_json(conditions, found, run.entries))
    text = report.markdown(conditions, found, sorted({peer.name for peer in peers}))
    for file in filter(None, (stem.with_suffix(".md"), options.markdown)):
        file.write_text(text)
    print("\n" + "\n".join(report.lines(bars)))
    missed = [bar for bar in bars if not bar.met]
    print(f"\n{len(bars) - len(missed)} of {len(bars)} bars met; {stem}.md and .json")
    for bar in missed:
        print(f"  missed: {bar.what}")
    return 1 if missed else 0


def _or(said: float | None, default: float) -> float:
    return default if said is None else said


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped on the way out
    sys.exit(main())
