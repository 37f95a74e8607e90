"""Write a log to a file that others move away: it is opened again when it is asked for.

Owns the file and its mode.  Leaves the lines to `logging`, and when to open it again to whoever
hears the signal.

Sources: logrotate(8), ``postrotate``: the file is renamed, and the program is told to open another
one; until it does, it writes to the renamed one, so that nothing is lost.  fifo(7).
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from io import TextIOWrapper
from typing import Final

FILE_MODE: Final = 0o640
"""Who may read a log beside its owner: its group, to which those belong who collect logs.  Others
may not: it holds the addresses of peers."""


class LogFile(logging.FileHandler):
    """A handler of `logging` that appends to a file.

    Args:
        path: Where.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def reopen(self) -> None:
        """Open the file again, wherever the one went that was open.  Callable from any thread.

        If that fails, it writes on to the one that is open.  What a full disk has not taken of
        that one is lost.

        Raises:
            OSError: The file cannot be opened.
        """
        opened = self._open()
        self.acquire()
        try:
            # Not by `setStream`: it flushes the earlier one first, and a full disk would keep the
            # log.
            before, self.stream = self.stream, opened
        finally:
            self.release()
        if before is not None:
            with suppress(OSError):
                before.close()

    def close(self) -> None:
        """Close the file.  What a full disk has not taken of it is lost."""
        with suppress(OSError):
            super().close()

    def _open(self) -> TextIOWrapper:
        return open(  # the handler closes it
            self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=_open_narrow
        )


def reopen_all() -> None:
    """Open the log files of this process again.

    Raises:
        OSError: One of them cannot be opened; the others have been.
    """
    failed: OSError | None = None
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFile):
            try:
                handler.reopen()
            except OSError as error:
                failed = error
    if failed is not None:
        raise failed


def _open_narrow(path: str, flags: int) -> int:
    # For a FIFO that nobody reads, which is an error then: else it would wait for a reader.
    opened = os.open(path, flags | os.O_CLOEXEC | os.O_APPEND | os.O_NONBLOCK, FILE_MODE)
    os.set_blocking(opened, True)
    return opened
