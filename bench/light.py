"""How light the runtime is: `modelyard --help`, and how soon `modelyard serve` is ready.

Serves the format's own small fixture and, where `make demo` was run, its store. The bars: help in under 0.3 s, ready in
under 1 s, medians of ten.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, bar, heading

from modelyard.bundle.store import LocalStore

N_RUNS = 10
COMMAND = [sys.executable, "-m", "modelyard"]


def help_s() -> float:
    before_s = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - before_s


def ready_s(store: Path) -> float:
    before_s = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, "serve", str(store), "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        took_s = time.perf_counter() - before_s
        server.terminate()
    if not line:
        raise SystemExit(f"the server on {store} did not get ready")
    return took_s


def main() -> int:
    heading("how light the runtime is", "onnxruntime", "click", "uvloop")
    seconds = [help_s() for _ in range(N_RUNS)]
    met = bar(
        f"modelyard --help: median {statistics.median(seconds):.3f} s (most {max(seconds):.3f}); under 0.3",
        statistics.median(seconds) < 0.3,
    )
    with tempfile.TemporaryDirectory() as folder:
        LocalStore(Path(folder)).publish(ROOT / "tests" / "fixtures" / "bundle-v1", "fixture")
        demo = ROOT / "demo" / "store"
        for store in (Path(folder), *([demo] if demo.exists() else [])):
            names = ", ".join(LocalStore(store).names())
            seconds = [ready_s(store) for _ in range(N_RUNS)]
            met &= bar(
                f"modelyard serve ({names}): ready in median {statistics.median(seconds):.3f} s (most {max(seconds):.3f}); under 1",
                statistics.median(seconds) < 1,
            )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
