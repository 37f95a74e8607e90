"""Count what becomes of the requests of one server.

Owns who writes the cells of an address in the row of this process, and the sums that a program
reads at the end.  Leaves the memory to `portico.counters`, and telling what happens to the server:
that a request came in and how it ended, and the moment before a connection is closed, when the
kernel is asked what has moved over it.  The way of a byte is not touched.

With `ForkingMixIn` a request ends in another process, which must not write to the row.  It sends a
few bytes to its parent instead; the parent counts them when it has collected that child.  One that
sent nothing was killed.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, Final

from portico.address import BoundAddress
from portico.counts import NO_PREAMBLE, Cell, refusal_cell
from portico.drain import LAST_WORDS
from portico.engines.forks import ForkingMixIn
from portico.events import CloseReason, RefusalReason
from portico.lifecycle import DrainReport
from portico.traffic import bytes_moved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portico.connection import Request
    from portico.counters import Station

CELL_OF: Final[Mapping[CloseReason, int]] = {
    CloseReason.FINISHED: Cell.FINISHED,
    CloseReason.FAILED: Cell.FAILED,
    CloseReason.PEER_GONE: Cell.PEER_GONE,
    CloseReason.INTERRUPTED: Cell.CUT_OFF,
    CloseReason.CUT: Cell.CUT_OFF,
    CloseReason.DEADLINE: Cell.CUT_OFF,
    CloseReason.NO_PREAMBLE: refusal_cell(NO_PREAMBLE),
}
"""Where each end is counted."""

# Plain numbers: to ask an enumeration, or to look one of its members up, costs as much as to count.
_ACCEPTED: Final = int(Cell.ACCEPTED)
_FINISHED: Final = int(Cell.FINISHED)
_RECEIVED: Final = int(Cell.RECEIVED)
_SENT: Final = int(Cell.SENT)

RECORD: Final = Struct("=I B 3x Q Q")
"""What a child sends: its process, the cell of its end, bytes that came in and were written."""

PIPE_SIZE: Final = 1 << 20
"""Bytes of records that fit: those of more children than end between two looks for them."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a server did.

    Attributes:
        address: Where.
        served: Requests whose handler ended by itself; a datagram is one, too.
        refused: Requests that did not get as far as a handler: a limit, a network or a hook kept
            them out, or their TLS handshake or PROXY header did.
        cut_off: Requests whose handler was interrupted, or its connection closed under it, or that
            still ran when the service stopped.
        drained: What became of the connections that were open at the stop; ``None`` if a second
            signal came first.
    """

    address: BoundAddress
    served: int
    refused: int
    cut_off: int
    drained: DrainReport | None = None


class Counter:
    """Counts the requests of one server.  Callable from any thread.

    Args:
        server: Whose.
        station: Where; nobody else writes there.
    """

    def __init__(self, server: Any, station: Station) -> None:
        self._server = server
        self._station = station
        # Guards the cells.  One for each server: a child that is forked by one acceptor must not
        # inherit a lock that another thread holds.
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._is_awaited = False
        server._guard.counter = self

    @property
    def has_left_handlers(self) -> bool:
        """Whether handlers still run in threads of this process."""
        return self._station.counts.active > 0

    def close(self) -> None:
        """Count no more.  Callable again."""
        self._server._guard.counter = None

    def tally(self) -> Tally:
        """Say what the server did so far; after a drain, when what it ended has told so."""
        server, report = self._server, self._server.drain_report
        with self._lock:
            if report is not None:  # a connection is at its end a moment before it is told
                left = server._guard.drain.stragglers if server._guard.drain else 0
                self._is_awaited = True
                self._changed.wait_for(lambda: self._station.counts.active <= left, LAST_WORDS)
            counts = self._station.counts
        served = counts.finished + counts.failed + counts.peer_gone
        cut_off = counts.cut_off + counts.active
        return Tally(server.address, served, counts.refused, cut_off, report)

    def note_closing(self, request: Request) -> None:
        """Count what has moved over a connection whose socket is closed next."""
        moved = bytes_moved(request)
        if moved is not None:
            self._add(*moved)

    def note_datagram(self, size: int) -> None:
        """Count the bytes of a datagram that is done with."""
        self._add(size, 0)

    def note_child_end(self, process: int) -> None:
        """Do nothing: what a handler forks is its own."""

    def note_accepted(self, count: int = 1, received: int = 0) -> None:
        """Count requests that came in, and the bytes of those that are datagrams."""
        with self._lock:
            self._station.cells[_ACCEPTED] += count
            if received:
                self._station.cells[_RECEIVED] += received

    def note_finished(self, count: int) -> None:
        """Count requests whose handlers have ended, of which nothing else is told."""
        with self._lock:
            self._station.cells[_FINISHED] += count
            if self._is_awaited:
                self._changed.notify_all()

    def note_refused(self, reason: RefusalReason) -> None:
        """Count a request that does not get as far as a handler."""
        self.note_end(refusal_cell(reason))

    def note_closed(self, reason: CloseReason) -> None:
        """Count the end of a request."""
        self.note_end(_FINISHED if reason is CloseReason.FINISHED else CELL_OF[reason])

    def note_end(self, cell: int) -> None:
        """Count the end of a request that was accepted."""
        with self._lock:
            self._station.cells[cell] += 1
            if self._is_awaited:
                self._changed.notify_all()

    def _add(self, received: int, sent: int) -> None:
        with self._lock:
            cells = self._station.cells
            cells[_RECEIVED] += received
            cells[_SENT] += sent


class ForkingCounter(Counter):
    """Counts the requests of a server whose requests end in child processes."""

    def __init__(self, server: Any, station: Station) -> None:
        self._reader, self._writer = os.pipe()
        for descriptor in (self._reader, self._writer):
            os.set_blocking(descriptor, False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):  # the system allows less
                fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._process = os.getpid()
        self._moved = 0, 0  # in a child
        self._told: dict[int, tuple[int, int, int]] = {}  # by children that are not collected
        super().__init__(server, station)

    @property
    def has_left_handlers(self) -> bool:
        """Whether handlers still run in threads of this process: never."""
        return False

    def close(self) -> None:
        """Count no more.  Callable again."""
        super().close()
        with self._lock:
            if self._reader >= 0:
                os.close(self._reader)
                os.close(self._writer)
                self._reader = self._writer = -1

    def tally(self) -> Tally:
        """Say what the server did so far; what children still do is cut off."""
        self._server.collect_children()
        counts = self._station.counts
        served = counts.finished + counts.failed + counts.peer_gone
        cut_off = counts.cut_off + counts.active
        return Tally(
            self._server.address, served, counts.refused, cut_off, self._server.drain_report
        )

    def note_closing(self, request: Request) -> None:
        """Look at what has moved over the connection of this child."""
        if self._station.is_detached:
            self._moved = bytes_moved(request) or self._moved
        else:
            super().note_closing(request)

    def note_datagram(self, size: int) -> None:
        """Count the bytes of a datagram, in the process that took it."""
        if not self._station.is_detached:
            super().note_datagram(size)

    def note_child_end(self, process: int) -> None:
        """Count how a child's request has ended."""
        with self._lock:
            self._read_told()
            cell, received, sent = self._told.pop(process, (Cell.CUT_OFF, 0, 0))
        self._add(received, sent)
        self.note_end(cell)

    def _read_told(self) -> None:
        if self._reader < 0:
            return
        with suppress(BlockingIOError):
            while told := os.read(self._reader, 1024 * RECORD.size):
                for process, cell, received, sent in RECORD.iter_unpack(told):
                    self._told[process] = cell, received, sent

    def note_end(self, cell: int) -> None:
        """Count the end of a request, or have the parent of this child do so."""
        if not self._station.is_detached:
            super().note_end(cell)
        elif os.getppid() == self._process:  # and not what a handler has forked
            with suppress(OSError):  # nobody is left to read it
                os.write(self._writer, RECORD.pack(os.getpid(), cell, *self._moved))


def count(server: Any, station: Station) -> Counter:
    """Count the requests of a server from now on.

    Args:
        server: One of portico's own.
        station: Where; nobody else writes there.
    """
    kind = ForkingCounter if isinstance(server, ForkingMixIn) else Counter
    return kind(server, station)
