"""What holds for the whole suite."""

import os
import signal

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
