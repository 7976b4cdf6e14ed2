"""Answers kept for calls that come again, byte for byte: one cache per loaded version, so that a switch of versions empties it.

    Front: `get` between reading a call and submitting it → `put` when it was computed

Only for versions whose rows do not depend on their batch mates: there an answer is a function of the call.
"""

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from modelyard.inference.serve.calls import Call, Run

_DIGEST_FROM_BYTES = 256
_ENTRY_BYTES = 600
"""What an entry costs beside its numbers: key, dictionary, array headers."""
_TEXT_BYTES = 64
_LARGEST_SHARE = 8
"""One answer may take this part of the cache at most."""

Key = tuple[int, Hashable, bytes]


class ResponseCache:
    """The most recently used answers up to a number of bytes. Belongs to the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.n_hits = 0
        self.n_misses = 0
        self._entries: dict[Key, tuple[Mapping[str, NDArray[Any]], int]] = {}  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, call: Call, now_s: float) -> Run | None:
        """Return the answer to an equal call, as a run that took no time, or None."""
        key = key_of(call)
        found = None if key is None else self._entries.pop(key, None)
        if key is None or found is None:
            self.n_misses += 1
            return None
        self._entries[key] = found
        self.n_hits += 1
        return Run(found[0], call.n_rows, 1, "cached", now_s, now_s)

    def put(self, call: Call) -> None:
        """Keep the answer of a call that was computed, and let go of the oldest that no longer fit."""
        run = call.run
        key = key_of(call)
        if run is None or key is None or key in self._entries:
            return
        outputs = {name: _own(call.output(name)) for name in run.outputs}
        size_bytes = _ENTRY_BYTES + len(key[2]) + sum(map(_bytes_of, outputs.values()))
        if size_bytes * _LARGEST_SHARE > self.max_bytes:
            return
        self._entries[key] = (outputs, size_bytes)
        self.size_bytes += size_bytes
        while self.size_bytes > self.max_bytes:
            oldest = next(iter(self._entries))
            self.size_bytes -= self._entries.pop(oldest)[1]

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0


def key_of(call: Call) -> Key | None:
    """Return what equal calls have in common: rows, shapes and bytes, or a cryptographic digest of many; None for odd text."""
    parts: list[bytes | memoryview] = []
    for part in call.inputs:
        if isinstance(part, list):
            try:
                parts.append(orjson.dumps(part))  # unlike a join, it shows where one text ends
            except TypeError:  # a lone surrogate
                return None
        else:
            parts.append(part)
    joined = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(joined) > _DIGEST_FROM_BYTES:
        joined = hashlib.blake2b(joined, digest_size=24).digest()
    return call.n_rows, call.bucket, bytes(joined)


def _own(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy that nobody can change and that holds on to no other call's rows."""
    copy = np.array(array)
    copy.flags.writeable = False
    return copy


def _bytes_of(array: NDArray[Any]) -> int:
    if array.dtype != object:
        return array.nbytes
    return sum(_TEXT_BYTES + len(str(text)) for text in array.flat)
