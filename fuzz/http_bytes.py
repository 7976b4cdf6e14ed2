"""Raw bytes on an HTTP connection, by atheris: `python fuzz/http_bytes.py [libFuzzer options] [CORPUS]`.

The first byte says how the rest is cut into pieces. Whole, in pieces, and on a server that has seen it all before, the answers
are the same, and none of them is a fault of ours.
"""

import asyncio
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "inference" / "serve"))

with atheris.instrument_imports(include=["modelyard"]):
    from wire import connections, converse, statuses

_HEAD_LIMIT = 16_000
"""A head near the limit is counted a little differently when it comes in pieces."""

runner = asyncio.Runner()


def fuzz_one_input(data: bytes) -> None:
    if not 0 < len(data) < _HEAD_LIMIT:
        return
    step, sent = data[0] + 1, data[1:]
    pieces = [sent[i : i + step] for i in range(0, len(sent), step)]
    requests = [part + b"\r\n\r\n" for part in sent.split(b"\r\n\r\n")]

    async def main() -> None:
        whole = converse(connections(remembers=False), [sent])
        assert set(statuses(whole[0])) <= {100, 200, 400, 405, 413, 415, 431}
        assert converse(connections(remembers=False), pieces) == whole
        cold = converse(connections(remembers=False), requests)
        warm = connections()
        for told in (requests, requests):
            assert converse(warm, told) == cold

    runner.run(main())


if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz_one_input)
    atheris.Fuzz()
