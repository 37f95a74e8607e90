"""Know how many descriptors this process may have open, and have it be more.

Source: getrlimit(2), ``RLIMIT_NOFILE``.
"""

from __future__ import annotations

import resource
from contextlib import suppress


def descriptor_limit() -> int:
    """Return how many descriptors this process may have open; below 0 for no limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors open as the system allows it.

    The usual limit, 1,024, is for the sake of select(2), which knows no higher numbers.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems say more than they allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
