"""The suite under pytest. Inherit from OpenInferenceTests and say where the server is:

    class TestMyServer(OpenInferenceTests):
        known_failures = {"http.head": "the proxy in front answers 405"}

        @pytest.fixture
        def target(self, my_server):
            return Target(my_server.url, model="mymodel")

One test per check. A check that cannot be tried on this server or model is skipped, with the reason.
"""

from collections.abc import Mapping
from typing import ClassVar

import pytest

from modelyard.testing.open_inference.check import Check, Exchange
from modelyard.testing.open_inference.server import Server, Target
from modelyard.testing.open_inference.suite import CHECKS, run_check


class OpenInferenceTests:
    """What clients of the protocol rely on."""

    known_failures: ClassVar[Mapping[str, str]] = {}
    """Checks that are known to fail, by id, and why; one of them that passes fails the test, so that the list stays true."""

    _server: ClassVar[Server | None] = None
    """What is known of the target, found out once for all checks."""

    @pytest.fixture
    def target(self) -> Target:
        """Return the server to test; override it."""
        raise NotImplementedError("override the fixture target")

    @pytest.fixture
    def server(self, target: Target) -> Server:
        cls = type(self)
        if cls._server is None or cls._server.target != target:
            cls._server = Server(target)
        return cls._server

    def test_known_failures_name_checks(self) -> None:
        unknown = set(self.known_failures) - {check.id for check in CHECKS}
        assert not unknown, f"there is no check {', '.join(sorted(unknown))}; see --list"

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
    def test_the_rule_holds(self, server: Server, check: Check) -> None:
        result = run_check(check, server)
        if result.status == "skipped":
            pytest.skip(result.reason)
        known = self.known_failures.get(check.id)
        if known is not None:
            assert result.status == "fail", f"{check.id} passes; take it out of known_failures ({known})"
            pytest.xfail(known)
        assert result.status == "pass", _told(check, result.reason, result.exchanges)


def _told(check: Check, reason: str, exchanges: tuple[Exchange, ...]) -> str:
    lines = [reason, f"rule: {check.level}, {check.rule}", f"where: {check.where}"]
    lines += [f"sent: {each.sent}\ngot: {each.got}" for each in exchanges[-1:]]
    return "\n".join(lines)
