"""What holds for the whole suite."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

import portico

# No deadline for an example: a busy machine is no failure.  In CI the examples are the same in
# every run; elsewhere each run looks at new ones.
hypothesis.settings.register_profile(
    "portico", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("portico")

# A shell that starts the suite in the background makes it ignore SIGINT, and every program that a
# test starts would inherit that; what is merely caught, a program does not inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    """Name the portico under test: the sources of this checkout, or an installed wheel."""
    del config
    return f"portico: {portico.__path__[0]}"


@pytest.fixture(autouse=True)
def leaves_no_fork() -> Iterator[None]:
    """End what a test has forked, and fail the test that left it.

    A child that waits for a client of its own process waits for ever: it has inherited the
    client's end of the connection, too.  And it keeps the output of the whole run open.
    """
    before = forks()
    yield
    left = forks() - before
    for child in left:
        os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):  # its server collects it in another thread
            os.waitpid(child, 0)
    assert not left, "forked children outlive the test"


def forks() -> set[int]:
    """Return the children of this process that run its own program."""
    own_command = Path("/proc/self/cmdline").read_bytes()
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread, or a child, that has just ended
            for child in task.read_text().split():
                if Path("/proc", child, "cmdline").read_bytes() == own_command:
                    found.add(int(child))
    return found
