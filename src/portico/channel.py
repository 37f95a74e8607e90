"""Carry short messages between a supervisor and a process that it has started.

Owns how a message becomes bytes, a line of JSON, and that neither side can be held or filled up by
the other.  That the other process is gone is the end of the stream: nobody else has its end.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Self, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""What is said: ``kind``, and whatever belongs to it."""

LONGEST_MESSAGE: Final = 1 << 18
"""Bytes of a message at the most: four times those of the stacks of a worker.  What is longer comes
from somewhere else, and is dropped."""


class Channel:
    """One end.

    Args:
        end: One of a pair of connected stream sockets.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._received = bytearray()
        self._lock = threading.Lock()  # guards the order of bytes that are sent

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Return both ends of a channel; the first, for a supervisor, never waits.

        Raises:
            OSError: The system has no descriptor left.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """Return the descriptor, which is readable when there is a message or the end."""
        return self._end.fileno()

    def send(self, kind: str, **values: object) -> bool:
        """Say something.  Callable from any thread.

        Returns:
            Whether it went out: the other process may be gone, or not read what it is told.
        """
        line = json.dumps({"kind": kind, **values}).encode() + b"\n"
        with self._lock:
            try:
                self._end.sendall(line)
            except OSError:
                return False
        return True

    def receive(self) -> list[Message] | None:
        """Return what has come, ``None`` at the end of it; waits only where the end does."""
        try:
            more = self._end.recv(65536)
        except BlockingIOError:
            return []
        except OSError:  # the other process was killed, and had not read everything
            return None
        if not more:
            return None
        self._received += more
        *lines, rest = self._received.split(b"\n")
        self._received = rest if len(rest) <= LONGEST_MESSAGE else bytearray()
        return [message for line in lines if (message := _read(line)) is not None]

    def close(self) -> None:
        """Close this end.  Callable again."""
        self._end.close()


def _read(line: bytearray) -> Message | None:
    """Read a message; ``None`` if it is none."""
    with suppress(ValueError, LookupError, TypeError):  # a handler may have written to it
        message: Any = json.loads(line)
        if isinstance(message["kind"], str):
            return dict(message)
    return None
