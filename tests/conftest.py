"""What holds for the whole suite."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import hypothesis
import pytest

import portico

if TYPE_CHECKING:
    from tests.tls import Authority

# No deadline for an example, nor for the making of the first ones, for which tables of Unicode are
# made in a fresh checkout: a busy machine is no failure.  In CI the examples are the same in every
# run; elsewhere each run looks at new ones.
hypothesis.settings.register_profile(
    "portico",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    print_blob=True,
)
hypothesis.settings.load_profile("portico")

# A shell that starts the suite in the background makes it ignore SIGINT, and every program that a
# test starts would inherit that; what is merely caught, a program does not inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    """Name the portico under test: the sources of this checkout, or an installed wheel."""
    del config
    return f"portico: {portico.__path__[0]}"


GRACE = 5.0
"""Seconds for a child to end that has just been told to."""


@pytest.fixture(autouse=True)
def leaves_no_fork(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End what a test has forked, and fail the test that left it.

    A child that waits for a client of its own process waits for ever: it has inherited the
    client's end of the connection, too.  And it keeps the output of the whole run open.
    """
    forked: list[int] = []
    fork = os.fork

    def recorded_fork() -> int:
        child = fork()
        if child:
            forked.append(child)
        return child

    monkeypatch.setattr(os, "fork", recorded_fork)
    yield
    left = [child for child in forked if is_running(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):  # its server collects it in another thread
            os.waitpid(child, 0)
    assert not left, "forked children outlive the test"


def is_running(child: int) -> bool:
    """Say whether a child goes on; leaves it to its server to collect one that has ended."""
    pause = threading.Event()
    for _ in range(int(GRACE / 0.01)):
        try:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
        except ChildProcessError:  # collected
            return False
        pause.wait(0.01)
    return True


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have programs that the test starts run without coverage, for those that are interrupted.

    What a signal handler raises while the measurement runs Python code of its own is lost.
    """
    for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> "Authority":
    """A certificate authority that the tests and their clients trust."""
    from tests.tls import Authority  # its library is slow to import, and few tests need it

    return Authority(tmp_path_factory.mktemp("authority"))
