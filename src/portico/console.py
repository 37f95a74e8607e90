"""Say on the terminal what happens to a program, one line at a time.

Owns the words that introduce each line.  It goes to standard error, wherever the log goes.
"""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Say something on standard error, in one piece, so that lines of several processes stay whole.

    Callable from any thread.  A terminal that has gone away is no reason to stop.
    """
    try:
        sys.stderr.write(f"portico: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads it any more, or it is closed
        pass
