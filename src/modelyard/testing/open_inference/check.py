"""What a check is and how its outcome is told; the bottom of the suite, which every area stands on.

A check is a function of the server under test. It returns when the rule holds (with a remark, if there is something worth
telling), raises Failed when it does not, and Skipped when the rule cannot be tried on this server or model.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    from modelyard.testing.open_inference.server import Server

Level = Literal["MUST", "SHOULD", "MAY"]
"""MUST: without it clients break, or the text says must. SHOULD: the text says typically, or means it without saying so.
MAY: optional, but where it is offered it has to be right."""
Status = Literal["pass", "fail", "skipped"]
Run = Callable[["Server"], str | None]

N_BYTES_SHOWN = 600
"""How much of a message a report shows."""


class Failed(Exception):
    """The server broke the rule; the message says how."""


class Skipped(Exception):
    """The rule cannot be tried here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One rule and the function that tries it."""

    id: str
    """Area and rule, e.g. "infer.id"."""
    level: Level
    rule: str
    where: str
    """The document and section that the check follows."""
    run: Run
    extension: str | None = None
    """The extension the rule belongs to: tried where the server lists it in its metadata."""

    @property
    def area(self) -> str:
        return self.id.partition(".")[0]


@dataclass(frozen=True)
class Exchange:
    """What was sent and what came back, shortened, as text."""

    sent: str
    got: str


@dataclass(frozen=True)
class Result:
    """What came of a check. `reason` says why it failed or was skipped, or remarks on how it passed."""

    check: Check
    status: Status
    reason: str = ""
    exchanges: tuple[Exchange, ...] = ()
    """The last requests of a check that failed, oldest first."""

    def to_builtins(self) -> dict[str, Any]:
        """Return the result as a value that JSON can write."""
        return {
            "id": self.check.id,
            "level": self.check.level,
            "extension": self.check.extension,
            "rule": self.check.rule,
            "where": self.check.where,
            "status": self.status,
            "reason": self.reason,
            "exchanges": [{"sent": exchange.sent, "got": exchange.got} for exchange in self.exchanges],
        }


def check(id: str, level: Level, rule: str, where: str, extension: str | None = None) -> Callable[[Run], Check]:  # noqa: A002 - the report's own word
    """Make a check of the function below it."""

    def made(run: Run) -> Check:
        return Check(id, level, rule, where, run, extension)

    return made


def checks_of(module: ModuleType) -> tuple[Check, ...]:
    """Return the checks that a module defines, alone or in tuples, in the order it defines them."""
    found: list[Check] = []
    for value in vars(module).values():
        if isinstance(value, Check):
            found.append(value)
        elif isinstance(value, tuple) and value and all(isinstance(each, Check) for each in value):
            found.extend(value)
    return tuple(found)


def fail(reason: str) -> NoReturn:
    raise Failed(reason)


def expect(holds: bool, reason: str) -> None:
    if not holds:
        raise Failed(reason)


def expect_text(value: Any, what: str) -> str:
    """Return `value` when it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise Failed(f"{what} must be a string that is not empty, got {shown(value)}")
    return value


def expect_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Failed(f"{what} must be an array, got {shown(value)}")
    return value


def expect_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Failed(f"{what} must be an object, got {shown(value)}")
    return value


def expect_count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Failed(f"{what} must be a whole number from 0, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value for a message, at most 80 characters of it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shown_bytes(data: bytes) -> str:
    """Return a message as text: line by line, what is no text as \\xNN, shortened in the middle of nothing but its end."""
    text = data[:N_BYTES_SHOWN].decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    text = "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    left = len(data) - N_BYTES_SHOWN
    return f"{text} ... and {left} bytes more" if left > 0 else text


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
