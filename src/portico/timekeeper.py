"""Look at the open connections of a server when their time may be over, and end those whose is.

Owns the thread that looks, one for all connections, and when it wakes.  Leaves judging to
`portico.deadlines`, the facts to `portico.traffic`, and what a handler waits for to its engine.

A connection costs nothing until it is looked at, and one that ends before its first look never is.
The thread sleeps while no connection is open, so an idle server does not wake for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Final

from portico.connection import borrow
from portico.deadlines import LONGEST_WAIT, Deadlines, Memory, Rules
from portico.events import Deadline, DeadlineExpired, emit
from portico.traffic import look, with_activity

if TYPE_CHECKING:
    from typing import Any

    from portico.connection import Connection, Connections

RETRY: Final = 0.1
"""Seconds until the next attempt to end a connection that had no socket to shut down."""

GATHERED: Final = 0.1
"""Seconds between two rounds at least, or a twentieth of the shortest time between two looks.

A round passes all connections.  Without a rest, ten thousand that are due one after another would
have the thread go round without end.
"""

WaitsToRead = Callable[["Connection"], "bool | None"]
"""Says whether the handler of a connection waits for bytes of it; ``None`` if nobody knows."""


class Timekeeper:
    """Ends the connections of one server that exceed a limit in time.

    Args:
        server: Whose.  The events carry it; its hooks tell what the engine knows of a handler.
        connections: Those that are open.
        rules: The limits.
    """

    def __init__(self, server: Any, connections: Connections, rules: Rules) -> None:
        self.is_asleep = True
        """Whether it has to be woken for a connection that comes: `wake`."""
        self._server = server
        self._connections = connections
        self._deadlines = Deadlines(rules)
        self._pause = self._deadlines.first_look(0.0)
        self._rest = min(GATHERED, self._pause / 20)
        self._lock = threading.RLock()  # guards is_asleep, _thread, and the two at the end
        self._changes: SimpleQueue[None] = SimpleQueue()  # re-entrant, which no event is
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._is_stopped = False

    def wake(self) -> None:
        """Begin to look: a connection has come.  Callable from any thread.

        Without a thread to be had, connections are served without limits until the next one comes.
        """
        with self._lock:
            self.is_asleep = False
            if self._thread is None and not self._is_stopped:
                thread = threading.Thread(
                    target=self._run, name=f"{type(self._server).__name__} timekeeper", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    self.is_asleep = True
                else:
                    self._thread = thread
        self._changes.put(None)

    def close(self) -> None:
        """Look only as long as a connection is open; the thread ends then.

        Callable from any thread, and again.  For a connection that comes all the same, another
        thread is started.
        """
        with self._lock:
            self._is_closed = True
        self._changes.put(None)

    def stop(self) -> None:
        """Look no more; the thread ends soon.  Callable from any thread, and again."""
        with self._lock:
            self._is_stopped = True
        self._changes.put(None)

    def _run(self) -> None:
        while True:
            while not self._changes.empty():  # nobody else takes any out
                self._changes.get()
            if self._may_end():
                return
            if self.is_asleep:
                self._changes.get()
                continue
            next_look = self.look_at_all(monotonic())
            # Whoever comes meanwhile is looked at after `_pause` at the latest, which is in time
            # for its first look.
            patience = min(next_look - monotonic(), self._pause, LONGEST_WAIT)
            with suppress(Empty):
                self._changes.get(timeout=max(self._rest, patience))

    def _may_end(self) -> bool:
        """Say whether the thread has nothing left to do; note if nobody is there to look at."""
        with self._lock:
            # First the note, then the look: who comes after it wakes us.
            self.is_asleep = True
            if len(self._connections):
                self.is_asleep = False
            if self._is_stopped or (self._is_closed and self.is_asleep):
                self._thread = None
                return True
            return False

    def look_at_all(self, now: float) -> float:
        """Look at the connections that are due, and end those whose time is over.

        Args:
            now: The instant, by `time.monotonic`.

        Returns:
            When the next one of these is due.
        """
        earliest = inf
        for connection in self._connections:
            if connection.next_look <= now:
                self._look_at(connection, now)
            earliest = min(earliest, connection.next_look)
        return earliest

    def _look_at(self, connection: Connection, now: float) -> None:
        if connection.memory is None:
            connection.memory = Memory(connection.accepted)
            connection.next_look = self._deadlines.first_look(connection.accepted)
            if connection.next_look > now:
                return
        traffic = borrow(connection, look)
        if traffic.received is None:
            traffic = with_activity(traffic, self._server._activity(connection))
        waits_to_read = self._server._waits_to_read(connection)
        verdict = self._deadlines.judge(connection.memory, now, traffic, waits_to_read)
        connection.next_look = verdict.next_look
        if verdict.deadline is not None:
            self._end(connection, verdict.deadline, now)

    def _end(self, connection: Connection, deadline: Deadline, now: float) -> None:
        connection.deadline = deadline
        if not self._connections.interrupt(connection):  # it has ended, or is just changing hands
            connection.next_look = now + RETRY
            return
        connection.next_look = inf  # nothing more can be done to one that goes on all the same
        if DeadlineExpired.subscribers:
            duration = now - connection.accepted
            emit(DeadlineExpired(self._server, connection.speaker, deadline, duration))
