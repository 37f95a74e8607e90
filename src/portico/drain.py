"""Bring the open connections of a server to their end, within a time.

Owns one drain: whom it gives end-of-file, when it closes the rest, and its count.  Leaves what idle
means to `portico.traffic`, the sums to `portico.lifecycle`, and no longer accepting to the server.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from threading import Event, RLock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Final

from portico.connection import borrow
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
        self.unfinished = 0
        """Requests without a connection of their own that were not served in time."""
        self.waiting = 0
        """Handlers of such requests that wait for this drain, and so it does not for them."""
        self._connections = connections
        self._of_children = of_children
        self._waits_to_read = waits_to_read
        self._spared: set[Connection] = set() if spared is None else {spared}
        # Guards waiting, _tally and _spared; re-entrant for signal handlers.
        self._lock = RLock()
        self._tally = DrainTally(now)
        self._lost: deque[tuple[Connection, float]] = deque()  # that have ended at this instant
        self._idle: set[Connection] = set()
        self._forced: set[Connection] = set()
        self._changed = Event()
        self._watchers: list[Thread] = []  # of `watch`
        self._is_unwatched = Event()  # ends them
        self.is_over = Event()
        """Set when there is a report."""

    def note_end(self, connection: Connection) -> None:
        """Count a connection that ends: whose socket is closed next.  Callable from any thread."""
        with self._lock:
            self._count_end(connection, monotonic())
        self._changed.set()

    def note_lost(self, connection: Connection) -> None:
        """Count one that the garbage collector has found, at the next look.

        The collector may interrupt a thread that holds the lock.
        """
        self._lost.append((connection, monotonic()))

    def spare(self, connection: Connection) -> None:
        """Count a connection as finished whose handler waits for this drain, as others do.

        Callable from any thread.
        """
        with self._lock:
            self._count_end(connection, monotonic())
            self._spared.add(connection)
        self._changed.set()

    def note_waiting(self) -> None:
        """Note that the handler of a request without a connection waits for this drain.

        Callable from any thread.
        """
        with self._lock:
            self.waiting += 1

    def _count_end(self, connection: Connection, now: float) -> None:
        if connection not in self._spared and not connection.has_ended:
            connection.has_ended = True
            # One that came and went between two looks is counted here.
            self._tally.add(connection, connection.accepted)
            self._tally.end(connection, now)

    def run(self, wait: Callable[[Event, float], object]) -> DrainReport:
        """See every connection to its end; closes at the deadline what is left.

        Args:
            wait: Waits for an event, for some seconds at the most, as the caller's engine does.
        """
        self._repeat(self.look, self.deadline, wait)
        if self._open():
            self._repeat(self._close_rest, monotonic() + LAST_WORDS, wait)
        for process in tuple(self._of_children):  # it can be ended whatever its handler does
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self._of_children:
            self._repeat(lambda: len(self._of_children), monotonic() + LAST_WORDS, wait)
        self.stragglers = self._open()
        with self._lock:
            return self._tally.report(monotonic())

    def _repeat(
        self, step: Callable[[], int], deadline: float, wait: Callable[[Event, float], object]
    ) -> None:
        """Do something until no connection is open, or a deadline comes; once at least."""
        while True:
            self._changed.clear()  # first, and then a look
            remaining = deadline - monotonic()
            if not step() or remaining <= 0:
                return
            wait(self._changed, min(LOOK_INTERVAL, remaining))

    @contextmanager
    def watched(self, draining: Event) -> Generator[None]:
        """See to the connections from a thread of its own while the block runs.

        On the serial engine a handler holds whoever runs it, here the drain itself: nobody else
        would give its idle peer end-of-file, or close it at the deadline.

        Args:
            draining: As for `watch`.
        """
        is_done = Event()
        watcher = self._start_watcher(draining, is_done)
        try:
            yield
        finally:
            is_done.set()
            if watcher is not None:
                watcher.join()

    def watch(self, draining: Event) -> None:
        """Do so for a handler that holds the serving loop, until `end_watch`.

        Callable from any thread, and more than once: two that watch do no harm.

        Args:
            draining: Set first of all, by that thread: a signal handler that begins a drain may
                have interrupted one that waits for it, and holds its lock.
        """
        if not self._watchers:
            watcher = self._start_watcher(draining, self._is_unwatched)
            if watcher is not None:
                self._watchers.append(watcher)

    def end_watch(self) -> None:
        """End what `watch` began, for good, and wait for that."""
        self._is_unwatched.set()
        for watcher in self._watchers:
            watcher.join()

    def _start_watcher(self, draining: Event, is_done: Event) -> Thread | None:
        """Return a thread that watches; ``None`` if the system has none left."""
        watcher = Thread(
            target=self._watch, args=(draining, is_done), name="portico drain", daemon=True
        )
        with suppress(RuntimeError):  # other engines than the serial one need none
            watcher.start()
            return watcher
        return None

    def _watch(self, draining: Event, is_done: Event) -> None:
        draining.set()
        while not is_done.wait(LOOK_INTERVAL):
            self.look()
            if monotonic() >= self.deadline:
                self._close_rest()

    def _open(self) -> int:
        with self._lock:
            while self._lost:
                self._count_end(*self._lost.popleft())
            return self._tally.open

    def look(self) -> int:
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
            traffic = borrow(connection, look)
            age = now - connection.accepted
            if is_idle(traffic, self._waits_to_read(connection), age):
                with self._lock:
                    self._tally.mark_idle(connection)
                # What is on its way to the peer arrives; the handler reads the end of the stream.
                if self._connections.interrupt(connection, socket.SHUT_RD):
                    self._idle.add(connection)
        return self._open()

    def _add(self, connection: Connection) -> None:
        """Count a connection that is open; not one that ended while it was looked at."""
        with self._lock:
            if not connection.has_ended and connection not in self._spared:
                self._tally.add(connection, connection.accepted)

    def _close_rest(self) -> int:
        """Close what is left; return how many are open.

        To be called again while any is: one whose socket was in the hands of nobody, because
        another object was taking it over, could not be closed.
        """
        for process, connection in tuple(self._of_children.items()):
            if self._mark_forced(connection):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        for connection in self._connections:
            if connection not in self._spared:
                self._mark_forced(connection)
                if not connection.was_cut:
                    self._connections.interrupt(connection)
        return self._open()

    def _mark_forced(self, connection: Connection) -> bool:
        """Count a connection as closed at the deadline; return whether it was not already."""
        self._add(connection)
        if connection in self._forced:
            return False
        self._forced.add(connection)
        with self._lock:
            self._tally.mark_forced(connection)
        return True
