from __future__ import annotations

import pytest

from portico.errors import PhaseError
from portico.lifecycle import NEXT, DrainReport, DrainTally, Phase, move


def test_every_phase_says_what_may_follow() -> None:
    assert set(NEXT) == set(Phase)


@pytest.mark.parametrize(
    "life",
    [
        "created serving stopped serving stopped closed",
        "created serving draining closed",
        "created serving stopped draining closed",
        "created closed closed",
        "created serving closed",
    ],
)
def test_a_server_may_live_like_this(life: str) -> None:
    phase, *rest = map(Phase, life.split())
    for to in rest:
        phase = move(phase, to)
        assert phase is to


@pytest.mark.parametrize("phase", Phase)
def test_a_server_may_be_closed_in_every_phase(phase: Phase) -> None:
    assert move(phase, Phase.CLOSED) is Phase.CLOSED


@pytest.mark.parametrize(
    ("phase", "to", "expected"),
    [
        (Phase.CREATED, Phase.DRAINING, "serving or stopped"),
        (Phase.CREATED, Phase.STOPPED, "serving"),
        (Phase.DRAINING, Phase.SERVING, "created or stopped"),
        (Phase.CLOSED, Phase.SERVING, "created or stopped"),
        (Phase.SERVING, Phase.CREATED, "a server made anew"),
    ],
)
def test_a_move_that_is_not_allowed_is_named_with_what_would_be(
    phase: Phase, to: Phase, expected: str
) -> None:
    with pytest.raises(PhaseError) as failed:
        move(phase, to)
    error = failed.value
    assert (error.phase, error.wanted, error.expected) == (phase.value, to.value, expected)


# --- the report of a drain --------------------------------------------------------------


def test_a_report_is_one_line() -> None:
    report = DrainReport(1000, finished=40, idle=960, forced=0, seconds=1.23, longest=0.91)
    assert str(report) == (
        "drained in 1.2 s: 40 finished, 960 idle, 0 forced; the longest took 0.9 s"
    )


def test_a_report_says_nothing_of_the_longest_when_none_finished() -> None:
    report = DrainReport(3, finished=0, idle=1, forced=2, seconds=5.0, longest=None)
    assert str(report) == "drained in 5.0 s: 0 finished, 1 idle, 2 forced"


def test_every_connection_is_counted_once_by_how_it_ended() -> None:
    tally = DrainTally(100.0)
    for name, accepted in {"early": 90.0, "late": 99.0, "idle": 50.0, "stuck": 1.0}.items():
        tally.add(name, accepted)
    tally.add("backlog", 100.5)
    tally.mark_idle("idle")
    tally.end("idle", 100.1)
    tally.end("early", 101.0)
    tally.end("late", 104.0)
    tally.end("backlog", 104.5)
    assert tally.open == 1
    tally.mark_forced("stuck")
    tally.end("stuck", 105.0)
    assert tally.open == 0
    assert tally.report(105.0) == DrainReport(
        connections=5, finished=3, idle=1, forced=1, seconds=5.0, longest=11.0
    )


def test_what_is_open_still_at_the_end_was_forced() -> None:
    tally = DrainTally(0.0)
    tally.add("stuck", 0.0)
    report = tally.report(5.0)
    assert (report.connections, report.forced, report.longest) == (1, 1, None)


def test_an_idle_connection_that_did_not_end_was_forced() -> None:
    """Its handler did not care for the end-of-file."""
    tally = DrainTally(0.0)
    tally.add("deaf", 0.0)
    tally.mark_idle("deaf")
    tally.mark_forced("deaf")
    tally.end("deaf", 5.0)
    assert tally.report(5.0) == DrainReport(1, 0, 0, 1, seconds=5.0, longest=None)


def test_a_connection_that_is_not_open_counts_for_nothing() -> None:
    """A handler may end in the moment in which it is found idle or is closed."""
    tally = DrainTally(0.0)
    tally.add("quick", 0.0)
    tally.end("quick", 1.0)
    tally.mark_idle("quick")
    tally.mark_forced("quick")
    tally.end("quick", 2.0)
    tally.end("a stranger", 2.0)
    assert tally.report(2.0) == DrainReport(1, 1, 0, 0, seconds=2.0, longest=1.0)


def test_a_drain_of_nothing_takes_no_time() -> None:
    assert DrainTally(7.0).report(7.0) == DrainReport(0, 0, 0, 0, seconds=0.0, longest=None)
