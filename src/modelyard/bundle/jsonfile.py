"""Strict JSON files that carry their own digest, used for bundle.json and profile.json.

The first key is "digest": the SHA-256 of the file's bytes with the digest's own 64 characters set to "0". One file, one
rename, no canonical form to agree on.
"""

import hashlib
import json
import math
import re
import secrets
from pathlib import Path
from typing import Any

from modelyard.errors import DigestMismatch, MalformedManifest, ModelyardError, TooLarge

BLANK = "0" * 64
_DIGEST = re.compile(rb'\A\{\s*"digest"\s*:\s*"([0-9a-f]{64})"')


def write_digested(path: Path, data: dict[str, Any]) -> str:
    """Write `data` with its digest in front, beside `path` and renamed over it; return the digest."""
    body = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps({"digest": BLANK} | body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_text(text.replace(BLANK, digest, 1), encoding="utf-8")
    beside.replace(path)
    return digest


def read_digested(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the file's object after checking its size, digest and JSON.

    Raises:
        TooLarge, DigestMismatch, MalformedManifest (not an object, duplicate keys, NaN or Infinity).
    """
    with path.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise TooLarge(
            f"{path}: more than {max_bytes} bytes, which is the limit; this is not a manifest: fetch it again"
        )
    data = strict_json(raw, str(path))
    if not isinstance(data, dict):
        raise MalformedManifest(f"{path}: must hold an object, got {type(data).__name__}; fetch the bundle again")
    found = _DIGEST.match(raw)
    if found is None:
        raise DigestMismatch(
            f'{path}: the first key must be "digest" with 64 hexadecimal digits; fetch the bundle again'
        )
    start, end = found.span(1)
    computed = hashlib.sha256(raw[:start] + BLANK.encode() + raw[end:]).hexdigest()
    if computed != found[1].decode():
        raise DigestMismatch(
            f"{path}: was changed after it was written (its digest says {found[1].decode()[:12]}…, its bytes give {computed[:12]}…); "
            "fetch the bundle again",
            expected=found[1].decode(),
            computed=computed,
        )
    return data


def strict_json(raw: bytes, source: str, error: type[ModelyardError] = MalformedManifest) -> Any:
    """Parse UTF-8 JSON. Duplicate keys, numbers that are not finite and text that is no Unicode raise `error`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"{source}: key {twice!r} stands twice in one object; keep one", key=twice)
        return members

    def finite(token: str) -> float:
        number = float(token)
        if not math.isfinite(number):
            raise error(f"{source}: {token[:40]} is not a finite number; use a finite number or null")
        return number

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # an escaped lone surrogate parses, but is no text
    except ModelyardError:
        raise
    except (ValueError, RecursionError) as exc:  # bad syntax, bad UTF-8, thousands of digits, thousands of levels
        raise error(f"{source}: not valid JSON ({_brief(exc)}); fetch the file again") from exc
    return data


def _brief(exc: Exception) -> str:
    return str(exc)[:200]
