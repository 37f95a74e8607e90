from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portico.supervision import (
    ANSWER_PATIENCE,
    DUMP_PATIENCE,
    FIRST_DELAY,
    IN_A_ROW,
    KILL_PATIENCE,
    LONGEST_DELAY,
    PROOF,
    WEAR_INTERVAL,
    Action,
    Adopt,
    Drain,
    End,
    Generation,
    GiveUp,
    Interrupt,
    Kill,
    Limits,
    Report,
    Situation,
    Stage,
    Start,
    Stop,
    Wait,
    Worker,
    decide,
    note_end,
    note_ready,
)

LIMITS = Limits(start_timeout=60, worker_timeout=30, drain_timeout=20)
FIRST = Generation(1, limits=LIMITS)
SECOND = Generation(2, limits=LIMITS)


def starting(number: int, generation: int = 1, since: float = 0) -> Worker:
    return Worker(number, generation, Stage.STARTING, since, since)


def ready(number: int, generation: int = 1, since: float = 0, beat: float = 0) -> Worker:
    return Worker(number, generation, Stage.READY, since, beat, ready=since)


def seen(
    workers: Sequence[Worker],
    wanted: int,
    serving: Generation | None = None,
    upcoming: Generation | None = None,
    *,
    is_heir: bool = False,
    stop: Stop = Stop.NOT,
) -> Situation:
    """Return a situation whose generations want as many workers."""
    if serving is not None:
        serving = replace(serving, wanted=wanted)
    if upcoming is not None:
        upcoming = replace(upcoming, wanted=wanted)
    return Situation(workers, serving, upcoming, is_heir, stop)


def told(*actions: Action) -> list[Action]:
    return [action for action in actions if not isinstance(action, Wait)]


# --- the first generation ----------------------------------------------------------------


def test_the_first_generation_is_started_whole() -> None:
    assert decide(seen((), 2, upcoming=FIRST), 0) == [Start(1), Start(1)]


def test_it_waits_for_those_that_start() -> None:
    workers = (starting(1), starting(2))
    assert decide(seen(workers, 2, upcoming=FIRST), 1) == [Wait(60)]


def test_the_first_that_serves_is_enough_to_begin_with() -> None:
    workers = (ready(1), starting(2))
    assert Adopt(1) in decide(seen(workers, 2, upcoming=FIRST), 1)


def test_an_heir_serves_when_all_of_it_does() -> None:
    """Its predecessor goes then, and half of the workers would be left."""
    half = seen((ready(1), starting(2)), 2, upcoming=FIRST, is_heir=True)
    assert told(*decide(half, 1)) == []
    whole = replace(half, workers=(ready(1), ready(2)))
    assert Adopt(1) in decide(whole, 1)


def test_one_that_fails_at_the_beginning_leaves_the_others_their_chance() -> None:
    failed = note_end(FIRST, starting(1), 1, "it exited with status 3")
    assert told(*decide(seen((starting(2),), 2, upcoming=failed), 1)) == []


def test_when_none_can_start_the_supervisor_ends_with_the_reason() -> None:
    failed = note_end(FIRST, starting(1), 1, "it exited with status 3")
    situation = seen((), 1, upcoming=failed)
    assert decide(situation, 1) == [GiveUp(1, "it exited with status 3")]
    assert decide(replace(situation, upcoming=None), 1) == [End()]


# --- replacing ---------------------------------------------------------------------------


def test_enough_workers_are_left_alone_until_the_first_of_them_is_overdue() -> None:
    workers = (ready(1, beat=5), ready(2, beat=7))
    assert decide(seen(workers, 2, serving=FIRST), 8) == [Wait(35)]


def test_without_limits_there_is_nothing_to_wait_for() -> None:
    situation = seen((ready(1),), 1, serving=Generation(1))
    assert decide(situation, 1000) == []


def test_a_worker_that_has_served_is_replaced_at_once() -> None:
    served = replace(ready(1), requests=1)
    generation = note_end(FIRST, served, 0.1, "it was killed by SIGKILL")
    assert decide(seen((), 1, serving=generation), 0.1) == [Start(1)]


def test_one_that_nobody_came_to_has_served_after_a_while() -> None:
    assert note_end(FIRST, ready(1), PROOF, "").failures == 0
    assert note_end(FIRST, ready(1), PROOF / 2, "").failures == 1


def test_one_that_was_stuck_is_replaced_at_once_too() -> None:
    killed = replace(ready(1, since=0), stage=Stage.KILLED, since=100)
    assert note_end(FIRST, killed, 100, "").failures == 0


def test_one_that_was_killed_for_not_starting_has_failed() -> None:
    killed = replace(starting(1), stage=Stage.KILLED, since=60)
    assert note_end(FIRST, killed, 60, "").failures == 1


@pytest.mark.parametrize("stage", [Stage.DRAINING, Stage.INTERRUPTED])
def test_one_that_was_told_to_go_has_not_failed(stage: Stage) -> None:
    assert note_end(FIRST, replace(starting(1), stage=stage), 1, "") == FIRST


def test_after_a_failure_the_next_start_waits_and_after_each_twice_as_long() -> None:
    now, generation, delays = 0.0, FIRST, []
    for _ in range(9):
        generation = note_end(generation, starting(1), now, "it exited with status 1")
        situation = seen((), 1, serving=generation)
        assert decide(situation, now) == [Wait(generation.retry)]
        delays.append(generation.retry - now)
        now = generation.retry
        assert decide(situation, now) == [Start(1)]
    assert delays[:4] == [FIRST_DELAY, 1, 2, 4]
    assert delays[-2:] == [LONGEST_DELAY, LONGEST_DELAY]


def test_workers_that_fail_together_count_once() -> None:
    once = note_end(FIRST, starting(1), 1, "one")
    twice = note_end(once, starting(2), 1.1, "two")
    assert (twice.failures, twice.retry, twice.reason) == (1, once.retry, "two")


def test_after_failures_one_is_tried_at_a_time() -> None:
    failed = replace(FIRST, failures=2, retry=0)
    assert told(*decide(seen((), 3, serving=failed), 1)) == [Start(1)]
    assert told(*decide(seen((starting(1),), 3, serving=failed), 1)) == []
    assert told(*decide(seen((ready(1),), 3, serving=note_ready(failed)), 1)) == [Start(1)]


def test_workers_that_serve_and_crash_at_once_are_tried_ever_more_seldom() -> None:
    now, generation, delays = 0.0, FIRST, []
    for _ in range(9):
        generation = note_end(
            note_ready(generation), ready(1, since=now), now, "it was killed by SIGSEGV"
        )
        delays.append(generation.retry - now)
        now = generation.retry
    assert delays[:4] == [FIRST_DELAY, 1, 2, 4]
    assert delays[-1] == LONGEST_DELAY


def test_a_failure_long_ago_does_not_count() -> None:
    failed = replace(FIRST, failures=5, failed=0)
    begun = IN_A_ROW + 1
    again = note_end(failed, starting(1, since=begun), begun + 5, "")
    assert (again.failures, again.retry) == (1, begun + 5 + FIRST_DELAY)


# --- stuck and overdue -------------------------------------------------------------------


def test_a_stuck_worker_is_asked_for_its_stacks_and_then_killed() -> None:
    worker = ready(1, beat=0)
    situation = seen((worker,), 1, serving=FIRST)
    reason = "no sign of life for 30 s"
    assert decide(situation, 30) == [Report(1, reason)]
    asked = replace(worker, asked=30.0, asks=1)
    assert decide(replace(situation, workers=(asked,)), 30.1) == [Wait(30 + ANSWER_PATIENCE)]
    answered = replace(asked, has_answered=True)
    assert decide(replace(situation, workers=(answered,)), 30.2) == [Kill(1, reason)]


def test_one_that_does_not_answer_is_made_to_tell_by_a_signal() -> None:
    asked = replace(ready(1, beat=0), asked=30.0, asks=1)
    situation = seen((asked,), 1, serving=FIRST)
    reason = "no sign of life for 30 s"
    assert decide(situation, 31) == [Report(1, reason, by_signal=True)]
    again = replace(asked, asked=31.0, asks=2)
    assert decide(replace(situation, workers=(again,)), 31) == [Wait(31 + DUMP_PATIENCE)]
    assert decide(replace(situation, workers=(again,)), 31.5) == [Kill(1, reason)]


def test_one_that_gives_a_sign_of_life_while_it_is_asked_is_not_killed() -> None:
    recovered = replace(ready(1, beat=30.5), asked=30.0, asks=1)
    assert decide(seen((recovered,), 1, serving=FIRST), 31) == [Wait(60.5)]


def test_a_killed_worker_is_left_alone_and_replaced_before_it_is_seen_to_end() -> None:
    killed = replace(ready(1), stage=Stage.KILLED, since=30)
    assert decide(seen((killed,), 1, serving=FIRST), 1000) == [Start(1)]


def test_a_worker_that_does_not_come_to_serve_is_overdue() -> None:
    situation = seen((ready(1, beat=60), starting(2)), 2, serving=FIRST)
    assert Report(2, "it does not serve after 60 s") in decide(situation, 60)


def test_a_drain_that_does_not_end_is_overdue() -> None:
    draining = replace(ready(2), stage=Stage.DRAINING, since=10)
    situation = seen((ready(1, beat=30), draining), 1, serving=FIRST)
    assert decide(situation, 29) == [Wait(30)]
    assert Report(2, "it still drains after 20 s") in decide(situation, 30)


# --- wear --------------------------------------------------------------------------------


def test_a_worn_worker_is_replaced_first_and_drained_when_its_replacement_serves() -> None:
    worn = replace(ready(1), allowance=100, requests=100)
    situation = seen((worn,), 1, serving=FIRST)
    assert told(*decide(situation, 1)) == [Start(1)]
    both = replace(situation, workers=(worn, starting(2)))
    assert told(*decide(both, 1)) == []
    served = replace(situation, workers=(worn, replace(ready(2), allowance=100)))
    drain = Drain(1, "it has served 100 requests (max_requests)")
    assert told(*decide(served, 1)) == [drain]


def test_a_worker_that_has_grown_is_worn() -> None:
    generation = replace(FIRST, limits=Limits(max_memory=1 << 20))
    grown = replace(ready(1), memory=(5 << 20))
    situation = seen((grown, ready(2)), 1, serving=generation)
    drain = Drain(1, "it takes 5 MiB of memory (max_worker_memory)")
    assert decide(situation, 1) == [drain, Wait(1 + WEAR_INTERVAL)]


# --- more and less -----------------------------------------------------------------------


def test_one_more_is_started() -> None:
    assert told(*decide(seen((ready(1),), 2, serving=FIRST), 1)) == [Start(1)]


def test_one_less_drains_the_youngest() -> None:
    situation = seen((ready(1), ready(3), ready(2)), 2, serving=FIRST)
    assert told(*decide(situation, 1)) == [Drain(3, "it is one too many")]


# --- reload ------------------------------------------------------------------------------


def test_a_reload_starts_its_workers_beside_those_that_serve() -> None:
    situation = seen((ready(1), ready(2)), 2, serving=FIRST, upcoming=SECOND)
    assert told(*decide(situation, 1)) == [Start(2), Start(2)]


def test_it_takes_over_when_all_of_its_workers_serve_and_the_others_drain() -> None:
    workers = (ready(1), ready(2, 2), starting(3, 2))
    situation = seen(workers, 2, serving=FIRST, upcoming=SECOND)
    assert Adopt(2) not in decide(situation, 1)
    whole = replace(situation, workers=(ready(1), ready(2, 2), ready(3, 2)))
    assert Adopt(2) in decide(whole, 1)
    adopted = replace(whole, serving=whole.upcoming, upcoming=None)
    assert told(*decide(adopted, 1)) == [Drain(1, "")]


@pytest.mark.parametrize("other", [1, 3])
def test_until_a_reload_serves_as_many_workers_are_kept_as_before(other: int) -> None:
    upcoming = replace(SECOND, wanted=other)
    serving = replace(FIRST, wanted=2)
    situation = Situation((ready(1), ready(2)), serving, upcoming)
    assert told(*decide(situation, 1)) == [Start(2)] * other
    assert told(*decide(replace(situation, upcoming=None), 1)) == []


def test_a_reload_that_cannot_start_is_given_up_and_those_that_serve_stay() -> None:
    failed = note_end(SECOND, starting(2, 2), 1, "it cannot import app")
    workers = (ready(1), ready(2, 2), starting(3, 2))
    situation = seen(workers, 2, serving=replace(FIRST, failures=1), upcoming=failed)
    assert GiveUp(2, "it cannot import app") in decide(situation, 1)
    given_up = replace(situation, upcoming=None)
    assert {Drain(2, ""), Drain(3, "")} <= set(decide(given_up, 1))
    assert not [each for each in decide(given_up, 1) if getattr(each, "worker", 0) == 1]


def test_a_worker_that_dies_meanwhile_is_replaced_as_ever() -> None:
    workers = (ready(2, 2), starting(3, 2))
    situation = seen(workers, 2, serving=FIRST, upcoming=SECOND)
    assert told(*decide(situation, 1)) == [Start(1), Start(1)]


# --- the end -----------------------------------------------------------------------------


def test_at_the_end_all_drain_who_may_serve_by_now() -> None:
    """A worker that has begun to serve since it last spoke has clients."""
    draining = replace(ready(3), stage=Stage.DRAINING)
    situation = seen((ready(1), starting(2), draining), 2, FIRST, stop=Stop.DRAIN)
    assert told(*decide(situation, 1)) == [Drain(1, ""), Drain(2, "")]
    assert decide(replace(situation, workers=()), 1) == [End()]


def test_who_never_served_has_no_long_drain() -> None:
    """It has no clients; and an import may hang without end."""
    told_to_drain = replace(starting(1), stage=Stage.DRAINING, since=10)
    situation = seen((told_to_drain,), 1, FIRST, stop=Stop.DRAIN)
    assert decide(situation, 10) == [Wait(10 + KILL_PATIENCE)]
    killed = decide(situation, 10 + KILL_PATIENCE)
    assert [type(action) for action in killed] == [Kill]
    serving = replace(situation, workers=(replace(told_to_drain, ready=10.5),))
    assert decide(serving, 11) == [Wait(30)]


def test_a_generation_that_takes_over_is_all_that_is_decided_then() -> None:
    """The one before it may miss a worker, or have a worn one, at this very moment."""
    workers = (ready(2), ready(3, 2), ready(4, 2))
    situation = seen(workers, 2, serving=FIRST, upcoming=SECOND)
    assert told(*decide(situation, 1)) == [Adopt(2)]
    adopted = replace(situation, serving=situation.upcoming, upcoming=None)
    assert told(*decide(adopted, 1)) == [Drain(2, "")]


def test_at_the_second_signal_all_are_interrupted_and_killed_if_they_stay() -> None:
    draining = replace(ready(1), stage=Stage.DRAINING)
    killed = replace(ready(2), stage=Stage.KILLED)
    situation = seen((draining, killed), 2, FIRST, stop=Stop.NOW)
    assert decide(situation, 1) == [Interrupt(1)]
    stubborn = replace(draining, stage=Stage.INTERRUPTED, since=1)
    after = replace(situation, workers=(stubborn,))
    assert decide(after, 1) == [Wait(1 + KILL_PATIENCE)]
    assert decide(after, 2) == [Kill(1, "it did not end within 1 s")]
    assert decide(replace(situation, workers=()), 1) == [End()]


# --- any course of events ----------------------------------------------------------------


class World:
    """What carries actions out, with workers that do as the draws say."""

    def __init__(self, wanted: int) -> None:
        self.situation = seen((), wanted, upcoming=FIRST)
        self.now = 0.0
        self.generation = 1
        self.has_ended = False
        self.has_served = False

    def settle(self) -> None:
        """Do what is decided until nothing but waiting is left; in bounded steps."""
        for _ in range(20):
            actions = told(*decide(self.situation, self.now))
            if not actions:
                return
            for action in actions:
                self.carry_out(action)
            if self.has_ended:
                return
        raise AssertionError(f"it does not come to rest: {decide(self.situation, self.now)}")

    def carry_out(self, action: Action) -> None:
        match action:
            case Start(generation):
                taken = {worker.number for worker in self.situation.workers}
                number = next(number for number in range(1, 99) if number not in taken)
                self.put(starting(number, generation, self.now))
            case Adopt():
                self.has_served = True
                self.change(serving=self.situation.upcoming, upcoming=None)
            case GiveUp():
                self.change(upcoming=None)
            case Drain(number):
                self.move(number, Stage.DRAINING)
            case Interrupt(number):
                self.move(number, Stage.INTERRUPTED)
            case Kill(number):
                self.move(number, Stage.KILLED)
            case Report(number):
                worker = self.get(number)
                self.put(replace(worker, asked=self.now, asks=worker.asks + 1))
            case End():
                assert not self.situation.workers
                self.has_ended = True
            case Wait():
                pass

    def change(self, **changes: object) -> None:
        self.situation = replace(self.situation, **changes)  # type: ignore[arg-type]  # by name

    def get(self, number: int) -> Worker:
        return next(each for each in self.situation.workers if each.number == number)

    def put(self, worker: Worker) -> None:
        others = [each for each in self.situation.workers if each.number != worker.number]
        self.change(workers=(*others, worker))

    def move(self, number: int, stage: Stage) -> None:
        self.put(replace(self.get(number), stage=stage, since=self.now))

    def become_ready(self, worker: Worker) -> None:
        if worker.stage is Stage.STARTING:
            self.put(
                replace(worker, stage=Stage.READY, since=self.now, ready=self.now, beat=self.now)
            )
            self.note(worker, note_ready)

    def end(self, worker: Worker) -> None:
        self.change(workers=tuple(each for each in self.situation.workers if each is not worker))
        self.note(worker, lambda generation: note_end(generation, worker, self.now, "it ended"))

    def note(self, worker: Worker, noted: object) -> None:
        for name in ("serving", "upcoming"):
            generation = getattr(self.situation, name)
            if generation is not None and generation.number == worker.generation:
                self.change(**{name: noted(generation)})  # type: ignore[operator]  # one of two

    @property
    def wanted(self) -> int:
        serving = self.situation.serving
        return 0 if serving is None else serving.wanted

    def want(self, more: int) -> None:
        for name in ("serving", "upcoming"):
            generation = getattr(self.situation, name)
            if generation is not None:
                self.change(**{name: replace(generation, wanted=max(1, generation.wanted + more))})

    def next_generation(self) -> int:
        self.generation += 1
        return self.generation

    def count(self, stage: Stage) -> int:
        return sum(each.stage is stage for each in self.situation.workers)

    def ready_of(self, generation: Generation | None) -> int:
        number = 0 if generation is None else generation.number
        return sum(
            each.stage is Stage.READY and each.generation == number
            for each in self.situation.workers
        )


STEPS = st.tuples(
    st.sampled_from(["ready", "end", "beat", "wait", "reload", "more", "less"]),
    st.integers(0, 5),
)


def after(world: World, word: str, which: int) -> None:
    """Let something happen."""
    workers = world.situation.workers
    worker = workers[which % len(workers)] if workers else None
    match word, worker:
        case "ready", Worker():
            world.become_ready(worker)
        case "end", Worker():
            world.end(worker)
        case "beat", Worker():
            world.put(replace(worker, beat=world.now))
        case "wait", _:
            world.now += 7.0 * which
        case "reload", _ if world.situation.upcoming is None:
            world.change(upcoming=Generation(world.next_generation(), 1 + which, LIMITS))
        case "more", _:
            world.want(1)
        case "less", _:
            world.want(-1)
        case _:
            pass


def all_goes_well(world: World) -> None:
    """Let workers start, beat and end as they should."""
    for worker in world.situation.workers:
        if worker.stage is Stage.STARTING:
            world.become_ready(worker)
        elif worker.stage is not Stage.READY:
            world.end(worker)
    world.now += 30
    for worker in world.situation.workers:
        world.put(replace(worker, beat=world.now, asked=None, asks=0))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.lists(STEPS, max_size=60))
def test_whatever_happens_the_workers_that_serve_are_kept(
    wanted: int, steps: list[tuple[str, int]]
) -> None:
    """No decision leaves fewer than are wanted, and when workers can start they are all there.

    Each event is followed by a few actions and then by rest.
    """
    world = World(wanted)
    world.settle()
    for word, which in steps:
        if world.has_ended:
            break
        after(world, word, which)
        before, killed = world.ready_of(world.situation.serving), world.count(Stage.KILLED)
        world.settle()
        lost = world.count(Stage.KILLED) - killed
        assert world.ready_of(world.situation.serving) >= min(before, world.wanted) - lost
    for _ in range(30):
        if world.has_ended:
            assert not world.has_served
            return
        all_goes_well(world)
        world.settle()
    serving = world.situation.serving
    assert serving is not None
    assert world.situation.upcoming is None
    assert world.ready_of(serving) == len(world.situation.workers) == world.wanted
