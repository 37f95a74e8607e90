"""Bring the open connections of a server to their end, within a time.

Owns one drain: whom it gives end-of-file, when it closes the rest, and its count.  Leaves what idle
means to `portico.traffic`, the sums to `portico.lifecycle`, and no longer accepting to the server.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from threading import Event, Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Final

from portico.lifecycle import DrainReport, DrainTally
from portico.traffic import is_idle, look

if TYPE_CHECKING:
    from portico.connection import Connection, Connections
    from portico.timekeeper import WaitsToRead

LOOK_INTERVAL: Final = 0.05
"""Seconds between two looks at the connections that were busy: a tenth of the half second in which
an idle one is to be ended."""

LAST_WORDS: Final = 1.0
"""Seconds that handlers have to end in after their connections were closed under them."""


class Drain:
    """One drain.

    Args:
        connections: Those that are open; more may come until `run`.
        of_children: Those that child processes serve, by the process.
        waits_to_read: What the engine knows of a handler.
        timeout: Seconds from now until the rest is closed; ``None`` for no limit.
        spared: The connection of the caller, which cannot wait for itself.
    """

    def __init__(
        self,
        connections: Connections,
        of_children: Mapping[int, Connection],
        waits_to_read: WaitsToRead,
        timeout: float | None,
        spared: Connection | None = None,
    ) -> None:
        now = monotonic()
        self.deadline = inf if timeout is None else now + timeout
        """When the rest is closed, by `time.monotonic`."""
        self.stragglers = 0
        """Connections whose handlers went on although they were closed."""
        self._connections = connections
        self._of_children = of_children
        self._waits_to_read = waits_to_read
        self._spared = spared
        self._lock = Lock()  # guards _tally
        self._tally = DrainTally(now)
        self._idle: set[Connection] = set()
        self._changed = Event()
        self.is_over = Event()
        """Set when there is a report."""

    def note_end(self, connection: Connection) -> None:
        """Count a connection that ends: whose socket is closed next.  Callable from any thread."""
        with self._lock:
            if connection is not self._spared and not connection.has_ended:
                connection.has_ended = True
                # One that came and went between two looks is counted here.
                self._tally.add(connection, connection.accepted)
                self._tally.end(connection, monotonic())
        self._changed.set()

    def run(self, wait: Callable[[Event, float], object]) -> DrainReport:
        """See every connection to its end; closes at the deadline what is left.

        Args:
            wait: Waits for an event, for some seconds at the most, as the caller's engine does.
        """
        while self._look() and (remaining := self.deadline - monotonic()) > 0:
            self._changed.clear()
            wait(self._changed, min(LOOK_INTERVAL, remaining))
        if self._open():
            self._close_rest()
            patience = monotonic() + LAST_WORDS
            while self._open() and (remaining := patience - monotonic()) > 0:
                self._changed.clear()
                if self._open():
                    wait(self._changed, remaining)
        self.stragglers = self._open()
        with self._lock:
            return self._tally.report(monotonic())

    @contextmanager
    def watched(self) -> Generator[None]:
        """See to the connections from a thread of its own while the block runs.

        On the serial engine a handler holds whoever runs it, the serving loop or the drain itself:
        nobody else would give its idle peer end-of-file, or close it at the deadline.
        """
        is_done = Event()
        watcher = Thread(target=self._watch, args=(is_done,), name="portico drain", daemon=True)
        try:
            watcher.start()
        except RuntimeError:  # the system has no thread left; the others need none
            yield
            return
        try:
            yield
        finally:
            is_done.set()
            watcher.join()

    def _watch(self, is_done: Event) -> None:
        while not is_done.wait(LOOK_INTERVAL):
            self._look()
            if monotonic() >= self.deadline:
                self._close_rest()

    def _open(self) -> int:
        with self._lock:
            return self._tally.open

    def _look(self) -> int:
        """Give end-of-file to those that have become idle; return how many are open."""
        now = monotonic()
        for connection in tuple(self._of_children.values()):
            self._add(connection)  # whether it is idle, only the child could say
        for connection in self._connections:
            if connection is self._spared:
                continue
            self._add(connection)
            if connection in self._idle:
                continue
            traffic = look(connection.request)
            age = now - connection.accepted
            if is_idle(traffic, self._waits_to_read(connection), age):
                self._idle.add(connection)
                with self._lock:
                    self._tally.mark_idle(connection)
                # What is on its way to the peer arrives; the handler reads the end of the stream.
                self._connections.interrupt(connection, socket.SHUT_RD)
        return self._open()

    def _add(self, connection: Connection) -> None:
        """Count a connection that is open; not one that ended while it was looked at."""
        with self._lock:
            if not connection.has_ended:
                self._tally.add(connection, connection.accepted)

    def _close_rest(self) -> None:
        for process, connection in tuple(self._of_children.items()):
            self._add(connection)
            with self._lock:
                self._tally.mark_forced(connection)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        for connection in self._connections:
            if connection is not self._spared:
                self._add(connection)
                with self._lock:
                    self._tally.mark_forced(connection)
                self._connections.interrupt(connection)
