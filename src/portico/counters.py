"""Keep what all workers count, in one mapping of memory that outlives each of them.

Owns the mapping: how it is laid out, who has which row of it, what becomes of the numbers of a
worker that has ended, and how it gets into another process.  Leaves what is counted to
`portico.counts`, counting to `portico.tally`, the places of `max_connections` to `portico.places`,
and starting workers to the supervisor.

A *row* belongs to one worker, which alone writes it; a *station* is the column of one address.
When a worker has ended, however it did, whoever started it folds its row into one of totals: what
was counted stays, and what was under way is lost.  So the totals are exact, and never go down.

A cell is eight bytes at a multiple of eight, which the processors that Python runs on read and
write as one.  Cells are read while others write them, so different numbers of a worker that is at
work may be those of different moments.

Source: memfd_create(2); fcntl(2), "Advisory record locking", whose locks end with their process,
and "File Sealing": without a seal whoever has the descriptor could end all with SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from itertools import starmap
from types import MappingProxyType
from typing import Final, Self
from weakref import WeakSet

from portico.bell import Bell
from portico.counts import CELLS, OF_THE_LIVING, REASONS, Cell, Counts, Totals
from portico.errors import CountersError
from portico.processes import birth, is_alive

MAGIC: Final = int.from_bytes(b"portico#", "little")
LAYOUT: Final = 1
"""Grows whenever a cell gets another meaning: a process with another one starts from nothing."""

ROWS: Final = 2048
"""Workers at once: those that serve, and those of earlier generations that drain."""

STATIONS: Final = 64
"""Addresses at once, and one place for those that there were."""

MOST_ADDRESSES: Final = STATIONS - 1
"""Addresses at which all workers of a supervisor can count."""

FORMER: Final = 0
"""The station of what was counted at addresses that are not served any more."""

MOST_ROWS: Final = 1 << 16
MOST_STATIONS: Final = 1 << 12
"""More than anybody has, so that what is adopted cannot ask for all memory."""

NAME_SIZE: Final = 504
"""Bytes of the text of an address: a name of the DNS has 253, the path of a socket 107."""

READ_PATIENCE: Final = 1.0
"""Seconds for which a reader waits while totals are being moved: far more than that takes."""

_HANDING: Final = re.compile(r"[0-9]{1,9}(,[0-9]{1,9}=[0-9]{1,9}/[0-9]{1,9})*")
_CELL: Final = 8
_HEADER: Final = 64
"""Cells that say what this is."""
_LABEL: Final = 1 + NAME_SIZE // _CELL
"""Cells of the name of a station: its length and its bytes."""
_PLATE: Final = 8
"""Cells of a row that belong to no station: as many as a processor moves at once, so that two
workers do not wait for each other's heartbeats."""


class _Header(IntEnum):
    """The cells at the beginning."""

    MAGIC = 0
    LAYOUT = 1
    ROWS = 2
    STATIONS = 3
    CELLS = 4
    REASONS = 5
    USED = 6
    """No row from this one on belongs to anybody."""
    MOVES = 7
    """Odd while numbers are moved from one row to another."""


class _Plate(IntEnum):
    """The cells at the beginning of a row."""

    CLAIMANT = 0
    """The process that claimed it; 0 for nobody's."""
    OWNER = 1
    """The process that writes it."""
    HEARTBEAT = 2
    CLAIMANT_BEGAN = 3
    OWNER_BEGAN = 4
    """When these processes began, as `birth` says it: their numbers may be others' later."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a worker is, as its row tells.

    Attributes:
        process: Its process; 0 before it has taken its row.
        heartbeat: When it was alive for certain, in nanoseconds of `time.monotonic_ns`, which on
            Linux is one clock for all processes.
        served: Requests that had a handler and are over.
        active: Those that are under way.
    """

    process: int
    heartbeat: int
    served: int
    active: int


class Station:
    """The cells of one address in the row of one worker.

    Whoever writes a cell sees to it that no other thread does.

    Attributes:
        cells: By `Cell` and `refusal_cell`.
        is_detached: Whether this process was forked by the one that writes the row.  What it
            writes then is its own, and nobody reads it.
    """

    def __init__(self, counters: Counters, row: int, number: int) -> None:
        self.counters = counters
        self.row, self.number = row, number
        self.cells = counters.cells(row, number)
        self.is_detached = False
        _written.add(self)

    def detach(self) -> None:
        """Write to nobody's cells from now on: those of the row are another process's."""
        self.is_detached = True
        self.cells = memoryview(bytearray(CELLS * _CELL)).cast("Q")

    @property
    def counts(self) -> Counts:
        """What was counted in this row, at this address."""
        return Counts.read(self.cells)


class Row:
    """The row of one worker, for the worker itself.

    To be made in its process, after the fork: what a process has forked writes to no row of it.
    """

    def __init__(self, counters: Counters, number: int) -> None:
        self.counters = counters
        self.number = number
        self._plate = counters.plate(number)
        self._plate[_Plate.OWNER_BEGAN] = birth(os.getpid())
        self._plate[_Plate.OWNER] = os.getpid()
        self.beat()

    def beat(self) -> None:
        """Say that the worker is alive.  Callable from any thread."""
        self._plate[_Plate.HEARTBEAT] = time.monotonic_ns()

    def station(self, name: str) -> Station:
        """Return the cells of an address.

        Raises:
            CountersError: None is allotted to it.
        """
        return Station(self.counters, self.number, self.counters.station_of(name))


class Counters:
    """One mapping for a supervisor and all its workers: see `create`, `private` and `adopt`.

    Callable from any thread; what claims, releases and allots, also in several processes at once.
    """

    def __init__(self, memory: mmap.mmap, descriptor: int, rows: int, stations: int) -> None:
        self.rows, self.stations = rows, stations
        self._memory = memoryview(memory).cast("Q")
        self._descriptor = descriptor
        self._plates = _HEADER + stations * _LABEL
        self._data = _first_station(rows, stations)
        self._lock = threading.Lock()  # guards _bells, and with `_locked` who has which row
        self._bells: dict[int, Bell] = {}

    # --- into a process -------------------------------------------------------------------

    @classmethod
    def create(cls, rows: int = ROWS, stations: int = STATIONS) -> Self:
        """Make a mapping that forked processes share, and that can be handed to another program.

        Args:
            rows: Workers at once.
            stations: Addresses at once, and one more.

        Raises:
            OSError: The system has no memory or descriptor left.
        """
        size = _size(rows, stations)
        descriptor = _make_file(size)
        try:
            made = cls(mmap.mmap(descriptor, size), descriptor, rows, stations)
        except BaseException:
            os.close(descriptor)
            raise
        made._memory[: len(_Header)] = _header(rows, stations)
        return made

    @classmethod
    def private(cls, names: Sequence[str]) -> Self:
        """Make a mapping for one process and its addresses; it needs no descriptor."""
        rows, stations = 1, len(names) + 1
        made = cls(mmap.mmap(-1, _size(rows, stations)), -1, rows, stations)
        made._memory[: len(_Header)] = _header(rows, stations)
        made.allot(names)
        made.claim()
        return made

    @classmethod
    def adopt(cls, text: str) -> Self:
        """Take over a mapping that the program before this one has handed on.

        Its descriptors are closed if it cannot be used.

        Args:
            text: What `inheritable` gave.

        Raises:
            CountersError: It is none, or laid out in another way, as that of another version.
        """
        descriptor, bells = _read_handing(text)
        with ExitStack() as undo:
            for each in (descriptor, *(number for pair in bells.values() for number in set(pair))):
                undo.callback(_close_quietly, each)
            try:
                rows, stations, size = _read_header(descriptor)
                made = cls(mmap.mmap(descriptor, size), descriptor, rows, stations)
                made._bells = {station: Bell(*pair) for station, pair in bells.items()}
                for each in made.descriptors:
                    os.set_inheritable(each, False)
            except (OSError, ValueError) as error:
                raise CountersError(f"counters={text!r}: {error}") from error
            undo.pop_all()
        return made

    @contextmanager
    def inheritable(self) -> Generator[str]:
        """Let a program that is started in the block have the mapping.

        For ``subprocess`` with ``pass_fds=counters.descriptors``, or for execve(2).

        Returns:
            What that program gives to `adopt`, as text without spaces.
        """
        for each in self.descriptors:
            os.set_inheritable(each, True)
        try:
            bells = (
                f"{station}={bell.descriptors[0]}/{bell.descriptors[-1]}"
                for station, bell in sorted(self._bells.items())
            )
            yield ",".join((str(self._descriptor), *bells))
        finally:
            for each in self.descriptors:
                os.set_inheritable(each, False)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What another program has to inherit."""
        own = () if self._descriptor < 0 else (self._descriptor,)
        return (*own, *(each for bell in self._bells.values() for each in bell.descriptors))

    def close(self) -> None:
        """Close the descriptors; what has been counted can still be read.  Callable again."""
        with self._lock:
            for each in self.descriptors:
                os.close(each)
            self._descriptor, self._bells = -1, {}

    # --- addresses ------------------------------------------------------------------------

    def allot(self, names: Sequence[str]) -> None:
        """Give each address a station, or leave it the one that it has.

        When none is free, one is taken from an address that is not among these and that no worker
        has counted anything at; its totals stay in the sum.

        Raises:
            CountersError: There are more addresses than stations.
            OSError: The system has no descriptor left.
        """
        with self._locked():
            known = self._known()
            for name in names:
                if name not in known:
                    known[name] = self._take_station(set(names), known)
                    self._write_label(known[name], name)
                if self._descriptor >= 0 and known[name] not in self._bells:
                    self._bells[known[name]] = Bell.make()

    def station_of(self, name: str) -> int:
        """Return the number of the station of an address.

        Raises:
            CountersError: It has none.
        """
        try:
            return self._known()[name]
        except KeyError:
            raise CountersError(f"address={name!r}: expected one that has a station") from None

    def bell_of(self, station: int) -> Bell | None:
        """Return what rings when a place at a station is free; ``None`` for a private mapping."""
        return self._bells.get(station)

    def _known(self) -> dict[str, int]:
        """Return the stations by their addresses."""
        labels = ((self._read_label(number), number) for number in range(1, self.stations))
        return {name: number for name, number in labels if name}

    def _take_station(self, wanted: set[str], known: dict[str, int]) -> int:
        for number in range(1, self.stations):
            if number not in known.values():
                return number
        for name, number in tuple(known.items()):
            if name not in wanted and not any(
                any(self.cells(row, number)) for row in self._live_rows()
            ):
                del known[name]
                with self._moving():
                    _fold(self.cells(self.rows, number), self.cells(self.rows, FORMER))
                return number
        raise CountersError(f"{len(wanted)} addresses: expected {self.stations - 1} at the most")

    def _read_label(self, number: int) -> str:
        label = self._label(number)
        return label[1:].tobytes()[: label[0]].decode(errors="surrogateescape")

    def _write_label(self, number: int, name: str) -> None:
        # As a path is written that is no UTF-8: a name is looked for by what it was told as.
        text, label = name.encode(errors="surrogateescape"), self._label(number)
        if len(text) > NAME_SIZE:
            raise CountersError(f"address={name!r}: expected {NAME_SIZE} bytes at the most")
        label[0] = 0  # nobody's, while it is written
        label[1:] = memoryview(text.ljust(NAME_SIZE, b"\0")).cast("Q")
        label[0] = len(text)

    def _label(self, number: int) -> memoryview[int]:
        first = _HEADER + number * _LABEL
        return self._memory[first : first + _LABEL]

    # --- rows -----------------------------------------------------------------------------

    def claim(self) -> int:
        """Claim a row for a worker that is started next; returns its number.

        Raises:
            CountersError: Every row belongs to a worker.
        """
        with self._locked():
            for number in range(self.rows):
                plate = self.plate(number)
                if not plate[_Plate.CLAIMANT]:
                    plate[_Plate.OWNER] = 0
                    plate[_Plate.HEARTBEAT] = time.monotonic_ns()
                    plate[_Plate.CLAIMANT_BEGAN] = birth(os.getpid())
                    plate[_Plate.CLAIMANT] = os.getpid()
                    self._memory[_Header.USED] = max(self._memory[_Header.USED], number + 1)
                    return number
        raise CountersError(f"{self.rows} workers: no row is left for another one")

    def release(self, number: int) -> Counts:
        """Keep what a worker has counted, now that its process has ended, and free its row.

        What was under way is lost; places that it had are free, and who waits for one learns it.

        Args:
            number: What `claim` returned; it belongs to nobody afterwards.

        Returns:
            What it had counted, with ``active`` among the ``lost``.
        """
        with self._locked():
            return self._release(number)

    def release_abandoned(self) -> int:
        """Release the rows whose worker has ended, and the supervisor that had started it, too.

        Returns:
            How many there were.
        """
        with self._locked():
            rows = [row for row in self._live_rows() if not any(starmap(is_alive, self._who(row)))]
            for number in rows:
                self._release(number)
            return len(rows)

    def has_rows_of_others(self) -> bool:
        """Say whether a row belongs to another supervisor than this process, alive or not."""
        with self._locked():
            own = os.getpid()
            return any(self.plate(row)[_Plate.CLAIMANT] != own for row in self._live_rows())

    def pulse(self, number: int) -> Pulse:
        """Say how a worker is."""
        plate = self.plate(number)
        counts = self._sum_of_row(number)
        return Pulse(plate[_Plate.OWNER], plate[_Plate.HEARTBEAT], counts.served, counts.active)

    def beating(self, since: int) -> int:
        """Return how many workers have given a sign of life since an instant.

        Args:
            since: Nanoseconds of `time.monotonic_ns`.
        """
        plates = map(self.plate, range(self._memory[_Header.USED]))
        return sum(
            plate[_Plate.CLAIMANT] != 0 and plate[_Plate.HEARTBEAT] >= since for plate in plates
        )

    def plate(self, number: int) -> memoryview[int]:
        """Return the cells of a row that belong to no station."""
        first = self._plates + number * _PLATE
        return self._memory[first : first + _PLATE]

    def cells(self, row: int, station: int) -> memoryview[int]:
        """Return the cells of a station in a row, by `Cell`; the totals are in row `rows`."""
        first = self._data + (row * self.stations + station) * CELLS
        return self._memory[first : first + CELLS]

    def column(self, station: int, cell: Cell) -> memoryview[int]:
        """Return a cell of a station in every row that may belong to a worker now."""
        step = self.stations * CELLS
        first = self._data + station * CELLS + cell
        return self._memory[first : first + self._memory[_Header.USED] * step : step]

    def _release(self, number: int) -> Counts:
        counts = self._sum_of_row(number)
        lost = Counts.sum((counts, Counts(lost=counts.active, active=-counts.active)))
        rings: list[Bell] = []
        with self._moving():
            for station in range(self.stations):
                cells = self.cells(number, station)
                if cells[Cell.PLACES] and station in self._bells:
                    rings.append(self._bells[station])
                cells[Cell.LOST] += Counts.read(cells).active
                for cell in OF_THE_LIVING:
                    cells[cell] = 0
                _fold(cells, self.cells(self.rows, station))
            plate = self.plate(number)
            plate[:] = memoryview(bytes(_PLATE * _CELL)).cast("Q")
            used = self._memory[_Header.USED]
            while used and not self.plate(used - 1)[_Plate.CLAIMANT]:
                used -= 1
            self._memory[_Header.USED] = used
        for bell in rings:
            bell.ring()
        return lost

    def _live_rows(self) -> list[int]:
        used = self._memory[_Header.USED]
        return [row for row in range(used) if self.plate(row)[_Plate.CLAIMANT]]

    def _who(self, row: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return who claimed a row and who writes it, each with when that process began."""
        plate = self.plate(row)
        return (
            (plate[_Plate.CLAIMANT], plate[_Plate.CLAIMANT_BEGAN]),
            (plate[_Plate.OWNER], plate[_Plate.OWNER_BEGAN]),
        )

    def _sum_of_row(self, row: int) -> Counts:
        numbers = (FORMER, *self._known().values())
        return Counts.sum(Counts.read(self.cells(row, number)) for number in numbers)

    # --- totals ---------------------------------------------------------------------------

    def totals(self) -> Totals:
        """Add up what all workers have counted, those that have ended included.

        Callable in any process that has the mapping.  None of the numbers but ``active`` is ever
        smaller than it was before.
        """
        deadline = time.monotonic() + READ_PATIENCE
        while True:
            before = self._memory[_Header.MOVES]
            totals = self._add_up()
            # A worker that dies in the middle of nothing leaves it even; a supervisor that does is
            # gone with all its workers.
            if before % 2 == 0 and before == self._memory[_Header.MOVES]:
                return totals
            if time.monotonic() > deadline:
                return totals
            time.sleep(0)

    def _add_up(self) -> Totals:
        rows = (*range(self._memory[_Header.USED]), self.rows)
        known = self._known()
        at = {
            number: Counts.sum(Counts.read(self.cells(row, number)) for row in rows)
            for number in (FORMER, *known.values())
        }
        names = {name: at[number] for name, number in known.items()}
        return Totals(Counts.sum(at.values()), MappingProxyType(names))

    # --- one at a time --------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Keep other threads and other supervisors out."""
        with self._lock, self.exclusive(FORMER):
            yield

    @contextmanager
    def exclusive(self, station: int) -> Generator[None]:
        """Keep other processes out of a station while the block runs, and wait for those in it.

        Among threads the caller decides.  The lock ends with its process, whatever ends that.
        """
        descriptor = self._descriptor
        if descriptor < 0:  # nobody else has the mapping
            yield
            return
        _lock(descriptor, station)
        try:
            yield
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, station)

    @contextmanager
    def _moving(self) -> Generator[None]:
        """Have readers of the totals wait, who would see a number twice or not at all."""
        memory = self._memory
        memory[_Header.MOVES] = (memory[_Header.MOVES] | 1) + (memory[_Header.MOVES] & 1) * 2
        try:
            yield
        finally:
            memory[_Header.MOVES] += 1


def _lock(descriptor: int, station: int) -> None:
    """Wait for a lock that other processes have.

    The kernel takes the threads of a process for one: two that hold a station each and wait for
    the other's, in two processes, look to it like a deadlock.  A thread holds one station at a time
    (`Counters.exclusive`), so it is none, and is over soon.
    """
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, station)
        except OSError as error:
            if error.errno != errno.EDEADLK:
                raise
        else:
            return


_written: WeakSet[Station] = WeakSet()


def _detach_all() -> None:
    for station in tuple(_written):
        station.detach()


os.register_at_fork(after_in_child=_detach_all)


def _header(rows: int, stations: int) -> memoryview[int]:
    """Return the cells that a mapping begins with."""
    cells = memoryview(bytearray(len(_Header) * _CELL)).cast("Q")
    cells[_Header.MAGIC], cells[_Header.LAYOUT] = MAGIC, LAYOUT
    cells[_Header.ROWS], cells[_Header.STATIONS] = rows, stations
    cells[_Header.CELLS], cells[_Header.REASONS] = CELLS, len(REASONS)
    return cells


def _read_header(descriptor: int) -> tuple[int, int, int]:
    """Return how many rows and stations an open mapping has, and its size.

    Raises:
        OSError: It cannot be read.
        ValueError: It is none of ours.
    """
    size = os.fstat(descriptor).st_size
    begin = os.pread(descriptor, len(_Header) * _CELL, 0)
    if len(begin) < len(_Header) * _CELL:
        raise ValueError("expected a mapping that `Counters.inheritable` has handed on")
    cells = memoryview(begin).cast("Q")
    rows, stations = cells[_Header.ROWS], cells[_Header.STATIONS]
    expected = _header(rows, stations)[: _Header.USED]
    if list(cells[: _Header.USED]) != list(expected):
        raise ValueError(f"expected layout {LAYOUT} of this version of portico")
    if not (1 <= rows <= MOST_ROWS and 2 <= stations <= MOST_STATIONS):
        raise ValueError(f"expected {MOST_ROWS} rows and {MOST_STATIONS} stations at the most")
    if size != _size(rows, stations) or cells[_Header.USED] > rows:
        raise ValueError(f"expected {_size(rows, stations)} bytes for {rows} rows")
    return rows, stations, size


def _read_handing(text: str) -> tuple[int, dict[int, tuple[int, int]]]:
    """Read what `Counters.inheritable` wrote: descriptors of the mapping and of each bell."""
    match = _HANDING.fullmatch(text)
    if match is None:
        raise CountersError(f"counters={text!r}: expected what `Counters.inheritable` gave")
    first, *bells = text.split(",")
    pairs: dict[int, tuple[int, int]] = {}
    for each in bells:
        station, reader, writer = (int(number) for number in re.split("[=/]", each))
        pairs[station] = reader, writer
    return int(first), pairs


def _first_station(rows: int, stations: int) -> int:
    """Return the cell where the rows begin: at a page, for the sake of those nobody uses."""
    page = mmap.PAGESIZE // _CELL
    before = _HEADER + stations * _LABEL + rows * _PLATE
    return -(-before // page) * page


def _size(rows: int, stations: int) -> int:
    return (_first_station(rows, stations) + (rows + 1) * stations * CELLS) * _CELL


def _make_file(size: int) -> int:
    """Return the descriptor of a file without a name, of which nobody can change the size."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("portico counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)  # nobody has a page of it until it is written to
        if hasattr(os, "memfd_create"):
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _fold(source: memoryview[int], target: memoryview[int]) -> None:
    """Add the numbers of one station to those of another, and forget them."""
    for cell, number in enumerate(source):
        if number:
            target[cell] += number
            source[cell] = 0


def _close_quietly(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)
