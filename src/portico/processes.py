"""Tell of another process whether it lives, when it began, and what it is called.

Owns the questions; each answer is true of the moment of asking.  Leaves what follows to who asks: a
number alone says little, since the system gives it to another process later.

Source: kill(2) (the signal 0); proc_pid_stat(5) (``starttime``, in clock ticks after the boot);
proc_pid_comm(5).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def is_alive(process: int) -> bool:
    """Say whether there is a process of this number; of 0, which none has, that there is not."""
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter of a number that none can have
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def start_time(process: int) -> float | None:
    """Return the time of day at which a process began; ``None`` if it cannot be told."""
    with suppress(OSError, ValueError, IndexError):
        # After the last parenthesis, since the name of a program may hold anything.
        text = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
        ticks = int(text.rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
    return None


def command(process: int) -> str:
    """Return the name of the program of a process."""
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text("utf-8", "replace").strip()
    return "unknown"
