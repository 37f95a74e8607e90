"""The laws of deadlines, on a connection that lives in imagined time.

The kernel's instants are wrong by up to a tick, as real ones are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from portico.deadlines import LOOKS, SOONEST, TICK, Deadlines, Memory, Rules
from portico.events import Deadline
from portico.traffic import Traffic

START = 1000.0

SLACK = 3 * TICK + SOONEST
"""Seconds that the kernel's clock and the shortest pause add."""


@dataclass
class Story:
    """Bytes that come and leave, at instants since the acceptance, in order."""

    came: list[float]
    left: list[float]
    error: float = 0.0
    """Of the kernel's clock: what it says of a time that passed is this much too long."""

    def seen(self, at: float, *, waits: bool = True) -> Traffic:
        received, sent = bisect_right(self.came, at), bisect_right(self.left, at)
        return Traffic(
            received=received,
            sent=sent,
            acknowledged=sent,
            unread=0 if waits else 1,
            unsent=0,
            since_received=max(0.0, at - self.came[received - 1] + self.error)
            if received
            else None,
            since_sent=max(0.0, at - self.left[sent - 1] + self.error) if sent else None,
        )

    def last_move(self, at: float) -> float:
        return max([0.0, *(move for move in self.came + self.left if move <= at)])


def found(rules: Rules, story: Story, until: float) -> tuple[Deadline | None, float]:
    """Look whenever a look is asked for; return what is found overdue, and when."""
    deadlines, memory = Deadlines(rules), Memory(START)
    now = deadlines.first_look(START)
    while now <= START + until:
        verdict = deadlines.judge(memory, now, story.seen(now - START), True)
        if verdict.deadline is not None:
            return verdict.deadline, now - START
        assert verdict.next_look >= now + SOONEST
        now = verdict.next_look
    return None, math.inf


LIMITS = st.floats(1.0, 600.0)
MOVES = st.lists(st.floats(0.0, 2000.0), max_size=20).map(sorted)
STORIES = st.builds(Story, MOVES, MOVES, st.floats(-TICK / 2, TICK / 2))


@given(LIMITS, STORIES)
def test_an_idle_connection_is_found_in_time_and_never_before(limit: float, story: Story) -> None:
    deadline, at = found(Rules(idle_timeout=limit), story, 10_000.0)
    assert deadline is Deadline.IDLE
    idle = at - story.last_move(at)
    assert idle >= limit - 1e-6
    assert idle <= limit * (1 + 1 / LOOKS) + SLACK


@given(LIMITS, STORIES)
def test_a_request_ends_at_its_limit(limit: float, story: Story) -> None:
    deadline, at = found(Rules(request_timeout=limit), story, 10_000.0)
    assert deadline is Deadline.REQUEST
    assert limit - 1e-6 <= at <= limit + SLACK


@given(
    limit=LIMITS,
    sent=st.floats(0.0, 1000.0),
    attempts=st.lists(st.floats(0.0, 300.0), max_size=50),
)
def test_a_peer_that_vanished_is_found_in_time_whatever_is_sent_again(
    limit: float, sent: float, attempts: list[float]
) -> None:
    """From the first byte that was not acknowledged; each attempt moves the kernel's instant."""
    instants, last = [sent], sent
    for pause in attempts:
        last += pause
        instants.append(last)
    deadlines, memory = Deadlines(Rules(idle_timeout=limit)), Memory(START)
    # It lives until then: a byte comes in all the time.
    now, verdict = START, None
    while verdict is None or verdict.deadline is None:
        at = now - START
        tried = bisect_right(instants, at)
        seen = Traffic(
            received=int(min(at, sent)) + 1,
            sent=min(tried, 1),
            acknowledged=0,
            unread=0,
            unsent=min(tried, 1),
            since_received=max(0.0, at - sent),
            since_sent=at - instants[tried - 1] if tried else None,
        )
        verdict = deadlines.judge(memory, now, seen, False)
        if verdict.deadline is None:
            now = verdict.next_look
    assert limit - 1e-6 <= now - START - sent <= limit * (1 + 1 / LOOKS) + SLACK


GRACES = st.floats(0.0, 60.0)
WINDOWS = st.floats(1.0, 60.0)
RATES = st.floats(1.0, 100.0)


@given(
    rate=RATES,
    grace=GRACES,
    window=WINDOWS,
    first=st.floats(0.01, 100.0),
    answered=st.booleans(),
    share=st.floats(0.01, 0.9),
)
def test_a_drip_is_found_in_time_and_never_before(
    rate: float, grace: float, window: float, first: float, answered: bool, share: float
) -> None:
    """It drips from `first` on, after an answer or as the first that is ever said.

    After an answer, it is found late by an eighth of the time for which it was quiet before.
    """
    pause = 1 / (rate * share)
    drips = [first + pause * n for n in range(1 + int((grace + window) * 3 / pause))]
    story = Story([0.0, *drips] if answered else drips, [0.0] if answered else [])
    turn = first if answered else 0.0  # when nothing has moved, it is the peer's turn
    deadline, at = found(
        Rules(minimum_rate=rate, rate_grace=grace, rate_window=window), story, 10_000.0
    )
    assert deadline is Deadline.RATE
    assert at - turn >= grace + window - 1e-6
    limit = (grace + window) * (1 + 1 / LOOKS)
    if window * rate * (1 - share) > 1:  # or one byte, at either end of a window, may do
        assert at - turn <= limit + turn / LOOKS + SLACK


@given(rate=RATES, grace=GRACES, window=WINDOWS, pauses=st.lists(st.floats(0.0, 30.0), max_size=60))
def test_a_peer_that_keeps_the_rate_is_never_found(
    rate: float, grace: float, window: float, pauses: list[float]
) -> None:
    """However late the looks are.  One byte more in a window makes up for counting whole ones."""
    kept = rate + 1 / window
    deadlines = Deadlines(Rules(minimum_rate=rate, rate_grace=grace, rate_window=window))
    memory, now = Memory(START), deadlines.first_look(START)
    for pause in pauses:
        count = int((now - START) * kept)
        seen = Traffic(received=count, sent=0, unread=0, unsent=0, since_received=0.0)
        verdict = deadlines.judge(memory, now, seen, True)
        assert verdict.deadline is None
        now = verdict.next_look + pause


@given(
    rate=RATES,
    looks=st.lists(
        st.tuples(st.floats(0.01, 30.0), st.integers(0, 50), st.integers(0, 3), st.booleans()),
        max_size=60,
    ),
    grace=GRACES,
    window=WINDOWS,
)
def test_no_rate_is_judged_before_the_peer_was_waited_for_long_enough(
    rate: float,
    looks: list[tuple[float, int, int, bool]],
    grace: float,
    window: float,
) -> None:
    """Whatever happens between the looks, and whenever they come."""
    deadlines = Deadlines(Rules(minimum_rate=rate, rate_grace=grace, rate_window=window))
    memory, now, received, sent = Memory(START), START, 0, 0
    waited, waited_before = 0.0, False
    for pause, came, left, waits in looks:
        now += pause
        received += came
        sent += left
        seen = Traffic(
            received=received,
            sent=sent,
            unread=0,
            unsent=0,
            since_received=0.0 if received else None,
            since_sent=pause if sent else None,
        )
        if left:
            waited, waited_before = 0.0, False
        elif waits and waited_before:
            waited += pause
        waited_before = waits
        verdict = deadlines.judge(memory, now, seen, waits)
        if verdict.deadline is not None:
            assert verdict.deadline is Deadline.RATE
            assert waits
            assert waited >= grace + window - 1e-6
            return
