"""Say on the terminal what happens to a program, one line at a time.

Owns the words that introduce each line, what becomes of a line that nobody takes, and what stands
for a terminal that is not there.  What is said goes to standard error, wherever the log goes.

Sources: pipe(7) (PIPE_BUF); poll(2) (a pipe that is ready takes so many bytes without a wait);
open(2) (O_NONBLOCK belongs to the open file description, which others who write there share).
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Final, TextIO

PATIENCE: Final = 0.25
"""Seconds that a line waits for whoever reads what is said.

It may be the supervisor that speaks, and meanwhile nobody sees to its workers, nor hears a signal:
a reader that has stopped for good costs this once, and each later line nothing."""

LONGEST_PIECE: Final = select.PIPE_BUF
"""Bytes that are written at once: a pipe takes so many whole, or not at all, whoever writes there
too."""

SHORT: Final = LONGEST_PIECE // 4
"""Characters that are never more bytes, in UTF-8."""


def complete() -> None:
    """Open what is closed of the three standard descriptors, on nothing.

    At the start of a process, before anything else is opened: that would get their numbers, and a
    handler's print might go to a client.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def say(text: str) -> None:
    """Say something on standard error, so that lines of several processes stay whole.

    Callable from any thread, and from a signal handler.  A terminal that has gone away is no reason
    to stop, and one that takes nothing more none to wait: the line is dropped, and the next one
    that is taken is introduced by how many were.
    """
    show(f"portico: {text}\n")


def show(text: str, stream: TextIO | None = None) -> None:
    """Write a text, such as a traceback, to standard error as it is; as `say` otherwise.

    Args:
        text: It, with the end of its last line.
        stream: Another one in the place of standard error.
    """
    _put(sys.stderr if stream is None else stream, text)


class LogConsole(logging.StreamHandler[TextIO]):
    """A handler of `logging` for standard error, which drops what nobody takes as `say` does.

    Whoever logs is serving: it would stand still with the reader.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            _put(self.stream, f"{self.format(record)}{self.terminator}")
        except Exception:  # of whoever gave the record its arguments
            self.handleError(record)


def _put(stream: TextIO | None, text: str) -> None:
    """Write a text, unless nobody takes it."""
    if stream is None:  # closed when the interpreter started, or taken off by the program
        return
    written = ""
    try:
        _lost.tell(stream)
        for piece in _pieces(text):
            _write(stream, piece)
            written = piece
    except BlockingIOError:
        _lost.count += 1
        _lost.breaks_off |= written != ""
    except (OSError, ValueError):  # nobody reads it any more, or it is closed
        pass


class Lost:
    """The lines of this process that were dropped and are to be told.

    No lock guards the number: it might be held where a signal handler speaks, or by another thread
    where the process forks, and a line that is not counted is no great loss.
    """

    def __init__(self) -> None:
        self.count = 0
        self.breaks_off = False
        """Whether only the rest of one was dropped, in the middle of a line perhaps."""
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Leave them to the process that has dropped them."""
        self.count, self.breaks_off = 0, False

    def tell(self, stream: TextIO) -> None:
        """Tell of them, if there are any.

        Raises:
            BlockingIOError: Nobody takes that either.
        """
        if count := self.count:
            lines, them = ("line was", "it") if count == 1 else ("lines were", "them")
            end = "\n" if self.breaks_off else ""
            _write(stream, f"{end}portico: {count} {lines} dropped, since nobody read {them}\n")
            self.count -= count
            self.breaks_off = False


_lost: Final = Lost()


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into what can be written at once, if need be; at the ends of lines, if it can."""
    while len(text) > SHORT and len(text.encode(errors="replace")) > LONGEST_PIECE:
        end = text.rfind("\n", 0, SHORT) + 1 or SHORT
        yield text[:end]
        text = text[end:]
    yield text


def _write(stream: TextIO, piece: str) -> None:
    """Write a piece, if it is taken in time.

    Raises:
        BlockingIOError: It is not, and nothing of it was written.
    """
    if not _has_room(stream):
        raise BlockingIOError
    stream.write(piece)
    stream.flush()


def _has_room(stream: TextIO) -> bool:
    """Wait for room, unless somebody has waited in vain and there was none since."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):  # of a kind of its own, such as a test's
        return True
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(0 if _lost.count else PATIENCE * 1000))
