"""What the calls of other people's clients share: where the server is, and a count for each client at the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

PLAIN: dict[str, Any] = {"repetition_penalty": 1.0}
"""For answers that repeat what they are about: models' own configurations punish that, and so small a model evades."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--url", help="the server's address, without /v1")
    parser.addoption("--served-model", help="the name of its model")


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--url"))


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--served-model"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    calls: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            client = report.nodeid.split("calls_")[-1].split(".py")[0]
            calls.setdefault(client, Counter())[outcome] += 1
    terminalreporter.section("calls by client")
    for client, counts in sorted(calls.items()):
        terminalreporter.line(f"{client:16} {counts['passed']:3} of {counts.total():3}")
    passed, total = sum(c["passed"] for c in calls.values()), sum(c.total() for c in calls.values())
    terminalreporter.line(f"{'all':16} {passed:3} of {total:3}")
