from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portico.errors import PhaseError
from portico.lifecycle import NEXT, DrainTally, Phase, move


class Life(RuleBasedStateMachine):
    """A server that is told to do anything at any time, and what that means in plain words."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = Phase.CREATED
        self.served = self.drained = self.closed = False

    def go(self, to: Phase, *, allowed: bool) -> None:
        if allowed:
            self.phase = move(self.phase, to)
        else:
            before = self.phase
            with pytest.raises(PhaseError):
                move(before, to)

    @rule()
    def serve(self) -> None:
        allowed = not (self.drained or self.closed or self.phase is Phase.SERVING)
        self.go(Phase.SERVING, allowed=allowed)
        self.served = self.served or allowed

    @rule()
    def stop(self) -> None:
        self.go(Phase.STOPPED, allowed=self.phase is Phase.SERVING)

    @rule()
    def drain(self) -> None:
        allowed = self.served and not (self.drained or self.closed)
        self.go(Phase.DRAINING, allowed=allowed)
        self.drained = self.drained or allowed

    @precondition(lambda self: self.served)
    @rule()
    def close(self) -> None:
        self.go(Phase.CLOSED, allowed=True)
        self.closed = True

    @rule()
    def be_born_again(self) -> None:
        self.go(Phase.CREATED, allowed=False)

    @invariant()
    def the_phase_tells_the_story(self) -> None:
        assert (self.phase is Phase.CREATED) == (not self.served and not self.closed)
        assert (self.phase is Phase.CLOSED) == self.closed
        if self.phase is Phase.DRAINING:
            assert self.drained

    @invariant()
    def the_end_can_always_be_reached(self) -> None:
        assert Phase.CLOSED in NEXT[self.phase]


TestLife = Life.TestCase


NAMES = st.integers(0, 5)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "mark_idle", "mark_forced", "end"]),
        NAMES,
        st.floats(0, 10, allow_nan=False),
    )
)


@given(STEPS)
def test_a_report_adds_up_whatever_happened_in_whatever_order(
    steps: list[tuple[str, int, float]],
) -> None:
    """Each connection counts by the strongest thing that was done to it while it was open."""
    tally, now, began = DrainTally(100.0), 100.0, 100.0
    alive: dict[int, tuple[float, str]] = {}
    ends: list[str] = []
    lives: list[float] = []
    for step, name, wait in steps:
        now += wait
        accepted, fate = alive.get(name, (now - 50, "finished"))
        if step == "add":
            tally.add(name, now - 50)
            alive[name] = accepted, fate
        elif step == "end":
            tally.end(name, now)
            if alive.pop(name, None):
                ends.append(fate)
                lives += [now - accepted] if fate == "finished" else []
        else:
            getattr(tally, step)(name)
            if name in alive and fate != "forced":
                alive[name] = accepted, step.removeprefix("mark_")
        assert tally.open == len(alive)
    report = tally.report(now)
    assert report.finished + report.idle + report.forced == report.connections
    assert report.connections == len(ends) + len(alive)
    assert (report.finished, report.idle) == (ends.count("finished"), ends.count("idle"))
    assert report.longest == max(lives, default=None)
    assert report.seconds == now - began
