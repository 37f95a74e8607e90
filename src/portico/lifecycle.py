"""Say what a server may do when: the phases of its life, and the count of a drain.

Owns the table of phases and the arithmetic of a `DrainReport`.  Decides only: it knows no socket,
thread or clock, so whoever uses it holds the lock and hands in the instants.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from portico.errors import PhaseError


class Phase(Enum):
    """Where a server is in its life."""

    CREATED = "created"
    """It has not served yet; its listener may be bound or not."""
    SERVING = "serving"
    """It accepts connections."""
    STOPPED = "stopped"
    """`shutdown` ended the loop; handlers may go on, and it may serve again."""
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
    """They were closed at the deadline."""
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
        self._open: dict[Hashable, float] = {}
        self._idle: set[Hashable] = set()  # of the open ones, those that were given end-of-file
        self._forced: set[Hashable] = set()  # of the open ones, those that were closed
        self._finished = self._idle_ended = self._forced_ended = 0
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
        self._open.setdefault(connection, accepted)

    def mark_idle(self, connection: Hashable) -> None:
        """Note that it is given end-of-file because it is idle.

        To be called before it is given, so that no end is counted wrongly.
        """
        if connection in self._open:
            self._idle.add(connection)

    def mark_forced(self, connection: Hashable) -> None:
        """Note that it is closed at the deadline.  To be called before it is."""
        if connection in self._open:
            self._forced.add(connection)

    def end(self, connection: Hashable, now: float) -> None:
        """Count the end of a connection's handler."""
        accepted = self._open.pop(connection, None)
        if accepted is None:
            return
        is_idle, is_forced = connection in self._idle, connection in self._forced
        self._idle.discard(connection)
        self._forced.discard(connection)
        if is_forced:
            self._forced_ended += 1
        elif is_idle:
            self._idle_ended += 1
        else:
            self._finished += 1
            self._longest = max(self._longest or 0.0, now - accepted)

    def report(self, now: float) -> DrainReport:
        """Return what became of all, at the end of the drain.

        What is open still counts as forced: whoever asks for the report waits for it no longer.
        """
        forced = self._forced_ended + len(self._open)
        return DrainReport(
            connections=self._finished + self._idle_ended + forced,
            finished=self._finished,
            idle=self._idle_ended,
            forced=forced,
            seconds=now - self._began,
            longest=self._longest,
        )
