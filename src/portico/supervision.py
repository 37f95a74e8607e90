"""Decide what a supervisor does next about its workers.

Owns the rules: when a worker is started, drained, replaced and killed, when a generation of workers
takes over from the last one, and how long is waited after one that could not start.  A look at
everything goes in with the instant, and a list of actions comes out; whoever carries them out notes
what has become of the workers, and asks again.  There is no process, descriptor or clock here.

A generation is a set of workers that were started with one reading of the configuration and the
code.  One serves; during a reload there is a second one, the upcoming, which takes over when all of
its workers serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from math import inf
from typing import Final, TypeAlias

FIRST_DELAY: Final = 0.5
"""Seconds until another worker is started after one that could not; doubled each time.

A worker that fails costs as much processor time as its imports take; half a second leaves most of
the machine to those that serve."""

LONGEST_DELAY: Final = 30.0
"""Seconds that the delay grows to: how long a cause that was mended may go on to be felt."""

IN_A_ROW: Final = 2 * LONGEST_DELAY
"""Seconds after a failure in which another one counts as the next in a row: a worker that is tried
again after the longest delay needs some time to come as far as it did before."""

PROOF: Final = 1.0
"""Seconds after which a worker has served, even if nobody came.

One that ends sooner, without a request, has failed at start in all but name, and would be started
over and over without a pause."""

WEAR_INTERVAL: Final = 1.0
"""Seconds between two looks at how much the workers have served, and how large they are."""

ANSWER_PATIENCE: Final = 1.0
"""Seconds that a stuck worker has to say where its threads are, before a signal has it tell."""

DUMP_PATIENCE: Final = 0.5
"""Seconds that it has after that signal, before it is killed.

Only the interpreter's C code runs then, which takes milliseconds."""

KILL_PATIENCE: Final = 1.0
"""Seconds that a worker has to end in which was told to end at once."""


class Stage(Enum):
    """Where a worker is in its life."""

    STARTING = auto()
    """It imports its target."""
    READY = auto()
    """It serves."""
    DRAINING = auto()
    """It accepts no more, and ends after those it has."""
    INTERRUPTED = auto()
    """It was told to end at once."""
    KILLED = auto()
    """It was killed, and nobody has seen it end yet."""


class Stop(Enum):
    """Whether everything is to end."""

    NOT = auto()
    DRAIN = auto()
    NOW = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """What workers may do; ``None`` for no limit.  See `portico.configuration.ProcessSettings`.

    Attributes:
        start_timeout: Seconds until a worker has to serve.
        worker_timeout: Seconds that a worker may be without a sign of life.
        drain_timeout: Seconds until a worker that drains has to have ended.
        max_memory: Bytes.
    """

    start_timeout: float | None = None
    worker_timeout: float | None = None
    drain_timeout: float | None = None
    max_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker, as it is now.

    Attributes:
        number: Which; no two that live have the same.
        generation: With which it was started.
        stage: Where it is in its life.
        since: The instant at which this stage began.
        beat: The instant of its last sign of life.
        ready: The instant at which it began to serve; ``None`` if it has not yet.
        allowance: Requests after which it is replaced; ``None`` for no limit.
        requests: How many it has served.
        memory: Bytes that it takes.
        asked: When it was asked for its stacks; ``None`` if it was not.
        asks: How often it was.
        has_answered: Whether it has told them.
    """

    number: int
    generation: int
    stage: Stage
    since: float
    beat: float
    ready: float | None = None
    allowance: int | None = None
    requests: int = 0
    memory: int = 0
    asked: float | None = None
    asks: int = 0
    has_answered: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """Workers that were started alike.

    Attributes:
        number: Which; later ones have larger numbers.
        wanted: How many of its workers are to serve; 1 or more.
        limits: What its workers may do.
        failures: How many in a row could not start.
        retry: The instant before which none is started.
        failed: The instant at which the last one failed.
        reason: How the last one failed.
    """

    number: int
    wanted: int = 1
    limits: Limits = Limits()
    failures: int = 0
    retry: float = -inf
    failed: float = -inf
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Situation:
    """All there is to look at.

    Attributes:
        workers: Those that have not been seen to end.
        serving: The generation that serves; ``None`` before the first does.
        upcoming: The one that is to take over; ``None`` if there is none.
        is_heir: Whether another supervisor serves until the first generation of this one does.
        stop: Whether everything is to end.
    """

    workers: Sequence[Worker]
    serving: Generation | None = None
    upcoming: Generation | None = None
    is_heir: bool = False
    stop: Stop = Stop.NOT


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker of a generation."""

    generation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Have a worker accept no more, and end; says why."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Have a worker tell where its threads are, since it will be killed; says why.

    `by_signal`, if it did not when it was asked.
    """

    worker: int
    reason: str
    by_signal: bool = False


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Have a worker end at once."""

    worker: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a worker; says why."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """Have the upcoming generation be the one that serves."""

    generation: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Forget the upcoming generation, which cannot start; says why."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again at this instant at the latest."""

    until: float


@dataclass(frozen=True, slots=True)
class End:
    """End: nobody is left."""


Action: TypeAlias = Start | Drain | Report | Interrupt | Kill | Adopt | GiveUp | Wait | End


def decide(situation: Situation, now: float) -> list[Action]:
    """Say what to do now, and until when to wait then; what was done is not said again.

    Args:
        situation: What there is.
        now: The instant, on the same clock as all the others.
    """
    if situation.stop is Stop.NOW:
        actions = _end_now(situation.workers, now)
    elif situation.stop is Stop.DRAIN:
        actions = _end(situation, now)
    elif situation.serving is None and situation.upcoming is None and not situation.workers:
        actions = [End()]
    else:
        actions = [*_look_after(situation, now), *_bring_up(situation)]
        # What is to be done for a generation that is about to be replaced is asked again then.
        if not any(isinstance(action, Adopt | GiveUp) for action in actions):
            actions += [*_keep_up(situation, now), *_retire(situation)]
    instants = [action.until for action in actions if isinstance(action, Wait)]
    decided: list[Action] = [action for action in actions if not isinstance(action, Wait)]
    if instants:
        decided.append(Wait(min(instants)))
    return decided


def note_end(generation: Generation, worker: Worker, now: float, reason: str) -> Generation:
    """Return what a generation is after one of its workers has ended.

    Args:
        generation: Its generation.
        worker: As it was last.
        now: The instant.
        reason: How it ended, in words.
    """
    if worker.stage in {Stage.DRAINING, Stage.INTERRUPTED}:  # it was told to
        return generation
    if _has_served(worker, now):
        return replace(generation, failures=0, retry=-inf)
    if now < generation.retry:  # one of several that were started together
        return replace(generation, reason=reason)
    before = generation.failures if worker.since <= generation.failed + IN_A_ROW else 0
    delay = min(FIRST_DELAY * 2.0**before, LONGEST_DELAY)
    failures = min(before + 1, 10)  # 2 to the power of more is no longer a float
    return replace(generation, failures=failures, retry=now + delay, failed=now, reason=reason)


def note_ready(generation: Generation) -> Generation:
    """Return what a generation is after one of its workers has begun to serve.

    Its failures are not forgotten: one that serves, and crashes at once, would be started again and
    again.
    """
    return replace(generation, retry=-inf)


def wear(worker: Worker, limits: Limits) -> str:
    """Say what a worker is to be replaced for; empty if for nothing."""
    if worker.allowance is not None and worker.requests >= worker.allowance:
        return f"it has served {worker.requests} requests (max_requests)"
    if limits.max_memory is not None and worker.memory > limits.max_memory:
        return f"it takes {worker.memory >> 20} MiB of memory (max_worker_memory)"
    return ""


# ------------------------------------------------------------------------------------ the rules


def _end_now(workers: Iterable[Worker], now: float) -> list[Action]:
    """End everything at once."""
    actions: list[Action] = []
    for worker in workers:
        if worker.stage is Stage.INTERRUPTED:
            deadline = worker.since + KILL_PATIENCE
            reason = f"it did not end within {KILL_PATIENCE:g} s"
            actions.append(Kill(worker.number, reason) if deadline <= now else Wait(deadline))
        elif worker.stage is not Stage.KILLED:
            actions.append(Interrupt(worker.number))
    return actions if tuple(workers) else [End()]


def _end(situation: Situation, now: float) -> list[Action]:
    """End everything, after those who are being served."""
    if not situation.workers:
        return [End()]
    actions = _look_after(situation, now)
    actions += [Drain(worker.number, "") for worker in _living(situation)]
    return actions


def _look_after(situation: Situation, now: float) -> list[Action]:
    """See to those that are overdue, in whatever they do."""
    actions: list[Action] = []
    for worker in situation.workers:
        deadline, reason = _deadline(worker, _limits_of(situation, worker))
        if deadline > now:
            actions += [Wait(deadline)] if deadline < inf else []
        elif worker.stage is Stage.INTERRUPTED or worker.has_answered or _has_nobody(worker):
            actions.append(Kill(worker.number, reason))
        else:
            actions.append(_next_report(worker, reason, now))
    return actions


def _next_report(worker: Worker, reason: str, now: float) -> Action:
    """Ask a worker that is overdue for its stacks, in one way and then in another, and kill it."""
    if worker.asked is None:
        return Report(worker.number, reason)
    patience = ANSWER_PATIENCE if worker.asks == 1 else DUMP_PATIENCE
    if now < worker.asked + patience:
        return Wait(worker.asked + patience)
    if worker.asks == 1:
        return Report(worker.number, reason, by_signal=True)
    return Kill(worker.number, reason)


def _bring_up(situation: Situation) -> list[Action]:
    """Get the upcoming generation to serve, or give it up."""
    upcoming = situation.upcoming
    if upcoming is None:
        return []
    mine = [worker for worker in _living(situation) if worker.generation == upcoming.number]
    ready = sum(worker.stage is Stage.READY for worker in mine)
    has_predecessor = situation.serving is not None or situation.is_heir
    if ready >= (upcoming.wanted if has_predecessor else 1):
        return [Adopt(upcoming.number)]
    if upcoming.failures and (has_predecessor or not mine):
        return [GiveUp(upcoming.number, upcoming.reason)]
    if upcoming.failures:
        return []  # the others may still come, and be enough to begin with
    return [Start(upcoming.number)] * (upcoming.wanted - len(mine))


def _keep_up(situation: Situation, now: float) -> list[Action]:
    """Have as many workers serve as are wanted, none of them worn."""
    serving = situation.serving
    if serving is None:
        return []
    mine = [worker for worker in _living(situation) if worker.generation == serving.number]
    reasons = {worker.number: wear(worker, serving.limits) for worker in mine}
    ready = [worker for worker in mine if worker.stage is Stage.READY]
    missing = serving.wanted - sum(not reason for reason in reasons.values())
    actions = _start_missing(serving, missing, len(mine) - len(ready), now)
    # The worn ones first, and of the others the youngest.
    ready.sort(key=lambda worker: (not reasons[worker.number], -worker.number))
    for worker in ready[: max(0, len(ready) - serving.wanted)]:
        actions.append(Drain(worker.number, reasons[worker.number] or "it is one too many"))
    has_wear = serving.limits.max_memory is not None
    if ready and (has_wear or any(worker.allowance is not None for worker in ready)):
        actions.append(Wait(now + WEAR_INTERVAL))
    return actions


def _start_missing(serving: Generation, missing: int, starting: int, now: float) -> list[Action]:
    """Start the workers that are missing; after a failure one by one, each after a delay."""
    if missing <= 0:
        return []
    if not serving.failures:
        return [Start(serving.number)] * missing
    if now < serving.retry:
        return [Wait(serving.retry)]
    return [] if starting else [Start(serving.number)]


def _retire(situation: Situation) -> list[Action]:
    """Drain the workers of generations that have been replaced."""
    current = {each.number for each in (situation.serving, situation.upcoming) if each is not None}
    return [
        Drain(worker.number, "")
        for worker in _living(situation)
        if worker.generation not in current
    ]


# ------------------------------------------------------------------------------- looks at them


def _living(situation: Situation) -> list[Worker]:
    """Return the workers that serve or are about to."""
    return [each for each in situation.workers if each.stage in {Stage.STARTING, Stage.READY}]


def _has_nobody(worker: Worker) -> bool:
    """Say whether a worker drains that has not served: it says so before it accepts anybody."""
    return worker.stage is Stage.DRAINING and worker.ready is None


def _limits_of(situation: Situation, worker: Worker) -> Limits:
    """Return what a worker may do: as its generation says, or else the one that serves now."""
    known = [each for each in (situation.serving, situation.upcoming) if each is not None]
    for each in known:
        if each.number == worker.generation:
            return each.limits
    return known[0].limits if known else Limits()


def _deadline(worker: Worker, limits: Limits) -> tuple[float, str]:
    """Return when a worker is overdue, and what is said of it then."""
    if worker.stage is Stage.STARTING:
        return _after(worker.since, limits.start_timeout, "it does not serve after {:g} s")
    if worker.stage is Stage.READY:
        return _after(worker.beat, limits.worker_timeout, "no sign of life for {:g} s")
    if _has_nobody(worker):
        return _after(worker.since, KILL_PATIENCE, "it did not end within {:g} s")
    if worker.stage is Stage.DRAINING:
        return _after(worker.since, limits.drain_timeout, "it still drains after {:g} s")
    if worker.stage is Stage.INTERRUPTED:
        return _after(worker.since, KILL_PATIENCE, "it did not end within {:g} s")
    return inf, ""


def _after(since: float, patience: float | None, words: str) -> tuple[float, str]:
    return (inf, "") if patience is None else (since + patience, words.format(patience))


def _has_served(worker: Worker, now: float) -> bool:
    """Say whether a worker was of use before it ended."""
    if worker.ready is None:
        return False
    return worker.requests > 0 or now - worker.ready >= PROOF
