"""All checks, and how they are run against a server."""

import fnmatch
from collections.abc import Iterable, Iterator

from modelyard.errors import ConfigError
from modelyard.testing.open_inference import (
    binary,
    compression,
    datatypes,
    extensions,
    faults,
    grpc,
    health,
    http1,
    infer,
    metadata,
)
from modelyard.testing.open_inference.check import Check, Failed, Result, Skipped, checks_of
from modelyard.testing.open_inference.server import Server, Target

AREAS = (health, metadata, infer, faults, datatypes, binary, http1, compression, extensions, grpc)
CHECKS: tuple[Check, ...] = tuple(each for area in AREAS for each in checks_of(area))
N_EXCHANGES_TOLD = 3


def selected(patterns: Iterable[str] = (), checks: Iterable[Check] = CHECKS) -> tuple[Check, ...]:
    """Return the checks whose id matches one of the patterns, or begins with one as with an area; all for none."""
    wanted = tuple(patterns)
    return tuple(
        each
        for each in checks
        if not wanted or any(fnmatch.fnmatchcase(each.id, p) or each.id.startswith(f"{p}.") for p in wanted)
    )


def run_check(check: Check, server: Server) -> Result:
    """Return what comes of one check; what the server does wrong is a failure, never an exception.

    Raises:
        ConfigError: the target itself is wrong: no such model to be found, an example that does not fit.
    """
    server.exchanges.clear()
    try:
        if check.extension is not None:
            server.need(check.extension)
        return Result(check, "pass", check.run(server) or "")
    except Skipped as exc:
        return Result(check, "skipped", str(exc))
    except Failed as exc:
        reason = str(exc)
    except (LookupError, TypeError, ValueError, AttributeError) as exc:  # an answer that no check foresaw
        if isinstance(exc, ConfigError):
            raise
        reason = f"the answer has a form that the check did not foresee, and breaks down over: {exc!r}"
    return Result(check, "fail", reason, tuple(server.exchanges[-N_EXCHANGES_TOLD:]) or server.base_exchanges)


def run(target: Target, patterns: Iterable[str] = ()) -> Iterator[Result]:
    """Yield the results of the checks that match, as they come."""
    server = Server(target)
    for each in selected(patterns):
        yield run_check(each, server)
