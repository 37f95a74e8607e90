"""Keep others out of a directory while a file in it is looked at and replaced.

Owns the lock, which belongs to the directory, so that it leaves no file behind.  Leaves to who
takes it what is done there.

Source: flock(2).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

LOCK_PATIENCE: Final = 1.0
"""Seconds to wait for another process that does the same in the same directory.

It takes well under a millisecond.  Who holds the lock for longer keeps a cleaner of temporary
files away, and does not mean us.
"""


@contextmanager
def alone_in(directory: Path) -> Generator[None]:
    """Keep others out who do the same: of two that find a stale file, one may replace it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # may be entered, not read: go without
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_PATIENCE
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
