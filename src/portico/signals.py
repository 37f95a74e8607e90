"""Have signals end a wait, as descriptors do, and tell a wish that comes again from one told twice.

Owns the handlers of the signals that it hears, and the pipe into which the interpreter writes their
numbers.  To be used in the main thread.  Leaves what a signal means to who hears it.

Source: signal.set_wakeup_fd in the documentation of Python.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Final, Self

SAME_WISH: Final = 0.25
"""Seconds within which further signals are the wish of the first.

timeout(1) sends one to its child and the next to the group, in which the child is as well.
"""


class SignalPipe:
    """Hears signals while the ``with`` block runs.

    Args:
        numbers: Which.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = tuple(numbers)
        self._reader = self._writer = -1

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, do_nothing)  # the interpreter writes its number
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        self.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when a signal has come."""
        return self._reader

    def take(self) -> bytes:
        """Return the numbers of the signals that have come, in their order; never waits."""
        with suppress(BlockingIOError):
            return os.read(self._reader, 4096)
        return b""

    def close(self) -> None:
        """Close the pipe, and leave the handlers: for a child, which has others by then."""
        os.close(self._reader)
        os.close(self._writer)


class Wish:
    """The wish that a service ends, of which signals tell."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._leaves_out = False

    def leave_out_one(self) -> None:
        """Have one signal be none of them: which this process sends itself, for another reason.

        It may come before or after others; which one is left out makes no difference.
        """
        self._leaves_out = True

    def comes_again(self) -> bool:
        """Take note of a signal; say whether it is another one's than the first's.

        Callable from a signal handler.
        """
        if self._leaves_out:
            self._leaves_out = False
            return False
        now = time.monotonic()
        if self._since is None:
            self._since = now
            return False
        return now - self._since >= SAME_WISH

    def settle(self) -> None:
        """Have the time begin only here, for who heard no other signal while it obeyed the first.

        What it says then may have to wait for whoever listens.
        """
        self._since = time.monotonic()


@contextmanager
def caught(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Generator[None]:
    """Have a handler for signals while the block runs, and then the earlier ones again."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal that has done its work when it has ended a wait, or that is ignored.

    A handler, and not ``SIG_IGN``, which programs that are started would inherit.
    """
