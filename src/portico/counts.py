"""Say what is counted of the requests of an address.

Owns the numbers, what they mean, and the order in which they lie in memory.  Counts nothing: that
is `portico.tally`, in the memory of `portico.counters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Self

from portico.events import RefusalReason


class Cell(IntEnum):
    """What is counted of a station; the reasons of refusals follow (`refusal_cell`)."""

    FINISHED = 0
    FAILED = 1
    PEER_GONE = 2
    CUT_OFF = 3
    LOST = 4
    RECEIVED = 5
    SENT = 6
    ACCEPTED = 8
    """After those that end what it begins."""
    PLACES = 9
    """Connections that have a place among `max_connections`; of a live worker alone."""
    AWAITS = 10
    """Whether the worker waits for one."""


NO_PREAMBLE: Final = "no preamble"
"""Why those are refused who did not get as far as a handler, beside `events.RefusalReason`."""

REASONS: Final = (*(reason.value for reason in RefusalReason), NO_PREAMBLE)

_FIRST_REASON: Final = 12
CELLS: Final = 24
"""Cells of a station."""

assert _FIRST_REASON + len(REASONS) <= CELLS, "there is a cell for each reason"

_REFUSAL_CELLS: Final = {reason: _FIRST_REASON + at for at, reason in enumerate(REASONS)}
OF_THE_LIVING: Final = (Cell.PLACES, Cell.AWAITS)
"""Cells that mean nothing any more when a worker has ended."""


def refusal_cell(reason: str) -> int:
    """Return the cell in which refusals for a reason are counted."""
    return _REFUSAL_CELLS[reason]


NOBODY: Final = MappingProxyType(dict.fromkeys(REASONS, 0))
"""Nobody was refused."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted, at one address or in sum.

    ``accepted`` is the sum of ``refused``, ``active``, ``finished``, ``failed``, ``peer_gone``,
    ``cut_off`` and ``lost``.

    Attributes:
        accepted: Connections and datagrams that came in.
        active: Those of them that are under way.
        finished: Whose handler returned.
        failed: Whose handler, or a hook on the way to it, raised.
        peer_gone: Whose peer vanished while the handler used the connection.
        cut_off: Whose handler was interrupted, or its connection closed under it.
        lost: That were under way when their process ended.
        received: Bytes that came in by connections that were closed, and in datagrams.  The system
            does not tell them of Unix sockets; on TLS they are those of its records.
        sent: Bytes that were written to connections that were closed, in the same way.
        refused_by: Those that did not get as far as a handler, by the reason: a value of
            `events.RefusalReason`, or `NO_PREAMBLE`.
    """

    accepted: int = 0
    active: int = 0
    finished: int = 0
    failed: int = 0
    peer_gone: int = 0
    cut_off: int = 0
    lost: int = 0
    received: int = 0
    sent: int = 0
    refused_by: Mapping[str, int] = field(default_factory=lambda: NOBODY)

    @property
    def refused(self) -> int:
        """Those that were refused, for whatever reason."""
        return sum(self.refused_by.values())

    @property
    def served(self) -> int:
        """Requests that had a handler and are over."""
        return self.finished + self.failed + self.peer_gone + self.cut_off + self.lost

    @classmethod
    def read(cls, cells: Sequence[int]) -> Self:
        """Read the cells of a station, which may be written meanwhile."""
        # The ends first: a request that comes and goes meanwhile is then active, and not the
        # contrary of that.
        refused = {reason: cells[cell] for reason, cell in _REFUSAL_CELLS.items()}
        numbers = {name: cells[cell] for name, cell in _NUMBER_CELLS.items()}
        ended = sum(refused.values()) + sum(numbers[name] for name in _ENDS)
        accepted = cells[Cell.ACCEPTED]
        return cls(accepted, accepted - ended, **numbers, refused_by=MappingProxyType(refused))

    @classmethod
    def sum(cls, parts: Iterable[Counts]) -> Self:
        """Add up several."""
        numbers = dict.fromkeys(_NUMBERS, 0)
        refused = dict.fromkeys(REASONS, 0)
        for part in parts:
            for name in _NUMBERS:
                numbers[name] += getattr(part, name)
            for reason, number in part.refused_by.items():
                refused[reason] += number
        return cls(**numbers, refused_by=MappingProxyType(refused))


_ENDS: Final = ("finished", "failed", "peer_gone", "cut_off", "lost")
_NUMBER_CELLS: Final = {name: Cell[name.upper()] for name in (*_ENDS, "received", "sent")}
_NUMBERS: Final = tuple(each.name for each in fields(Counts) if each.name != "refused_by")


@dataclass(frozen=True, slots=True)
class Totals:
    """What all workers did, those that have ended included.

    Attributes:
        sum: At all addresses, those included that are not served any more.
        at: By the address, as it was allotted.
    """

    sum: Counts
    at: Mapping[str, Counts]
