"""Say what a server may do when: the phases of its life, and the count of a drain.

Owns the table of phases and the arithmetic of a `DrainReport`.  Decides only: it knows no socket,
thread or clock, so whoever uses it holds the lock and hands in the instants.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from portico.errors import PhaseError


class Phase(Enum):
    """Where a server is in its life."""

    CREATED = "created"
    """It has not served yet; its listener may be bound or not."""
    SERVING = "serving"
    """It accepts connections."""
    STOPPED = "stopped"
    """`shutdown` ended the loop, or it serves single requests; handlers may go on, and it may serve
    again."""
    DRAINING = "draining"
    """It accepts no more, and its open connections come to their end."""
    CLOSED = "closed"
    """Its listener is closed."""


NEXT: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.CREATED: frozenset({Phase.SERVING, Phase.CLOSED}),
    Phase.SERVING: frozenset({Phase.STOPPED, Phase.DRAINING, Phase.CLOSED}),
    Phase.STOPPED: frozenset({Phase.SERVING, Phase.DRAINING, Phase.CLOSED}),
    Phase.DRAINING: frozenset({Phase.CLOSED}),
    # `server_close` means the same when it is called again, as it does in socketserver.
    Phase.CLOSED: frozenset({Phase.CLOSED}),
}
"""The only moves a server can make."""


def move(phase: Phase, to: Phase) -> Phase:
    """Return `to`, if a server in `phase` may go there.

    Raises:
        PhaseError: It may not; the error names the phases from which it could.
    """
    if to not in NEXT[phase]:
        origins = [origin.value for origin in Phase if to in NEXT[origin]]
        raise PhaseError(phase.value, to.value, " or ".join(origins) or "a server made anew")
    return to


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the connections that were open when a drain began, or came out of the backlog.

    ``finished + idle + forced == connections``.
    """

    connections: int
    """All of them."""
    finished: int
    """Their handlers ended by themselves."""
    idle: int
    """They were given end-of-file because they were idle, and ended."""
    forced: int
    """They were closed at the deadline, or left behind where nobody could."""
    seconds: float
    """How long the drain took."""
    longest: float | None
    """Seconds that the longest of the finished ones lived, from its acceptance; ``None`` if none
    finished."""

    def __str__(self) -> str:
        text = (
            f"drained in {self.seconds:.1f} s: "
            f"{self.finished} finished, {self.idle} idle, {self.forced} forced"
        )
        return text if self.longest is None else f"{text}; the longest took {self.longest:.1f} s"


class DrainTally:
    """The connections of one drain, each counted once however it ends.

    Callable from one thread at a time.  A connection is named by whatever its owner likes; the
    end of one that was never added, or that has already ended, is no news and changes nothing.

    Args:
        now: The instant at which the drain begins.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._open: dict[Hashable, tuple[float, _Fate]] = {}  # when accepted, and what it awaits
        self._ended = dict.fromkeys(_Fate, 0)
        self._longest: float | None = None

    @property
    def open(self) -> int:
        """How many have not ended."""
        return len(self._open)

    def add(self, connection: Hashable, accepted: float) -> None:
        """Count a connection: open when the drain began, or accepted from the backlog since.

        Args:
            connection: Its name.
            accepted: The instant at which it was accepted.
        """
        self._open.setdefault(connection, (accepted, _Fate.FINISHED))

    def mark_idle(self, connection: Hashable) -> None:
        """Note that it is given end-of-file because it is idle.

        To be called before it is given, so that no end is counted wrongly.
        """
        self._mark(connection, _Fate.IDLE)

    def mark_forced(self, connection: Hashable) -> None:
        """Note that it is closed at the deadline.  To be called before it is."""
        self._mark(connection, _Fate.FORCED)

    def end(self, connection: Hashable, now: float) -> None:
        """Count the end of a connection's handler."""
        if connection not in self._open:
            return
        accepted, fate = self._open.pop(connection)
        self._ended[fate] += 1
        if fate is _Fate.FINISHED:
            self._longest = max(self._longest or 0.0, now - accepted)

    def report(self, now: float) -> DrainReport:
        """Return what became of all, at the end of the drain.

        What is open still counts as forced: whoever asks for the report waits for it no longer.
        """
        return DrainReport(
            connections=sum(self._ended.values()) + len(self._open),
            finished=self._ended[_Fate.FINISHED],
            idle=self._ended[_Fate.IDLE],
            forced=self._ended[_Fate.FORCED] + len(self._open),
            seconds=now - self._began,
            longest=self._longest,
        )

    def _mark(self, connection: Hashable, fate: _Fate) -> None:
        if connection in self._open:
            accepted, so_far = self._open[connection]
            # What was closed is not idle any more, in whatever order it was noted.
            self._open[connection] = accepted, max(so_far, fate)


class _Fate(IntEnum):
    """How a connection counts when it ends; the stronger one stays."""

    FINISHED = 0
    IDLE = 1
    FORCED = 2
