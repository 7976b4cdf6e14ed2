"""bench/ is no package of the project: its folder is put on the path, as `make bench-serve` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
