"""Say at the end of a run what the comparisons with the standard library came to."""

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
