"""Tell of another process whether it lives, when it began, and what it is called.

Owns the questions; each answer is true of the moment of asking.  Leaves what follows to who asks: a
number alone says little, since the system gives it to another process later.

Source: kill(2) (the signal 0); proc_pid_stat(5) (``state``; ``starttime``, in clock ticks after the
boot); proc_pid_comm(5).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def is_alive(process: int, began: int = 0) -> bool:
    """Say whether there is a process of this number, and has not ended; of 0 that there is not.

    Args:
        process: Its number.
        began: What `birth` said of it; 0 if that is not known.
    """
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter of a number that none can have
        return False
    except PermissionError:  # somebody else's
        pass
    state, now = _state(process)
    has_ended = state in {"Z", "X"}  # and nobody has collected it yet
    return not has_ended and (not began or not now or began == now)


def birth(process: int) -> int:
    """Return when a process began, in clock ticks after the boot; 0 if it cannot be told.

    With its number it tells a process from all others for as long as the machine runs.
    """
    return _state(process)[1]


def start_time(process: int) -> float | None:
    """Return the time of day at which a process began; ``None`` if it cannot be told."""
    ticks = birth(process)
    if not ticks:
        return None
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")


def _state(process: int) -> tuple[str, int]:
    """Return the state of a process, and when it began."""
    with suppress(OSError, ValueError, IndexError):
        # After the last parenthesis, since the name of a program may hold anything.
        text = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
        fields = text.rpartition(")")[2].split()
        return fields[0], int(fields[19])
    return "", 0


def command(process: int) -> str:
    """Return the name of the program of a process."""
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text("utf-8", "replace").strip()
    return "unknown"
