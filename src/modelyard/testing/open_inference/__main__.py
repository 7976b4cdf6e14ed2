"""The suite on the command line: python -m modelyard.testing.open_inference URL"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelyard.errors import ConfigError, MissingExtra
from modelyard.testing.open_inference import grpc
from modelyard.testing.open_inference.check import Failed, Result
from modelyard.testing.open_inference.server import Server, Target
from modelyard.testing.open_inference.suite import run_check, selected
from modelyard.testing.open_inference.wire import parse_url

N_REASONS_TOLD = 5
EPILOG = """
exit status: 0 when no MUST failed (with --strict: nothing failed), 1 when one did, 2 when the server or an option is wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return the exit status; 1 without a word where the reader of stdout leaves, as `head` does."""
    try:
        return _run(_parser().parse_args(arguments))
    except BrokenPipeError:  # never a socket's: wire.py keeps those
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it once more at exit
        return 1
    except (ConfigError, MissingExtra, Failed, OSError) as exc:
        return _usage(str(exc))


def _run(options: argparse.Namespace) -> int:
    checks = selected(options.only)
    if not checks:
        return _usage(f"--only {' '.join(options.only)} matches no check; see --list")
    if options.list:
        for each in checks:
            _say(f"{each.id:42} {each.level:6} {each.rule}\n{'':49} {each.where}")
        return 0
    if not options.url:
        return _usage("give the URL of a server, like http://localhost:8000")
    target = _target(options)
    server = Server(target)
    reply = server.get(server.model_path())
    if reply.status == 404:
        return _usage(
            f"{target.url} has no model {server.name!r}; it says {reply.body[:200].decode('utf-8', 'replace')}"
        )
    if target.grpc and any(each.area == "grpc" for each in checks):
        grpc.reach(server)
    results = []
    for each in checks:
        results.append(run_check(each, server))
        if not options.json and (options.verbose or results[-1].status == "fail"):
            _say(_told(results[-1]))
    if options.json:
        about = {"url": target.url, "model": server.name, "server": dict(server.metadata)}
        _say(json.dumps({**about, "results": [each.to_builtins() for each in results]}, indent=1, ensure_ascii=False))
    else:
        _say(_summary(server, results))
    failed = [each for each in results if each.status == "fail" and (options.strict or each.check.level == "MUST")]
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modelyard.testing.open_inference",
        description="Check a server against the Open Inference Protocol, version 2.",
        epilog=EPILOG,
    )
    parser.add_argument("url", nargs="?", default="", help="where the server speaks REST: http://localhost:8000")
    parser.add_argument(
        "--model", default="", help="the model to ask; by default the first ready one of the repository index"
    )
    parser.add_argument("--version", default="", help="its version; by default as the server chooses")
    parser.add_argument("--grpc", default="", metavar="HOST:PORT", help="where it speaks gRPC (needs grpcio)")
    parser.add_argument(
        "--example", type=Path, metavar="FILE", help="an inference request in JSON that the model takes"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="areas or ids of checks: binary infer.id 'faults.*'"
    )
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="EXTENSION", help="try extensions that the server does not list"
    )
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME:VALUE", help="a header for every request"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="how long to wait for an answer (10)"
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="may unload models and change settings; puts them back"
    )
    parser.add_argument(
        "--strict", action="store_true", help="a SHOULD or MAY that fails counts for the exit status too"
    )
    parser.add_argument("--verbose", action="store_true", help="tell of checks that pass or are skipped too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--list", action="store_true", help="print the checks and their rules, and ask nobody")
    return parser


def _target(options: argparse.Namespace) -> Target:
    parse_url(options.url)
    headers = []
    for text in options.header:
        name, colon, value = text.partition(":")
        if not colon:
            raise ConfigError(f"--header must be NAME:VALUE, got {text!r}")
        headers.append((name.strip(), value.strip()))
    return Target(
        options.url,
        model=options.model,
        version=options.version,
        grpc=options.grpc,
        example=_example(options.example),
        allow_changes=options.allow_changes,
        assume=frozenset(options.assume),
        headers=tuple(headers),
        timeout_s=options.timeout,
    )


def _example(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"--example {path} must be an inference request in JSON: {exc}") from exc


def _told(result: Result) -> str:
    """Return a result as lines of text; a failure with its rule, the document and what was said."""
    check = result.check
    level = f"{check.level} of {check.extension}" if check.extension else check.level
    lines = [f"{result.status:8} {check.id}  ({level})"]
    if result.status != "fail":
        return lines[0] + (f": {result.reason}" if result.reason else "")
    lines += [f"  rule   {check.rule}", f"  where  {check.where}", f"  why    {result.reason}"]
    for exchange in result.exchanges[-1:]:
        lines += _block("sent", exchange.sent) + _block("got", exchange.got)
    return "\n".join(lines)


def _block(title: str, text: str) -> list[str]:
    first, *rest = text.splitlines() or [""]
    return [f"  {title:6} {first}", *(f"         {line}" for line in rest)]


def _summary(server: Server, results: Sequence[Result]) -> str:
    counts = Counter(each.status for each in results)
    by_level = Counter(each.check.level for each in results if each.status == "fail")
    failed = ", ".join(f"{by_level[level]} {level}" for level in ("MUST", "SHOULD", "MAY") if by_level[level])
    name = f"{server.metadata.get('name', 'a server without a name')} {server.metadata.get('version', '')}".strip()
    total = (
        f"{name}, model {server.name}: {counts['pass']} passed, {counts['fail']} failed{f' ({failed})' if failed else ''}, "
        f"{counts['skipped']} skipped"
    )
    return "\n".join([*_skips(results), total])


def _skips(results: Sequence[Result]) -> list[str]:
    """Return lines that say for which reasons most checks were skipped."""
    reasons = Counter(each.reason for each in results if each.status == "skipped")
    told = reasons.most_common(N_REASONS_TOLD)
    if n_left := reasons.total() - sum(n for _, n in told):
        told.append(("other reasons; see --verbose", n_left))
    return [f"skipped  {n:3}: {reason}" for reason, n in told]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _usage(text: str) -> int:
    sys.stderr.write(f"error: {text}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
