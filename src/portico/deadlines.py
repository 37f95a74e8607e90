"""Decide which connections exceed a limit in time, and when to look at each again.

Owns the rules: what idle means, what a request's time is, whose turn it is.  Decides only: it
knows no socket, thread or clock; what the kernel says of a connection (`portico.traffic`) and the
instants are handed in.

Nothing is told to a connection while bytes move: the kernel knows when the last one did.  So a
look every eighth of a limit is enough to find whoever exceeds it at most an eighth late, and a
limit costs the more the shorter it is: with ten thousand connections and 300 seconds, 270 looks a
second.  Whether one that has been quiet drips now is asked after an eighth of the quiet time.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from portico.errors import SettingError
from portico.events import Deadline

if TYPE_CHECKING:
    from portico.traffic import Traffic

LOOKS: Final = 8
"""Looks in the time of one limit: what is found late is found an eighth of it late."""

TICK: Final = 0.01
"""Seconds by which the kernel's instants may be wrong: one tick of its slowest clock, 100 Hz.

A limit gives a connection this much, so that none is closed before its time.
"""

SOONEST: Final = 0.01
"""Seconds between two looks at the same connection, at least: less would show nothing else."""

LONGEST_WAIT: Final = 2_000_000.0
"""Seconds that one wait takes at the most, and then another begins: poll(2) knows 24 days.

For whoever waits in one call for the end of a timeout that a program has chosen.
"""


def check_limit(name: str, value: Any, *, may_be_zero: bool = False) -> None:
    """Check a number of seconds, or of what else is limited; ``None`` is no limit.

    Args:
        name: The setting.
        value: What it was given.
        may_be_zero: Whether no time at all has a meaning.

    Raises:
        SettingError: It is too small, infinite, or no number.
    """
    if value is None:
        return
    # A text is neither more nor less, and a whole number may be beyond all that a float can be.
    with suppress(TypeError, OverflowError):
        if (value > 0 or (may_be_zero and value == 0)) and math.isfinite(value):
            return
    least = "0 or more seconds" if may_be_zero else "more than 0"
    raise SettingError(name, value, f"{least}, or None for no limit")


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits in time of one server's connections.

    Raises:
        SettingError: A value is not above zero, or has no end.
    """

    idle_timeout: float | None = None
    """Seconds without a byte in either direction; ``None`` for no limit.

    A peer that does not read what it is sent is idle, too: no byte moves, whatever the kernel
    tries.  So is one that vanished: what is sent again, and never acknowledged, does not move.
    It answers who holds connections and does nothing with them.
    """
    request_timeout: float | None = None
    """Seconds for a whole handler, from the acceptance; ``None`` for no limit.

    It answers who keeps a handler busy in whatever way.
    """
    minimum_rate: float | None = None
    """Bytes a second that a peer has to send while the handler waits for it; ``None`` for no limit.

    It answers the slow drip, a byte every few seconds, which is never idle.  Only the peer's turn
    is judged: the handler waits to read, nothing is unread, and the last byte that moved was the
    peer's, or none has moved at all.  A connection that is quiet between two requests, the last
    byte ours, is left to `idle_timeout`.
    """
    rate_grace: float = 10.0
    """Seconds at the beginning of a peer's turn in which no rate is demanded."""
    rate_window: float = 5.0
    """Seconds over which the rate is judged, after the grace, and again and again.

    Only time in which the handler waited counts.
    """

    def __post_init__(self) -> None:
        for name in ("idle_timeout", "request_timeout", "minimum_rate"):
            check_limit(name, getattr(self, name))
        if not self.rate_grace >= 0:
            raise SettingError("rate_grace", self.rate_grace, "0 or more")
        if not self.rate_window > 0:
            raise SettingError("rate_window", self.rate_window, "more than 0")


class Verdict(NamedTuple):
    """What a look at one connection comes to."""

    deadline: Deadline | None
    """The limit that it exceeds; ``None`` if none."""
    next_look: float
    """The instant at which to look again; infinity if no limit can ever be exceeded."""


class Memory:
    """What the looks at one connection have to remember from one to the next.

    Owned by `Deadlines.judge`; one for each connection, made when it is accepted.

    Args:
        started: The instant at which it was accepted.
    """

    __slots__ = ("before", "gained", "looked", "moved", "started", "waited", "was_turn")

    def __init__(self, started: float) -> None:
        self.started = started
        self.looked = started
        """When it was last looked at."""
        self.moved = started
        """When the last byte moved, as far as is known."""
        self.before: Traffic | None = None
        """What the last look saw."""
        self.was_turn = False
        """Whether it was the peer's turn then, and its handler waited."""
        self.waited: float | None = None
        """Seconds that the peer has been waited for in this window, up to zero in the grace before
        it; ``None`` when it is not the peer's turn."""
        self.gained = 0
        """Bytes that came in this window."""


class Deadlines:
    """Judge connections by the rules of their server.

    Holds nothing of a connection, so one serves all; it may be called from any thread, for one
    connection from one at a time.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._idle_pause = math.inf if rules.idle_timeout is None else rules.idle_timeout / LOOKS
        self._rate_pause = (
            math.inf
            if rules.minimum_rate is None
            else (rules.rate_grace + rules.rate_window) / LOOKS
        )

    def first_look(self, started: float) -> float:
        """Return when to look for the first time at a connection that was accepted at `started`."""
        request = self.rules.request_timeout
        return started + min(
            self._idle_pause, self._rate_pause, math.inf if request is None else request
        )

    def judge(
        self, memory: Memory, now: float, traffic: Traffic, waits_to_read: bool | None
    ) -> Verdict:
        """Say which limit a connection exceeds, if any, and when to look again.

        A look earlier than asked for costs accuracy nothing.  One that comes late finds what is
        overdue later, and nothing sooner than it is.

        Args:
            memory: That of this connection.
            now: The instant of the look.
            traffic: What the kernel says.  Where it tells no instants, as of a Unix socket, but
                somebody counts the bytes, those counts in `received` and `sent` do instead.
                Without either, the connection can exceed its `request_timeout` only.
            waits_to_read: Whether its handler waits for bytes of this connection, as its engine
                knows; ``None`` if it does not, and then no rate is judged.
        """
        self._note_moves(memory, now, traffic)
        self._note_turn(memory, now, traffic, waits_to_read)
        memory.before, memory.looked = traffic, now
        verdict = min(
            self._judge_request(memory, now),
            self._judge_idle(memory, now, traffic),
            self._judge_rate(memory, now),
            key=lambda verdict: (verdict.deadline is None, verdict.next_look),
        )
        if verdict.deadline is not None:
            return verdict
        return Verdict(None, max(verdict.next_look, now + SOONEST))

    # --- noting -----------------------------------------------------------------------------

    def _note_moves(self, memory: Memory, now: float, traffic: Traffic) -> None:
        """Find out when the last byte moved."""
        moved, before = memory.moved, memory.before
        if traffic.received and traffic.since_received is None:
            # No kernel saw it.  What nobody looked at is not held against the peer: on a machine
            # that stood still, a look comes late, and before the handler that would have gone on.
            moved += max(0.0, now - memory.looked - self._idle_pause)
        if traffic.since_received is not None:
            moved = max(moved, now - traffic.since_received + TICK)
        elif before is not None and traffic.received != before.received:
            moved = now  # at some time since the last look; the latest is in favour of the peer
        if traffic.since_sent is not None:
            if not _is_stuck(before, traffic):
                moved = max(moved, now - traffic.since_sent + TICK)
        elif before is not None and traffic.sent != before.sent:
            moved = now
        memory.moved = moved

    def _note_turn(
        self, memory: Memory, now: float, traffic: Traffic, waits_to_read: bool | None
    ) -> None:
        """Add up how long the peer was waited for, and what it sent."""
        before, was_turn = memory.before, memory.was_turn
        memory.was_turn = False
        if traffic.received is None or not _is_peers_turn(before, traffic):
            memory.waited = None
            return
        if memory.waited is None:
            memory.waited, memory.gained = -self.rules.rate_grace, 0  # what came before is no gain
        elif before is not None and before.received is not None and memory.waited >= 0:
            memory.gained += traffic.received - before.received
        memory.was_turn = bool(waits_to_read) and not traffic.unread
        # Waiting at both ends of the time between two looks stands for waiting throughout.  A
        # look that finds the handler at work excuses the peer for the time around it, no more.
        if was_turn and memory.was_turn:
            # What of it is beyond the grace is given away: its bytes were not counted.
            end = 0.0 if memory.waited < 0 else math.inf
            memory.waited = min(memory.waited + now - memory.looked, end)

    # --- judging ----------------------------------------------------------------------------

    def _judge_request(self, memory: Memory, now: float) -> Verdict:
        if self.rules.request_timeout is None:
            return _NEVER
        deadline = memory.started + self.rules.request_timeout
        return Verdict(Deadline.REQUEST if now >= deadline else None, deadline)

    def _judge_idle(self, memory: Memory, now: float, traffic: Traffic) -> Verdict:
        if self.rules.idle_timeout is None or not _tells_moves(traffic):
            return _NEVER
        deadline = memory.moved + self.rules.idle_timeout
        return Verdict(
            Deadline.IDLE if now >= deadline else None, min(deadline, now + self._idle_pause)
        )

    def _judge_rate(self, memory: Memory, now: float) -> Verdict:
        rules, waited = self.rules, memory.waited
        if rules.minimum_rate is None:
            return _NEVER
        if waited is None:
            # Who has been quiet for long is asked less often whether it drips now: that is found
            # late by an eighth of the quiet time.  Ten thousand idle ones would cost a tenth of a
            # core otherwise.
            quiet = (now - memory.moved) / LOOKS
            return Verdict(None, now + max(quiet, self._rate_pause))
        if waited < 0:
            rest = -waited  # the end of the grace is looked at, so that the window begins there
        elif waited < rules.rate_window:
            rest = rules.rate_window - waited
        elif memory.gained < rules.minimum_rate * waited:
            return Verdict(Deadline.RATE, now)
        else:
            memory.waited, memory.gained = 0.0, 0
            rest = rules.rate_window
        return Verdict(None, now + min(rest, self._rate_pause))


_NEVER: Final = Verdict(None, math.inf)


def _tells_moves(traffic: Traffic) -> bool:
    """Say whether somebody knows of moving bytes, in both directions."""
    came, left = traffic.since_received, traffic.since_sent
    return not (
        (came is None and traffic.received is None) or (left is None and traffic.sent is None)
    )


def _is_stuck(before: Traffic | None, traffic: Traffic) -> bool:
    """Say whether bytes wait for an acknowledgement since the last look, and nothing got one.

    Then what leaves is sent again, or sent to nobody.
    """
    return (
        before is not None
        and bool(before.unsent and traffic.unsent)
        and traffic.acknowledged is not None
        and traffic.acknowledged == before.acknowledged
    )


def _is_peers_turn(before: Traffic | None, traffic: Traffic) -> bool:
    """Say whether the last byte that moved was the peer's, or none has moved at all."""
    if before is not None and before.sent != traffic.sent:
        return False  # an answer left since the last look: what was waited for then, came
    came, left = traffic.since_received, traffic.since_sent
    if came is not None and left is not None:
        return came < left
    return traffic.sent == 0
