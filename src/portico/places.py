"""Share the places of `max_connections` between all workers.

Owns how a worker takes a place and gives it back, and how one that waits for a place learns that
another worker has given one back.  Leaves the memory to `portico.counters`, and what one worker
alone has to decide to `portico.admission` and `portico.gate`.

Each worker raises and lowers a cell of its own, and adds up those of all.  It raises first and adds
up then: of two that do so at the same moment at least one sees both, and takes its own back.  So
there are never more than the limit.  Who had to take its place back tries again where only one
process is let in at a time: so one of them gets the place that was free.
"""

from __future__ import annotations

import errno
import os
from threading import Lock
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from portico.acceptor import is_ready
from portico.admission import Admission, AdmissionRules
from portico.counts import Cell
from portico.engines import left_out_of_batches
from portico.events import RefusalReason
from portico.gate import Gate, WhenFull
from portico.server import BaseServer

if TYPE_CHECKING:
    from portico.connection import ClientAddress, Request
    from portico.counters import Station

    _Base: TypeAlias = BaseServer
else:
    _Base = object

LOOK_AGAIN: Final = 1.0
"""Seconds after which who waits for a place looks again although no bell has rung.

A worker that was to ring may have been killed between giving its place back and ringing.
"""


LEAD: Final = 1.25
"""How many times its share of all connections a worker may have, and one more, before it leaves
those who come next to the others for a while."""

SILENCE: Final = 2.5
"""Seconds without a sign of life after which nobody is left to a worker: it is stuck, or drains.
One that accepts gives a sign every two."""

COUNT_INTERVAL: Final = 0.5
"""Seconds after which the workers that give signs are counted again."""


class SharedPlaces:
    """The places of one address, as one worker sees them.

    Not safe between threads: its owner lets one call in at a time.

    Args:
        station: The cells of the address in the row of this worker.
        limit: How many places there are, in all workers together.
        workers: How many workers there are.
    """

    def __init__(self, station: Station, limit: int, workers: int = 1) -> None:
        bell = station.counters.bell_of(station.number)
        assert bell is not None, "several workers have a mapping that is shared"
        self.limit = limit
        self._workers = workers
        self._share = LEAD / workers
        self._accepting, self._counted = workers, 0
        self._station = station
        self._bell = bell
        self._fence = Lock()  # guards nothing: see `_settle_order`

    @property
    def taken(self) -> int:
        """Places that are taken, in all workers."""
        return sum(self._column(Cell.PLACES))

    @property
    def is_full(self) -> bool:
        """Whether every place is taken."""
        return self.taken >= self.limit

    @property
    def leads(self) -> bool:
        """Whether this worker has clearly more than its share of the connections.

        That of the workers that can take one: with the others stuck or gone, it never has.
        """
        mine, taken = self._station.cells[Cell.PLACES], self.taken
        if mine <= 1 + self._share * taken:
            return False
        now = monotonic_ns()
        if now - self._counted >= COUNT_INTERVAL * 1e9:
            beating = self._station.counters.beating(now - int(SILENCE * 1e9))
            self._accepting, self._counted = max(1, min(self._workers, beating)), now
        return mine > 1 + LEAD / self._accepting * taken

    def take(self) -> bool:
        """Take a place, and say whether there was one."""
        if self.is_full:
            return False
        if not self._try():
            # Another one has tried at this moment, or does.
            with self._station.counters.exclusive(self._station.number):
                is_in = self._try()
            if not is_in:
                self._tell()  # who saw ours may wait for it
                return False
        if self._station.cells[Cell.AWAITS]:
            # The bell rang for all who waited, and this one may have hushed it: if there is more
            # room, it is for the others as well.
            self._station.cells[Cell.AWAITS] = 0
            if not self.is_full:
                self._tell()
        return True

    def take_over(self) -> None:
        """Count a connection that is open already."""
        self._station.cells[Cell.PLACES] += 1

    def leave(self) -> None:
        """Give a place back."""
        self._station.cells[Cell.PLACES] -= 1
        self._settle_order()
        self._tell()

    def begin_to_wait(self) -> int:
        """Return a descriptor that is readable when a place was given back since this call.

        It has to be looked once more for a place afterwards, before anybody waits.
        """
        self._bell.hush()
        self._station.cells[Cell.AWAITS] = monotonic_ns()
        self._settle_order()
        return self._bell.fileno()

    def end_waiting(self) -> bool:
        """Say that nobody here waits, and whether somebody did."""
        cells = self._station.cells
        did_wait, cells[Cell.AWAITS] = cells[Cell.AWAITS], 0
        return bool(did_wait)

    @property
    def is_awaited_elsewhere(self) -> bool:
        """Whether another worker may wait for a place, and this one does not."""
        since = self._station.cells[Cell.AWAITS]
        if since and monotonic_ns() - since < LOOK_AGAIN * 1e9:
            return False
        return any(self._column(Cell.AWAITS))

    def _try(self) -> bool:
        cells = self._station.cells
        cells[Cell.PLACES] += 1
        self._settle_order()
        if self.taken <= self.limit:
            return True
        cells[Cell.PLACES] -= 1
        return False

    def _tell(self) -> None:
        if any(self._column(Cell.AWAITS)):
            self._bell.ring()

    def _settle_order(self) -> None:
        """Have others see what was written here before this one reads what they have written.

        A processor may read a cell before its own write of another has left it.  Two that do so
        would both see room for one.  The locked instructions of a lock keep x86 from it; Arm's
        order those of one lock, and the many instructions of the interpreter do the rest.
        """
        self._fence.acquire()
        self._fence.release()

    def _column(self, cell: Cell) -> memoryview[int]:
        return self._station.counters.column(self._station.number, cell)


class SharedAdmission(Admission):
    """Applies the rules of one worker to connections, and `max_connections` to those of all.

    Args:
        rules: The rules; their `max_connections` are those of this worker alone.
        shared: The places of all.
    """

    def __init__(self, rules: AdmissionRules, shared: SharedPlaces) -> None:
        super().__init__(rules)
        self._shared = shared
        self._reserved = 0

    @property
    def is_full(self) -> bool:
        """Whether there is no place, here or in all workers."""
        return super().is_full or self._shared.is_full

    def reserve(self) -> bool:
        """Take a place for whoever is admitted next, and say whether there was one."""
        if self.active + self._reserved >= self.limit or not self._shared.take():
            return False
        self._reserved += 1
        return True

    def forgo(self) -> None:
        """Give back what was reserved, if it still is."""
        if self._reserved:
            self._reserved -= 1
            self._shared.leave()

    def decide(self, client_address: Any, now: float) -> RefusalReason | None:
        """Admit and count a connection, or say why not; uses a place that was reserved."""
        refusal = super().decide(client_address, now)
        if refusal is not None:
            self.forgo()
        elif self._reserved:
            self._reserved -= 1
        else:
            try:
                has_place = self._shared.take()
            except BaseException:
                self.take_back(client_address)
                raise
            if not has_place:
                self.take_back(client_address)
                return RefusalReason.TOO_MANY
        return refusal

    def take_over(self, client_address: Any) -> None:
        """Count a connection that is open already, whatever the rules say of it."""
        super().take_over(client_address)
        self._shared.take_over()

    def leave(self, client_address: Any) -> None:
        """Give the place of an admitted connection back."""
        super().leave(client_address)
        self._shared.leave()


class SharedGate(Gate):
    """Where the connections of one worker's server come in and leave.

    Callable from any thread.
    """

    places: SharedAdmission

    def __init__(
        self,
        rules: AdmissionRules,
        when_full: WhenFull,
        *,
        counts_peers: bool = True,
        shared: SharedPlaces,
    ) -> None:
        super().__init__(rules, when_full, counts_peers=counts_peers)
        self.places = SharedAdmission(self.places.rules, shared)
        self._shared = shared
        self.is_awaited = True  # always: others want to know
        self.reserves = when_full is not WhenFull.REFUSE

    @property
    def leads(self) -> bool:
        """Whether this worker is to leave those who come next to the others for a while."""
        return self._shared.leads

    def reserve(self) -> bool:
        """Take a place for a client before it is accepted, and say whether there was one.

        Between a look for room and accept(2) another worker may take the last place.  Who is to
        wait in the backlog must not have been accepted by then.  With `WhenFull.REFUSE` nothing is
        reserved, and everyone may come.
        """
        if self.when_full is WhenFull.REFUSE:
            return True
        with self._lock:
            self._take_back()
            is_reserved = self.places.reserve()
        self.settle()
        return is_reserved

    def forgo(self) -> None:
        """Give back what `reserve` has taken, if nobody came for it."""
        with self._lock:
            self.places.forgo()
        self.settle()

    def settle(self) -> None:
        """Take the places back of those that have left, and tell who waits for that.

        Never waits, as `Gate.settle`.
        """
        super().settle()
        on_relief = self.on_relief
        if on_relief is not None and not self.leads:
            self.on_relief = None
            on_relief()

    def _tell_room(self) -> None:
        """Do nothing: who waits is told where the cells of all workers are."""

    def await_room(self) -> int | None:
        """Return a descriptor that is readable as soon as there is a place; ``None`` if there is.

        Who waits for it looks again after `LOOK_AGAIN` seconds all the same.
        """
        with self._lock:
            self._take_back()
            room = self._shared.begin_to_wait() if self.places.is_full else None
            if room is not None and not self.places.is_full:  # since it was looked at
                room = None
        self.settle()
        return room

    def close(self) -> bool:
        """Say that nobody waits for room any more, and whether somebody did."""
        with self._lock:
            did_wait = self._shared.end_waiting()
        self.settle()
        return did_wait


class SharingMixIn(_Base):
    """Accept a connection only when there is a place for it among those of all workers.

    Owns `make_gate`; extends `get_request` and `service_actions`, in front of every engine.
    """

    shared_places: SharedPlaces
    """The places."""

    def make_gate(
        self, rules: AdmissionRules, when_full: WhenFull, *, counts_peers: bool
    ) -> SharedGate:
        """Make the gate, for the guard of the server."""
        return SharedGate(rules, when_full, counts_peers=counts_peers, shared=self.shared_places)

    @left_out_of_batches
    def get_request(self) -> tuple[Request, ClientAddress]:
        """Accept one connection, if there is a place for it.

        Raises:
            OSError: As accept(2); `BlockingIOError` if there is no place.
        """
        gate = self._guard.gate
        if not isinstance(gate, SharedGate):
            return super().get_request()
        if not gate.reserve():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            return super().get_request()
        except BaseException:
            gate.forgo()
            raise

    def _await_place(self, until: tuple[int, ...], seconds: float | None) -> None:
        # Never without looking again.
        super()._await_place(until, LOOK_AGAIN if seconds is None else seconds)

    @left_out_of_batches
    def service_actions(self) -> None:
        """Look after a client for whom another worker has no place.

        Where a client wakes one worker only (``EPOLLEXCLUSIVE``), and that one is full by itself,
        or has no connection that it could close to make room, nobody else would hear of the client.
        """
        super().service_actions()
        if self.shared_places.is_awaited_elsewhere and is_ready(self):
            self._handle_request_noblock()
