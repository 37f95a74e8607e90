"""Bring the open connections of a server to their end, within a time.

Owns one drain: whom it gives end-of-file, when it closes the rest, and its count.  Leaves what idle
means to `portico.traffic`, the sums to `portico.lifecycle`, and no longer accepting to the server.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from threading import Event, Lock
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
        self._spared: set[Connection] = set() if spared is None else {spared}
        self._lock = Lock()  # guards _tally, _spared
        self._tally = DrainTally(now)
        self._idle: set[Connection] = set()
        self._changed = Event()
        self.is_over = Event()
        """Set when there is a report."""

    def spare(self, connection: Connection) -> None:
        """Do not wait for a connection whose handler waits for this drain.

        Callable from any thread.
        """
        with self._lock:
            self._spared.add(connection)
            self._tally.forget(connection)
        self._changed.set()

    def note_end(self, connection: Connection) -> None:
        """Count a connection that ends: whose socket is closed next.  Callable from any thread."""
        with self._lock:
            if connection not in self._spared and not connection.has_ended:
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
            self._wait_ended(wait)
            if self._of_children:  # whose own signal handlers let them go on
                self._signal_children(signal.SIGKILL)
                self._wait_ended(wait)
        self.stragglers = self._open()
        with self._lock:
            return self._tally.report(monotonic())

    def _wait_ended(self, wait: Callable[[Event, float], object]) -> None:
        """Give handlers whose connections were closed the time to end."""
        patience = monotonic() + LAST_WORDS
        while self._open() and (remaining := patience - monotonic()) > 0:
            self._changed.clear()
            if self._open():
                wait(self._changed, remaining)

    def _open(self) -> int:
        with self._lock:
            return self._tally.open

    def _look(self) -> int:
        """Give end-of-file to those that have become idle; return how many are open."""
        now = monotonic()
        for connection in tuple(self._of_children.values()):
            self._add(connection)  # whether it is idle, only the child could say
        for connection in self._connections:
            if connection in self._spared:
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
            if not connection.has_ended and connection not in self._spared:
                self._tally.add(connection, connection.accepted)

    def _close_rest(self) -> None:
        for connection in tuple(self._of_children.values()):
            self._add(connection)
            with self._lock:
                self._tally.mark_forced(connection)
        self._signal_children(signal.SIGTERM)
        for connection in self._connections:
            if connection not in self._spared:
                self._add(connection)
                with self._lock:
                    self._tally.mark_forced(connection)
                self._connections.interrupt(connection)

    def _signal_children(self, number: signal.Signals) -> None:
        for process in tuple(self._of_children):
            with suppress(ProcessLookupError):
                os.kill(process, number)
