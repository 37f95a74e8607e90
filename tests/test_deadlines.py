from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from portico.deadlines import SOONEST, TICK, Deadlines, Memory, Rules, Verdict
from portico.errors import SettingError
from portico.events import Deadline
from portico.traffic import UNKNOWN, Traffic

START = 1000.0

NOTHING = Traffic(received=0, sent=0, acknowledged=0, unread=0, unsent=0)
"""A connection over which no byte has moved."""

UNIX = Traffic(unread=0, unsent=0)
"""A connection whose kernel counts nothing."""


def traffic(
    now: float, came: float | None = None, left: float | None = None, **facts: Any
) -> Traffic:
    """What the kernel says of bytes that came, and left, at these instants."""
    counts = {"received": 0 if came is None else 10, "sent": 0 if left is None else 20}
    return NOTHING._replace(
        since_received=None if came is None else now - came,
        since_sent=None if left is None else now - left,
        **{**counts, "acknowledged": counts["sent"], **facts},
    )


class Watched:
    """A connection that is looked at, at instants counted from its acceptance."""

    def __init__(self, **settings: float | None) -> None:
        self.deadlines = Deadlines(Rules(**settings))  # type: ignore[arg-type]  # by name
        self.memory = Memory(START)

    def look(
        self,
        at: float,
        came: float | None = None,
        left: float | None = None,
        waits: bool | None = True,
        **facts: Any,
    ) -> Deadline | None:
        """Look, as long after the acceptance as `at`; bytes came and left so long after it too."""
        return self.judge(at, traffic(at, came, left, **facts), waits).deadline

    def judge(self, at: float, seen: Traffic, waits: bool | None = True) -> Verdict:
        return self.deadlines.judge(self.memory, START + at, seen, waits)


# --- rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["idle_timeout", "request_timeout", "minimum_rate"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, "5"])
def test_a_limit_is_more_than_nothing_and_has_an_end(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"{name}=.*: expected more than 0, or None"):
        Rules(**{name: value})


def test_a_grace_may_be_nothing_and_a_window_may_not() -> None:
    assert Rules(rate_grace=0).rate_grace == 0
    with pytest.raises(SettingError, match="rate_grace=-1: expected 0 or more"):
        Rules(rate_grace=-1)
    with pytest.raises(SettingError, match="rate_window=0: expected more than 0"):
        Rules(rate_window=0)


def test_without_a_limit_nobody_is_overdue_and_nobody_looks() -> None:
    watched = Watched()
    assert watched.deadlines.first_look(START) == math.inf
    assert watched.judge(1e9, NOTHING) == Verdict(None, math.inf)


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"idle_timeout": 80.0}, 10.0),
        ({"request_timeout": 80.0}, 80.0),
        ({"minimum_rate": 100.0, "rate_grace": 11.0, "rate_window": 5.0}, 2.0),
        ({"idle_timeout": 80.0, "request_timeout": 7.0}, 7.0),
    ],
)
def test_the_first_look_is_an_eighth_of_a_limit_after_the_beginning_or_at_its_end(
    settings: dict[str, float], first: float
) -> None:
    assert Deadlines(Rules(**settings)).first_look(START) == START + first


# --- the whole request ------------------------------------------------------------------


def test_a_handler_that_takes_too_long_is_overdue_whatever_moves() -> None:
    watched = Watched(request_timeout=60.0)
    assert watched.judge(59.9, UNKNOWN, None) == Verdict(None, START + 60.0)
    assert watched.look(59.9, came=59.8, left=59.9, waits=False) is None
    assert watched.look(60.0, came=59.9, left=60.0, waits=False) is Deadline.REQUEST


# --- idle -------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [True, False, None])
def test_a_connection_over_which_nothing_moves_is_idle(waits: bool | None) -> None:
    watched = Watched(idle_timeout=300.0)
    assert watched.look(299.9, waits=waits) is None
    assert watched.look(300.0, waits=waits) is Deadline.IDLE


def test_the_last_byte_in_either_direction_counts() -> None:
    for came, left in [(100.0, None), (None, 100.0), (100.0, 50.0), (50.0, 100.0)]:
        watched = Watched(idle_timeout=300.0)
        assert watched.look(399.9, came, left) is None
        assert watched.look(400.0 + 2 * TICK, came, left) is Deadline.IDLE


def test_a_look_is_asked_for_at_the_limit_and_each_eighth_of_it() -> None:
    watched = Watched(idle_timeout=80.0)
    assert watched.judge(5.0, traffic(5.0)).next_look == START + 15.0
    assert watched.judge(75.0, traffic(75.0)).next_look == START + 80.0
    verdict = watched.judge(79.0, traffic(79.0, came=78.0))
    assert verdict == Verdict(None, START + 89.0)


def test_two_looks_are_never_closer_than_can_be_told_apart() -> None:
    watched = Watched(request_timeout=10.0)
    assert watched.judge(9.9999, NOTHING) == Verdict(None, START + 9.9999 + SOONEST)


def test_a_peer_that_does_not_read_is_idle() -> None:
    """Its window is closed, nothing leaves any more, and probes move no byte."""
    watched = Watched(idle_timeout=80.0)
    stuck = {"sent": 1000, "acknowledged": 1000, "unsent": 5000}
    for at in range(10, 90, 10):
        assert watched.look(at, came=5.0, left=7.0, waits=False, **stuck) is None
    assert watched.look(87.1, came=5.0, left=7.0, waits=False, **stuck) is Deadline.IDLE


def test_a_peer_that_vanished_is_idle_though_bytes_are_sent_again() -> None:
    """The kernel tries for a quarter of an hour, and calls each attempt the last byte sent."""
    watched = Watched(idle_timeout=80.0)
    lost = {"sent": 1000, "acknowledged": 900, "unsent": 100}
    assert watched.look(10.0, came=5.0, left=6.0, sent=900) is None
    for at in range(20, 100, 10):
        assert watched.look(at, came=5.0, left=at - 1.0, waits=False, **lost) is None
    # Found first at 20, when the last attempt was a second ago.
    assert watched.look(99.1, came=5.0, left=98.0, waits=False, **lost) is Deadline.IDLE


def test_an_answer_after_a_long_silence_moves_before_it_is_acknowledged() -> None:
    """It is on its way: nothing was waiting for an acknowledgement before."""
    watched = Watched(idle_timeout=80.0)
    assert watched.look(70.0, came=5.0, left=6.0) is None
    on_its_way = {"sent": 30, "acknowledged": 20, "unsent": 10}
    assert watched.look(86.1, came=5.0, left=86.0, waits=False, **on_its_way) is None
    assert watched.look(100.0, came=5.0, left=86.0, sent=30) is None


def test_a_peer_that_reads_slowly_is_not_idle() -> None:
    """Each acknowledgement makes room for more."""
    watched = Watched(idle_timeout=80.0)
    for at in range(10, 1000, 10):
        facts = {"sent": at + 100, "acknowledged": at, "unsent": 5000}
        assert watched.look(at, came=1.0, left=at - 9.0, waits=False, **facts) is None


def test_a_kernel_that_counts_no_acknowledgements_is_believed() -> None:
    watched = Watched(idle_timeout=80.0)
    old: dict[str, Any] = {"received": None, "sent": None, "acknowledged": None, "unsent": 100}
    for at in range(10, 1000, 10):
        assert watched.look(at, came=5.0, left=at - 9.0, **old) is None
    assert watched.look(1070.0, came=5.0, left=981.0, **old) is Deadline.IDLE


def test_counts_of_ones_own_do_where_the_kernel_tells_no_instants() -> None:
    """A byte moved between two looks, at the latest just now."""
    watched = Watched(idle_timeout=80.0)
    for at in range(10, 110, 10):
        counted = UNIX._replace(received=5 if at >= 20 else 1, sent=7 if at >= 30 else 1)
        assert watched.judge(at, counted).deadline is None
    assert watched.judge(110, UNIX._replace(received=5, sent=7)).deadline is Deadline.IDLE


def test_what_nobody_looked_at_is_not_held_against_the_peer() -> None:
    """On a machine that stood still a look comes before the handler that would have gone on."""
    watched = Watched(idle_timeout=80.0)
    counted = UNIX._replace(received=5, sent=7)
    assert watched.judge(10, counted).deadline is None
    assert watched.judge(500, counted).deadline is None
    for at in range(510, 560, 10):
        assert watched.judge(at, counted).deadline is None
    assert watched.judge(560, counted).deadline is Deadline.IDLE


def test_a_connection_of_which_nothing_is_known_is_never_called_idle() -> None:
    """A busy Unix socket has nothing unread at every look, just as an idle one."""
    watched = Watched(idle_timeout=80.0)
    for seen in (UNIX, UNKNOWN, UNIX._replace(received=5), UNIX._replace(sent=5)):
        assert watched.judge(1e6, seen) == Verdict(None, math.inf)


# --- the minimum rate -------------------------------------------------------------------

RATE: dict[str, float | None] = {"minimum_rate": 10.0, "rate_grace": 10.0, "rate_window": 5.0}


def seconds(until: float) -> Iterator[float]:
    """Instants of looks, one a second."""
    at = 1.0
    while at <= until:
        yield at
        at += 1.0


def first_found(watched: Watched, until: float, see: Callable[[float], Deadline | None]) -> float:
    """The instant at which the connection is first found to be too slow."""
    for at in seconds(until):
        deadline = see(at)
        if deadline is not None:
            assert deadline is Deadline.RATE
            return at
    return math.inf


def test_a_peer_that_says_nothing_at_first_is_too_slow_after_grace_and_window() -> None:
    watched = Watched(**RATE)
    assert first_found(watched, 60, watched.look) == 16.0  # its turn was first seen at 1


def test_a_slow_drip_is_too_slow() -> None:
    """A byte a second keeps every idle timer from running out."""
    watched = Watched(**RATE, idle_timeout=5.0)
    assert first_found(watched, 60, lambda at: watched.look(at, came=at, received=int(at))) == 16.0


def test_a_peer_that_is_fast_enough_is_left_alone() -> None:
    watched = Watched(**RATE)
    found = first_found(watched, 600, lambda at: watched.look(at, came=at, received=int(10 * at)))
    assert found == math.inf


def test_a_peer_that_becomes_slow_is_found_in_a_later_window() -> None:
    watched = Watched(**RATE)
    found = first_found(
        watched, 600, lambda at: watched.look(at, came=at, received=int(min(10 * at, 1000 + at)))
    )
    assert 111.0 <= found <= 121.0


def test_a_second_request_is_judged_like_the_first() -> None:
    watched = Watched(**RATE)
    for at in (1.0, 2.0, 50.0):
        assert watched.look(at, came=0.5, left=1.0) is None
    found = first_found(
        watched,
        600,
        lambda at: watched.look(50 + at, came=50 + at, left=1.0, received=10 + int(at)),
    )
    assert found == 16.0


def test_a_connection_between_two_requests_may_be_quiet() -> None:
    """The last byte was ours: that is for the idle timeout."""
    watched = Watched(**RATE)
    assert first_found(watched, 600, lambda at: watched.look(at, came=0.5, left=1.0)) == math.inf


def test_one_tick_that_hides_who_was_last_is_in_favour_of_the_peer() -> None:
    watched = Watched(**RATE)
    assert first_found(watched, 600, lambda at: watched.look(at, came=0.5, left=0.5)) == math.inf


@pytest.mark.parametrize("waits", [False, None])
def test_a_handler_that_may_be_at_work_waits_for_nobody(waits: bool | None) -> None:
    watched = Watched(**RATE)
    found = first_found(watched, 600, lambda at: watched.look(at, came=0.5, waits=waits))
    assert found == math.inf


def test_unread_bytes_are_no_fault_of_the_peer() -> None:
    watched = Watched(**RATE)
    found = first_found(watched, 600, lambda at: watched.look(at, came=0.5, unread=10))
    assert found == math.inf


def test_a_server_that_spoke_last_waits_for_nobody() -> None:
    """It has sent its greeting, and the peer has all of the idle timeout to answer."""
    watched = Watched(**RATE)
    assert first_found(watched, 600, lambda at: watched.look(at, left=0.5)) == math.inf


def test_a_conversation_is_not_judged() -> None:
    """Answers leave between two looks, though the peer's byte is the last at each."""
    watched = Watched(**RATE)
    found = first_found(
        watched,
        600,
        lambda at: watched.look(at, came=at, left=at - 0.5, received=int(at), sent=int(at)),
    )
    assert found == math.inf


def test_the_time_in_which_the_handler_works_does_not_count() -> None:
    watched = Watched(**RATE)
    found = first_found(
        watched, 100, lambda at: watched.look(at, came=0.5, waits=not 5.0 <= at < 25.0)
    )
    # Waited for from 1 to 4, and from 25 on: 3 seconds, and 12 more.
    assert found == 37.0


def test_one_look_that_finds_the_handler_at_work_excuses_the_peer_for_that_moment_only() -> None:
    """Otherwise a drip would begin anew whenever a look falls on one of its bytes."""
    watched = Watched(**RATE)
    found = first_found(watched, 60, lambda at: watched.look(at, came=0.5, unread=int(at == 8.0)))
    assert found == 18.0


def test_a_late_look_gives_what_is_beyond_the_grace_away() -> None:
    """The bytes of that time were not counted, so its seconds are not either."""
    watched = Watched(**RATE)
    assert watched.look(1.0) is None
    assert watched.look(50.0) is None
    assert watched.look(54.9) is None
    assert watched.look(55.0) is Deadline.RATE


def test_without_counts_no_rate_is_judged() -> None:
    watched = Watched(**RATE)
    for at in seconds(100):
        verdict = watched.judge(at, UNIX)
        assert verdict.deadline is None
        assert verdict.next_look == pytest.approx(START + at + max(15, at) / 8)


def test_the_limit_that_is_exceeded_is_the_one_that_is_named() -> None:
    watched = Watched(**RATE, idle_timeout=100.0, request_timeout=50.0)
    assert watched.look(49.0, waits=False) is None
    assert watched.look(50.0, waits=False) is Deadline.REQUEST
