"""Where the benchmark keeps what it builds and finds. Two environment variables move it elsewhere."""

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HOME = Path(
    os.environ.get("BENCH_HOME", ROOT / ".cache" / "bench-serve")
)  # models, stores, logs, results, the generator
VENVS = Path(os.environ.get("BENCH_VENVS", HOME / "venvs"))  # one virtual environment for each peer
MODELS, STORES, LOGS, RESULTS = HOME / "models", HOME / "stores", HOME / "logs", HOME / "results"
SCRATCH = HOME / "scratch" / str(os.getpid())  # of this run; another may be going on
OPEN_LOOP = HOME / "open_loop"
PERF = VENVS / "perf"  # perf_analyzer and the libraries it needs
