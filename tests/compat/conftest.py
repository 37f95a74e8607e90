"""Say at the end of a run what the comparisons with the standard library came to.

And keep hundreds of forked children from writing what they have covered, a tenth of a second each:
what a child does, the tests of the engines measure.
"""

import os
import posix

import pytest

SUMMARY = "comparison"
"""The property of a test's report that holds one line for the end of the run."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lines of all comparisons."""
    lines = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == SUMMARY
    ]
    if lines:
        terminalreporter.section("CPython's tests on portico")
        for line in lines:
            terminalreporter.write_line(str(line))


@pytest.fixture(autouse=True)
def leaves_children_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what coverage puts in the place of `os._exit`."""
    monkeypatch.setattr(os, "_exit", posix._exit)
