"""Ring across processes: whoever waits for a descriptor learns that something has changed.

Owns one descriptor (two where the system has no eventfd) that all processes share which inherit it.
Says nothing about what has changed: who hears it looks.

Source: eventfd(2).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Self


class Bell:
    """A descriptor that is readable from the moment it rings until somebody hushes it.

    Callable from any thread and any process; never waits.

    Args:
        reader: What is readable.
        writer: What is written to; the same for an eventfd.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    def make(cls) -> Self:
        """Make one that is silent.

        Raises:
            OSError: The system has no descriptor left.
        """
        if hasattr(os, "eventfd"):
            number = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return cls(number, number)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        return cls(reader, writer)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors, the readable one first; none once it is closed."""
        if self._reader < 0:
            return ()
        return (self._reader,) if self._reader == self._writer else (self._reader, self._writer)

    def fileno(self) -> int:
        """Return the descriptor to wait for; below 0 once it is closed."""
        return self._reader

    def ring(self) -> None:
        """Make it readable."""
        with suppress(BlockingIOError):  # it is full: that is heard, too
            os.write(self._writer, (1).to_bytes(8, "little"))

    def hush(self) -> None:
        """Make it unreadable."""
        with suppress(BlockingIOError):  # it is, now or already
            while os.read(self._reader, 65536):
                pass

    def close(self) -> None:
        """Close this process's hold on it.  Callable again."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self._reader = self._writer = -1
